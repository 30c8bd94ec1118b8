"Hounsfield units from real files: every transfer syntax, every oddity we have met, the right number or a clear refusal."

import pickle
import warnings

import numpy as np
import pytest
from pydicom import Dataset, FileMetaDataset, dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian

from ctbm.cohort import scan
from ctbm.preprocess import AIR_HU, Unreadable, read_hu, stored_values

LOSSLESS = ["1.2", "1.2.1", "1.2.1.99", "1.2.2", "1.2.5", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90"]


@pytest.fixture(scope="module")
def syntaxes(data):
    "A function from the end of a transfer syntax UID to the file written in it"
    return lambda uid: next((data / "ts_matrix_ctimage_chest").glob(f"*_1.2.840.10008.{uid}.dcm"))


@pytest.fixture(scope="module")
def chest(data):
    return read_hu(data / "ts_matrix_ctimage_chest" / "CTImage.dcm")


@pytest.fixture(scope="module")
def head(data):
    return read_hu(data / "headct_ge_hispeed_tilt18p5" / "15.dcm")


@pytest.fixture(scope="module")
def odd(data):
    "A function from the number of an edited head slice to its file"
    return lambda number: next((data / "odd_derived").glob(f"{number}_*.dcm"))


def reason(path, frame=0):
    "Why a file was refused"
    with pytest.raises(Unreadable) as caught: read_hu(path, frame)
    assert str(path) in str(caught.value) and caught.value.reason in str(caught.value)
    return caught.value.reason


def ct(stored, syntax=ExplicitVRLittleEndian, **tags):
    "A CT data set around stored integers, [rows, cols] or [frames, rows, cols]"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, "1.2.3", "CT"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape[-2:], 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(stored.dtype.kind == "i")
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = stored.astype(stored.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    ds["PixelData"].VR = "OW"
    if stored.ndim == 3: ds.NumberOfFrames = len(stored)
    for tag, value in tags.items(): setattr(ds, tag, value)
    return ds


def save(ds, path):
    ds.save_as(path, enforce_file_format=True)
    return path


# Transfer syntaxes


def test_plain_file_is_slope_times_stored_plus_intercept(data, chest):
    ds = dcmread(data / "ts_matrix_ctimage_chest" / "CTImage.dcm")
    expected = np.frombuffer(ds.PixelData, "<i2").reshape(512, 512).astype(np.float64) * 1 - 1024
    assert chest.dtype == np.float32 and expected.min() == -3024
    assert np.array_equal(chest, np.maximum(expected, AIR_HU))


@pytest.mark.parametrize("uid", LOSSLESS)
def test_lossless_syntaxes_are_exact(syntaxes, chest, uid):
    assert np.array_equal(read_hu(syntaxes(uid)), chest)


@pytest.mark.parametrize(("uid", "limit_hu"), [("1.2.4.91", 5), ("1.2.4.81", 1)])
def test_mildly_lossy_syntaxes_stay_within_a_few_hu(syntaxes, chest, uid, limit_hu):
    assert 0 < np.abs(read_hu(syntaxes(uid)) - chest).max() <= limit_hu


@pytest.mark.parametrize("uid", ["1.2.4.50", "1.2.4.51", "1.2.4.53", "1.2.4.55"])
def test_lossy_jpeg_is_refused(syntaxes, uid):
    assert "lossy JPEG" in reason(syntaxes(uid))


@pytest.mark.parametrize("uid", ["1.2.4.50", "1.2.4.51"])
def test_lossy_jpeg_is_refused_for_good_reason(syntaxes, chest, uid):
    ds = dcmread(syntaxes(uid))
    hu = np.maximum(ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept), AIR_HU)
    assert np.abs(hu - chest).max() > 30


@pytest.mark.parametrize("uid", ["1.2.5", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90"])
def test_compressed_pixels_cut_short_are_refused(syntaxes, tmp_path, uid):
    ds = dcmread(syntaxes(uid))
    stream = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([stream[: int(len(stream) * 0.97) // 2 * 2]])
    assert "cannot be decoded" in reason(save(ds, tmp_path / "cut.dcm"))


@pytest.mark.parametrize("uid", LOSSLESS)
@pytest.mark.parametrize("part", [0.0, 0.1, 0.6, 0.999])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_cut_short_are_refused(syntaxes, tmp_path, uid, part):
    content = syntaxes(uid).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(content[: int(len(content) * part)])
    assert reason(tmp_path / "cut.dcm")


# One real head slice, edited


@pytest.mark.parametrize("number", ["01", "04", "05", "06", "12", "13", "15", "16"])
def test_the_same_head_whatever_its_encoding(odd, head, number):
    assert np.array_equal(read_hu(odd(number)), head)


def test_a_circle_of_undeclared_depth(odd, head):
    circle, outside = read_hu(odd("07")), dcmread(odd("07")).pixel_array == -2000
    assert outside.any() and (circle[outside] == AIR_HU).all()
    assert np.array_equal(circle[~outside], head[~outside])


def test_pixels_that_are_not_square_are_read_as_stored(odd, head):
    assert np.array_equal(read_hu(odd("08")), head[:, ::2])


@pytest.mark.parametrize(("number", "words"), [("03", "rescale"), ("19", "rescale"), ("09", "less than expected")])
def test_edits_that_cannot_be_read(odd, number, words):
    assert words in reason(odd(number))


def test_padding_is_air_and_nothing_else_is_touched(data, head):
    ds = dcmread(data / "headct_ge_hispeed_tilt18p5" / "15.dcm")
    stored = ds.pixel_array
    assert ds.PixelPaddingValue == -1500 and (head[stored == -1500] == AIR_HU).all()
    inside = stored >= AIR_HU
    assert np.array_equal(head[inside], stored[inside])


# Files from pydicom's collection, and other vendors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MR_small_bigendian.dcm", "modality MR"),
        ("MR_truncated.dcm", "modality MR"),
        ("SC_rgb_small_odd.dcm", "modality OT"),
        ("badVR.dcm", "modality RTDOSE"),
        ("meta_missing_tsyntax.dcm", "no image"),
        ("no_meta.dcm", "no image"),
        ("LICENSE", "no image"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_that_are_not_ct(data, name, words):
    assert words in reason(data / "pydicom_ct" / name)


@pytest.mark.parametrize(("name", "low", "high"), [("CT_small.dcm", -896, 1167), ("J2K_pixelrep_mismatch.dcm", -1024, 1896)])
def test_odd_ct_files(data, name, low, high):
    hu = read_hu(data / "pydicom_ct" / name)
    assert (hu.min(), hu.max()) == (low, high)


def test_sign_of_j2k_with_mismatched_representation(data):
    "Its stream says unsigned and its header signed; read wrongly, air turns into metal"
    hu = read_hu(data / "pydicom_ct" / "J2K_pixelrep_mismatch.dcm")
    assert hu[0, 0] == AIR_HU and (hu > 2000).sum() == 0


@pytest.mark.parametrize(("name", "words"), [("scout_I10", "localizer"), ("examsummary_I30", "secondary capture")])
def test_objects_of_a_ct_study_that_are_not_slices(data, name, words):
    assert words in reason(data / "phantom_philips_brain5mm" / "non_axial" / name)


def test_a_ct_without_modality_is_known_by_its_class(data):
    ds = dcmread(data / "lungmask_test" / "0.dcm")
    assert not ds.get("Modality")
    assert read_hu(data / "lungmask_test" / "0.dcm").max() == 1502


@pytest.mark.parametrize("name", ["explicit_little_endian", "fragmented_no_bot_jpeg_ls.80", "not_fragmented_bot_rle"])
def test_perfusion_maps_are_refused_but_their_frames_decode(data, name):
    plain = dcmread(data / "enhanced_ct" / "CT0012.explicit_little_endian.dcm")
    path = data / "enhanced_ct" / f"CT0012.{name}.dcm"
    assert all("rescale type US" in reason(path, frame) for frame in (0, 1))
    expected = np.frombuffer(plain.PixelData, "<u2").reshape(2, 512, 512)
    assert all(np.array_equal(stored_values(dcmread(path), frame), expected[frame]) for frame in (0, 1))


def test_errors_survive_other_processes(odd):
    with pytest.raises(Unreadable) as caught: read_hu(odd("03"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.path, copy.reason, str(copy)) == (caught.value.path, caught.value.reason, str(caught.value))


def test_a_missing_file_is_not_an_unreadable_one(tmp_path):
    with pytest.raises(FileNotFoundError): read_hu(tmp_path / "nothing.dcm")


# Files that we write


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [12, 13, 14, 16])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_every_depth_sign_and_byte_order_with_dirty_high_bits(tmp_path, bits, signed, syntax):
    intercept, low = (0, -1024) if signed else (-1024, 0)
    values = np.arange(low, low + 2048, dtype=np.int64).reshape(32, 64) # what the stored bits mean
    dirt = np.random.default_rng(bits).integers(0, 1 << (16 - bits), values.shape) << bits
    stored = (values & ((1 << bits) - 1) | dirt).astype(np.uint16)
    ds = ct(stored.view(np.int16) if signed else stored, syntax, BitsStored=bits, HighBit=bits - 1, RescaleIntercept=intercept)
    assert np.array_equal(read_hu(save(ds, tmp_path / "ct.dcm")), values + intercept)


def multiframe(*, per_frame, shared=None, kind="HU"):
    "An enhanced CT of three frames, each 64 units brighter than the one before, with rescales where asked"
    stored = np.arange(3)[:, None, None] * 64 + np.arange(16).reshape(4, 4)
    ds = ct(stored.astype(np.int16), SOPClassUID=EnhancedCTImageStorage)
    del ds.RescaleSlope, ds.RescaleIntercept

    def group(slope_intercept):
        item = Dataset()
        if slope_intercept:
            item.PixelValueTransformationSequence = [Dataset()]
            item.PixelValueTransformationSequence[0].update(
                {"RescaleSlope": slope_intercept[0], "RescaleIntercept": slope_intercept[1], "RescaleType": kind}
            )
        return item

    ds.SharedFunctionalGroupsSequence = [group(shared)]
    ds.PerFrameFunctionalGroupsSequence = [group(each) for each in per_frame]
    return ds


def test_frames_have_their_own_rescale(tmp_path):
    path = save(multiframe(per_frame=[(1, 0), (2, -1024), (0.5, 7)]), tmp_path / "frames.dcm")
    base = np.arange(16).reshape(4, 4)
    for frame, (slope, intercept) in enumerate([(1, 0), (2, -1024), (0.5, 7)]):
        assert np.array_equal(read_hu(path, frame), (base + 64 * frame) * slope + intercept)
    for frame in (-1, 3): assert "there are 3" in reason(path, frame)


def test_frames_share_a_rescale(tmp_path):
    path = save(multiframe(per_frame=[None] * 3, shared=(1, -24)), tmp_path / "frames.dcm")
    assert [read_hu(path, frame)[0, 0] for frame in range(3)] == [-24, 40, 104]


def test_a_frame_without_rescale_is_refused(tmp_path):
    path = save(multiframe(per_frame=[(1, 0), None, (1, 0)]), tmp_path / "frames.dcm")
    assert read_hu(path, 0).max() == 15 and "no rescale" in reason(path, 1)


@pytest.mark.parametrize(
    ("value", "limit", "air"),
    [(900, None, [900]), (900, 1100, [900, 1000, 1100]), (1100, 900, [900, 1000, 1100]), (64536, None, [-1000])],
)
def test_declared_padding(tmp_path, value, limit, air):
    values = np.array([[-1000, 0, 899, 900], [1000, 1100, 1101, 1200]], np.int16)
    ds = ct(values, RescaleIntercept=0)
    vr = "US" if value > 32767 else "SS"
    ds.add_new("PixelPaddingValue", vr, value)
    if limit is not None: ds.add_new("PixelPaddingRangeLimit", vr, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(ds, tmp_path / "padded.dcm")
    assert np.array_equal(read_hu(path), np.where(np.isin(values, air), AIR_HU, values))


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"RescaleType": "HU"}, None),
        ({"RescaleType": "US"}, "rescale type US"),
        ({"RescaleSlope": 0}, "slope 0"),
        ({"Modality": "PT"}, "modality PT"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, None),
        ({"ImageType": ["DERIVED", "SECONDARY", "LOCALIZER"]}, "localizer"),
    ],
)
def test_headers_that_promise_hu_and_those_that_do_not(tmp_path, tags, words):
    stored = np.arange(64, dtype=np.int16).reshape(8, 8) + 1000
    path = save(ct(stored, **tags), tmp_path / "ct.dcm")
    if words: assert words in reason(path)
    else: assert np.array_equal(read_hu(path), stored - 1024)


def test_scan_and_read_hu_agree_on_every_file(data):
    "A slice that the cohort calls usable can be read, and one that it sets aside is refused with a reason."
    folders = ("headct_ge_hispeed_tilt18p5", "odd_derived", "ts_matrix_ctimage_chest", "pydicom_ct", "enhanced_ct",
               "phantom_philips_brain5mm")
    for folder in folders:
        table = scan(data / folder, jobs=1)
        for row in table[table.rows > 0].itertuples():
            try:
                read_hu(row.path, row.frame)
                refused = None
            except Unreadable as error:
                refused = error.reason
            assert (row.problem is None) == (refused is None), (row.path, row.problem, refused)
