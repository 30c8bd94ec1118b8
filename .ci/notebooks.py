"""Run every notebook of `nbs/` as papermill does, from top to bottom with its defaults, and say how long each took.

05_train is the job itself and 20_compare does it several times: the tests run them through papermill with small settings.
"""
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

import papermill

NBS = Path(__file__).parents[1] / "nbs"
ELSEWHERE = ("05_train", "20_compare")


def run(
    notebook: Path,
    folder: str,  # for the executed notebook
) -> tuple[float, str]:  # seconds, what went wrong
    "One notebook in a kernel of its own."
    start = time.monotonic()
    try:
        papermill.execute_notebook(notebook, Path(folder) / notebook.name, cwd=NBS, progress_bar=False, kernel_name="python3")
    except Exception as error:
        return time.monotonic() - start, str(error)
    return time.monotonic() - start, ""


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in NBS.glob("*.ipynb") if path.stem not in ELSEWHERE)
    failed = []
    with TemporaryDirectory() as folder, ProcessPoolExecutor(os.cpu_count()) as pool:
        waiting = {pool.submit(run, NBS / f"{name}.ipynb", folder): name for name in names}
        for done in as_completed(waiting):
            seconds, wrong = done.result()
            print(f"{waiting[done]:20} {seconds:5.0f} s  {'FAILED' if wrong else 'ok'}", flush=True)
            if wrong: failed.append(f"{waiting[done]}\n{wrong}")
    sys.exit("\n\n".join(failed) or None)
