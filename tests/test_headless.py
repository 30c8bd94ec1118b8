"Runs without anybody watching, and with somebody: parameters, logs, the executed notebook, what is left when a run is stopped."
import ast
import gc
import json
import signal
import sys
import weakref
from pathlib import Path

import lightning
import nbformat
import papermill
import pytest
import torch

from ctbm import jobs, learning, recipes, runs, train
from tests.browser import browser_page, jupyter_lab, run_all, write_notebook
from tests.conftest import ROOT, SMALL

HEADLESS = {path.stem: path for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if '"parameters"' in path.read_text(encoding="utf8")}


def sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", HEADLESS)
def test_every_parameter_says_what_it_is(name):
    "`papermill --help-notebook` gives a type, a default of that type, and a text."
    types = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
    found = papermill.inspect_notebook(HEADLESS[name])
    assert found
    for parameter in found.values():
        assert parameter["inferred_type_name"] in types and len(parameter["help"]) > 8, parameter
        default = ast.literal_eval(parameter["default"])
        assert default is None or type(default) is types[parameter["inferred_type_name"]], parameter


def test_the_job_lists_options_of_every_recipe():
    found = papermill.inspect_notebook(HEADLESS["05_train"])
    understood = {recipe: set(jobs.parameters(recipe)) for recipe in recipes.RECIPES}
    assert set(found) <= set.union(*understood.values()), "a parameter that no recipe knows"
    for recipe, names in understood.items():
        own = [name for name in found if name in names and not all(name in others for others in understood.values())]
        assert any(name in recipes.flat(recipes.RECIPES[recipe]) for name in own), f"no option of {recipe} itself"
        assert f"{recipe}" in found["recipe"]["help"]


@pytest.mark.parametrize("name", HEADLESS)
def test_a_kernel_without_the_package_is_told_what_to_do(name, monkeypatch):
    guard = next(source for source in sources(HEADLESS[name]) if "from ctbm" in source or "import ctbm" in source)
    monkeypatch.setitem(sys.modules, "ctbm.recipes", None)
    with pytest.raises(ModuleNotFoundError, match="Change Kernel") as caught:
        exec(guard, {})
    assert sys.executable in str(caught.value) and "pip install -e ." in str(caught.value)


@pytest.fixture
def watched_trainers(monkeypatch) -> list:
    "Weak references to every trainer, module, network and optimizer that training makes."
    made, real = [], lightning.Trainer.fit

    def fit(trainer, module, *loaders, **how):
        try:
            return real(trainer, module, *loaders, **how)
        finally:
            made.extend(map(weakref.ref, (trainer, module, module.network, *trainer.optimizers)))

    monkeypatch.setattr(lightning.Trainer, "fit", fit)
    return made


def test_a_run_lets_go_of_its_networks_and_its_log_is_short(workplace, watched_trainers, monkeypatch, capfd):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(emptied)))
    gc.disable()  # so that it is the run itself that lets go
    try:
        run = train.run(**workplace, **SMALL)
        assert len(watched_trainers) >= 12 and not [ref for ref in watched_trainers if ref() is not None]
    finally:
        gc.enable()
    assert emptied and not (run / jobs.STATE).exists()
    said = capfd.readouterr()
    assert "\r" not in said.out + said.err, "a bar in a log"
    epochs = [line for line in said.out.splitlines() if "epoch" in line and "loss" in line]
    assert len(epochs) == 6 and all("fold" in line and "AUPRC" in line for line in epochs)
    assert all("at most" in line for line in epochs[:-1]) and len(said.out.splitlines()) < 80


def test_ctrl_c_is_ctrl_c_and_lets_go(workplace, watched_trainers, monkeypatch, tmp_path, capfd):
    "Lightning would end the program."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    line = learning.epoch_line
    stop = lambda row, monitor: signal.raise_signal(signal.SIGINT) if row["epoch"] == 2 else line(row, monitor)
    monkeypatch.setattr(learning, "epoch_line", stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.run(**workplace | {"outputs": str(tmp_path)}, **SMALL)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C works no more"
    finally:
        signal.signal(signal.SIGINT, before)
    (partial,) = tmp_path.glob("*.partial")
    state = runs.read_json(partial / jobs.STATE)
    assert state["state"] == "stopped" and state["error"].startswith("KeyboardInterrupt")
    assert f"`ctbm train --resume {partial}` goes on" in capfd.readouterr().out
    assert watched_trainers and not [ref for ref in watched_trainers if ref() is not None]


STOPPED = """
import signal
from ctbm import learning, train
line = learning.epoch_line
def stop(row, monitor): {how}; return line(row, monitor)
learning.epoch_line = stop
"""


@pytest.mark.parametrize(("how", "error"), [("signal.raise_signal(signal.SIGTERM)", "Terminated"), ("bytearray(1 << 60)", "MemoryError")])
def test_a_stopped_run_says_so_in_the_notebook_and_in_its_folder(how, error, workplace, tmp_path):
    asked = workplace | SMALL | {"outputs": str(tmp_path / "outputs")}
    made = write_notebook(tmp_path / "in.ipynb", STOPPED.format(how=how), f"train.run(**{asked})", "'never'")
    with pytest.raises(papermill.PapermillExecutionError, match=error):
        papermill.execute_notebook(made, tmp_path / "out.ipynb", progress_bar=False, cwd=ROOT)
    cells = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"]
    (at,) = [cell for cell in cells if any(output.output_type == "error" for output in cell.outputs)]
    assert at.source.startswith("train.run") and not cells[-1].outputs
    said = "".join(output.get("text", "") for output in at.outputs)
    (partial,) = (tmp_path / "outputs").glob("*.partial")
    state = runs.read_json(partial / jobs.STATE)
    assert state["error"].startswith(error) and f"{state['resume']}` goes on" in said
    if error == "Terminated":
        finished = train.run(resume=partial)
        assert finished.suffix == "" and not (finished / jobs.STATE).exists()


def test_executed_notebook_is_a_report(workplace, tmp_path):
    "Through papermill as users call it: few lines in the log, every figure and picture in the notebook, links."
    values = workplace | SMALL | {"report": True, "prep_plot_n": 1, "outputs": str(tmp_path / "outputs")}
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(HEADLESS["05_train"], out, values, progress_bar=False, cwd=ROOT)
    run, cells = runs.latest(tmp_path / "outputs"), nbformat.read(out, 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pages = "".join(output.data.get("text/html", "") for output in outputs if output.output_type == "display_data")
    assert pages.count("<img") == len(list(run.glob("*.png"))) - 1, "all pictures but the preprocessing of the negatives"
    assert "<table" in pages and "sensitivity" in pages and "threshold" in pages
    assert (run / "report.html").as_uri() in "".join(output.data.get("text/markdown", "") for output in outputs if "data" in output)
    assert max(len(output.text.splitlines()) for output in outputs if output.output_type == "stream") < 90


@pytest.mark.slow
def test_jupyterlab_shows_a_bar_and_trains_twice_in_one_kernel(workplace, tmp_path):
    asked = workplace | SMALL | {"outputs": str(tmp_path / "outputs"), "epochs_ft": 1}
    write_notebook(tmp_path / "run.ipynb", "from ctbm import train", *[f"train.run(**{asked})"] * 2)
    with jupyter_lab(tmp_path) as lab, browser_page() as page:
        run_all(page, lab, "run.ipynb")
        bars = page.locator(".jp-OutputArea progress")
        assert bars.count() == 2 and {bar.get_attribute("value") for bar in bars.all()} == {"1.0000"}
        below = page.locator(".jp-OutputArea progress + pre").first.inner_text()
        assert below.startswith("100%") and "fold 1" in below and "fold final" in below
        assert not page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count()
        page.screenshot(path=tmp_path / "bars.png")
    assert len(list((tmp_path / "outputs").glob("run_*"))) == 2
