"The questions of the exploratory analysis on tables small enough to answer by hand."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread

from ctbm import cohort, eda, phantom
from ctbm.preprocess import Unreadable, read_hu

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "01_eda.ipynb"


@pytest.fixture
def table():
    "Four patients: a and b negative, c positive, d both; one row without a label, one that is no CT."
    rows = pd.DataFrame(index=range(8), columns=[*cohort.COLUMNS, "label"], dtype=object)
    label = pd.array([0, 0, 0, 1, 0, 1, pd.NA, pd.NA], dtype="Int64")
    thickness = [5, 5, 5, 1, 1, np.nan, 5, np.nan]
    rows = rows.assign(patient=list("aabcddef"), label=label, thickness_mm=thickness, manufacturer="X", series="1.2", frame=0)
    rows["kernel"] = [*["SOFT"] * 3, *["BONE"] * 3, "SOFT", None]
    rows["problem"] = [*[None] * 6, "no label: not in labels1.csv", "localizer: a scout view, not a slice"]
    rows["path"], rows["slice_id"], rows["instance"] = ([form.format(i) for i in range(8)] for form in ("{}.dcm", "ID_{}", "1.{}"))
    return rows.assign(position_mm=np.arange(8.0)[::-1])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Six synthetic patients with two slices each."
    folder = tmp_path_factory.mktemp("eda") / "cohort"
    return phantom.make_cohort(folder, n_patients=6, seed=5, positive=0.5, jobs=1, progress=False)


@pytest.fixture(scope="module")
def scanned(files):
    return cohort.join_labels(cohort.scan(files / "CTs"), files / "labels1.csv")


def test_balance_counts_slices_and_patients(table):
    balance = eda.class_balance(table)
    assert balance.loc["slices", ["negative", "positive", "imbalance"]].tolist() == [4, 2, 2]
    assert balance.loc["patients", ["negative", "positive", "imbalance"]].tolist() == [2, 2, 1]


def test_balance_without_a_positive_has_no_ratio(table):
    assert eda.class_balance(table.assign(label=table["label"].where(table["label"] != 1)))["imbalance"].isna().all()


def test_patients_across_labels(table):
    across = eda.patients_across_labels(table)
    assert across["patients"].to_dict() == {"negative only": 2, "positive only": 1, "both": 1}
    assert across["slices"].sum() == 6 and across.loc["both", "most_slices"] == 2


def test_leak_of_a_split_by_slices(table):
    assert eda.seen_before(table, 0.5) == pytest.approx(4 * 0.5 / 6)  # the slices of a and d each meet the other with probability one half


def test_checks_count_and_are_plain_json(table):
    checks = json.loads(json.dumps(cohort.checks(table)))
    assert checks["rows"] == 8 and checks["images"] == 7 and checks["usable"] == 6 and checks["patients"] == 4
    assert checks["missing"]["label"] == 1 and checks["missing"]["thickness_mm"] == 1
    assert checks["problems"] == {"no label": 1, "localizer": 1} and checks["duplicate_ids"] == 0


def test_header_that_decides_the_label_is_seen(table):
    spread = eda.header_spread(table, ["kernel", "thickness_mm"])
    assert spread.loc[("kernel", "BONE"), ["patients", "positive", "share"]].tolist() == [2, 2, 1]
    assert spread.loc[("kernel", "SOFT"), "share"] == 0 and spread.loc[("thickness_mm", "absent"), "slices"] == 1
    many = pd.concat([table.assign(patient=table["patient"] + str(i)) for i in range(10)], ignore_index=True)
    told = eda.header_association(many, ["manufacturer", "kernel"], shuffles=100)
    assert told.index[0] == "kernel" and told["V"].tolist() == [pytest.approx(1, abs=1e-6), 0] and told.loc["kernel", "chance"] < 0.5


def test_header_figure_has_a_point_for_each_value(table):
    headers = ["kernel", "thickness_mm"]
    points = [line for line in eda.header_figure(table, headers).axes[0].lines if line.get_marker() == "o"]
    assert len(points) == len(eda.header_spread(table, headers)) == 5


def test_no_usable_image_is_an_error_that_says_why(table):
    with pytest.raises(ValueError, match="localizer"): cohort.usable(table.iloc[6:])


def test_sample_takes_every_patient_before_a_second_slice(table):
    assert set(eda.sample(table, 0, 3)["patient"]) == {"a", "b", "d"} and len(eda.sample(table, 0, 99)) == 4
    with pytest.raises(ValueError, match="label 2"): eda.sample(table, 2, 1)


def test_histograms_and_grid_read_the_files(scanned):
    assert len(eda.hu_densities(scanned, np.arange(-20, 101, 10), n=2)) == 4
    assert len(eda.hu_histograms(scanned, n=1).axes) == 2 and len(eda.example_grid(scanned, 1, n=2).axes) == 2


def test_series_from_below_upwards(scanned, table):
    assert eda.series_images(table)["slice_id"].tolist() == [f"ID_{i}" for i in range(6, -1, -1)]  # positions fall in the table
    assert eda.series_images(scanned)["position_mm"].is_monotonic_increasing
    with pytest.raises(ValueError, match="9.9"): eda.series_images(scanned, "9.9")


def test_duplicates_of_every_kind(files, scanned, tmp_path, monkeypatch):
    assert eda.duplicates(scanned).empty
    shutil.copytree(files, tmp_path / "c")
    folder = tmp_path / "c" / "CTs"
    first, second, third, fourth = sorted(folder.glob("*.dcm"))[:4]
    shutil.copy(first, folder / f"{first.stem} (1).dcm")
    shutil.copy(second, folder / "other_name.dcm")
    anonymised = dcmread(third)
    anonymised.PatientID, anonymised.SOPInstanceUID = "someone else", "1.2.3"
    anonymised.save_as(folder / "anonymised.dcm")

    def read(path, frame):
        if path == str(fourth): raise Unreadable(path, "cannot be decoded")
        return read_hu(path, frame)

    monkeypatch.setattr(eda, "read_hu", read)
    found = eda.duplicates(cohort.join_labels(cohort.scan(folder), tmp_path / "c" / "labels1.csv"), jobs=1)
    assert found.groupby("kind")["slice_id"].agg(set).to_dict() == {
        "browser copy": {first.stem, f"{first.stem} (1)"}, "same file": {second.stem, "other_name"},
        "same pixels": {third.stem, "anonymised"}, "not decoded": {fourth.stem}}
    assert found.groupby("kind")["patients"].first().to_dict() == {"browser copy": 1, "same file": 1, "same pixels": 2, "not decoded": 1}


def test_misspelt_parameter_stops_the_notebook(tmp_path):
    papermill = pytest.importorskip("papermill")
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'data_root'"):
        papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", dict(data_rot="x"), kernel_name="python3", progress_bar=False)


def test_import_needs_no_torch():
    code = "import ctbm.eda, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
