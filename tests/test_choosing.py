"The fourth pipeline from files to study: slices chosen, one branch per window, weak labels, pictures of windows instead of DICOM."
import json

import numpy as np
import pandas as pd
import pytest

from ctbm import chest, choosing, cli, predict, train, windowed

TINY = {"recipe": "siamese", "organ": "lung", "scale": "demo", "backbone": "test_resnet", "weights": "none", "size": 32, "epochs_all": 2,
        "top_k": 5, "num_workers": 1, "prep_plot_n": 0, "report": False}
CLASSIFIER = {"select": "classifier", "selector_backbone": "test_resnet", "selector_epochs": 2, "selector_lr": 1e-3}


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    return chest.make_chest_cohort(tmp_path_factory.mktemp("chests") / "cohort", n_patients=20, seed=3, slices=12, jobs=1)


@pytest.fixture(scope="module")
def pictures(chests, tmp_path_factory):
    out = tmp_path_factory.mktemp("competition") / "rsna"
    chest.write_competition(chests, out)
    return out


@pytest.fixture(scope="module")
def chosen(chests, tmp_path_factory):
    place = tmp_path_factory.mktemp("chosen")
    return train.run(data_root=str(chests), outputs=str(place / "outputs"), packs=str(place / "packs"), **TINY, **CLASSIFIER)


def told(run, name): return pd.read_csv(run / name, keep_default_na=False, na_values=[""], dtype={"patient": str})


def test_both_stages_leave_a_run_that_says_what_was_chosen(chosen):
    kept = told(chosen, "selection.csv")
    assert (kept.chosen == 5).all() and kept.slices.between(6, 12).all() and (chosen / "selection.png").is_file()
    assert (kept.positive_chosen <= kept.positive).all() and kept.positive.gt(0).any()
    model = json.loads((chosen / "model.json").read_text())
    assert model["top_k"] == 5 and model["branches"] == "shared" and model["selector"]["backbone"] == "test_resnet"
    slices = told(chosen, "test_slices.csv")
    assert (slices.groupby("patient").size() == 5).all(), "only chosen slices are scored"


def test_prediction_chooses_and_scores_as_the_test_did(chosen, chests):
    test = told(chosen, "test_predictions.csv").set_index("id")
    studies, slices = predict.load(chosen).predict(chests / "CTs")
    found = studies.set_index("patient").score[test.index]
    np.testing.assert_array_equal(found.to_numpy(float), test.prob.to_numpy(float))
    assert (slices.groupby("patient").used.sum() == 5).all() and slices.why.str.contains("not among the 5").sum() == (~slices.used).sum()


def test_a_patient_in_training_and_validation_is_refused_by_the_first_stage():
    slices = pd.DataFrame({"patient": ["a", "a", "b"], "label": [0, 1, 0]})
    choosing.refuse_seen(slices[:2], slices[2:])
    with pytest.raises(ValueError, match="leak: the slice selector .* first is a"):
        choosing.refuse_seen(slices[:2], slices[1:])


def test_a_planted_validation_slice_stops_the_job(chests, tmp_path, monkeypatch):
    choose = train.choosers

    def planted(recipe, table, fold, job):
        learns, chooses = choose(recipe, table, fold, job)
        return pd.concat([learns, chooses[:1]]), chooses
    monkeypatch.setattr(train, "choosers", planted)
    with pytest.raises(ValueError, match="leak"):
        train.run(data_root=str(chests), outputs=str(tmp_path / "o"), packs=str(tmp_path / "p"), **TINY, **CLASSIFIER)


def test_pictures_of_windows_train_and_predict_like_dicom(pictures, tmp_path, capsys):
    options = {k: v for k, v in TINY.items() if k != "recipe"} | {"data_root": pictures, "cts": "train-jpegs", "labels": "train.csv",
                                                                  "select": "area", "outputs": tmp_path / "o", "packs": tmp_path / "p"}
    argv = ["train", "--recipe", "siamese", *(word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v)))]
    assert cli.main(argv) == 0, capsys.readouterr().err
    run, = (tmp_path / "o").glob("run_*")
    out = tmp_path / "new"
    assert cli.main(["predict", str(run), str(pictures / "train-jpegs"), "--out", str(out)]) == 0, capsys.readouterr().err
    studies = told(out, "studies.csv")
    test = told(run, "test_predictions.csv").set_index("id")
    np.testing.assert_array_equal(studies.set_index("patient").score[test.index].to_numpy(float), test.prob.to_numpy(float))
    problems = pd.read_parquet(run / "features_df.parquet").problem.dropna()
    assert problems.str.contains("indeterminate").any(), "the competition's undecided studies are left out, and said to be"


def test_labels_of_studies_alone(chests, tmp_path, capsys):
    labels = told(chests, "labels1.csv").rename(columns={"PatientID": "patient"})
    weak = labels.groupby("patient").Label.max().rename_axis("PatientID").reset_index()
    weak.to_csv(tmp_path / "weak.csv", index=False)
    where = {"data_root": str(chests), "labels": str(tmp_path / "weak.csv"), "outputs": str(tmp_path / "o"), "packs": str(tmp_path / "p")}
    run = train.run(**TINY | {"epochs_all": 1}, **where)
    assert "not of slices: slice_weight 0" in capsys.readouterr().out
    assert json.loads((run / "effective_config.json").read_text())["slice_weight"] == 0
    split = pd.read_parquet(run / "features_df_split.parquet")
    assert (split.label == split.patient_label).all() and split.weak.all()
    with pytest.raises(ValueError, match="recipe slice_cv learns from single slices"):
        train.run(recipe="slice_cv", scale="demo", size=32, weights="none", num_workers=1, prep_plot_n=0, report=False, **where)


def test_the_published_way_labels_every_slice(chests, tmp_path):
    small = {k: v for k, v in TINY.items() if k != "organ"} | {"batch_size": 16, "epochs_all": 1}
    run = train.run(published=True, data_root=str(chests), outputs=str(tmp_path / "o"), packs=str(tmp_path / "p"), **small, **CLASSIFIER)
    config = json.loads((run / "effective_config.json").read_text())
    assert config["every_slice"] and config["windows"] == [[-600, 1500], [100, 700], [40, 400]] and config["flip_p"] == 0
    test, slices = told(run, "test_predictions.csv").set_index("id"), told(run, "test_slices.csv")
    from scipy.special import expit, logit
    pooled = slices.groupby("patient").score.agg(lambda scores: expit(logit(scores).mean()))
    np.testing.assert_allclose(pooled[test.index], test.prob, atol=1e-6)


def test_windows_are_recovered_from_pictures(pictures):
    files = sorted((pictures / "train-jpegs").rglob("*.jpg"))
    assert files and all(windowed.is_windowed(path) for path in files)
