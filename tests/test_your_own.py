"From a hospital folder to a report: the notebook through papermill, on its own messy folder and on real files."
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from papermill import inspect_notebook
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from ctbm import cohort, runs
from tests.conftest import ROOT

NOTEBOOK = ROOT / "nbs" / "30_your_own_data.ipynb"
TINY = {"backbone": "test_resnet", "weights": "none", "size": 64, "epochs_head": 0, "epochs_ft": 1, "k_folds": 2, "num_workers": 1,
        "prep_plot_n": 1}


def papermill(out: Path, **parameters) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(out), "--no-progress-bar", "-y", json.dumps(parameters)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def said(out: Path) -> str:
    "Everything that the executed notebook shows as text."
    outputs = [each for cell in json.loads(out.read_text(encoding="utf8"))["cells"] for each in cell.get("outputs", [])]
    return "\n".join("".join(each.get("text", each.get("data", {}).get("text/plain", ""))) for each in outputs)


@pytest.fixture(scope="module")
def export(cohort_folder, data, tmp_path_factory) -> Path:
    "An export in both layouts with real files among the synthetic ones, and a spreadsheet's table of labels in other words."
    root = tmp_path_factory.mktemp("own") / "export"
    truth = pd.read_csv(cohort_folder / "truth.csv")
    rows = []
    for number, (patient, part) in enumerate(truth.groupby("patient")):
        for k, slice_ in enumerate(part.itertuples()):
            name = slice_.ID if number % 2 else f"{patient}/IM{k}"
            target = root / "PACS" / (f"{name}.dcm" if number % 2 else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(cohort_folder / "CTs" / f"{slice_.ID}.dcm", target)
            rows.append((patient, name, "ja" if slice_.label else "nein"))
    real = sorted((data / "headct_ge_hispeed_tilt18p5").rglob("*.dcm"))[:3]
    for number, (path, syntax) in enumerate(zip(real, (RLELossless, JPEG2000Lossless, JPEGLSLossless), strict=True)):
        image = dcmread(path)
        image.PatientName, image.PatientBirthDate, image.PatientID = "Real^Name", "19500101", "HOSP-4711"
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(root / "PACS" / f"real{number}")
        rows.append(("HOSP-4711", f"real{number}", "nein"))
    shutil.copytree(data / "phantom_philips_brain5mm", root / "PACS" / "philips")
    with (root / "Tabelle.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("Fall", "Bild", "Metastase"), *rows])
    return root


@pytest.fixture(scope="module")
def done(export) -> tuple[Path, str]:
    "The working folder and what the notebook said of that export, which stays as it was."
    work, out = export.parent / "work", export.parent / "out.ipynb"
    content = lambda: {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    before = content()
    finished = papermill(out, data_root=str(export), scans="PACS", labels="Tabelle.csv", work=str(work), scale="demo", values=TINY,
                         names={"Bild": "ID", "Fall": "PatientID", "Metastase": "Label"}, words={"ja": "1", "nein": "0"})
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert content() == before
    return work, said(out)


@pytest.mark.slow
def test_an_export_becomes_a_run_with_a_report(done):
    work, told = done
    run = runs.latest(work / "outputs")
    assert (run / "report.html").is_file() and (run / "model_card.md").is_file()
    chosen = runs.read_json(run / "threshold_selection.json")
    assert (chosen["strategy"], chosen["cost_ratio"]) == ("cost", 10)
    assert f"{chosen['threshold']:.4g} (cost" in told


@pytest.mark.slow
def test_the_working_copy_keeps_pixels_and_no_name(done, export):
    work, _ = done
    key = pd.read_csv(work / "key" / "key.csv", dtype=str)
    assert key.path.is_unique and len(key) == 123 and key["name"].nunique() == key.patient.nunique() == 61
    files = sorted((work / "data" / "CTs").rglob("*.dcm"))
    assert len(files) == len(key)
    mine = key[key.patient == "HOSP-4711"]
    for row in mine.itertuples():
        pseudonym, number = row.label_id.split("/")
        copy, real = dcmread(work / "data" / "CTs" / pseudonym / f"{number}.dcm"), dcmread(row.path)
        assert (copy.pixel_array == real.pixel_array).all() and copy.file_meta.TransferSyntaxUID == real.file_meta.TransferSyntaxUID
        assert copy.PatientID == pseudonym and "PatientName" not in copy and "PatientBirthDate" not in copy
        assert not any(element.tag.is_private for element in copy.iterall())
        assert all(copy[name].value != real[name].value for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"))
    seen = b"".join(path.read_bytes()[:4000] for path in files)
    assert b"HOSP-4711" not in seen and b"Real^Name" not in seen and b"SYN-" not in seen
    found = cohort.join_labels(cohort.scan(work / "data" / "CTs"), work / "data" / "labels1.csv")
    assert len(cohort.usable(found)) == len(key) and set(found.patient) == set(key["name"])


def test_what_is_wrong_is_said_before_anything_is_read(tmp_path):
    finished = papermill(tmp_path / "out.ipynb", data_root=str(tmp_path), values={"lr_fine": 1})
    assert finished.returncode != 0 and "did you mean 'lr_ft'" in finished.stderr


def test_every_parameter_has_a_type_and_a_help():
    told = inspect_notebook(str(NOTEBOOK))
    assert {"data_root", "scans", "labels", "names", "words", "work", "recipe", "values", "cost_ratio"} <= set(told)
    assert all(each["inferred_type_name"] not in (None, "None") and each["help"] for each in told.values())
