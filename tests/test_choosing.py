"The fourth pipeline on chests, from files to studies: pictures of windows instead of DICOM, labels of studies alone, a planted leak."
import json

import numpy as np
import pandas as pd
import pytest

from ctbm import chest, cli, train

TINY = {"organ": "lung", "scale": "demo", "backbone": "test_resnet", "weights": "none", "size": 32, "epochs_all": 1, "top_k": 5,
        "num_workers": 1, "prep_plot_n": 0, "report": False}
CLASSIFIER = {"select": "classifier", "selector_backbone": "test_resnet", "selector_epochs": 2, "selector_lr": 1e-3}


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    return chest.make_chest_cohort(tmp_path_factory.mktemp("chests") / "cohort", n_patients=20, seed=3, slices=12, jobs=1)


def where(tmp_path): return {"outputs": str(tmp_path / "outputs"), "packs": str(tmp_path / "packs")}


def told(run, name): return pd.read_csv(run / name, keep_default_na=False, na_values=[""])


@pytest.mark.slow
def test_pictures_of_windows_go_the_whole_way(chests, tmp_path, capsys):
    rsna = chest.write_competition(chests, tmp_path / "rsna")
    options = TINY | CLASSIFIER | {"data_root": rsna, "cts": "train-jpegs", "labels": "train.csv"} | where(tmp_path)
    argv = ["train", "--recipe", "siamese", *(word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v)))]
    assert cli.main(argv) == 0, capsys.readouterr().err
    run, = (tmp_path / "outputs").glob("run_*")
    kept, slices = told(run, "selection.csv"), told(run, "test_slices.csv")
    assert (kept.chosen == 5).all() and (kept.slices == 12).all() and (run / "selection.png").is_file()
    assert (kept.positive_chosen <= kept.positive).all() and kept.positive.gt(0).any()
    assert (slices.groupby("patient").size() == 5).all(), "only chosen slices are scored"
    problems = pd.read_parquet(run / "features_df.parquet").problem.dropna()
    assert problems.str.contains("indeterminate").any(), "the competition's undecided studies are left out, and said to be"

    assert cli.main(["predict", str(run), str(rsna / "train-jpegs"), "--out", str(tmp_path / "new")]) == 0, capsys.readouterr().err
    studies, test = told(tmp_path / "new", "studies.csv"), told(run, "test_predictions.csv").set_index("id")
    np.testing.assert_allclose(studies.set_index("patient").score[test.index], test.prob, rtol=1e-12)
    seen = told(tmp_path / "new", "slices.csv")
    assert (seen.groupby("patient").used.sum() == 5).all() and (seen.why[~seen.used] == "not among the 5 slices chosen").all()


def test_a_planted_validation_slice_stops_the_job(chests, tmp_path, monkeypatch):
    choose = train.choosers

    def planted(recipe, table, fold, job):
        learns, chooses = choose(recipe, table, fold, job)
        return pd.concat([learns, chooses[:1]]), chooses
    monkeypatch.setattr(train, "choosers", planted)
    with pytest.raises(ValueError, match="leak"):
        train.run(recipe="siamese", data_root=str(chests), **where(tmp_path), **TINY, **CLASSIFIER)


def test_labels_of_studies_alone(chests, tmp_path, capsys):
    weak = told(chests, "labels1.csv").groupby("PatientID").Label.max().reset_index()
    weak.to_csv(tmp_path / "weak.csv", index=False)
    data = {"data_root": str(chests), "labels": str(tmp_path / "weak.csv")} | where(tmp_path)
    run = train.run(recipe="siamese", **TINY | {"size": 64}, **data)
    links = told(run, "audit_links.csv")
    assert links.kind.tolist() == ["not compared"], "chests are alike without being one patient"
    assert "not of slices: slice_weight 0" in capsys.readouterr().out
    assert json.loads((run / "effective_config.json").read_text())["slice_weight"] == 0
    split = pd.read_parquet(run / "features_df_split.parquet")
    assert (split.label == split.patient_label).all() and split.weak.all()
    with pytest.raises(ValueError, match="recipe slice_cv learns from single slices"):
        train.run(recipe="slice_cv", scale="demo", size=32, weights="none", num_workers=1, prep_plot_n=0, report=False, **data)
