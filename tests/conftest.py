import os
from pathlib import Path

import pytest

from ctbm import phantom

ROOT = Path(__file__).parents[1]


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
