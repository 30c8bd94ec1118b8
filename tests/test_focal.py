"The second recipe through the whole job: one split, checkpoints, instruments, and a run that was killed."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import fbeta_score

from ctbm import cli, learning, recipes, runs, train
from tests.conftest import FOCAL, ROOT, SMALL, oof, papermill


@pytest.fixture(scope="module")
def focal(workplace) -> Path:
    "One small run of the focal-loss pipeline, everything measured."
    return train.run(**workplace, **FOCAL, instruments=["all"], loggers=["tensorboard"])


def test_a_single_split_learns_chooses_and_tests_on_three_groups_of_patients(focal):
    split = pd.read_csv(focal / "split.csv")
    share = split.drop_duplicates("patient").fold.map({-1: "test", 0: "validation", 1: "training"}).value_counts(normalize=True)
    assert abs(share["training"] - 0.7) < 0.05 and abs(share["validation"] - 0.15) < 0.04 and abs(share["test"] - 0.15) < 0.04
    assert split.groupby("patient").fold.nunique().eq(1).all()
    assert set(oof(focal).id) == set(split.slice_id[split.fold == 0]), "operating point and epoch come from validation scores only"
    history, chosen = pd.read_csv(focal / "history.csv"), runs.read_json(focal / "threshold_selection.json")
    best = history[history.best].iloc[-1]
    assert best.val_fbeta == history.val_fbeta.max() and chosen["strategy"] == "max_fbeta" and len(history) == 3
    scores = oof(focal)
    f2 = lambda cut: fbeta_score(scores.label, scores.score >= cut, beta=2)
    assert f2(chosen["threshold"]) == pytest.approx(max(map(f2, scores.score)), abs=1e-12), "no threshold does better"
    assert chosen["row"]["fbeta_mean"] == pytest.approx(f2(chosen["threshold"]), abs=1e-12)
    assert runs.read_json(focal / "manifest.json")["focal_alpha"] == pytest.approx(1 - split.label[split.fold == 1].mean())
    assert "validation (" in runs.describe(focal) and "out-of-fold" not in runs.describe(focal)


def test_checkpoints_have_the_published_layout_and_load_without_pickle(focal):
    "best_model.pth and every second epoch; the best is the final model."
    there = {path.name for path in (focal / "checkpoints").iterdir()}
    assert there == {"best_model.pth", "checkpoint_epoch_2.pth"}
    best = torch.load(focal / "checkpoints" / "best_model.pth", weights_only=True)
    assert {"epoch", "model_state_dict", "optimizer_state_dict", "train_loss", "val_loss", "train_fbeta", "val_fbeta", "train_recall",
            "val_recall", "train_avg_precision", "val_avg_precision", "best_threshold"} == set(best)
    assert all(type(v) in (int, float) for k, v in best.items() if not k.endswith("state_dict"))
    final = load_file(focal / "final_model_state_dict.safetensors")
    assert all(torch.equal(v, final[k]) for k, v in best["model_state_dict"].items())
    history = pd.read_csv(focal / "history.csv")
    assert best["epoch"] == history.epoch[history.best].iloc[-1] - 1 and not (focal / "folds" / "cv" / "fold_0").exists()


def test_instruments_leave_tables_pictures_and_logs(focal):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    batches, epochs = (pd.read_parquet(focal / "instruments" / f"{name}.parquet") for name in ("batches", "epochs"))
    assert set(batches.epoch) == {1, 2, 3} and batches.gradient_norm.gt(0).all() and batches.fold.eq("0").all()
    slices = pd.read_csv(focal / "split.csv").fold.eq(0).sum()
    counted = epochs[epochs.side == "validation"].dropna(subset="tp")
    assert (counted[["tp", "fp", "fn", "tn"]].sum(axis=1) == slices).all()
    assert {path.stem for path in (focal / "instruments").glob("*.png")} == {
        "steps", "loss", "confusion_published", "confusion_best", "figures", "probabilities", "memory", "throughput"}
    events = EventAccumulator(str(next((focal / "tensorboard").rglob("events.*")).parent))
    events.Reload()
    assert {"val_fbeta", "train_loss"} <= set(events.Tags()["scalars"])


def test_watching_changes_nothing(focal, workplace):
    plain = train.run(**workplace, **FOCAL | {"checkpoint_every": 0})
    assert np.array_equal(oof(plain).score, oof(focal).score) and not (plain / "checkpoints").exists()
    assert np.array_equal(pd.read_csv(plain / "test_predictions.csv").prob, pd.read_csv(focal / "test_predictions.csv").prob)
    assert not (plain / "instruments").exists() and not (plain / "tensorboard").exists()


KILLED = """
import os, signal, sys
from ctbm import learning, train
step, seen = learning.SliceModule.training_step, []
def training_step(self, batch, index):
    if self.current_epoch == 1 and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)
learning.SliceModule.training_step = training_step
train.run(**{values!r})
"""


def test_run_killed_in_the_middle_of_an_epoch_resumes_to_the_same_weights(focal, workplace, tmp_path):
    values = workplace | FOCAL | {"outputs": str(tmp_path / "outputs"), "instruments": ["all"]}
    dead = subprocess.run([sys.executable, "-c", KILLED.format(values=values)], cwd=ROOT, capture_output=True, text=True)
    assert dead.returncode == -9, dead.stderr[-2000:]
    (partial,) = (tmp_path / "outputs").glob("*.partial")
    assert (partial / "folds" / "cv" / "fold_0" / "all.ckpt").is_file()
    resumed = train.run(resume=str(partial))
    before, after = (load_file(run / "final_model_state_dict.safetensors") for run in (focal, resumed))
    assert all(torch.equal(before[k], after[k]) for k in before)
    same = ["epoch", "train_loss", "val_loss", "val_fbeta", "threshold", "best"]
    assert pd.read_csv(resumed / "history.csv")[same].equals(pd.read_csv(focal / "history.csv")[same])
    norms = [pd.read_parquet(run / "instruments" / "batches.parquet").gradient_norm for run in (focal, resumed)]
    assert np.array_equal(*norms), "what was measured before the kill is kept, and nothing twice"


def test_run_stopped_after_everything_is_trained_loses_nothing(workplace, tmp_path, monkeypatch):
    "The stop comes before the manifest; a table was being written; the networks are not trained again."
    values = workplace | SMALL | {"outputs": str(tmp_path / "outputs"), "instruments": "loss"}
    monkeypatch.setattr(runs, "manifest", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run(**values)
    monkeypatch.undo()
    (partial,) = (tmp_path / "outputs").glob("*.partial")
    (partial / "folds" / "cv" / "final" / ".123.ft.batches.parquet").write_bytes(b"half a tab")
    kept = pd.read_csv(partial / "test_predictions.csv").prob
    monkeypatch.setattr(learning, "run_stage", lambda *args: 1 / 0)
    run = train.run(resume=str(partial))
    assert np.array_equal(pd.read_csv(run / "test_predictions.csv").prob, kept)
    assert set(pd.read_parquet(run / "instruments" / "batches.parquet").fold) == {"0", "1", "final"}
    assert not list(run.rglob(".*")) and {path.suffix for path in (run / "folds").rglob("*.*")} == {".json", ".parquet"}


def test_grid_of_the_second_recipe_is_ranked_by_what_it_monitors(workplace, monkeypatch):
    monkeypatch.setitem(recipes.GRIDS, "focal_f2", {name: recipes.GRIDS["focal_f2"][name] for name in ("baseline", "weighted_bce")})
    run = train.run(**workplace, **FOCAL | {"epochs_all": 2}, run_grid=True)
    ranked, made = pd.read_csv(run / "grid_results.csv"), runs.read_json(run / "effective_config.json")
    history = pd.read_csv(run / "history.csv")
    assert ranked.mean_metric.is_monotonic_decreasing and made["candidate"] == ranked.name[0]
    assert ranked.mean_metric[0] == pytest.approx(history.val_fbeta.max(), abs=1e-6)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [ranked.name[0]]


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_candidates_of_a_grid_share_one_pack(recipe):
    pixels = "volumetric" if recipes.RECIPES[recipe].kind == "volume" else "preprocess"
    assert len({getattr(recipes.resolve(recipe, candidate=name), pixels) for name in recipes.GRIDS[recipe]}) == 1


def test_run_is_not_resumed_as_another_recipe(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run(**workplace | FOCAL | {"outputs": str(tmp_path)})
    (partial,) = tmp_path.glob("*.partial")
    with pytest.raises(ValueError, match="recipe cannot be changed"):
        train.run(resume=str(partial), recipe="slice_cv")


def test_limit_leaves_patients_out_and_says_so(workplace):
    run = train.run(**workplace, **FOCAL | {"epochs_all": 1}, limit=60)
    table, split = pd.read_parquet(run / "features_df.parquet"), pd.read_csv(run / "split.csv")
    assert 40 <= len(split) <= 60 and (table.problem == "left out: limit 60").sum() == len(table) - len(split)
    everyone = pd.read_csv(run / "labels_clean.csv", dtype={"ID": str})
    assert len(everyone) == len(table) and {"ID", "Label"} <= set(everyone)


def test_papermill_runs_the_second_recipe(workplace, tmp_path):
    values = FOCAL | workplace | {"epochs_all": 1, "prep_plot_n": 1, "instruments": "gradient_norm, confusion"}
    done = papermill(tmp_path, *[word for name, value in values.items() for word in ("-p", name, value)])
    assert done.returncode == 0, done.stderr[-3000:]
    run = runs.latest(workplace["outputs"])
    assert runs.read_json(run / "manifest.json")["recipe"] == "focal_f2" and (run / "instruments" / "batches.parquet").is_file()
    assert "Train Loss:" in (tmp_path / "out.ipynb").read_text() and "Best Threshold:" in (tmp_path / "out.ipynb").read_text()


def test_help_lists_the_options_of_the_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", "focal_f2", "--help"])
    said = capsys.readouterr().out
    assert "--lr-all" in said and "--focal-gamma" in said and "--lr-head" not in said and "the recipe, focal_f2" in said


def test_memory_that_runs_out_is_one_line_with_the_knobs(workplace, monkeypatch, capfd):
    def full(self, batch, index): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(learning.SliceModule, "training_step", full)
    options = FOCAL | workplace
    assert cli.main(["train", *[word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]]) == 2
    said = capfd.readouterr().err
    assert "batch_size 16 with accumulate 2" in said and "activation_checkpointing" in said
