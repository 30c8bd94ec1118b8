"Patients as samples, through the whole job: train, resume, checkpoints, predict, export."
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ctbm import cli, learning, predict, recipes, runs, train
from tests.conftest import BAGS, oof


@pytest.fixture(scope="module")
def place(bag_folder, bag_run) -> dict:
    "Where further runs on the same patients go; they find the pack."
    return {"data_root": str(bag_folder), "outputs": str(bag_run.parents[1] / "more"), "packs": str(bag_run.parents[1] / "packs")}


def test_every_row_is_a_patient_with_all_slices(bag_run):
    split, scores = pd.read_csv(bag_run / "split.csv"), oof(bag_run)
    test = pd.read_csv(bag_run / "test_predictions.csv")
    for fold, table in ((0, scores), (-1, test)):
        side = split[split.fold == fold].groupby("patient").label.agg(["max", "size"])
        assert set(table.patient) == set(side.index), "the negative ratio is for training alone"
        assert (table.label.to_numpy() == side["max"][table.patient]).all()
        assert (table.slices.to_numpy() == side["size"][table.patient]).all()
        assert table.slices.eq(5).all() and table.id.equals(table.patient)
    assert np.allclose(scores.score, scores.max_score, atol=1e-12) and (scores.mean_score < scores.max_score).all()
    assert set(split.groupby("patient").fold.nunique()) == {1}
    stored = runs.read_json(bag_run / "patients.json")
    assert stored["operating_point"]["threshold"] == runs.read_json(bag_run / "threshold_selection.json")["threshold"]
    assert stored["slices"] == {"least": 5, "median": 5, "most": 5} and stored["pooling"] == "max"
    shifts = pd.read_csv(bag_run / "shifts.csv")
    assert (shifts.groupby(["shift", "level"]).id.nunique() == len(test)).all() and set(shifts.id) == set(test.id)
    pooled = pd.read_csv(bag_run / "pooling.csv")
    assert set(pooled.pooling) == {"max", "max of slices", "mean of slices"} and set(pooled.side) == {"validation", "test"}
    slices = pd.read_csv(bag_run / "test_slices.csv")
    assert np.allclose(slices.groupby("patient").score.max()[test.patient], test.max_score)


def test_checkpoints_and_curves_have_the_published_names(bag_run, capsys):
    history, listed = pd.read_csv(bag_run / "history.csv"), pd.read_csv(bag_run / "checkpoint_summary.csv")
    assert history.stage.tolist() == ["warmup", "layer4", "layer3", "layer3"]
    there = {path.name for path in (bag_run / "checkpoints").glob("*.pth")}
    ends = {f"checkpoint_epoch{epoch:02}_stage{stage}_f1_{history.val_f1[epoch - 1]:.4f}.pth"
            for epoch, stage in ((1, 1), (2, 2), (4, 3))}
    better = {f"best_model_f1_{f1:.4f}.pth" for f1 in history.val_f1[history.best]}
    assert there == ends | better == set(listed.file)
    best = f"best_model_f1_{history.val_f1[history.best].iloc[-1]:.4f}.pth"
    kept, final = torch.load(bag_run / "checkpoints" / best, weights_only=True), load_file(bag_run / "final_model_state_dict.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in kept["model_state_dict"].items()), "the best of all stages is the model"
    assert cli.main(["show", str(bag_run / "checkpoints" / best)]) == 0 and f"{kept['val_metrics']['f1']:.4f}" in capsys.readouterr().out
    for name in ("training_curves", "f1_score_curve", "loss_curves", "sensitivity_specificity"):
        assert (bag_run / f"{name}.png").stat().st_size > 10_000


def test_a_run_stopped_between_stages_goes_on_as_if_it_had_not(bag_run, place, monkeypatch):
    def until_layer3(module, *rest):
        if module.stage.name == "layer3": raise KeyboardInterrupt
        return run_stage(module, *rest)

    run_stage = learning.run_stage
    monkeypatch.setattr(learning, "run_stage", until_layer3)
    with pytest.raises(KeyboardInterrupt): train.run(**place, **BAGS)
    monkeypatch.undo()
    partial = next(Path(place["outputs"]).glob(f"*{runs.PARTIAL}"))
    assert (partial / "folds" / "cv" / "fold_0" / "layer4.pt").is_file()
    resumed = train.run(resume=str(partial))
    ours, whole = (load_file(run / "final_model_state_dict.safetensors") for run in (resumed, bag_run))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert (resumed / "test_predictions.csv").read_bytes() == (bag_run / "test_predictions.csv").read_bytes()


def test_prediction_repeats_the_test_set_and_writes_the_published_columns(bag_run, bag_folder, tmp_path):
    scans = tmp_path / "scans"
    shutil.copytree(bag_folder / "CTs", scans)
    (scans / "P99").mkdir()
    (scans / "P99" / "1.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"no more than this")
    found = predict.write(predict.load(bag_run, tta=1), scans, tmp_path / "out")
    test, told = pd.read_csv(bag_run / "test_predictions.csv").set_index("patient"), found.studies.set_index("patient")
    assert np.array_equal(told.score[test.index], test.prob), "bit for bit"
    assert (told.decision[test.index].eq("positive") == test.pred.eq(1)).all() and (told.score_slice[test.index] == test.top_slice).all()
    assert np.allclose(told.probability[test.index], test.calibrated) and told.tta_sd.notna().sum() == 30
    assert found.slices.decision.isna().all() and found.slices.score[found.slices.used].notna().all(), "a slice of a bag has no decision"
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("patient_id")
    assert list(table) == ["prediction", "probability", "patient_logit", "num_slices", "mean_slice_prob", "max_slice_prob",
                           "num_dicom_files", "confidence", "error"]
    assert np.allclose(1 / (1 + np.exp(-table.patient_logit[test.index])), test.prob) and (table.num_slices[test.index] == 5).all()
    assert table.loc["P99", "prediction"] == -1 and "no usable slice" in table.loc["P99", "error"] and table.loc["P99", "num_slices"] == 0
    first = pd.read_parquet(bag_run / "features_df_split.parquet").query("fold == -1").sort_values("patient")
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in first.path[first.patient == first.patient.iloc[0]]: shutil.copy(path, alone)
    assert predict.load(bag_run)(alone).score.tolist() == [test.prob[first.patient.iloc[0]]], "one patient folder"


@pytest.mark.slow
def test_learned_pooling_with_folds_quality_and_texture(place, bag_folder, tmp_path):
    "Attention, two folds, faulty slices left out, texture altered: scored, predicted with every fold's own pool, exported."
    from ctbm import export
    run = train.run(**place, **BAGS, bag_pooling="attention", hidden=8, k_folds=2, quality="any", texture="same")
    listed = pd.read_csv(run / "checkpoint_summary.csv")
    assert set(listed.file) == {path.name for path in (run / "checkpoints" / "final").glob("*.pth")} and listed.best.sum() >= 1
    scores, pooled = oof(run), pd.read_csv(run / "pooling.csv")
    assert "attention" in set(pooled.pooling) and not np.allclose(scores.score, scores.max_score)
    faults, split = pd.read_csv(run / "quality.csv"), pd.read_parquet(run / "features_df_split.parquet")
    assert set(faults.slice_id) == set(split.slice_id[split.fold >= 0])
    assert set(split.slice_id[split.dropped]) == set(faults.slice_id[faults.dropped])
    assert set(scores.patient) == set(split.patient[split.fold >= 0]) and scores.slices.eq(5).all(), "what is scored keeps its slices"
    predictor = predict.load(run, ensemble=True)
    told = predictor(bag_folder / "CTs").set_index("patient")
    test = pd.read_csv(run / "test_predictions.csv").set_index("patient")
    assert np.array_equal(told.score[test.index], test.prob) and (told.folds_sd > 0).all()
    file = export.to_onnx(predictor.made, tmp_path / "model.onnx")
    told = runs.read_json(export.write(run, tmp_path / "bundle", formats=("onnx",), jobs=1) / "export.json")
    assert "patients" in told["measured_on"] and told["engines"]["onnx"]["largest_difference"] < 1e-4 and told["torch_beside_the_run"] == 0
    by_onnx = predict.load(tmp_path / "bundle", engine="onnx")(bag_folder / "CTs").set_index("patient").score
    assert by_onnx[test.index].sub(test.prob).abs().max() < 1e-4
    session = export.session(file)
    images = np.random.default_rng(0).integers(0, 255, (7, 1, 32, 32)).astype(np.uint8)
    score, embedding, patient = session.run(["score", "embedding", "patient"], {"images": images})
    by_torch = predict.SCORERS["bag"](predictor.made, predictor.made.network, predictor.made.look, [images], [np.full(7, np.nan)])[0]
    assert patient.shape == (1,) and patient[0] == pytest.approx(by_torch.score, abs=1e-4)
    assert np.allclose(score, by_torch.slices, atol=1e-4) and embedding.shape == (7, predictor.made.network.head_hidden_size)


def test_a_gru_is_exported_without_its_pool_and_pools_in_torch(bag_run, tmp_path):
    from ctbm import export, models
    made = predict.load(bag_run).made
    network = models.create_model("resnet10t", 1, "none", size=32, pooling="gru").eval()
    graph = export.GRAPHS["bag"](network)
    assert graph.outputs == ("score", "features", "logit", "embedding") and len(graph(torch.zeros(3, 1, 32, 32, dtype=torch.uint8))) == 4
    assert export.GRAPHS["bag"](made.network).outputs[-1] == "patient"


def test_sides_of_a_split_have_patients_of_both_classes():
    "Positive patients have negative slices, which must not pass for negative patients."
    patients, labels = np.repeat([f"P{i}" for i in range(12)], 4), [1, 0, 0, 0] * 11 + [0] * 4
    table = pd.DataFrame({"patient": patients, "slice_id": range(48), "label": labels})
    table["patient_label"] = table.groupby("patient").label.transform("max")
    with pytest.raises(ValueError, match="both classes"):
        train.datasets.split(train.sided(recipes.RECIPES["patient"], table), 0.2, 1, 0, 0.2)
    assert train.datasets.split(train.sided(recipes.RECIPES["slice_cv"], table), 0.2, 1, 0, 0.2).fold.nunique() == 3


def test_faulty_slices_leave_training_and_never_make_a_patient_healthy(monkeypatch):
    table = pd.DataFrame({"patient": ["A"] * 4 + ["B"] * 4, "slice_id": [f"S{i}" for i in range(8)], "label": [1] + [0] * 7, "fold": 1})
    found = table[["slice_id", "patient"]].assign(issues=["metal_artifact", "", "", "", "metal_artifact", "", "", ""], unreadable=None)
    monkeypatch.setattr(train.quality, "table", lambda rows, jobs: found)
    told, faults = train.examined(train.Job(quality="any"), recipes.RECIPES["patient"], table)
    assert told.dropped.tolist() == [True] * 5 + [False] * 3 and len(faults) == 8, "A, whose only positive slice is faulty, goes as a whole"
    told, _ = train.examined(train.Job(quality="any"), recipes.RECIPES["slice_cv"], table)
    assert told.dropped.tolist() == [True, False, False, False, True, False, False, False]
    learns, chooses = train.choosers(recipes.RECIPES["patient"], told.assign(row=range(8)), told.assign(fold=0), 0)
    assert set(learns.slice_id) == set(told.slice_id[~told.dropped]) and len(chooses) == 8


def test_options_belong_to_the_recipe(capsys):
    for recipe, there in (("patient", True), ("slice_cv", False)):
        with pytest.raises(SystemExit): cli.main(["train", "--recipe", recipe, "--help"])
        said = capsys.readouterr().out
        assert ("--max-slices" in said) is there and ("--lr-body-layer3" in said) is there and "--texture" in said
    with pytest.raises(ValueError, match="negative_ratio"): recipes.resolve("patient", values={"balanced": True})
    with pytest.raises(ValueError, match="separation_weight"): recipes.resolve("patient", values={"batch_size": 1})
    with pytest.raises(ValueError, match="must be one of .*attention"): recipes.resolve("patient", values={"bag_pooling": "atention"})


def test_every_candidate_of_the_grid_is_a_recipe():
    for candidate in recipes.GRIDS["patient"]:
        assert recipes.resolve("patient", "demo", candidate, values={"weights": "none"}).kind == "bag"
