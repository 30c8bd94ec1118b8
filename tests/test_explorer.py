"The threshold explorer: its numbers against scikit-learn, every kind of run, and as a person sees it in JupyterLab."

import hashlib
import shutil
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from ctbm import explorer, runs, thresholds, volumes
from ctbm.evaluate import pool
from ctbm.thresholds import Rule
from tests.browser import browser_page, jupyter_lab, run_all, write_notebook


def oof(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "oof_predictions.csv")


def between(scores: pd.DataFrame, threshold: float) -> float:
    "A threshold that makes three scores change sides."
    return float(np.sort(scores.score[scores.score < threshold])[-3:].min())


def test_figures_are_those_of_others(small_run):
    seen, table = explorer.explore(small_run), oof(small_run)
    chosen = runs.read_json(small_run / "threshold_selection.json")
    assert seen.threshold == chosen["threshold"] and seen.unit == "slices"
    for threshold in (chosen["threshold"], *table.score.quantile([0.1, 0.5, 0.9])):
        seen.threshold = threshold
        called, at = table.score >= threshold, {name: figure["estimate"] for name, figure in seen.figures().items()}
        tn, fp, fn, tp = confusion_matrix(table.label, called).ravel()
        assert [seen.counts()[k] for k in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]
        assert np.isclose(at["sens"], recall_score(table.label, called)) and np.isclose(at["spec"], tn / (tn + fp))
        assert np.isclose(at["ppv"], precision_score(table.label, called)) and np.isclose(at["f1"], f1_score(table.label, called))
        assert np.isclose(at["cost"], 1000 * (chosen["cost_ratio"] * fn + fp) / len(table))
    seen.prevalence, seen.miss, seen.alarm = 0.02, 40, 2
    at = {name: figure["estimate"] for name, figure in seen.figures().items()}
    odds = at["sens"] * 0.02 / (at["sens"] * 0.02 + (1 - at["spec"]) * 0.98)
    assert np.isclose(at["ppv"], odds) and np.isclose(at["cost"], 1000 * (40 * 0.02 * (1 - at["sens"]) + 2 * 0.98 * (1 - at["spec"])))


def test_strategies_and_flips(small_run):
    seen, table = explorer.explore(small_run), oof(small_run)
    by_fold = thresholds.summary(thresholds.table(table))
    assert seen.points().threshold["max_f1"] == thresholds.select(by_fold, Rule("max_f1"))["threshold"]
    assert seen.points().threshold[Rule().threshold_strategy] == seen.scored.threshold
    own, seen.threshold = seen.threshold, between(table, seen.threshold)
    moved = seen.flips()
    assert set(moved.id) == set(table.id[(table.score < own) & (table.score >= seen.threshold)]) and len(moved) >= 3
    assert (moved.change == "found").equals(moved.label == 1) and moved.score.is_monotonic_decreasing
    seen.unit = "patients"
    pooled = runs.read_json(small_run / "patients.json")
    assert seen.threshold == pooled["operating_point"]["threshold"] and seen.flips().empty
    seen.threshold = 0.4
    everyone = pool(table, pooled["pooling"])
    assert seen.counts()["tp"] == ((everyone.score >= 0.4) & (everyone.label == 1)).sum()


def test_slices_of_a_patient_and_when_they_are_gone(small_run, tmp_path):
    copy, table = tmp_path / "run_1", oof(small_run)
    shutil.copytree(small_run, copy)
    seen = explorer.explore(copy)
    series, start = seen.series(table.id[0])
    one = next(iter(series.values()))
    assert one.titles[start] == table.id[0] and f"score {table.score[0]:.3f}" in one.notes[start]
    assert np.asarray(one.images[start]).ndim == 2
    manifest = runs.read_json(copy / "manifest.json")
    root = manifest["data_root"]
    split = pd.read_parquet(copy / "features_df_split.parquet")
    split["path"] = [path.replace(root, str(tmp_path / "gone")) for path in split.path]
    split.to_parquet(copy / "features_df_split.parquet")
    runs.write_json(copy / "manifest.json", manifest | {"data_root": str(tmp_path / "gone")})
    with pytest.raises(FileNotFoundError, match="data_root"): explorer.explore(copy).series(table.id[0])
    assert "No slices to show" in explorer.slices_shown(explorer.explore(copy), table.id[0]).value
    assert explorer.explore(copy, data_root=root).series(table.id[0])[1] == start
    tested = split.patient[split.fold < 0].iloc[0]
    with pytest.raises(FileNotFoundError): explorer.stacks(copy, tested, data_root=root)


def test_nothing_is_written_and_unfinished_runs_are_refused(small_run, tmp_path):
    digest = lambda: {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in small_run.rglob("*") if p.is_file()}
    before, seen = digest(), explorer.explore(small_run)
    seen.threshold = 0.2
    explorer.panel(seen)
    assert digest() == before
    with pytest.raises(FileNotFoundError, match="no scores to explore"): explorer.explore(tmp_path)
    with pytest.raises(ValueError, match="score"): explorer.explore(pd.DataFrame({"label": [0, 1]}))
    with pytest.raises(ValueError, match="explorer.threshold = 0.3"): explorer.explore(small_run, threshold=0.3)
    table = explorer.explore(pd.DataFrame({"label": [0, 1, 1], "score": [0.1, 0.4, 0.8]}), threshold=0.5)
    assert table.counts()["fn"] == 1 and "a table of scores has no images" in explorer.slices_shown(table, "1").value
    explorer.panel(table)


def test_a_run_of_bags(bag_run):
    seen, table = explorer.explore(bag_run), oof(bag_run)
    assert list(seen.sides) == ["patients"]
    series, start = seen.series(table.patient[0])
    assert next(iter(series.values())).titles[start] == table.top_slice[0]


def test_a_run_of_volumes(tmp_path):
    images, run = tmp_path / "images", tmp_path / "run_1"
    rng, rows = np.random.default_rng(0), []
    for name in ("a", "b", "c", "d"):
        (images / name).mkdir(parents=True)
        mask = np.zeros((20, 24, 12), np.uint8)
        mask[8:12, 8:12, 7:9] = name in "cd"
        for what, array in {"image": rng.normal(100, 20, mask.shape).astype(np.float32), "mask": mask}.items():
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 3, 1])), images / name / f"{what}.nii.gz")
    table = volumes.find(images, images="*/image.nii.gz", masks="*/mask.nii.gz", jobs=1)
    assert table.problem.isna().all()
    run.mkdir()
    runs.write_table(run / "volumes.csv", table.assign(fold=[0, 0, 0, -1]))
    for name, row in zip("abc", table.itertuples(), strict=False):
        rows.append({"id": row.patient, "patient": row.patient, "fold": 0, "label": int(name == "c"), "score": ord(name) / 100,
                     "slices": 1, "top_slice": row.case})
    runs.write_table(run / "oof_predictions.csv", pd.DataFrame(rows))
    runs.write_json(run / "threshold_selection.json", {"strategy": "max_f1", "threshold": 0.97})
    for name, value in {"model": {"kind": "volume"}, "effective_config": {"k_folds": 2}, "manifest": {"data_root": str(images)}}.items():
        runs.write_json(run / f"{name}.json", value)
    seen = explorer.explore(run)
    seen.threshold = 0.985
    assert seen.flips().change.tolist() == ["cleared", "cleared"]
    series, start = seen.series(table.patient[2])
    assert start in (7, 8) and list(series) == [table.case[2]] and series[table.case[2]].masks["truth"].sum() == 32
    with pytest.raises(ValueError, match="no row"): seen.series(table.patient[3])
    (run / "oof_predictions.csv").unlink(); (run / "threshold_selection.json").unlink()
    with pytest.raises(FileNotFoundError, match="masks and no decision"): explorer.explore(run)


SHOWN = """() => { const box = document.querySelector('.ctbm-explorer');
  return {counts: [...box.querySelectorAll('.four b')].map(b => Number(b.textContent.replace(',', ''))),
          rows: [...box.querySelector('select[size]').options].map(o => o.textContent.replaceAll('\\u00a0', ' ')),
          exact: Number(box.querySelector('input[type=number]').value), text: box.textContent}; }"""


def until(page, good, seconds: float = 30) -> dict:
    "What is shown, once it is as expected; the screen follows the kernel a little later."
    end = time.monotonic() + seconds
    while not good(shown := page.evaluate(SHOWN)) and time.monotonic() < end: page.wait_for_timeout(200)
    assert good(shown), shown
    return shown


@pytest.mark.slow
def test_in_jupyterlab(small_run, tmp_path):
    table, own = oof(small_run), runs.read_json(small_run / "threshold_selection.json")["threshold"]
    wanted = between(table, own)
    write_notebook(tmp_path / "x.ipynb", "from ctbm.explorer import explore", f"seen = explore({str(small_run)!r})\nseen",
                   f"seen.threshold = {wanted}")
    counted = lambda cut: [thresholds.rates(table.label, table.score, cut)[k] for k in ("tp", "fn", "fp", "tn")]
    moved = lambda cut: explorer.flips(explorer.read(small_run)["slices"], cut)
    listed = lambda cut: [f"{score:.4f}" for score in moved(cut).head(explorer.LISTED).score]
    follows = lambda shown: shown["counts"] == counted(shown["exact"]) and [r.split()[0] for r in shown["rows"]] == listed(shown["exact"])
    with jupyter_lab(tmp_path) as lab, browser_page() as page:
        run_all(page, lab, "x.ipynb")
        page.locator(".ctbm-explorer select[size]").wait_for(state="attached")
        assert len(until(page, lambda s: s["exact"] == wanted and follows(s))["rows"]) >= 3  # set in a cell, seen on the screen
        page.get_by_role("button", name="back to the run's").click()
        until(page, lambda s: s["exact"] == own and follows(s) and "no slice changes sides" in s["text"])
        page.locator(".ctbm-explorer .noUi-handle").first.focus()
        for _ in range(40): page.keyboard.press("ArrowLeft")
        cut = until(page, lambda s: s["exact"] < own - 39 * explorer.explore(small_run).reach[2] and follows(s))["exact"]
        page.locator(".ctbm-explorer select[size]").select_option(index=0)
        page.locator(".ctbm-explorer canvas").first.wait_for()
        said = f"label {moved(cut).label[0]}, score {moved(cut).score[0]:.3f}"  # stands in the corner of the slice
        page.wait_for_function(f"() => document.querySelector('.ctbm-explorer').innerText.includes('{said}')")
        assert not page.said
