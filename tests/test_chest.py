"The synthetic chests: valid DICOM, the same bytes every time, complete or absent, and no way to the label but through the embolus."
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from ctbm import chest, cohort, phantom
from ctbm.preprocess import read_hu

SMALL = dict(n_patients=12, seed=5, slices=10, progress=False)


def hashes(folder: Path) -> dict[str, str]:
    "The SHA-256 of every file below a folder, by relative path."
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return chest.make_chest_cohort(tmp_path_factory.mktemp("chests") / "small", jobs=1, **SMALL)


@pytest.fixture(scope="module")
def truth(small) -> pd.DataFrame:
    return pd.read_csv(small / "truth.csv")


def test_files_are_those_of_a_phantom_cohort_by_patients(small, truth):
    labels = pd.read_csv(small / "labels1.csv")
    assert list(labels.columns) == ["ID", "Label", "PatientID"] and labels.Label.tolist() == truth.label.tolist()
    assert sorted(f"{f.parent.name}/{f.stem}" for f in (small / "CTs").rglob("*.dcm")) == sorted(labels.PatientID + "/" + labels.ID)
    assert labels.groupby("PatientID").size().eq(10).all() and not list(small.parent.glob("*.partial"))
    assert truth.groupby("patient").label.max().sum() == 6 == truth[truth.sites.notna()].patient.nunique()


def test_masks_are_where_the_labels_say(small, truth):
    for patient, rows in truth.groupby("patient"):
        stored = np.load(small / "masks" / f"{patient}.npz")
        assert stored["ids"].tolist() == rows.ID.tolist() and stored["affine"].shape == (10, 4, 4)
        area = (stored["mask"] > 0).sum((1, 2)) * rows.pixel_mm**2
        np.testing.assert_allclose(area, rows.lesion_area_mm2, atol=0.06)
        assert ((rows.lesion_area_mm2 >= chest.MIN_AREA_MM2) == rows.label).all()


def test_the_cohort_is_scanned_without_a_problem(small, truth):
    table = cohort.scan(small / "CTs", jobs=1)
    assert table.problem.isna().all() and set(table.slice_id) == set(truth.ID) and table.groupby("study").series.nunique().eq(1).all()
    told = table.set_index("slice_id").path[truth.ID[0]]
    header = pydicom.dcmread(told)
    assert header.Manufacturer.startswith("SYNTHETIC") and "SYNTHETIC" in str(header.PatientName) and header.BodyPartExamined == "CHEST"
    affine = np.load(small / "masks" / f"{truth.patient[0]}.npz")["affine"][0]
    assert np.allclose(affine[:3, 3], np.float64(header.ImagePositionPatient), atol=1e-3)


def test_two_processes_and_fewer_patients_give_the_same_bytes(small, tmp_path):
    again = hashes(chest.make_chest_cohort(tmp_path / "again", jobs=2, **SMALL | dict(n_patients=3)))
    images = {k: v for k, v in again.items() if k.startswith(("CTs", "masks"))}
    assert len(images) == 33 and images.items() <= hashes(small).items()


def test_an_interrupted_cohort_goes_on_and_another_is_left_alone(small, tmp_path, monkeypatch):
    def torn(folder, wanted, index):
        if index == 2: raise KeyboardInterrupt
        write(folder, wanted, index)
    few, write = SMALL | dict(n_patients=3, slices=8), chest.write_patient
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(chest, "write_patient", torn)
        chest.make_chest_cohort(tmp_path / "torn", jobs=1, **few)
    assert not (tmp_path / "torn").exists()
    done = chest.make_chest_cohort(tmp_path / "torn", jobs=1, **few)
    assert len(pd.read_csv(done / "labels1.csv")) == 24 == len(list(done.rglob("*.dcm"))) and not (done / "truth").exists()
    with pytest.raises(FileExistsError, match="n_patients 3, not 4"):
        chest.make_chest_cohort(done, jobs=1, **few | dict(n_patients=4))
    with pytest.raises(FileExistsError, match="another cohort"):
        phantom.make_cohort(done, n_patients=3, progress=False)
    with pytest.raises(ValueError, match="slices is 3"):
        chest.make_chest_cohort(tmp_path / "none", slices=3)


def test_emboli_are_dark_in_bright_vessels(small, truth):
    paths = cohort.scan(small / "CTs", jobs=1).set_index("slice_id").path
    for row in truth[truth.lesion_area_mm2 > 60].itertuples():
        stored = np.load(small / "masks" / f"{row.patient}.npz")
        inside = read_hu(paths[row.ID])[stored["mask"][stored["ids"].tolist().index(row.ID)] > 0]
        assert np.median(inside) < 0.7 * row.contrast_hu, row.ID


def test_grey_alone_does_not_tell_who_is_ill():
    "Histograms of one slice each of 70 studies, at the height of the arteries: near chance, with emboli and without."
    def histogram(p, emboli):
        hu = p.render(p.body.centre_mm[2] - 15 * p.body.size[2], emboli).hu
        return np.histogram(hu[hu > -200], bins=np.arange(-200, 460, 20))[0] / hu.size
    ill = np.array([phantom.is_positive(11, i, 0.5) for i in range(70)])
    without = np.array([histogram(chest.Patient(11, i), False) for i in range(70)])
    shown = without.copy()
    shown[ill] = [histogram(chest.Patient(11, i), True) for i in np.flatnonzero(ill)]
    for seen in (without, shown):
        score = cross_val_predict(HistGradientBoostingClassifier(max_iter=30), seen, ill, cv=5, method="predict_proba")[:, 1]
        assert roc_auc_score(ill, score) < 0.8
    assert (np.abs(shown - without).sum(1) > 0)[ill].mean() > 0.5


def test_competition_table_holds_its_own_rules(small, tmp_path):
    out = chest.write_competition(small, tmp_path / "rsna")
    table, truth = pd.read_csv(out / "train.csv"), pd.read_csv(small / "truth.csv")
    assert tuple(table.columns) == chest.COLUMNS and len(table) == len(truth) and table.SOPInstanceUID.is_unique
    one = table.groupby("StudyInstanceUID").max()
    assert one.indeterminate.sum() == 1 and ((one.pe_present_on_image + one.negative_exam_for_pe + one.indeterminate) == 1).all()
    ill = one[one.pe_present_on_image == 1]
    assert (ill.rv_lv_ratio_gte_1 + ill.rv_lv_ratio_lt_1 == 1).all() and ill[["leftsided_pe", "rightsided_pe"]].max(axis=1).all()
    assert table.groupby("StudyInstanceUID")[["central_pe", "negative_exam_for_pe", "qa_motion"]].nunique().eq(1).all().all()
