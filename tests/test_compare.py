"Recipes side by side: the tables against the stored figures, and the notebook through papermill."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ctbm import evaluate, report, runs
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def pair(small_run, tmp_path_factory) -> list[Path]:
    "A small run, and one of another recipe on the same folds that scores a little worse."
    place = tmp_path_factory.mktemp("pair")
    first = Path(shutil.copytree(small_run, place / "outputs" / "first"))
    other, rng = Path(shutil.copytree(first, place / "outputs" / "other")), np.random.default_rng(0)
    for name, score in (("oof", "score"), ("test", "prob")):
        table = pd.read_csv(other / f"{name}_predictions.csv", dtype={"id": str, "patient": str}).sample(frac=1, random_state=0)
        runs.write_table(other / f"{name}_predictions.csv", table.assign(**{score: 0.6 * table[score] + 0.4 * rng.random(len(table))}))
    config = runs.read_json(other / "effective_config.json")
    runs.write_json(other / "effective_config.json", config | {"recipe": "focal_f2", "loss": "focal"})
    return [first, other]


def papermill(out: Path, *parameters: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "papermill", "nbs/20_compare.ipynb", str(out), "--no-progress-bar", *parameters]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_tables_say_what_the_runs_stored(pair):
    beside, apart = report.side_by_side(pair), report.differences(pair)
    assert beside.index.names == ["scores", "of", "run"] and len(beside) == 8
    for run, name in zip(pair, ("slice_cv", "focal_f2"), strict=True):
        e = report.evidence(run)
        for side, rows in (("out-of-fold", e.oof), ("test", e.test)):
            stored = evaluate.score(rows.label, rows.score, e.chosen["threshold"], rows.patient)
            said = beside.loc[(side, "slices", name)]
            assert [said[report.FIGURES[k]] for k in ("roc_auc", "f2")] == [report.interval(stored[k]) for k in ("roc_auc", "f2")]
            assert apart.loc[(side, "slices", "focal_f2", "AUROC")]["slice_cv" if name == "slice_cv" else "this run"] in said["AUROC"]
            assert apart.loc[(side, "slices", "focal_f2", "F2")]["slice_cv" if name == "slice_cv" else "this run"] in said["F2"]
    assert set(report.settings(pair).index) == {"recipe", "loss"}
    wanted = {"AUROC", "average precision", "sensitivity", "specificity", "F2"}
    assert wanted <= set(apart.index.get_level_values("figure"))


def test_a_run_does_not_differ_from_itself(pair):
    apart = report.differences([pair[0], pair[0]])
    assert apart.difference.str.startswith(("0.000", "not defined")).all() and (apart.p == "not defined").all()


@pytest.mark.parametrize(("name", "change", "said"), [
    ("oof", lambda table: table.assign(fold=1 - table.fold), r"the folds of .* 0 slices are in one only, 0 labels, 0 patients, \d+ folds"),
    ("oof", lambda table: table[table.fold == 0], "the folds of .* slices are in one only"),
    ("test", lambda table: table.assign(label=1 - table.label), r"the test sets of .* [1-9]\d* labels"),
])
def test_what_was_split_otherwise_is_not_compared(pair, tmp_path, name, change, said):
    other = shutil.copytree(pair[1], tmp_path / "other")
    path = other / f"{name}_predictions.csv"
    runs.write_table(path, change(pd.read_csv(path, dtype={"id": str, "patient": str})))
    for table in (report.side_by_side, report.differences):
        with pytest.raises(ValueError, match=said):
            table([pair[0], other])
    with pytest.raises(ValueError, match="1 run given"):
        report.side_by_side(pair[:1])


def test_papermill_compares_finished_runs(pair, tmp_path):
    done = papermill(tmp_path / "out.ipynb", "-y", json.dumps({"runs": [str(run) for run in pair]}))
    assert done.returncode == 0, done.stderr[-2000:]
    said = (tmp_path / "out.ipynb").read_text(encoding="utf8")
    for figure in report.side_by_side(pair)["AUROC"]:
        assert figure in said
    for difference in report.differences(pair).difference:
        assert difference in said
    assert said.count("image/png") == 2 and '"output_type": "error"' not in said


def test_papermill_refuses_what_it_does_not_know(tmp_path):
    done = papermill(tmp_path / "out.ipynb", "-p", "k_fold", "3")
    assert done.returncode != 0 and "did you mean 'k_folds'" in done.stderr


def test_papermill_trains_every_recipe_on_the_same_folds(cohort_folder, tmp_path):
    tiny = {"data_root": str(cohort_folder), "outputs": str(tmp_path / "outputs"), "packs": str(tmp_path / "packs"), "scale": "demo",
            "k_folds": 2, "backbone": "test_resnet", "weights": "none", "size": 32, "epochs_head": 0, "epochs_ft": 1, "epochs_all": 1,
            "num_workers": 1, "prep_plot_n": 0, "report": False}
    done = papermill(tmp_path / "out.ipynb", "-y", json.dumps(tiny))
    assert done.returncode == 0, done.stderr[-2000:]
    finished = sorted((tmp_path / "outputs").iterdir())
    configs = [runs.read_json(run / "effective_config.json") for run in finished]
    assert {(c["recipe"], c["backbone"], c["selection"]) for c in configs} == {
        (recipe, "test_resnet", "inner_holdout") for recipe in ("slice_cv", "focal_f2")}
    assert len(report.differences(finished)) == 24
