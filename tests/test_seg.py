"Masks for the archive and for the eye: valid, read by others as they were meant, on tilted, uneven and multi-frame series, and on real MR."
import shutil
import subprocess
import warnings

import numpy as np
import pandas as pd
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from highdicom.seg import segread
from pydicom import config, dcmread
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from ctbm import cohort, dicom, phantom, seg, viewer, volumes
from ctbm.volumes import Volume

ABOUT = {"run": "run_20260101_120000", "recipe": "segment", "version": "0.1.0", "sha256": "ab" * 32, "threshold": 0.5}
N = 8  # slices of a made-up series


def errors(path) -> list[str]:
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    return [line for line in (said.stdout + said.stderr).splitlines() if "Error" in line]


def series(folder, changes: dict | None = None, seed: int = 2):
    "A synthetic series without much in it, under a tilted gantry, its header changed."
    folder.mkdir(parents=True)
    patient = phantom.Patient(seed, 0)
    header = phantom.study_header(patient)
    for k in range(N):
        image = phantom.image_dataset(header, patient, k, np.full((phantom.SIZE, phantom.SIZE), 40, np.float32))
        phantom.write_dicom(image, folder / f"{k}.dcm", "explicit")
        if not changes: continue
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            for keyword, value in changes.items():
                if value is None: delattr(image, keyword)
                else: setattr(image, keyword, value)
            image.save_as(folder / f"{k}.dcm")
    return folder


def marked(slices) -> np.ndarray:
    "Three lesions: one over four slices, one of a single voxel, one in the corner of the last slice."
    row = slices.iloc[0]
    mask = np.zeros((int(row.cols), int(row["rows"]), len(slices)), np.uint8)
    mask[100:120, 200:210, 1:5], mask[300, 310, 3], mask[-3:, -5:, -1] = 1, 1, 1
    return mask


def usable(folder):
    return volumes.in_order(cohort.scan(folder))


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> dict:
    "Slices, mask and file of a synthetic series, of a real head with uneven distances under a tilt of 18.5 degrees, of a real phantom."
    place, made = tmp_path_factory.mktemp("seg"), {}
    places = {"synthetic": series(place / "in"), "head": data / "headct_ge_hispeed_tilt18p5", "phantom": data / "phantom_philips_brain5mm"}
    for name, folder in places.items():
        slices = usable(folder)
        made[name] = slices, marked(slices), seg.write(place / f"{name}.dcm", slices, marked(slices), ABOUT)
    return made


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (package dicom3tools)")
def test_dciodvfy_finds_no_error(written):
    for name, (slices, _, file) in written.items():
        assert not errors(file), name
        assert name == "phantom" or slices.tilt_deg.iloc[0] > 10


def test_highdicom_reads_back_every_lesion(written):
    for slices, mask, file in written.values():
        read = segread(file)
        back = read.get_pixels_by_source_instance(slices.instance.tolist(), combine_segments=True)
        assert np.array_equal(back.T, seg.numbered(mask)) and read.number_of_segments == 3
        assert [read.get_segment_description(k).tracking_id for k in (1, 2, 3)] == ["lesion 1", "lesion 2", "lesion 3"]
        assert len(read.PerFrameFunctionalGroupsSequence) == 4 + 1 + 1, "frames without a lesion are not stored"


def test_we_read_back_the_mask(written):
    slices, mask, file = written["synthetic"]
    assert np.array_equal(volumes.read_mask(file, volumes.read_series(slices), slices=slices), mask)


def test_frames_lie_on_their_images(written):
    for slices, _, file in written.values():
        by_instance = slices.set_index("instance").path
        for frame in dcmread(file).PerFrameFunctionalGroupsSequence:
            image = dicom.source(by_instance[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID])
            assert np.allclose(frame.PlanePositionSequence[0].ImagePositionPatient, image.ImagePositionPatient)


def test_names_are_new_and_stay(written):
    for slices, mask, file in written.values():
        read, other = dcmread(file), mask.copy()
        other[0, 0, 0] = 1
        again = seg.dicom_seg(slices.sample(frac=1, random_state=0), seg.numbered(mask), ABOUT)
        assert again.SOPInstanceUID == read.SOPInstanceUID and again.SeriesInstanceUID == read.SeriesInstanceUID
        changed = seg.dicom_seg(slices, other, ABOUT), seg.dicom_seg(slices, mask, ABOUT | {"sha256": "cd" * 32})
        assert len({read.SOPInstanceUID, *(each.SOPInstanceUID for each in changed)}) == 3
        assert not {read.SOPInstanceUID, read.SeriesInstanceUID} & {*slices.instance, *slices.series}
        assert read.StudyInstanceUID == slices.study.iloc[0] and dicom.STATEMENT in read.SeriesDescription


@pytest.mark.parametrize("changes", [
    dict(StudyDate="12.03.2020", PatientSex="male", PatientBirthDate="1950", PatientName="Nobody"),
    dict(StudyDate=None, StudyTime=None, StudyID=None, AccessionNumber=None, ReferringPhysicianName=None, PatientName=None, PatientID=None),
    dict(SpecificCharacterSet="ISO_IR 192", PatientName="Grün^Zoë=山田^太郎", StudyDescription="Schädel"),
    dict(LossyImageCompression="01", LossyImageCompressionRatio="8", LossyImageCompressionMethod="ISO_15444_1")],
    ids=["not valid", "absent", "alphabets", "lossy"])
def test_odd_headers(tmp_path, changes, recwarn):
    slices = usable(series(tmp_path / "in", changes))
    file = seg.write(tmp_path / "seg.dcm", slices, marked(slices), ABOUT)
    assert not [w for w in recwarn.list if "person name" in str(w.message)]
    if shutil.which("dciodvfy"): assert not errors(file)
    read = dcmread(file)
    if "PatientName" in changes and changes["PatientName"]: assert read.PatientName == changes["PatientName"]
    assert read.get("LossyImageCompression", "00") == changes.get("LossyImageCompression", "00")


@pytest.mark.parametrize("keyword", ["FrameOfReferenceUID", "SOPInstanceUID", "ImageOrientationPatient"])
def test_what_has_no_place_is_an_error_that_names_the_file(tmp_path, keyword):
    slices = usable(series(tmp_path / "in"))
    image = dcmread(tmp_path / "in" / "3.dcm")
    delattr(image, keyword)
    image.save_as(tmp_path / "in" / "3.dcm")
    with pytest.raises(ValueError, match=rf"3\.dcm: {keyword} absent"): seg.dicom_seg(slices, marked(slices), ABOUT)


def test_a_multi_frame_file(tmp_path):
    folder = series(tmp_path / "in")
    frames = [dcmread(path) for path in sorted(folder.iterdir(), reverse=True)]  # from the top down
    for frame in frames: frame.ImageType, frame.FrameType = ["ORIGINAL", "PRIMARY", "AXIAL"], None
    many = LegacyConvertedEnhancedCTImage(frames, generate_uid(), 7, generate_uid(), 1, transfer_syntax_uid=ExplicitVRLittleEndian)
    (tmp_path / "many").mkdir()
    many.save_as(tmp_path / "many" / "one.dcm", enforce_file_format=True)
    slices = usable(tmp_path / "many")
    if slices.empty: pytest.skip("the scan sets this file aside")
    file = seg.write(tmp_path / "seg.dcm", slices, marked(slices), ABOUT)
    back = segread(file).get_pixels_by_source_frame(many.SOPInstanceUID, [int(f) + 1 for f in slices.frame], combine_segments=True)
    assert np.array_equal(back.T, seg.numbered(marked(slices)))
    if shutil.which("dciodvfy"): assert not errors(file)


def test_two_series_are_not_one_segmentation(tmp_path):
    slices = [usable(series(tmp_path / str(seed), seed=seed)) for seed in (2, 3)]
    both = [part.assign(position_mm=part.position_mm + 1000 * k) for k, part in enumerate(slices)]
    with pytest.raises(ValueError, match="series"): seg.dicom_seg(pd.concat(both), np.concatenate([marked(s) for s in slices], 2), ABOUT)


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    slices = usable(series(tmp_path / "in"))
    with pytest.raises(ValueError, match="the mask is empty"): seg.write(tmp_path / "out.dcm", slices, 0 * marked(slices), ABOUT)
    with pytest.raises(ValueError, match="512 x 512 x 7 voxels, the series 512 x 512 x 8"):
        seg.write(tmp_path / "out.dcm", slices, marked(slices)[..., 1:], ABOUT)

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left")
    monkeypatch.setattr("pydicom.dataset.Dataset.save_as", full)
    with pytest.raises(OSError, match="no space"): seg.write(tmp_path / "out.dcm", slices, marked(slices), ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- for the eye -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_mr(data) -> tuple[Volume, np.ndarray]:
    folder = data / "mri_tumour_label"
    volume = volumes.read(folder / "brain1_image.nrrd")
    return volume, volumes.read_mask(folder / "brain1_label.nrrd", volume)


def test_real_mr_lies_as_radiologists_see_it(head_mr):
    volume, mask = head_mr
    shown = seg.slices_of(volume.array, volume.affine)
    level, width = seg.grey(volume.array)
    assert level - width / 2 >= 0 and width > 50
    voxel = np.argwhere(mask)[0]
    left, _, up = (volume.affine @ [*voxel, 1])[:3] - (volume.affine @ [*(np.array(mask.shape) / 2), 1])[:3]
    k, _, column = np.argwhere(seg.slices_of(mask * 0 + _only(mask, voxel), volume.affine))[0]
    assert (column > shown.shape[2] / 2) == (left < 0), "the patient's left is on the right of the picture"
    assert (k > len(shown) / 2) == (up > 0), "the first slice is the lowest"


def _only(mask, voxel) -> np.ndarray:
    found = np.zeros_like(mask)
    found[tuple(voxel)] = 1
    return found


def test_the_outline_runs_along_the_voxels_of_the_mask(head_mr, monkeypatch):
    volume, mask = head_mr
    asked = {}
    monkeypatch.setattr(viewer, "view", lambda stack, level, width, start: asked.update(stack=stack, at=(level, width), start=start))
    seg.show(volume, {"truth": mask, "prediction": np.roll(mask, 6, axis=0)})
    figure = viewer.still({"": asked["stack"]}, asked["start"], *asked["at"])
    (ax,) = figure.axes
    green, orange = (collection.get_paths()[0].get_extents() for collection in ax.collections)
    rows, cols = np.nonzero(seg.slices_of(mask, volume.affine)[asked["start"]])
    assert np.allclose([green.x0, green.y0], [cols.min() - 0.5, rows.min() - 0.5], atol=0.6)
    assert np.allclose([green.x1, green.y1], [cols.max() + 0.5, rows.max() + 0.5], atol=0.6)
    assert {abs(green.x0 - orange.x0), abs(green.y0 - orange.y0)} == {0, 6}
    assert {"truth", "prediction"} <= {text.get_text() for text in ax.texts}


def test_a_montage_of_real_mr_shows_the_tumour(head_mr):
    volume, mask = head_mr
    figure = seg.overlay_figure(volume, {"truth": mask})
    plain, outlined = figure.axes[0], figure.axes[len(figure.axes) // 2]
    assert not plain.collections and outlined.collections and viewer.png(figure).startswith(b"\x89PNG")
    assert len(seg.overlay_figure(volume, {}).axes) == 8 and len(seg.overlay_figure(volume, {"truth": 0 * mask}).axes) == 8


def test_volumes_without_contrast_can_be_shown():
    for value in (0.0, np.nan, 7.0):
        volume = Volume(np.full((9, 8, 7), value, np.float32), np.eye(4))
        assert viewer.png(seg.overlay_figure(volume, {"prediction": np.ones((9, 8, 7), np.uint8)})).startswith(b"\x89PNG")
