"The whole job: through papermill, through the command line, stopped and resumed, with seeds, with shuffled labels."
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ctbm import calibration, cli, datasets, decision, evaluate, failures, learning, models, recipes, runs, train
from tests.conftest import FOCAL, ROOT, SMALL, oof, papermill


@pytest.fixture(scope="module")
def finished(workplace) -> Path:
    "One small run."
    return train.run(**workplace, **SMALL | {"report": True, "prep_plot_n": 1})


def test_run_folder_holds_every_artefact(finished):
    names = {"run_args.json", "effective_config.json", "features_df.parquet", "features_df_split.parquet", "features_checks_summary.json",
             "preprocessing_examples_label0.png", "preprocessing_examples_label1.png", "cv_thresholds_by_fold.csv",
             "cv_thresholds_summary.csv", "cv_metrics.json", "cv_mean_roc.png", "cv_mean_pr.png", "threshold_selection.json",
             "test_predictions.csv", "final_model_state_dict.safetensors", "test_roc_curve.png", "test_pr_curve.png", "test_metrics.json",
             "manifest.json", "oof_predictions.csv", "history.csv", "model.json", "split.csv", "findings.csv", "calibration.json",
             "triage.json", "audit.json", "labels_clean.csv", "history.png", "confusion_matrix.csv", "confusion_matrix.png",
             "audit_links.csv", "shifts.csv", "errors.csv", "errors.png", "report.html", "report.json",
             "model_card.md", "checklist_claim.csv", "checklist_tripod.csv", "patients.json", "reference.json", "reference.safetensors",
             "networks"}
    there = {p.name for p in finished.iterdir()}
    assert names <= there
    assert not [p for p in finished.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".partial") or p.name.startswith(".")]
    assert sorted(path.name for path in (finished / "networks").iterdir()) == ["fold_0.safetensors", "fold_1.safetensors"]
    summary = pd.read_csv(finished / "cv_thresholds_summary.csv")
    columns = {"sens_mean", "sens_std", "acc_mean", "ap_mean", "auc_mean_trn", "auc_mean", "auc_std", "tp", "fn"}
    assert len(summary) == 19 and columns <= set(summary)
    assert summary.auc_mean_trn.notna().all()


def test_figures_of_the_run_agree_with_its_tables(finished):
    test, chosen = pd.read_csv(finished / "test_predictions.csv"), runs.read_json(finished / "threshold_selection.json")
    metrics = runs.read_json(finished / "test_metrics.json")
    assert metrics["threshold"] == chosen["threshold"]
    assert (test.pred == (test.prob >= chosen["threshold"])).all()
    assert metrics["tp"] == ((test.pred == 1) & (test.label == 1)).sum() and metrics["fn"] == ((test.pred == 0) & (test.label == 1)).sum()
    figures = evaluate.score(test.label, test.prob, chosen["threshold"], test.patient)
    assert metrics["figures"]["roc_auc"] == figures["roc_auc"]
    assert not set(test.patient) & set(oof(finished).patient)
    assert "test (" in runs.describe(finished) and "grey-histogram baseline" in runs.describe(finished)


def test_test_set_is_judged_by_what_was_stored(finished):
    "Calibration and triage in the run folder, applied again to the stored scores, give the stored probabilities and classes bit for bit."
    test, scores = (pd.read_csv(finished / f"{name}_predictions.csv") for name in ("test", "oof"))
    fitted, zones = (runs.read_json(finished / f"{name}.json") for name in ("calibration", "triage"))
    assert np.array_equal(test.calibrated, calibration.apply(fitted, test.prob.to_numpy()))
    assert (test.triage == decision.assign(zones, test.prob.to_numpy())).all()
    again = calibration.cross_fit(fitted["method"], scores.label.to_numpy(), scores.score.to_numpy(), scores.fold.to_numpy())
    assert np.array_equal(scores.calibrated, again)
    shifts = pd.read_csv(finished / "shifts.csv")
    assert set(shifts.id) == set(test.id) and set(shifts["shift"]) == set(failures.SHIFTS)


def test_slices_of_two_patients_with_one_name_are_told_apart(cohort_folder, workplace, tmp_path):
    "Patients' folders that all hold IM0000.dcm and IM0001.dcm, labelled by folder/name."
    truth, seen = pd.read_csv(cohort_folder / "truth.csv"), Counter()
    rows = []
    for row in truth.itertuples():
        name, seen[row.patient] = f"IM{seen[row.patient]:04}", seen[row.patient] + 1
        (tmp_path / "CTs" / row.patient).mkdir(parents=True, exist_ok=True)
        (tmp_path / "CTs" / row.patient / f"{name}.dcm").symlink_to(cohort_folder / "CTs" / f"{row.ID}.dcm")
        rows.append((f"{row.patient}/{name}", row.label))
    pd.DataFrame(rows, columns=["ID", "Label"]).to_csv(tmp_path / "labels1.csv", index=False)
    run = train.run(**workplace | {"data_root": str(tmp_path)}, **SMALL | {"epochs_ft": 1})
    names = pd.concat([oof(run).id, pd.read_csv(run / "test_predictions.csv").id])
    assert names.is_unique and set(names) == {name for name, _ in rows}


def test_stored_weights_give_the_stored_scores(finished):
    from ctbm import pack
    how, table = runs.read_json(finished / "model.json"), pd.read_parquet(finished / "features_df_split.parquet")
    network = models.create_model(how["backbone"], how["in_chans"], "none", how["dropout_p"], how["size"])
    network.load_state_dict(load_file(finished / "final_model_state_dict.safetensors"))
    spec = pack.Preprocess.from_dict(how["preprocess"])
    test = table[table.test].reset_index(drop=True)
    images = np.stack([np.rint(spec(pack.read_hu(p)) * 255).astype(np.uint8) for p in test.path])
    seen = learning.score(network.to(memory_format=torch.channels_last), images, np.arange(len(test)))
    scores = dict(zip(test.slice_id, seen, strict=True))
    stored = pd.read_csv(finished / "test_predictions.csv")
    assert np.allclose(stored.prob, stored.id.map(scores), atol=1e-6)


def test_another_seed_gives_other_scores(finished, workplace):
    other = train.run(**workplace, **SMALL, seed=7)
    assert not np.array_equal(oof(finished).sort_values("id").score.to_numpy(), oof(other).sort_values("id").score.to_numpy())


def test_stopped_run_is_resumed_to_the_same_result(finished, workplace, monkeypatch):
    fit, calls = train.fit, []

    def stop_at_the_second_fold(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(train, "fit", stop_at_the_second_fold)
    with pytest.raises(KeyboardInterrupt):
        train.run(**workplace, **SMALL)
    (partial,) = Path(workplace["outputs"]).glob("*.partial")
    monkeypatch.setattr(train, "fit", lambda *args: calls.append(args) or fit(*args))
    resumed = train.run(resume=str(partial))
    assert len(calls) == 4, "the finished fold was trained again"
    assert not partial.exists() and np.array_equal(oof(resumed).score, oof(finished).score)
    assert np.array_equal(pd.read_csv(resumed / "test_predictions.csv").prob, pd.read_csv(finished / "test_predictions.csv").prob)


def test_run_is_not_resumed_on_other_data(workplace, cohort_folder, tmp_path, monkeypatch):
    (tmp_path / "CTs").symlink_to(cohort_folder / "CTs")
    labels = pd.read_csv(cohort_folder / "labels1.csv", index_col=0)
    labels.to_csv(tmp_path / "labels1.csv")
    monkeypatch.setattr(train, "fit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run(**workplace | {"data_root": str(tmp_path), "outputs": str(tmp_path / "outputs")}, **SMALL)
    (partial,) = (tmp_path / "outputs").glob("*.partial")
    labels.assign(Label=1 - labels.Label).to_csv(tmp_path / "labels1.csv")
    with pytest.raises(ValueError, match="not what they were"):
        train.run(resume=partial)


def test_run_is_not_resumed_with_other_settings(workplace, tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text('{"lr_ft": 0.001}')
    monkeypatch.setattr(train, "fit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run(**workplace | {"outputs": str(tmp_path / "outputs")}, **SMALL, config_json=str(config))
    (partial,) = (tmp_path / "outputs").glob("*.partial")
    with pytest.raises(ValueError, match="lr_ft cannot be changed"):
        train.run(resume=partial, lr_ft=0.5)
    config.write_text('{"lr_ft": 0.00005}')
    with pytest.raises(ValueError, match="not what they were"):
        train.run(resume=partial)


def test_stages_train_what_they_say_and_stop_when_patience_is_gone():
    "Head, then the last two stages; what is frozen stays, statistics too; a cosine over the epochs; patience and one bad epoch more."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (48, 3, 32, 32)).astype(np.uint8)
    table = pd.DataFrame({"row": range(48), "label": np.arange(48) % 2})
    values = {"weights": "none", "size": 32, "batch_size": 8, "epochs_head": 3, "epochs_ft": 9, "patience_head": 9, "patience_ft": 1,
              "trainable_ft": 2, "schedule": "cosine"}
    recipe = recipes.override(recipes.resolve(scale="demo"), values)
    torch.manual_seed(learning.drawn(recipe.seed, 0))
    start = models.create_model("resnet18", 3, "none", recipe.dropout_p, 32).state_dict()
    network, history = learning.fit(recipe, images, table[:32], table[32:], 0)
    changed = {k.split(".")[0] for k, v in network.state_dict().items() if not torch.equal(v, start[k])}
    assert changed <= {"layer3", "layer4", "fc"} and "fc" in changed
    head, ft = ([line for line in history if line["stage"] == name] for name in ("head", "ft"))
    assert [round(line["lr"] / head[0]["lr"], 2) for line in head] == [1.0, 0.75, 0.25]
    best = max(i for i, line in enumerate(ft) if line["best"])
    assert len(ft) == 9 or len(ft) == best + 1 + 2, "patience 1 puts up with one epoch that is no better and ends after the second"


def test_a_few_positive_patients_are_on_both_sides():
    table = pd.DataFrame({"patient": [f"P{i:03}" for i in range(60)], "label": [1] * 4 + [0] * 56, "fold": 0, "row": range(60)})
    recipe = recipes.resolve()
    for job in range(6):
        learns, chooses = train.choosers(recipe, table, table[:0], job)
        assert learns.label.sum() == 3 and chooses.label.sum() == 1 and not set(learns.patient) & set(chooses.patient)


def test_every_patient_may_have_a_positive_slice():
    table = pd.DataFrame({"patient": np.repeat([f"P{i}" for i in range(20)], 4), "label": [0, 1, 0, 0] * 20, "slice_id": range(80)})
    split = datasets.split(table, folds=3)
    assert split.groupby("fold").label.nunique().eq(2).all() and split.groupby("patient").fold.nunique().eq(1).all()


def test_training_that_diverges_says_so(workplace):
    with pytest.raises(FloatingPointError, match="Lower lr_ft"):
        train.run(**workplace, **SMALL | {"clip_norm": 1e9, "optimizer": "sgd", "precision": "32"}, lr_ft=1e12)


def test_only_an_unfinished_run_can_be_resumed(finished):
    with pytest.raises(FileNotFoundError, match="cannot be resumed"):
        train.run(resume=finished)


def test_canary_of_random_labels_learns_nothing(workplace, finished):
    "One option; as many patients are positive as before, but others, and no figure is sure to be above chance."
    run = train.run(**workplace, **SMALL | {"epochs_ft": 4}, random_labels=True)
    split, before = (pd.read_csv(each / "split.csv") for each in (run, finished))
    drawn, real = (each.groupby("patient").label.max() for each in (split, before))
    assert drawn.sum() == real.sum() and (drawn != real).any()
    figure = runs.read_json(run / "cv_metrics.json")["oof"]["roc_auc"]
    assert figure["low"] < 0.5 < figure["high"], figure
    assert runs.describe(run).startswith("RANDOM LABELS")


def test_grid_picks_a_winner_and_the_user_s_values_hold(workplace, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.GRIDS, "slice_cv", dict(list(recipes.GRIDS["slice_cv"].items())[:3]))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"epochs_ft": 1, "epochs_head": 0, "lr_ft": 0.0005}))
    values = {k: v for k, v in SMALL.items() if not k.startswith("epochs")}
    run = train.run(**workplace, **values, run_grid=True, config_json=str(config))
    results = pd.read_csv(run / "grid_results.csv")
    assert list(results) == ["name", "mean_metric", "std_metric", "seconds", "config"]
    assert set(results.name) == set(recipes.GRIDS["slice_cv"])
    assert results.mean_metric.is_monotonic_decreasing
    made = runs.read_json(run / "effective_config.json")
    assert made["candidate"] == results.name[0]
    assert {json.loads(c)["lr_ft"] for c in results.config} == {0.0005} and made["lr_ft"] == 0.0005
    assert runs.read_json(run / "cv_metrics.json")["mean_metric"] == pytest.approx(results.mean_metric[0])


def test_published_selection_and_preprocessing_by_options_alone(workplace):
    run = train.run(**workplace, **SMALL, published=True)
    made = runs.read_json(run / "effective_config.json")
    got = {k: made[k] for k in ("crop", "floor", "resize", "blur_p", "selection")}
    assert got == {"crop": "published", "floor": "published", "resize": "bilinear", "blur_p": 1.0, "selection": "published"}


def test_papermill_trains_the_backbone_it_was_given(workplace, tmp_path):
    values = SMALL | workplace | {"backbone": "resnet14t", "epochs_ft": 1, "prep_plot_n": 1}
    done = papermill(tmp_path, *[word for name, value in values.items() for word in ("-p", name, value)])
    assert done.returncode == 0, done.stderr[-3000:]
    run = runs.latest(workplace["outputs"])
    assert runs.read_json(run / "manifest.json")["backbone"] == "resnet14t"
    shapes = {k: v.shape for k, v in load_file(run / "final_model_state_dict.safetensors").items()}
    assert "layer3.0.conv3.weight" in shapes, "a resnet14t has bottlenecks, the small runs of the other tests have none"


def test_papermill_stops_at_a_misspelt_parameter(tmp_path):
    done = papermill(tmp_path, "-p", "backbne", "resnet34")
    assert done.returncode != 0 and "did you mean 'backbone'" in done.stderr


def test_papermill_lists_the_parameters():
    words = [sys.executable, "-m", "papermill", "--help-notebook", "nbs/05_train.ipynb"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("backbone", "data_root", "recipe", "run_grid", "seed"))


def test_command_line_with_the_same_seed_gives_the_same_run(finished, workplace, capfd):
    options = {k: v for k, v in (SMALL | workplace).items() if k != "size"} | {"out_size": 32}
    words = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    assert cli.main(["train", *words]) == 0
    run = runs.latest(workplace["outputs"])
    assert f"run       {run}" in capfd.readouterr().out
    assert np.array_equal(oof(run).score, oof(finished).score)
    assert np.array_equal(pd.read_csv(run / "test_predictions.csv").prob, pd.read_csv(finished / "test_predictions.csv").prob)


@pytest.mark.parametrize(("words", "said"), [
    (["--backbne", "resnet34"], "did you mean 'backbone'"),
    (["--backbone", "resnet_34"], "near matches: ['resnet34'"),
    (["--k-folds", "many"], "k_folds must be int"),
    (["--data-root", "no/such/folder"], "no/such/folder"),
    (["--config-json", "no.json"], "no.json does not exist"),
    (["--scale", "huge"], "unknown scale 'huge'"),
    (["--recipe", "slice"], "did you mean 'slice_cv'"),
    (["--recipe", "focal_f2", "--lr-ft", "1e-3"], "did you mean 'lr_all'"),
    (["--recipe", "focal_f2", "--loss", "focol"], "did you mean 'focal'"),
    (["--instruments", "speed"], "unknown instrument"),
    (["--loggers", "tensorbord"], "did you mean 'tensorboard'"),
    (["--fit", "scale"], "resample_mm"),
    (["--weights", "my.pth", "--data-root", "HERE"], "weights file 'my.pth' does not exist"),
])
def test_what_a_user_can_mend_is_said_in_one_line(words, said, cohort_folder, tmp_path, capfd):
    words = [str(cohort_folder) if word == "HERE" else word for word in words]
    start = ["train", "--outputs", str(tmp_path / "o"), "--packs", str(tmp_path / "p"), "--out-size", "32", "--weights", "none"]
    assert cli.main([*start, *words]) == 2
    assert said in capfd.readouterr().err


def test_empty_data_folder_says_where_it_looked(tmp_path):
    (tmp_path / "CTs").mkdir()
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "CTs")):
        train.run(data_root=str(tmp_path), weights="none")


def test_planted_overlap_is_refused(finished):
    table = pd.read_parquet(finished / "features_df_split.parquet")
    datasets.check_split(table)
    who = table.patient[table.fold == datasets.TEST].iloc[0]
    for fold in (0, 1):
        row = table[table.patient == who].index[0]
        with pytest.raises(ValueError, match=who):
            datasets.check_split(table.assign(fold=table.fold.where(table.index != row, fold)))


def test_imagenet_weights_come_from_the_hub_s_cache(tmp_path, monkeypatch, forget_weights):
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(3)
    donor = timm.create_model("resnet18", num_classes=1000)
    snapshot = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(donor.state_dict(), snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = models.create_model("resnet18", weights="auto")
    facts = models.provenance("resnet18", "auto")
    assert facts["used"] == "imagenet" and len(facts["sha256"]) == 64
    assert torch.equal(model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)


def test_weights_that_cannot_be_had_are_an_error_or_said_loudly(tmp_path, monkeypatch, forget_weights):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    with pytest.raises(FileNotFoundError, match="does not give them"):
        models.create_model("resnet18", weights="imagenet")
    with pytest.warns(UserWarning, match="RANDOM START"):
        assert models.provenance("resnet18", "auto")["used"] == "random"


def test_both_recipes_have_the_same_folds(finished, workplace):
    run = train.run(**workplace, **FOCAL | {"epochs_all": 1, "k_folds": 2, "selection": "inner_holdout"})
    a, b = (pd.read_csv(each / "split.csv").set_index("slice_id").sort_index() for each in (finished, run))
    assert a.equals(b)
    assert set(pd.read_csv(run / "history.csv").fold.astype(str)) == {"0", "1", "final"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"fold_0", "fold_1", "final"}
