import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from ctbm import models, phantom, train

ROOT = Path(__file__).parents[1]
SMALL = {"scale": "demo", "backbone": "test_resnet", "weights": "none", "size": 32, "epochs_head": 0, "epochs_ft": 2, "k_folds": 2,
         "num_workers": 1, "prep_plot_n": 0, "report": False}
FOCAL = {"recipe": "focal_f2", "scale": "demo", "backbone": "test_resnet", "weights": "none", "size": 32, "resample_mm": 6.0,
         "epochs_all": 3, "num_workers": 1, "checkpoint_every": 2, "prep_plot_n": 0, "report": False}

BAGS = {"recipe": "patient", "scale": "demo", "backbone": "resnet10t", "weights": "none", "size": 32, "epochs_layer3": 2, "num_workers": 1,
        "checkpoint_every": 1, "prep_plot_n": 0, "report": False}


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


def once(
    factory: pytest.TempPathFactory,
    name: str,
    make: Callable[[Path], Path],  # a new folder -> what is to be shared
) -> Path:
    "Made by the first process of the tests that needs it, and read by all."
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        if not (base / f"{name}.txt").is_file():
            (base / f"{name}.txt").write_text(str(make(factory.mktemp(name))))
    return Path((base / f"{name}.txt").read_text())


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory) -> Path:
    "A synthetic cohort of 60 patients with two slices each, half of the patients positive."
    make = lambda place: phantom.make_cohort(place / "flat", n_patients=60, slices_per_patient=2, positive=0.5, progress=False)
    return once(tmp_path_factory, "cohort", make)


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
    values = SMALL | {"backbone": "resnet10t", "prep_plot_n": 1, "data_root": str(cohort_folder)}
    make = lambda place: train.run(outputs=str(place / "outputs"), packs=str(place / "packs"), **values)
    return once(tmp_path_factory, "small_run", make)


@pytest.fixture(scope="session")
def bag_folder(tmp_path_factory) -> Path:
    "A synthetic cohort of 30 patients with five slices each, half of the patients positive."
    make = lambda place: phantom.make_cohort(place / "flat", n_patients=30, slices_per_patient=5, positive=0.5, progress=False)
    return once(tmp_path_factory, "bags", make)


@pytest.fixture(scope="session")
def bag_run(bag_folder, tmp_path_factory) -> Path:
    "A finished run of the patient recipe that learnt little in four epochs. Copy it before changing it."
    values = BAGS | {"report": True, "prep_plot_n": 1, "data_root": str(bag_folder)}
    make = lambda place: train.run(outputs=str(place / "outputs"), packs=str(place / "packs"), **values)
    return once(tmp_path_factory, "bag_run", make)
