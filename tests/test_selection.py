"Slices chosen before a network sees them: on real slices, through a whole run, in prediction and in a bundle."
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from ctbm import bundle, choosing, cohort, datasets, export, learning, lung, pack, patient, predict, recipes, runs, selection, train
from ctbm.learning import Beside
from ctbm.preprocess import Preprocess
from tests.conftest import BAGS, oof

CHOSEN = BAGS | {"organ": "brain", "select": "classifier", "top_k": 3, "backbone": "test_resnet", "selector_backbone": "test_resnet",
                 "selector_epochs": 1, "epochs_warmup": 0, "epochs_layer4": 0}


@pytest.fixture(scope="module")
def chosen_run(bag_folder, tmp_path_factory):
    "A finished run that shows three of five slices, chosen by a classifier of which slices show much brain."
    place = tmp_path_factory.mktemp("chosen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lung.SHOWS, "brain", 0.6)  # of the five slices of a synthetic head, all show some
        return train.run(data_root=str(bag_folder), outputs=str(place / "outputs"), packs=str(place / "packs"), **CHOSEN)


def test_real_chest_slices_are_chosen_by_their_lung(data, tmp_path):
    table = cohort.scan(data / "chest_lungdx", jobs=1)
    table = table[table.problem.isna()]
    made = pack.build(table, Preprocess(size=64, windows=("lung", "embolism", "mediastinum"), organ="lung", crop="none"), tmp_path, jobs=1)
    slices = made.table
    chosen = selection.top(slices, slices.organ_area, 2)
    assert chosen.sum() == sum(min(2, n) for n in slices.groupby(["patient", "study"]).size())
    for _, study in slices.groupby(["patient", "study"]):
        mine = chosen[study.index]
        assert study.organ_area[mine].min() >= study.organ_area[~mine].max() or mine.all()
    assert selection.kept(slices, chosen).slices.sum() == len(slices)
    figure = selection.figure(slices, slices.organ_area, chosen, made.images)
    assert len(figure.axes) == 9 * min(4, slices.groupby(["patient", "study"]).ngroups)


def test_every_patient_is_judged_by_the_chosen_slices_and_keeps_the_label_of_all(chosen_run):
    split = pd.read_csv(chosen_run / "split.csv")
    worst = split.groupby("patient").label.max()
    for table in (oof(chosen_run), pd.read_csv(chosen_run / "test_predictions.csv")):
        assert table.slices.eq(3).all() and (table.label.to_numpy() == worst[table.patient]).all()
    model = runs.read_json(chosen_run / "model.json")
    assert model["top_k"] == 3 and model["selector"]["backbone"] == "test_resnet" and "weights" not in model["selector"]


def test_prediction_chooses_as_the_run_did_and_says_what_it_left(chosen_run, tmp_path):
    split, scans = pd.read_parquet(chosen_run / "features_df_split.parquet"), tmp_path / "scans"
    scans.mkdir()
    for path in split.path[split.fold == -1]: shutil.copy(path, scans)
    predictor = predict.load(bundle.write(chosen_run, tmp_path / "bundle.zip"), tta=1)
    found = predictor.predict(scans, tmp_path / "kept")
    told, test = found.studies.set_index("patient"), pd.read_csv(chosen_run / "test_predictions.csv").set_index("patient")
    assert np.array_equal(told.score[test.index], test.prob), "bit for bit"
    assert told.slices.eq(3).all() and told.other_series.isna().all() and not told.findings.str.contains("decoded").any()
    left = found.slices[~found.slices.used]
    assert (left.why == "not among the 3 slices chosen").all() and (left.groupby("patient").size() == 2).all() and left.score.isna().all()
    assert told.tta_sd.notna().all() and found.slices.used.groupby(found.slices.patient).sum().eq(3).all()
    again = predictor.predict(scans, tmp_path / "kept")
    pd.testing.assert_frame_equal(found.slices, again.slices), pd.testing.assert_frame_equal(found.studies, again.studies)


def test_an_exported_network_is_measured_on_the_chosen_slices(chosen_run, tmp_path):
    told = runs.read_json(export.write(chosen_run, tmp_path / "bundle", formats=("onnx",), jobs=1) / "export.json")
    assert told["torch_beside_the_run"] == 0 and told["engines"]["onnx"]["largest_difference"] < 1e-4
    patients = len(pd.read_csv(chosen_run / "test_predictions.csv"))
    assert told["measured_on"] == f"the test set: {3 * patients} slices of {patients} patients"
    said = export.about(bundle.load(chosen_run))
    assert '"slices_of_a_study": 3' in said["choose"] and "classifier" in said["choose"]


def toy() -> tuple[pd.DataFrame, np.ndarray]:
    "Sixteen patients of eight squares; half of the squares are bright, and half of the patients ill."
    row = np.arange(128)
    table = pd.DataFrame({"row": row, "slice_id": row.astype(str), "patient": [f"P{i:02}" for i in row // 8], "position_mm": row % 8,
                          "label": (row // 8 % 2) * (row % 8 == 3), "organ_area": np.where(row % 8 < 4, 0.3, 0.0), "body_area": 0.5})
    noise = np.random.default_rng(0).integers(0, 50, (128, 1, 32, 32))
    return table, (noise + 150 * (table.organ_area > 0).to_numpy()[:, None, None, None]).astype(np.uint8)


def small(**values) -> recipes.Recipe:
    return recipes.override(recipes.resolve("patient", "demo"), {
        "backbone": "test_resnet", "selector_backbone": "test_resnet", "weights": "none", "size": 32, "intensity": "window",
        "mask": "none", "epochs_warmup": 0, "epochs_layer4": 0, "epochs_layer3": 1, "negative_ratio": None, "organ": "lung",
        "select": "classifier", "top_k": 3, "selector_epochs": 1, **values})


def test_no_slice_of_a_validation_study_reaches_the_selector(monkeypatch):
    "Planted twice: by the split, and by the lesson itself."
    table, images = toy()
    folds = table.assign(fold=(table.patient >= "P12").astype(int), patient_label=table.groupby("patient").label.transform("max"))
    learn = lambda: train.run_fold(small(selection="published"), images, folds, 1, Beside())
    scored, _ = learn()
    assert set(scored.patient) == set(folds.patient[folds.fold == 1])

    lesson, unseen = choosing.lesson, folds[folds.fold == 1]
    monkeypatch.setattr(choosing, "lesson", lambda recipe, slices, seed: (pd.concat([lesson(recipe, slices, seed)[0], unseen[:1]]), slices))
    with pytest.raises(ValueError, match="leak: the slice selector .* the first is P12"): learn()
    monkeypatch.undo()
    monkeypatch.setattr(train, "choosers", lambda *_: (folds, unseen))
    monkeypatch.setattr(datasets, "check_split", lambda table: None)
    with pytest.raises(ValueError, match="leak: "): learn()


def test_the_selector_learns_from_its_own_patients_alone(monkeypatch):
    "What is shown to it in training are slices of training patients, half with and half without the organ; its epoch is chosen on others."
    table, images = toy()
    seen, fit = [], learning.fit
    monkeypatch.setattr(learning, "fit", lambda recipe, pixels, taught, holds, *rest: seen.append((recipe, taught, holds)) or fit(
        recipe, pixels, taught, holds, *rest))
    recipe = small()
    network = learning.build(recipe, "none")
    train_part, valid = table[table.patient < "P12"], table[table.patient >= "P12"]
    before = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("chooser.")}
    left = choosing.first_stage(recipe, network, images, train_part, valid, 0, Beside())
    (its_own, taught, holds), = seen
    assert its_own.kind == "slice" and its_own.backbone == "test_resnet" and not set(taught.patient) & set(holds.patient)
    assert set(taught.patient) | set(holds.patient) <= set(train_part.patient) and taught.label.mean() == holds.label.mean() == 0.5
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items()), "the second network has not begun"
    assert [part.groupby("patient").size().eq(3).all() for part in left] == [True, True]


def test_the_published_way_teaches_slices_and_scores_patients(monkeypatch):
    "Every chosen slice with its patient's label, class weights of the whole training set, patients pooled; a permuted table is the same."
    table, images = toy()
    folds = table.assign(fold=(table.patient >= "P12").astype(int), patient_label=table.groupby("patient").label.transform("max"))
    recipe, met = small(select="area", every_slice=True, slice_weight=0.0, separation_weight=0.0, bag_pooling="mean",
                         selection="published"), []
    kept, weigh = patient.kind_of(recipe), learning.met
    monkeypatch.setattr(learning, "met", lambda recipe, labels: met.append(weigh(recipe, labels)) or met[-1])
    scored, facts = train.run_fold(recipe, images, folds, 1, Beside())
    assert kept is patient.EVERY_SLICE and len(met[0]) == 12 * 3 and met[0].mean() == 0.5, "of 36 slices shown, 6 have a lesion"
    assert set(scored.patient) == {"P12", "P13", "P14", "P15"} and scored.slices.eq(3).all() and scored.label.sum() == 2
    assert len(facts["history"]) == 1 and (scored.score < scored.max_score).all()
    again, _ = train.run_fold(recipe, images, folds.sample(frac=1, random_state=0), 1, Beside())
    assert np.array_equal(again.set_index("patient").score[scored.patient], scored.score)


def test_nothing_is_chosen_where_all_are_asked_for_or_areas_are_missing():
    table, images = toy()
    assert not hasattr(learning.build(small(select="all"), "none"), "chooser")
    network = learning.build(small(select="area"), "none")
    with pytest.raises(ValueError, match="organ_area"): choosing.chosen(network, images, table.assign(organ_area=np.nan))
    with pytest.raises(ValueError, match="organ"): recipes.resolve("patient", values={"select": "area", "organ": "none"})
