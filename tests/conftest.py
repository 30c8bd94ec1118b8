import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ctbm import models, phantom, train

ROOT = Path(__file__).parents[1]
SMALL = {"scale": "demo", "backbone": "resnet10t", "weights": "none", "size": 32, "epochs_head": 0, "epochs_ft": 2, "k_folds": 2,
         "num_workers": 1, "report": False}
FOCAL = {"recipe": "focal_f2", "scale": "demo", "weights": "none", "size": 32, "resample_mm": 6.0, "epochs_all": 3, "num_workers": 1,
         "checkpoint_every": 2, "report": False}

BAGS = {"recipe": "patient", "scale": "demo", "backbone": "resnet10t", "weights": "none", "size": 32, "epochs_layer3": 2, "num_workers": 1,
        "checkpoint_every": 1, "report": False}


def oof(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "oof_predictions.csv")


def papermill(tmp_path, *parameters) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "papermill", "nbs/05_train.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    return subprocess.run([*words, *map(str, parameters)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def data() -> Path:
    "The folder of real images that tests read and that is never committed: `CTBM_TEST_DATA`, or `../shared/data` beside the project."
    folder = Path(os.environ.get("CTBM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set CTBM_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory) -> Path:
    "A synthetic cohort of 60 patients with two slices each, half of the patients positive."
    return phantom.make_cohort(tmp_path_factory.mktemp("cohort") / "flat", n_patients=60, slices_per_patient=2, positive=0.5)


@pytest.fixture
def forget_weights():
    "What was found out about weights in one test is not true in another."
    models.find_weights.cache_clear()
    yield
    models.find_weights.cache_clear()


@pytest.fixture(scope="module")
def workplace(cohort_folder, tmp_path_factory) -> dict:
    "Where the runs of a test file go."
    place = tmp_path_factory.mktemp("runs")
    return {"data_root": str(cohort_folder), "outputs": str(place / "outputs"), "packs": str(place / "packs")}


@pytest.fixture(scope="session")
def small_run(cohort_folder, tmp_path_factory) -> Path:
    "A finished run that learnt little in two epochs. Copy it before changing it."
    place = tmp_path_factory.mktemp("small_run")
    return train.run(data_root=str(cohort_folder), outputs=str(place / "outputs"), packs=str(place / "packs"), **SMALL)


@pytest.fixture(scope="session")
def bag_folder(tmp_path_factory) -> Path:
    "A synthetic cohort of 30 patients with five slices each, half of the patients positive."
    return phantom.make_cohort(tmp_path_factory.mktemp("bags") / "flat", n_patients=30, slices_per_patient=5, positive=0.5)


@pytest.fixture(scope="session")
def bag_run(bag_folder, tmp_path_factory) -> Path:
    "A finished run of the patient recipe that learnt little in four epochs. Copy it before changing it."
    place = tmp_path_factory.mktemp("bag_run")
    return train.run(data_root=str(bag_folder), outputs=str(place / "outputs"), packs=str(place / "packs"), **BAGS | {"report": True})
