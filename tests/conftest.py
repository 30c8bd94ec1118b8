import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    "The folder of real images that tests read and that is never committed: `CTBM_TEST_DATA`, or `../shared/data` beside the project."
    folder = Path(os.environ.get("CTBM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set CTBM_TEST_DATA to their folder")
    return folder
