"The synthetic cohort: valid DICOM, the same bytes every time, complete or absent, and no way to the label but through the lesion."
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pydicom
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import cross_val_score
from threadpoolctl import threadpool_limits

from ctbm import phantom

FLAT = dict(n_patients=10, seed=3, positive=0.4, progress=False)


def hashes(folder: Path) -> dict[str, str]:
    "The SHA-256 of every file below a folder, by relative path."
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Path:
    return phantom.make_cohort(tmp_path_factory.mktemp("phantom") / "flat", jobs=2, **FLAT)


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    return phantom.make_cohort(
        tmp_path_factory.mktemp("phantom") / "series", n_patients=2, layout="patients", positive=0.5, jobs=2, progress=False)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_flat_layout(flat):
    labels, truth = pd.read_csv(flat / "labels1.csv", index_col=0), pd.read_csv(flat / "truth.csv")
    assert list(labels.columns) == ["ID", "Label"] and labels.index.tolist() == list(range(20))
    assert labels.ID.is_unique and labels.ID.str.fullmatch("ID_[0-9a-f]{9}").all()
    assert sorted(f.stem for f in (flat / "CTs").iterdir()) == sorted(labels.ID)
    assert labels.Label.tolist() == truth.label.tolist() and truth.groupby("patient").size().eq(2).all()
    assert set(truth.label) == {0, 1}


def test_patients_layout(series):
    labels, truth = pd.read_csv(series / "labels1.csv"), pd.read_csv(series / "truth.csv")
    assert list(labels.columns) == ["ID", "Label", "PatientID"]
    assert sorted(f"{f.parent.name}/{f.stem}" for f in (series / "CTs").rglob("*.dcm")) == sorted(labels.PatientID + "/" + labels.ID)
    assert labels.groupby("PatientID").size().between(22, 42).all()
    assert truth.groupby("patient").label.max().sum() == 1, "half of two patients carry lesions"
    for _, rows in truth.groupby("patient"):
        step = rows.sort_values("slice").position_mm.diff().dropna()
        assert np.allclose(step, rows.thickness_mm.iloc[0], atol=0.02)


def test_labels_masks_and_geometry_agree(flat, series):
    for folder, pattern in ((flat, "{ID}.dcm"), (series, "{patient}/{ID}.dcm")):
        truth = pd.read_csv(folder / "truth.csv").set_index("ID", drop=False)
        for file in (folder / "masks").iterdir():
            m = np.load(file)
            for name, mask, affine in zip(m["ids"], m["mask"], m["affine"], strict=True):
                row = truth.loc[name]
                d = pydicom.dcmread(folder / "CTs" / pattern.format(**row), stop_before_pixels=True)
                area = (mask > 0).sum() * float(d.PixelSpacing[0]) * float(d.PixelSpacing[1])
                assert row.label == (area >= phantom.MIN_AREA_MM2) and abs(row.lesion_area_mm2 - area) < 0.1
                assert d.PatientID == row.patient == file.stem
                assert np.allclose(np.float64(d.ImagePositionPatient), affine[:3, 3], atol=1e-3)
                assert np.allclose(np.float64(d.ImageOrientationPatient) * row.pixel_mm, affine[:3, :2].T.ravel(), atol=1e-5)


def test_every_image_says_that_it_is_synthetic(flat, series):
    for file in [*flat.rglob("*.dcm"), *series.rglob("*.dcm")]:
        d = pydicom.dcmread(file, stop_before_pixels=True)
        assert all("SYNTHETIC" in str(t) for t in (d.PatientName, d.StudyDescription, d.Manufacturer, d.ImageComments))


def test_identifiers_are_unique(flat, series):
    heads = [pydicom.dcmread(f, stop_before_pixels=True) for folder in (flat, series) for f in folder.rglob("*.dcm")]
    assert len({d.SOPInstanceUID for d in heads}) == len(heads)
    assert all(d.SOPInstanceUID.is_valid and d.file_meta.MediaStorageSOPInstanceUID == d.SOPInstanceUID for d in heads)
    for level in ("StudyInstanceUID", "SeriesInstanceUID"):
        assert len({(d.PatientID, d[level].value) for d in heads}) == len({d.PatientID for d in heads}) == 12


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (package dicom3tools)")
def test_dciodvfy_finds_no_error(flat, series, tmp_path):
    files, seen = [*flat.rglob("*.dcm"), *sorted(series.rglob("*.dcm"))[::9]], set()
    for p in (phantom.Patient(1, i) for i in range(60)):
        if p.scanner.model in seen: continue
        seen.add(p.scanner.model)
        for syntax in phantom.TRANSFER_SYNTAXES:
            files.append(tmp_path / f"{p.scanner.model} {syntax}.dcm")
            image = phantom.image_dataset(phantom.study_header(p), p, 12, p.render(p.positions_mm[12]).hu)
            phantom.write_dicom(image, files[-1], syntax)
    assert seen == {s.model for s in phantom.SCANNERS}
    for file in files:
        said = subprocess.run(["dciodvfy", file], capture_output=True, text=True)
        assert "Error" not in said.stdout + said.stderr, f"{file.name}: {said.stderr}"


# ---- the same every time ---------------------------------------------------------------------------------------------


def test_same_arguments_same_bytes(flat, tmp_path):
    assert hashes(phantom.make_cohort(tmp_path / "again", jobs=1, **FLAT)) == hashes(flat)


def test_more_patients_change_none_of_the_earlier(flat, tmp_path):
    fewer = hashes(phantom.make_cohort(tmp_path / "fewer", jobs=1, **FLAT | dict(n_patients=3)))
    images = {f: h for f, h in fewer.items() if f.endswith((".dcm", ".npz"))}
    assert len(images) == 9 and images.items() <= hashes(flat).items()


def test_another_seed_is_another_cohort(flat, tmp_path):
    other = hashes(phantom.make_cohort(tmp_path / "other", jobs=1, **FLAT | dict(n_patients=2, seed=4)))
    assert not set(other.values()) & set(hashes(flat).values())


def test_golden_numbers():
    "Numbers of version 1 of the recipe, with room for the rounding of FFTs: when they move, raise phantom.VERSION."
    p = phantom.Patient(42, 0)
    z = p.positions_mm[19]
    image, quiet = p.render(z), p.render(z, noise=False).hu
    brain = quiet[(quiet > 15) & (quiet < 60)]
    found = [p.head.age, len(p.lesions), p.lesions[0].diameter_mm, brain.mean(), brain.size, (image.mask > 0).sum(),
             (image.hu - quiet)[240:272, 240:272].std(), quiet[256, 256]]
    expected = [47, 4, 17.1389, 35.0268, 54708, 928, 2.88647, 38.4927]
    assert phantom.VERSION == 1 and list(map(float, found)) == pytest.approx(expected, rel=2e-3)


# ---- complete or absent ----------------------------------------------------------------------------------------------


def test_complete_cohort_is_left_alone(flat):
    before = {f: f.stat().st_mtime_ns for f in flat.rglob("*")}
    assert phantom.make_cohort(flat, **FLAT) == flat
    assert {f: f.stat().st_mtime_ns for f in flat.rglob("*")} == before


@pytest.mark.parametrize("change", [dict(seed=4), dict(n_patients=11), dict(difficulty="hard"), dict(lesions=False)])
def test_other_arguments_are_refused(flat, change):
    before = hashes(flat)
    with pytest.raises(FileExistsError, match=next(iter(change))): phantom.make_cohort(flat, **FLAT | change)
    assert hashes(flat) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no phantom cohort"): phantom.make_cohort(tmp_path, **FLAT)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_cohort_goes_on(flat, tmp_path, monkeypatch):
    folder, write, written = tmp_path / "cohort", phantom.write_patient, []

    def fails(where, cohort, index):
        if index == 4: raise KeyboardInterrupt
        written.append(index)
        write(where, cohort, index)

    monkeypatch.setattr(phantom, "write_patient", fails)
    with pytest.raises(KeyboardInterrupt): phantom.make_cohort(folder, jobs=1, **FLAT)
    assert not folder.exists() and (tmp_path / "cohort.partial").is_dir()
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="cohort.partial"): phantom.make_cohort(folder, jobs=1, **FLAT | dict(seed=9))
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "cohort.partial" / "CTs").iterdir()}
    phantom.make_cohort(folder, jobs=1, **FLAT)
    assert written == [0, 1, 2, 3] and hashes(folder) == hashes(flat) and not (tmp_path / "cohort.partial").exists()
    assert all((folder / "CTs" / f.name).stat().st_mtime_ns == t for f, t in kept.items()), "finished patients are not made again"


@pytest.mark.parametrize("wrong, says", [
    (dict(difficulty="Easy"), "easy, medium, hard"), (dict(layout="tree"), "flat, patients"),
    (dict(transfer_syntax="png"), "jpegls, rle, explicit"),
    (dict(positive=20), "between 0 and 1"), (dict(n_patients=0), "n_patients"), (dict(slices_per_patient=0), "slices_per_patient")])
def test_wrong_arguments(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says): phantom.make_cohort(tmp_path / "cohort", **FLAT | wrong)
    assert not any(tmp_path.iterdir())


# ---- lesions and nothing but lesions ---------------------------------------------------------------------------------


def test_lesions_off_keeps_everything_else(flat, tmp_path):
    off = phantom.make_cohort(tmp_path / "off", jobs=2, lesions=False, **FLAT)
    a, b = hashes(flat), hashes(off)
    ill = pd.read_csv(flat / "truth.csv").set_index("ID").patient_lesions > 0
    assert a.keys() == b.keys()
    assert {f for f in a if a[f] != b[f]} == {"cohort.json", *(f"CTs/{i}.dcm" for i in ill.index[ill])}
    one = ill.index[ill][0]
    heads = [pydicom.dcmread(c / "CTs" / f"{one}.dcm") for c in (flat, off)]
    for d in heads: del d.PixelData
    assert heads[0] == heads[1]


def test_contrast_is_linear_in_kappa():
    p = phantom.Patient(5, 1)
    z = p.table_mm(p.lesions[0].centre_mm)
    for a, b, c in ((0.0, 0.5, 1.0), (1.0, 1.5, 2.0)):
        a, b, c = (p.render(z, kappa=k).hu for k in (a, b, c))
        assert np.abs((c - b) - (b - a)).max() < 0.05 < np.abs(c - a).max()


def greys(index: int) -> tuple[np.ndarray, np.ndarray, int]:
    "Grey histograms of one slice of one patient, as labelled and with its lesions left out, and the label of the patient."
    p, ill = phantom.Patient(11, index), phantom.is_positive(11, index, 0.5)
    (k,) = phantom.choose_slices(p, 1)
    off = p.render(p.positions_mm[k], lesions=False).hu
    on = p.render(p.positions_mm[k]).hu if ill else off
    return *(np.histogram(hu, 40, (-20, 120), density=True)[0] for hu in (on, off)), int(ill)


def header(index: int) -> tuple[list[float], int]:
    "What the header of one slice says, as numbers, and the label of the patient."
    p, (k,) = phantom.Patient(12, index), phantom.choose_slices(phantom.Patient(12, index), 1)
    h = phantom.image_dataset(phantom.study_header(p), p, k, np.zeros((phantom.SIZE, phantom.SIZE), np.float32))
    model = [s.model for s in phantom.SCANNERS].index(h.ManufacturerModelName)
    said = [model, h.PatientSex == "F", h.PatientAge[:3], "ContrastBolusAgent" in h, h.KVP, h.SliceThickness, h.GantryDetectorTilt,
            h.SliceLocation, h.PixelSpacing[0], h.InstanceNumber, *h.ImagePositionPatient, h.StudyDate, h.StudyTime]
    return [*map(float, said), int(h.PatientID[-8:], 16)], int(phantom.is_positive(12, index, 0.5))


def auroc(x: list, y: list) -> tuple[float, float]:
    "Mean AUROC of gradient boosting over six folds, and the standard error it has when there is nothing to find."
    x, y = np.array(x), np.array(y)
    with threadpool_limits(1):
        folds = cross_val_score(HistGradientBoostingClassifier(max_iter=60, random_state=0), x, y, cv=6, scoring="roc_auc")
    return folds.mean(), (len(y) + 1) ** 0.5 / (12 * y.sum() * (1 - y).sum()) ** 0.5


def test_without_lesions_grey_values_do_not_tell():
    on, off, y = zip(*joblib.Parallel(2)(joblib.delayed(greys)(i) for i in range(200)), strict=True)
    value, error = auroc(off, y)
    assert abs(value - 0.5) < 2.5 * error
    assert auroc(on, y)[0] > 0.5 + 5 * error, "with lesions the same classifier must see them, or the test has no power"


def test_header_does_not_tell():
    x, y = zip(*joblib.Parallel(2)(joblib.delayed(header)(i) for i in range(600)), strict=True)
    value, error = auroc(x, y)
    assert abs(value - 0.5) < 2.5 * error


def test_lesions_are_where_and_as_large_as_the_truth_says(flat):
    truth = pd.read_csv(flat / "truth.csv")
    assert (truth[truth.label == 1].diameters_mm.str.split().map(len) == truth[truth.label == 1].patient_lesions).all()
    for p in (phantom.Patient(42, i) for i in range(3)):
        z = p.table_mm(p.lesions[0].centre_mm)
        on, off = p.render(z, noise=False), p.render(z, lesions=False, noise=False)
        seen = on.mask == 1
        assert seen.sum() * p.scanner.pixel_mm**2 < 1.5 * np.pi * (max(p.lesions[0].radii_mm)) ** 2
        assert np.abs(on.hu - off.hu)[seen].mean() > 10


def test_import_is_light():
    code = "import sys, ctbm.phantom; print([m for m in ('torch', 'timm', 'matplotlib', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
