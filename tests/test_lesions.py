"Masks judged: real volumes, whole synthetic series, faults."


import numpy as np
import pandas as pd
import pytest

from ctbm import lesions

ONE_MM = (1.0, 1.0, 1.0)


def sphere(shape, centre, radius):
    return np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1) <= radius


@pytest.fixture(scope="module")
def tumours(data):
    "Image, mask and affine of the two real tumour volumes."
    import SimpleITK as sitk
    found = []
    for name in ("brain1", "brain2"):
        image, mask = (sitk.ReadImage(str(data / "mri_tumour_label" / f"{name}_{what}.nrrd")) for what in ("image", "label"))
        steps = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        affine = np.diag([-1.0, -1, 1, 1]) @ np.vstack([np.column_stack([steps, image.GetOrigin()]), [0, 0, 0, 1]])
        found.append((*(sitk.GetArrayFromImage(each).T for each in (image, mask)), affine))
    return found


def test_real_lesions(tumours):
    "Volumes and lengths of real tumours are SimpleITK's, which measures them in another way."
    import SimpleITK as sitk
    for _, mask, affine in tumours:
        table, image = lesions.lesion_table(mask, affine), sitk.GetImageFromArray((mask > 0).astype(np.uint8).T)
        image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.ComputeFeretDiameterOn()
        shape.Execute(sitk.ConnectedComponent(image, True))
        assert np.allclose(sorted(table.volume_ml), sorted(shape.GetPhysicalSize(i) / 1000 for i in shape.GetLabels()))
        assert np.allclose(sorted(table.longest_mm), sorted(shape.GetFeretDiameter(i) for i in shape.GetLabels()), rtol=0.1)


def test_real_itself(tumours):
    "A real mask against itself is perfect; moved by a voxel it is a voxel away."
    for _, mask, affine in tumours:
        same, found, parts = lesions.case(mask, mask.astype(float), affine)
        assert same["dice"] == same["lesion_f1"] == 1 and same["hd95_mm"] == 0 and found.found.all() and (parts.hit > 0).all()
        moved = lesions.case(mask, np.roll(mask, 1, 0).astype(float), affine)[0]
        assert 0.6 < moved["dice"] < 1 and 0 < moved["hd95_mm"] <= 0.79


def test_real_baseline(tumours):
    "On whole heads the rule finds the tumour that enhances well, and not the other."
    dice = []
    for image, mask, affine in tumours:
        p = lesions.threshold_mask(image.astype(np.float32), affine, "mr")
        assert p.shape == mask.shape and 0 < (p >= 0.5).mean() < 0.02
        dice.append(lesions.case(mask, p, affine)[0]["dice"])
    assert dice[0] > 0.3 and dice[1] < 0.1, dice


def test_distance_in_mm():
    "HD95 of two plates is their distance in millimetres, along whichever axis."
    for axis in range(3):
        a, b = np.zeros((2, 20, 20, 20))
        np.moveaxis(a, axis, 0)[4] = np.moveaxis(b, axis, 0)[9] = 1
        assert np.isclose(lesions.case(a, b, (0.5, 2.0, 5.0))[0]["hd95_mm"], 5 * (0.5, 2.0, 5.0)[axis])


def test_empty_masks():
    "The rule for empty masks, and that no summary loses such a case."
    ball, none = sphere((20, 20, 20), 10, 4).astype(float), np.zeros((20, 20, 20))
    diagonal = np.sqrt(3) * 20
    expected = {"both empty": (none, none, 1, 0), "truth empty": (none, ball, 0, diagonal), "prediction empty": (ball, none, 0, diagonal)}
    rows, found = [], []
    for rule, (truth, p, dice, far) in expected.items():
        figures, lesion, _ = lesions.case(truth, p, ONE_MM)
        assert figures["rule"] == rule and figures["dice"] == dice and np.isclose(figures["hd95_mm"], far)
        assert np.isnan(figures["recall"]) == (not truth.any()) and np.isnan(figures["precision"]) == (not p.any())
        rows.append({"case": rule, "patient": rule} | figures)
        found.append(lesion.assign(patient=rule))
    told = lesions.summary(pd.DataFrame(rows), pd.concat(found), resamples=50)
    assert told["rules"] == {"both empty": 1, "truth empty": 1, "prediction empty": 1} and told["positive"] == 1
    figures = {name: one["estimate"] for name, one in told["figures"].items()}
    assert figures["dice"] == 0 and np.isclose(figures["dice_all"], 1 / 3) and figures["clean"] == 0.5
    assert np.isclose(figures["hd95_mm"], diagonal)


def test_healthy_only():
    "A cohort without lesions has no Dice, and says so instead of failing."
    figures, none, _ = lesions.case(np.zeros((8, 8, 8)), np.zeros((8, 8, 8)), ONE_MM)
    cases, empty = pd.DataFrame([{"case": str(i), "patient": str(i), "fold": i % 2} | figures for i in range(4)]), none.assign(patient=[])
    told = lesions.summary(cases, empty, resamples=50)
    assert np.isnan(told["figures"]["dice"]["estimate"]) and told["figures"]["dice_all"]["estimate"] == 1
    assert told["sizes"]["<10"]["lesions"] == 0
    assert lesions.by_fold(cases, resamples=50).dice.isna().all()
    parts = pd.DataFrame(columns=["patient", "score", "hit"])
    for wrong in (lambda: lesions.compare(cases, cases), lambda: lesions.froc(parts, empty, cases)):
        with pytest.raises(ValueError, match="no case has a lesion"): wrong()


def test_one_voxel_in_a_plane():
    "Lesions of one voxel, of a line, and of one slice are measured like all others."
    mask = np.zeros((12, 12, 3))
    mask[1, 1, 0] = mask[4:8, 2, 1] = mask[2:5, 7:11, 2] = 1
    figures, found, _ = lesions.case(mask, mask, (1, 1, 5))
    assert figures["lesions"] == 3 and np.allclose(found.longest_mm, [np.hypot(2, 3), 3, 0])
    assert lesions.lesion_table(mask[..., 2:], np.diag([1.0, 1, 5, 1])).longest_axial_mm[0] == np.hypot(2, 3)


def test_touching_and_split():
    "A part over two lesions finds both; a lesion in two parts is found once, and neither part is false."
    truth = sphere((40, 20, 20), (8, 10, 10), 4) | sphere((40, 20, 20), (28, 10, 10), 4)
    across = truth | (np.abs(np.moveaxis(np.indices(truth.shape), 0, -1)[..., 1:] - 10).max(-1) < 2)
    figures, found, parts = lesions.case(truth, across.astype(float), ONE_MM)
    assert figures["found"] == 2 and len(parts) == 1 and figures["false_positives"] == 0 and found.dice.max() < 0.7
    cut = truth & (np.indices(truth.shape)[0] != 8)
    figures, _, parts = lesions.case(truth, cut.astype(float), ONE_MM)
    assert figures["found"] == 2 and len(parts) == 3 and figures["false_positives"] == 0 and figures["lesion_f1"] == 1


def test_sheared_grid():
    "Of a tilted gantry the volume is smaller than the product of the spacings, and the table is told in the patient's millimetres."
    affine = np.array([[0.5, 0, 0, 3], [0, 0.5, 5 * np.sin(0.3), -7], [0, 0, 5 * np.cos(0.3), 11], [0, 0, 0, 1]])
    mask = np.zeros((40, 40, 8))
    mask[10:30, 10:30, 2:6] = 1
    row = lesions.lesion_table(mask, affine).iloc[0]
    assert np.isclose(row.volume_ml, 1600 * 1.25 * np.cos(0.3) / 1000)
    assert np.allclose(row[["x_mm", "y_mm", "z_mm"]].astype(float), (affine @ [19.5, 19.5, 3.5, 1])[:3])
    corner = affine[:3, :3] @ [19, 19, 3]
    assert np.isclose(row.longest_mm, np.linalg.norm(corner))
    assert np.isclose(lesions.case(mask, mask, affine)[1].longest_mm[0], row.longest_mm)


@pytest.mark.parametrize("change, words", [
    (lambda t, p: (t, p[1:]), "both must be the same"), (lambda t, p: (t[0], p[0]), "both must be the same"),
    (lambda t, p: (t, p + 2), "lie in 0 to 1"), (lambda t, p: (t, p * np.nan), "lie in 0 to 1")])
def test_wrong_input(change, words):
    with pytest.raises(ValueError, match=words): lesions.case(*change(np.zeros((6, 6, 6)), np.zeros((6, 6, 6))), ONE_MM)
