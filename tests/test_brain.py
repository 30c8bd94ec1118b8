"The brain on a real head, and the quality of real slices."

import inspect

import cv2
import numpy as np
import pandas as pd
import pytest

from ctbm import brain, pack, quality
from ctbm.brain import brain_mask
from ctbm.phantom import Patient, brain_truth
from ctbm.preprocess import read_hu

MM = (0.488, 0.488)


@pytest.fixture(scope="module")
def series(data):
    "A real head from below the base of the skull to above the vertex, slices 1 to 28"
    return {n: read_hu(data / "headct_ge_hispeed_tilt18p5" / f"{n:02}.dcm") for n in range(1, 29)}


@pytest.fixture(scope="module")
def masks(series):
    return {n: brain_mask(hu, spacing_mm=MM) for n, hu in series.items()}


def pieces(mask):
    return cv2.connectedComponentsWithStats(mask.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("n", range(13, 27))
def test_all_that_the_skull_holds_and_nothing_else(series, masks, n):
    "Above the base the skull is a closed ring: what it holds is known without any rule for brain"
    hu, mask = series[n], masks[n]
    ring = cv2.morphologyEx((hu > 200).astype(np.uint8), cv2.MORPH_CLOSE, brain.disc(6))
    skull = 1 + np.argmax(cv2.connectedComponentsWithStats(ring)[2][1:, cv2.CC_STAT_AREA])
    ring = (cv2.connectedComponents(ring)[1] == skull).astype(np.uint8)
    inside = brain.filled(ring).astype(bool) & (hu < 200)
    assert dice(mask, inside & ~cv2.dilate((~brain.filled(ring).astype(bool)).astype(np.uint8), brain.disc(3)).astype(bool)) > 0.93
    assert len(pieces(mask)) == 1 and 25 < np.median(hu[mask]) < 50 and (hu[mask] > 300).mean() < 0.002


def test_chambers_of_the_skull_base(masks):
    "The middle fossae lie beside the posterior one and are brain as well"
    for n in (8, 9, 10): assert len(pieces(masks[n])) >= 2 and 0.08 < masks[n].mean() < 0.2
    assert masks[9][200:330, 120:200].any() and masks[9][200:330, 300:400].any() and masks[9][320:370, 230:300].all()


def test_eyes_face_and_neck_are_no_brain(series, masks):
    for n in (1, 2, 3, 4, 5): assert masks[n].mean() < 0.02, "the spinal cord at most"
    for n in (7, 8, 9, 10): assert not masks[n][60:150, 110:190].any(), "the right orbit"
    assert not masks[28].any(), "nothing but bone"


def test_area_changes_slowly_from_slice_to_slice(masks):
    area = np.array([masks[n].mean() for n in range(12, 27)])
    assert np.abs(np.diff(area)).max() < 0.06 and area.argmax() in range(2, 8)


@pytest.mark.parametrize("n", [12, 15, 20, 25])
def test_mask_does_not_depend_on_matrix_place_or_noise(series, masks, n):
    hu = series[n]
    half = cv2.resize(hu, (256, 256), interpolation=cv2.INTER_AREA)
    assert dice(brain_mask(half, spacing_mm=(0.976, 0.976)), masks[n][::2, ::2]) > 0.97
    narrow = cv2.resize(hu, (256, 512), interpolation=cv2.INTER_AREA) # pixels twice as wide as high
    assert dice(brain_mask(narrow, spacing_mm=(0.488, 0.976)), masks[n][:, ::2]) > 0.97
    moved = np.roll(hu, (20, -25), (0, 1))
    assert dice(brain_mask(moved, spacing_mm=MM), np.roll(masks[n], (20, -25), (0, 1))) > 0.99
    noisy = hu + np.random.default_rng(0).normal(0, 10, hu.shape)
    assert dice(brain_mask(noisy, spacing_mm=MM), masks[n]) > 0.97
    assert dice(brain_mask(hu[:, ::-1], spacing_mm=MM)[:, ::-1], masks[n]) > 0.98


@pytest.mark.parametrize("n", [15, 20])
def test_open_skull(series, masks, n):
    hu = series[n].copy()
    hu[200:330, 256:][hu[200:330, 256:] > 100] = 40 # a bone flap removed
    assert dice(brain_mask(hu, spacing_mm=MM), masks[n]) > 0.94
    cut = series[n][:, 200:]
    assert dice(brain_mask(cut, spacing_mm=MM), masks[n][:, 200:]) > 0.97


@pytest.mark.parametrize("index", [0, 3, 5, 9])
def test_dice_against_the_phantom(index):
    patient = Patient(11, index) # tilted and straight gantries, sharp and soft kernels
    for height in (-20, 5, 45, 65):
        z = patient.head.centre_mm[2] + height * patient.head.size[2]
        seen = patient.render(z)
        mask, truth = brain_mask(seen.hu, spacing_mm=(patient.scanner.pixel_mm,) * 2), brain_truth(patient, z)
        assert dice(mask, truth) >= 0.95
        if seen.mask.any(): assert mask[seen.mask > 0].mean() > 0.95, "a lesion was masked away"


def test_no_head(data):
    for hu in (np.full((512, 512), -1000), np.full((512, 512), 40), np.full((3, 3), 40), np.zeros((200, 1))):
        assert brain_mask(hu).shape == hu.shape and not brain_mask(hu).any()


def test_a_pack_knows_the_code_of_the_mask(monkeypatch):
    before, source = pack.code_version(), inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda what: source(what) + ("# edited" if what is brain else ""))
    assert pack.code_version() != before


# Quality


def test_a_sharp_head_has_no_fault_above_the_base(series):
    for n in range(11, 26): assert not set(quality.assess(series[n], MM)["issues"]) - set(quality.FINDINGS), f"slice {n}"
    for n in (1, 4, 27): assert "insufficient_brain" in quality.assess(series[n], MM)["issues"]
    assert quality.assess(series[28], MM)["issues"] == ["no_brain_tissue"]


def test_metal_in_bone_and_in_the_brain(series):
    for row, col in ((250, 250), (95, 250)): # in the brain, in the frontal bone
        hu = series[18].copy()
        hu[row - 7 : row + 7, col - 7 : col + 7] = 3071
        assert "metal_artifact" in quality.assess(hu, MM)["issues"]
    hu = series[18].copy()
    hu[5:25, 5:25] = 3071 # beside the head
    assert "metal_artifact" not in quality.assess(hu, MM)["issues"]


def test_every_file_is_a_row(data, tmp_path):
    names = sorted(p.name for p in (data / "odd_derived").glob("*.dcm"))
    slices = pd.DataFrame({"path": [str(data / "odd_derived" / name) for name in names] + [str(tmp_path / "gone.dcm")]})
    slices = slices.assign(frame=0, row_mm=np.nan, col_mm=np.nan)
    slices.index = slices.index * 3 + 7
    found = quality.table(slices, jobs=1)
    assert found.index.equals(slices.index) and found.unreadable.notna().iloc[-1]
    assert ((found.issues == "unreadable") == found.unreadable.notna()).all() and found.unreadable.isna().sum() >= 5


def test_rules():
    found = pd.DataFrame({"issues": ["", "high_asymmetry", "insufficient_brain", "unreadable", "insufficient_brain; high_asymmetry"]})
    for labels in ([0] * 5, [1] * 5):
        assert quality.dropped(found, pd.Series(labels), "any").tolist() == [False, False, True, True, True]
        assert not quality.dropped(found, pd.Series(labels), "none").any()
    assert not quality.dropped(found, pd.Series([1] * 5), "published").any()
    assert quality.dropped(found, pd.Series([0, 0, 0, 1, 0], dtype="Int64"), "published").tolist() == [False, False, True, False, True]
    with pytest.raises(ValueError, match="'published'"): quality.dropped(found, pd.Series([0] * 5), "publish")
    with pytest.raises(ValueError, match="index"): quality.dropped(found, pd.Series([0] * 5, index=range(1, 6)), "any")
