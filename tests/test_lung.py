"Lung on real chests, heads and a real abdomen, and against the synthetic chest."

import gzip
import inspect
import struct

import cv2
import numpy as np
import pandas as pd
import pytest

from ctbm import chest, cohort, lung, pack, windowed
from ctbm.preprocess import Preprocess, read_hu

SHOWN = {"01": False, "04": True, "07": True, "10": True, "13": True, "16": True, "19": True, "22": True, "25": True, "28": False}


@pytest.fixture(scope="module")
def real(data):
    "A real chest from the shoulders, over the apices and the hila, to the liver below the lungs"
    return {name: read_hu(data / "chest_lungdx" / f"1-{name}.dcm") for name in SHOWN}


@pytest.fixture(scope="module")
def volume(data):
    "A real CT, 30 slices 3 mm apart, from the kidneys to the lower ends of the lungs, rows from front to back"
    raw = gzip.decompress((data / "nifti_ct" / "example_ct_sm.nii.gz").read_bytes())
    cols, rows, slices = struct.unpack("<3h", raw[42:48])
    return np.frombuffer(raw[352:], "<i2").reshape(slices, rows, cols)[:, ::-1].astype(np.float32)


def share(hu, organ="lung"):
    "Of the body"
    area, body = lung.areas(hu, organ)
    return area / body


def shown(hu, organ="lung"):
    return bool(lung.shows(organ, *lung.areas(hu, organ)))


def as_jpeg(hu, quality):
    "HU as they come back from a JPEG of three windows, 256 pixels"
    small = cv2.resize(hu, (256, 256), interpolation=cv2.INTER_AREA)
    how = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return windowed.recovered(cv2.imdecode(cv2.imencode(".jpg", windowed.colours(small)[..., ::-1], how)[1], 1)[..., ::-1])


@pytest.mark.parametrize("name", SHOWN)
def test_right_on_every_real_chest_slice(real, name):
    "01: shoulders and windpipe; 28: liver, stomach and colon, with no more of the lung than the recess behind the liver"
    hu, mask = real[name], lung.lung_mask(real[name])
    assert shown(hu) == SHOWN[name]
    if SHOWN[name]:
        assert share(hu) > 0.1 and len(np.unique(mask.nonzero()[1] < 256)) == 2, "both sides"
        assert -920 < np.median(hu[mask]) < -700 and mask[hu > 0].mean() < 0.02 and not mask[~lung.body_mask(hu)].any()
    else: assert share(hu) < 0.05


@pytest.mark.parametrize("name", SHOWN)
def test_neither_windpipe_nor_stomach_nor_table(real, name):
    hu, mask = real[name], lung.lung_mask(real[name])
    body, gas = lung.body_mask(hu), cv2.medianBlur(hu, 5) < -970
    bubbles = cv2.morphologyEx((gas & body).astype(np.uint8), cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
    if name in ("01", "04", "07", "28"): assert bubbles.any() and not mask[bubbles > 0].any()
    assert 0.35 < body.mean() < 0.6 and cv2.connectedComponents(body.astype(np.uint8))[0] == 2 and not body[-60:].any() # the table


@pytest.mark.parametrize("quality", [100, 95, 75])
def test_the_same_from_a_jpeg_of_three_windows(real, quality):
    for name, hu in real.items():
        assert shown(as_jpeg(hu, quality)) == SHOWN[name]
        assert share(as_jpeg(hu, quality)) == pytest.approx(share(hu), rel=0.02, abs=0.003)


@pytest.mark.parametrize("name", ["04", "10", "16", "22", "25"])
def test_the_mask_depends_neither_on_matrix_nor_side_nor_noise(real, name):
    hu = real[name]
    assert share(cv2.resize(hu, (256, 256), interpolation=cv2.INTER_AREA)) == pytest.approx(share(hu), rel=0.02)
    assert share(hu[:, ::-1]) == pytest.approx(share(hu), rel=0.02)
    assert share(np.pad(hu, 100, constant_values=-1000)) == pytest.approx(share(hu), rel=0.05) # a larger field of view
    assert share(hu + np.random.default_rng(0).normal(0, 50, hu.shape)) == pytest.approx(share(hu), rel=0.05)
    narrow = cv2.resize(hu, (256, 512), interpolation=cv2.INTER_AREA) # pixels twice as wide as high
    area, body = lung.areas(narrow, "lung", (0.65, 1.3))
    assert area / body == pytest.approx(share(hu), rel=0.02) and lung.lung_mask(narrow, (0.65, 1.3)).shape == narrow.shape


@pytest.mark.parametrize("name", ["10", "16", "19", "22"])
def test_lung_that_the_field_of_view_cuts(real, name):
    hu, whole = real[name], lung.lung_mask(real[name])
    for box in (np.s_[:, 100:], np.s_[:, :410], np.s_[110:, 100:420]):
        assert lung.lung_mask(hu[box])[whole[box]].mean() > 0.95 and shown(hu[box])


def test_another_scanner_with_contrast_and_a_circle(data):
    "The body touches the circle on both sides and the mattress below: neither it nor the table is lung"
    for name in ("0.dcm", "1.dcm"):
        hu = read_hu(data / "lungmask_test" / name)
        mask = lung.lung_mask(hu)
        assert 0.2 < share(hu) < 0.3 and not mask[440:].any() and mask[200:300, 60:130].mean() > 0.5 and mask[300:340, 400:440].mean() > 0.5
    assert share(read_hu(data / "ts_matrix_ctimage_chest" / "CTImage.dcm")) == 0, "a neck and shoulders, on a mattress of -870 HU"


def test_abdomen_with_gas_in_the_colon(volume):
    shares = [share(hu) for hu in volume]
    assert max(shares[:20]) < 0.01 and not any(shown(hu) for hu in volume[:24]) # colon and stomach full of gas
    assert all(shown(hu) for hu in volume[27:]), "both recesses, all around the liver"


def test_no_lung_in_a_head_and_no_brain_in_a_chest(data, real):
    for n in range(1, 29):
        hu = read_hu(data / "headct_ge_hispeed_tilt18p5" / f"{n:02}.dcm")
        assert not shown(hu) and shown(hu, "brain") == (6 <= n <= 27) # from the cerebellum to below the vertex
    assert not any(shown(hu, "brain") for hu in real.values())


def test_pictures_of_nothing():
    for hu in (np.full((512, 512), -1000), np.full((64, 64), 40), np.full((3, 3), -800), np.zeros((200, 1)), np.full((1, 1), -1024)):
        assert lung.lung_mask(hu).shape == lung.body_mask(hu).shape == hu.shape
        assert not shown(hu) and not shown(hu, "brain") and np.isfinite(lung.areas(hu, "lung")).all()
    with pytest.raises(ValueError, match="'lung'"): lung.shows("lungs", [0.1], [0.5])


def test_a_pack_tells_which_real_slices_show_lung(data, tmp_path):
    slices = cohort.scan(data / "chest_lungdx", jobs=1)
    made = pack.build(slices, Preprocess(size=32, crop="none", organ="lung"), tmp_path, jobs=1)
    told = lung.shows("lung", made.table.organ_area, made.table.body_area)
    assert dict(zip(made.table.slice_id.str[-2:], told.tolist(), strict=True)) == SHOWN
    plain = pack.build(slices, Preprocess(size=32, crop="none"), tmp_path, jobs=1)
    assert plain.table[["organ_area", "body_area"]].isna().all(axis=None) and plain.key != made.key
    assert np.array_equal(plain.images, made.images)


def test_a_pack_knows_the_code_of_the_areas_and_of_the_jpegs(monkeypatch):
    before, source = pack.code_version(), inspect.getsource
    for module in (lung, windowed):
        monkeypatch.setattr(inspect, "getsource", lambda what, module=module: source(what) + ("# edited" if what is module else ""))
        assert pack.code_version() != before


def test_what_could_not_be_read_shows_nothing():
    told = pd.DataFrame({"organ_area": [0.3, None, 0.01], "body_area": [0.5, None, 0.5]})
    assert lung.shows("lung", told.organ_area, told.body_area).tolist() == [True, False, False]


def test_every_slice_of_a_synthetic_chest(tmp_path):
    "Lung or not, as the phantom knows it; where it says otherwise, the share is next to the threshold"
    folder = chest.make_chest_cohort(tmp_path / "cohort", n_patients=4, jobs=1)
    slices = cohort.scan(folder / "CTs", jobs=1)
    slices = slices[slices.problem.isna()].set_index("slice_id").sort_index()
    truth = pd.read_csv(folder / "truth.csv").set_index("ID").lung.loc[slices.index].astype(bool)
    areas = [lung.areas(read_hu(row.path), "lung", pack.spacing_mm(row)) for row in slices.itertuples()]
    told = pd.DataFrame(areas, slices.index, ["lung", "body"])
    found = pd.Series(lung.shows("lung", told.lung, told.body), slices.index)
    assert 0.3 < truth.mean() < 0.9 and (found == truth).mean() >= 0.95
    doubtful = (told.lung / told.body)[found != truth]
    assert doubtful.between(0.01, 0.12).all()
