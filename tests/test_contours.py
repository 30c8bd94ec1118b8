"Masks, tables and decisions of new volumes, with a stand-in for the network: mixed folders, geometry, stops, faults."
import shutil
import sys
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK
from highdicom.seg import segread
from pydicom.uid import generate_uid
from scipy.special import expit

from ctbm import calibration, contours, decision, phantom, runs, volumes
from ctbm.contours import Contours
from tests.test_seg import errors

SHAPE = (30, 26, 20)
GRADE = np.r_[np.linspace(0, 0.6, 40), np.linspace(0.5, 1, 40)]
Y = np.repeat([0, 1], 40)
CHOICES = {"chosen": {"threshold": 0.5}, "calibration": calibration.fit("platt", Y, GRADE), "triage": decision.triage(Y, GRADE)}


class Bright:
    "A network that knows that a metastasis is bright."
    threshold, least_mm3, name, sha256, networks = 0.5, 20.0, "run_20260101_120000", "ab" * 32, (None,)
    recipe = SimpleNamespace(name="segment", volumetric=SimpleNamespace(modality="ct"))

    def __init__(self): self.seen = []

    def probability(self, volume):
        assert np.isfinite(volume.array).all() and volume.array.dtype == np.float32
        self.seen.append(volume)
        return expit((volume.array - 100) / 5)


def made(network=None, choices=CHOICES) -> Contours:
    return Contours(network or Bright(), "0.1.0", choices)


def head(shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    "An image with two lesions and a speck, and the mask of the lesions."
    x, y, z = np.ogrid[tuple(map(slice, shape))]
    mask = (x - 8) ** 2 + (y - 9) ** 2 + (z - 7) ** 2 <= 9
    mask |= (x - 20) ** 2 + (y - 15) ** 2 + (z - 12) ** 2 <= 16
    image = np.where(mask, 150, np.random.default_rng(0).normal(40, 3, shape)).astype(np.float32)
    image[2, 2, 2] = 150
    return image, mask


def series(folder: Path, number: int, left_out: int | None = None) -> Path:
    "A tilted CT series with one bright block, which is not in the middle."
    folder.mkdir(parents=True)
    patient = phantom.Patient(2, number)
    header = phantom.study_header(patient)
    for k in range(7):
        hu = np.full((phantom.SIZE, phantom.SIZE), 40, np.float32)
        if 2 <= k <= 4: hu[100:110, 200:220] = 150
        if k != left_out: phantom.write_dicom(phantom.image_dataset(header, patient, k, hu), folder / f"{k}.dcm", "explicit")
    return folder


def itk(path: Path, image: np.ndarray, spacing=(0.9, 1.1, 2.0)) -> Path:
    "A volume as ITK writes it, in an odd order of axes."
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = SimpleITK.GetImageFromArray(image.T)
    volume.SetSpacing(spacing)
    volume.SetDirection((0, 0, 1, 0, -1, 0, 1, 0, 0))
    volume.SetOrigin((-3, 7, 11))
    SimpleITK.WriteImage(volume, str(path))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    "What a folder holds: two CT studies, one of them with a gap, files of several formats, a mask, files that are no volume."
    folder, (image, mask) = tmp_path_factory.mktemp("new") / "scans", head()
    series(folder / "a", 0), series(folder / "gap", 1, left_out=3)
    itk(folder / "Müller" / "t1.nrrd", image), itk(folder / "Beer" / "t1.nrrd", np.where(mask, 40, image).astype(np.float32))
    volumes.write(folder / "scan.nii.gz", np.where(np.arange(SHAPE[0])[:, None, None] < 2, np.nan, image), np.diag([-2.0, 2, 2, 1]))
    volumes.write(folder / "scan_mask.nii.gz", mask.astype(np.uint8), np.diag([-2.0, 2, 2, 1]))
    (folder / "cut.nii.gz").write_bytes((folder / "scan.nii.gz").read_bytes()[:2000])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 5), np.float32), np.eye(4)), folder / "fmri.nii.gz")
    (folder / "readme.txt").write_text("not a scan")
    return folder


@pytest.fixture(scope="module")
def written(mixed, tmp_path_factory) -> tuple[contours.Prediction, Path]:
    out = tmp_path_factory.mktemp("out") / "out"
    return contours.write(made(), mixed, out, dicom=True), out


def test_every_volume_has_a_row(written):
    found, out = written
    studies = found.studies.set_index("case")
    assert {str(kind) for kind in found.studies.dtypes} <= {"str", "float64", "Int64"} and len(studies) == 8
    done, lost = studies[studies.problem.isna()], studies[studies.problem.notna()]
    assert len(done) == 4 and done["mask"].notna().all() and lost[["mask", "score", "lesions"]].isna().all(axis=None)
    assert {"Müller_t1", "Beer_t1", "scan"} < set(done.index)
    assert done.lesions.sum() == len(found.lesions) == 2 + 2 + 1 and done.lesions["Beer_t1"] == 0
    assert done.tumour_ml.sum() == pytest.approx(found.lesions.volume_ml.sum())
    assert "no number" in done.findings["scan"] and "two values" not in str(done.findings)
    reasons = {"cut": "cut short", "fmri": "4 axes", "scan_mask": "a mask, not an image"}
    for case, why in reasons.items(): assert why in lost.problem[case]
    assert lost.problem.str.contains("as if 1 were missing").sum() == 1
    assert sorted(path.name for path in out.iterdir()) == ["files.csv", "lesions.csv", "masks", "predict.json", "seg", "studies.csv"]
    for name, table in found._asdict().items(): assert len(pd.read_csv(out / f"{name}.csv")) == len(table)
    told = runs.read_json(out / "predict.json")
    assert told["counts"]["not_predicted"] == 4 and told["counts"]["segmentations"] == 1 and "5 in 3 volumes" in contours.describe(told)


def test_masks_lie_on_their_images_for_itk_and_for_nibabel(written, mixed):
    found, out = written
    image, mask = head()
    own, back = SimpleITK.ReadImage(str(mixed / "Müller" / "t1.nrrd")), SimpleITK.ReadImage(str(out / "masks" / "Müller_t1.nii.gz"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(back).T, mask), "without the speck, voxel for voxel"
    assert own.GetSize() == back.GetSize() and np.allclose(own.GetDirection(), back.GetDirection(), atol=1e-6)
    assert np.allclose(own.GetSpacing(), back.GetSpacing()) and np.allclose(own.GetOrigin(), back.GetOrigin(), atol=1e-5)
    scan, back = nibabel.load(mixed / "scan.nii.gz"), nibabel.load(out / "masks" / "scan.nii.gz")
    assert np.array_equal(scan.affine, back.affine) and np.array_equal(np.asarray(back.dataobj), mask) and back.get_data_dtype() == np.uint8
    first = found.lesions[found.lesions.case == "Müller_t1"].iloc[0]
    corner = np.array(own.TransformIndexToPhysicalPoint((20, 15, 12))) * (-1, -1, 1)
    assert np.allclose(corner, first[["x_mm", "y_mm", "z_mm"]].astype(float)), "the larger one is the first"


def test_the_series_gets_a_segmentation(written, mixed):
    found, out = written
    row = found.studies[found.studies.seg.str.endswith(".dcm", na=False)].iloc[0]
    read = segread(out / row.seg)
    mask = np.asarray(nibabel.load(out / row["mask"]).dataobj)
    assert mask.sum() == 3 * 10 * 20 and read.number_of_segments == 1 and read.StudyInstanceUID == row.study
    used = found.files[found.files.used & (found.files.series == row.series)]
    assert len(used) == 7 and used["case"].eq(row["case"]).all()
    if shutil.which("dciodvfy"): assert not errors(out / row.seg)
    others = found.studies.seg[(found.studies.seg != row.seg) & found.studies.problem.isna()]
    assert others.str.startswith("not written: the input is no DICOM series").all() and len(list((out / "seg").iterdir())) == 1


def test_every_file_is_accounted_for(written, mixed):
    found, _ = written
    assert set(found.files.file) == {str(p.relative_to(mixed)) for p in mixed.rglob("*") if p.is_file()}
    assert found.files.why[found.files.used].isna().all() and found.files.why[~found.files.used].notna().all()
    assert found.files.used.sum() == 3 + 7


def test_decisions_are_those_of_the_run(written):
    done = written[0].studies.dropna(subset="score")
    assert ((done.decision == "positive") == (done.score >= 0.5)).all() and set(done.decision) == {"positive", "negative"}
    assert np.allclose(done.probability, calibration.apply(CHOICES["calibration"], done.score.to_numpy()))
    assert (done.triage == decision.assign(CHOICES["triage"], done.score.to_numpy())).all()


def test_a_run_that_chose_no_threshold_decides_nothing(mixed, tmp_path):
    found = contours.write(made(choices={}), mixed / "scan.nii.gz", tmp_path / "out")
    said = found.studies.findings[0]
    assert found.studies.decision.isna().all() and "one class only" in said and "no number" in said
    assert "one class only" in contours.describe(runs.read_json(tmp_path / "out" / "predict.json"))


def test_a_stop_loses_nothing(mixed, written, tmp_path, capsys):
    class Stopped(Bright):
        def probability(self, volume):
            if len(self.seen) == 2: raise KeyboardInterrupt
            return super().probability(volume)

    with pytest.raises(KeyboardInterrupt): contours.write(made(Stopped()), mixed, tmp_path / "out", dicom=True)
    assert not (tmp_path / "out").exists() and "the same command goes on" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="was started otherwise"):
        contours.write(made(choices={}), mixed, tmp_path / "out", dicom=True)
    network = Bright()
    found = contours.write(made(network), mixed, tmp_path / "out", dicom=True)
    assert len(network.seen) == 2 and list(tmp_path.iterdir()) == [tmp_path / "out"]
    for name, table in found._asdict().items(): pd.testing.assert_frame_equal(table, getattr(written[0], name))
    for path in (written[1] / "masks").iterdir():
        assert np.array_equal(nibabel.load(path).dataobj, nibabel.load(tmp_path / "out" / "masks" / path.name).dataobj)
    with pytest.raises(FileExistsError, match="name another folder"): contours.write(made(), mixed, tmp_path / "out")


def test_a_failure_at_the_first_case_leaves_nothing(mixed, tmp_path):
    class Broken(Bright):
        def probability(self, volume): raise RuntimeError("no memory")

    with pytest.raises(RuntimeError): contours.write(made(Broken()), mixed / "scan.nii.gz", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["zip", "series", "file"])
def test_sources(mixed, written, tmp_path, kind):
    match kind:
        case "zip":
            source = tmp_path / "scans.zip"
            with zipfile.ZipFile(source, "w") as archive: archive.write(mixed / "scan.nii.gz", "export/scan.nii.gz")
        case "series": source = mixed / "a"
        case "file": source = mixed / "scan.nii.gz"
    found = contours.write(made(), source, tmp_path / "out")
    assert len(found.studies) == 1 and found.studies.score[0] in set(written[0].studies.score)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["files.csv", "lesions.csv", "masks", "predict.json", "studies.csv"]


def test_another_series_stands_in_for_one_with_a_gap(mixed, tmp_path):
    folder = Path(shutil.copytree(mixed / "gap", tmp_path / "scans" / "gap"))
    patient = phantom.Patient(2, 1)
    header = phantom.study_header(patient)
    header.SeriesInstanceUID = "1.2.3"
    hu = np.linspace(0, 80, phantom.SIZE, dtype=np.float32) * np.ones((phantom.SIZE, 1), np.float32)
    for k in range(1, 6):
        image = phantom.image_dataset(header, patient, k, hu)
        image.SOPInstanceUID = generate_uid()
        phantom.write_dicom(image, folder / f"second_{k}.dcm", "explicit")
    found = contours.write(made(), tmp_path / "scans", tmp_path / "out", dicom=True)
    (row,) = found.studies.itertuples()
    assert row.series == "1.2.3" and row.lesions == 0
    assert row.seg == "not written: no lesion" and "passed over" in row.findings
    assert found.files.used.sum() == 5 and found.files.why[~found.files.used].str.contains("series").all()


def test_ct_is_refused_by_a_run_of_mr(mixed, tmp_path):
    network = Bright()
    network.recipe = SimpleNamespace(name="segment", volumetric=SimpleNamespace(modality="mr"))
    found = contours.write(made(network), mixed / "a", tmp_path / "out")
    assert "this is CT, and the run learnt from MR" in found.studies.problem[0] and not network.seen and not found.files.used.any()


def test_what_holds_no_volume_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no volume"): contours.write(made(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="among the scans"): contours.write(made(), tmp_path / "in", tmp_path / "in" / "out")
    with pytest.raises(FileNotFoundError): contours.write(made(), tmp_path / "nothing", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_real_mr(data, tmp_path):
    class Fixed(Bright):
        least_mm3 = 50.0

        def probability(self, volume): return (volume.array > np.percentile(volume.array, 99.9)).astype(np.float32)

    shutil.copytree(data / "mri_tumour_label", tmp_path / "scans")
    found = contours.write(made(Fixed()), tmp_path / "scans", tmp_path / "out")
    studies = found.studies.set_index("case")
    assert studies.problem.isna().to_dict() == {"brain1_image": True, "brain1_label": False, "brain2_image": True, "brain2_label": False}
    files = tmp_path / "scans" / "brain1_image.nrrd", tmp_path / "out" / "masks" / "brain1_image.nii.gz"
    own, back = (SimpleITK.ReadImage(str(path)) for path in files)
    assert own.GetSize() == back.GetSize() and np.allclose(own.GetOrigin(), back.GetOrigin(), atol=1e-3)
    assert SimpleITK.GetArrayFromImage(back).sum() > 0 and found.lesions.longest_mm.gt(0).all()


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    "What `load` reads of a run, its network a stand-in."
    stand_in = types.ModuleType("ctbm.segment")
    stand_in.load = lambda folder, ensemble: Bright()
    monkeypatch.setitem(sys.modules, "ctbm.segment", stand_in)
    monkeypatch.setattr("ctbm.segment", stand_in, raising=False)
    folder = tmp_path / "run_1"
    folder.mkdir()
    for name, content in {"model.json": {"kind": "volume"}, "manifest.json": {"versions": {"ctbm": "9.9"}}}.items():
        runs.write_json(folder / name, content)
    return folder


def test_load(run):
    opened = contours.load(run)
    assert not opened.choices and opened.about()["version"] == "9.9"
    for name, file in contours.CHOICES.items(): runs.write_json(run / file, CHOICES[name])
    assert contours.load(run).choices["chosen"] == {"threshold": 0.5}
    runs.write_json(run / "model.json", {"kind": "bag"})
    with pytest.raises(ValueError, match="no finished run of the recipe segment"): contours.load(run)
