"Segmentation from files to a decision: runs, resumes, several devices, lists of images, what is read back by other programs."
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file

from ctbm import cli, jobs, lesions, recipes, report, runs, segment, train, volumes, volumetric
from tests.conftest import ROOT, once, papermill

TINY = {"recipe": "segment", "scale": "demo", "skull": "none", "bias": False, "spacing_mm": None, "width": 4, "levels": 3,
        "patch_size": [16, 16, 16], "epochs": 2, "lr": 0.01, "precision": "32", "num_workers": 1, "report": False}


def write_toys(folder: Path, count: int = 16, healthy: int = 6) -> Path:
    "Heads of 28 x 26 x 14 voxels with bright balls, as NIfTI pairs and a table of labels."
    rng, grid = np.random.default_rng(0), np.moveaxis(np.indices((28, 26, 14)), 0, -1)
    folder.mkdir(parents=True)
    for i in range(count):
        image = rng.normal(100, 8, grid.shape[:3]) * (np.linalg.norm((grid - (14, 13, 7)) / (13, 12, 7), axis=-1) < 1)
        mask = np.zeros(image.shape, np.uint8)
        if i >= healthy: mask[np.linalg.norm(grid - rng.integers((9, 9, 5), (18, 17, 9)), axis=-1) < rng.uniform(2.5, 4)] = 1
        affine = np.diag([2, 2, 4, 1.0])
        volumes.write(folder / f"P{i:02}_image.nii.gz", (image + 80 * mask).astype(np.float32), affine)
        volumes.write(folder / f"P{i:02}_label.nii.gz", mask, affine)
    rows = "\n".join(f"P{i:02},{int(i >= healthy)}" for i in range(count))
    (folder / "labels.csv").write_text("PatientID,Label\n" + rows)
    return folder


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> Path:
    return once(tmp_path_factory, "toys", lambda place: write_toys(place / "toys"))


@pytest.fixture(scope="session")
def place(tmp_path_factory, toys) -> dict:
    where = tmp_path_factory.mktemp("segment")
    return TINY | {"data_root": str(toys), "labels": "labels.csv", "outputs": str(where / "outputs"), "packs": str(where / "packs")}


@pytest.fixture(scope="session")
def segment_run(place) -> Path:
    "A finished run of two folds, made from a shell."
    words = [word for name, value in place.items() for word in (f"--{name.replace('_', '-')}", json.dumps(value))]
    words = [word.strip('"') for word in words]
    done = subprocess.run([sys.executable, "-m", "ctbm.cli", "train", *words, "--k-folds", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test, masks (" in done.stdout and "fixed-threshold baseline" in done.stdout and "epoch   2/2" in done.stdout
    return runs.latest(Path(place["outputs"]))


def test_run_leaves_all_that_was_asked_for(segment_run):
    cases, split = pd.read_csv(segment_run / "cases.csv"), pd.read_csv(segment_run / "split.csv")
    assert set(cases.patient) == {f"P{i:02}" for i in range(16)} and cases.case.is_unique
    assert dict(zip(cases.case, cases.fold, strict=True)) == dict(zip(split.case, split.fold, strict=True)), "judged in its own fold"
    told = runs.read_json(segment_run / "segmentation.json")
    assert set(told) == {"out-of-fold", "test", "baseline"} and told["test"]["cases"] == (cases.side == "test").sum()
    for name in ("history.png", "froc.png", "dice.png", "sizes.png", "examples.png", "test_metrics.json", "oof_predictions.csv",
                 "folds.csv", "lesions.csv", "candidates.csv", "history.csv", "volumes.csv", "networks/fold_0.safetensors"):
        assert (segment_run / name).is_file(), name
    oof = pd.read_csv(segment_run / "oof_predictions.csv").set_index("id").score
    scored = cases[cases.side == "out-of-fold"].set_index("patient").score
    assert oof.to_dict() == pytest.approx(scored.to_dict()), "the patient's score is that of the mask"


def test_masks_lie_on_their_volumes_in_other_programs(segment_run, toys):
    for file in (segment_run / "masks").glob("*.nii.gz"):
        name = file.name.removesuffix(".nii.gz")
        image, mask = nib.load(toys / f"{name}_image.nii.gz"), nib.load(file)
        assert np.allclose(image.affine, mask.affine) and image.shape == mask.shape
        other, mine = sitk.ReadImage(toys / f"{name}_image.nii.gz"), sitk.ReadImage(file)
        assert (other.GetSpacing(), other.GetOrigin(), other.GetDirection()) == (mine.GetSpacing(), mine.GetOrigin(), mine.GetDirection())
        assert np.array_equal(sitk.GetArrayFromImage(mine).T, np.asarray(mask.dataobj))


def test_lists_of_the_folds_keep_patients_apart(segment_run):
    lists = sorted((segment_run / "splits").glob("split_*.json"))
    assert len(lists) == 2
    seen = []
    for file in lists:
        sides = json.loads(file.read_text())
        train, valid = ({each["image"] for each in sides[side]} for side in ("training", "validation"))
        assert train and valid and not train & valid
        seen += valid
    assert len(seen) == len(set(seen)), "every volume is validated once"


def test_scores_come_again_from_the_finished_run(segment_run, toys):
    ready = segment.load(segment_run)
    cases = pd.read_csv(segment_run / "cases.csv").query("side == 'test'").set_index("case")
    for row in volumes.find(toys, labels="labels.csv").itertuples():
        if row.case not in cases.index: continue
        volume, truth = volumes.load(row)
        p = ready.probability(volume)
        assert lesions.patient_score(p, volume.affine) == pytest.approx(cases.score[row.case], abs=1e-6)
        assert lesions.case(truth, p, volume.affine)[0]["dice"] == pytest.approx(cases.dice[row.case], abs=1e-6)
    both = segment.load(segment_run, ensemble=True)
    assert len(both.networks) == 3 and not np.array_equal(both.probability(volume), ready.probability(volume))


def test_new_volumes_from_a_shell(segment_run, toys, tmp_path):
    (tmp_path / "new").mkdir()
    for i in (0, 12): (tmp_path / "new" / f"scan{i}.nii.gz").write_bytes((toys / f"P{i:02}_image.nii.gz").read_bytes())
    assert cli.main(["predict", str(segment_run), str(tmp_path / "new"), "--out", str(tmp_path / "out"), "--ensemble"]) == 0
    told = pd.read_csv(tmp_path / "out" / "studies.csv")
    assert len(told) == 2 and told.decision.isin(["positive", "negative"]).all() and told.score.between(0, 1).all()
    assert cli.main(["predict", str(segment_run), str(tmp_path / "new"), "--out", str(tmp_path / "no"), "--tta", "2"]) == 2
    assert cli.main(["export", str(segment_run), "--out", str(tmp_path / "b.zip")]) == 2


def test_report_of_a_run(segment_run):
    page = report.write(segment_run).read_text(encoding="utf8")
    assert "Dice" in page and "HD95" in page and (segment_run / "model_card.md").is_file()


def test_unknown_and_unfit_values_are_refused(place):
    wrong = [({"patch_size": [18, 18, 18]}, "nearest"), ({"network": "vnet"}, "network must be one of"), ({"epoch": 3}, "epochs"),
             ({"skull": "brain"}, "skull"), ({"pooling": "mean"}, "only 'max' fits"), ({"run_grid": True, "network": "unet"}, "the grid"),
             ({"percentiles": [99, 1]}, "smaller number"), ({"weights": "nowhere.pth"}, "nowhere.pth"), ({"quality": "any"}, "quality"),
             ({"intensity": "window"}, "window")]
    for values, word in wrong:
        with pytest.raises((ValueError, FileNotFoundError), match=word): train.run(**place | values)


def some(place: dict, toys: Path, **values) -> tuple:
    "A recipe and its prepared volumes."
    job, recipe, _ = jobs.plan(place | values)
    table = volumes.find(toys, labels="labels.csv")
    recipe = segment.settled(recipe, table)
    return recipe, volumetric.build(table, recipe.volumetric, job.packs, 1)


def same(a: Path, b: Path) -> bool:
    one, two = (load_file(file) for file in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("network", ["unet", pytest.param("segresnet", marks=pytest.mark.slow)])
def test_a_killed_training_goes_on_as_if_nothing_had_been(place, toys, tmp_path, monkeypatch, network):
    recipe, table = some(place, toys, epochs=4, validate_every=1, network=network, rotate3_p=0.5)
    whole, killed = (segment.Beside(tmp_path / name) for name in ("whole", "killed"))
    for each in (whole, killed): each.folder.mkdir()
    _, history = segment.fit(recipe, table[6:12], table[12:], 0, whole)
    told = segment.Progress.on_train_epoch_start

    def pull_the_plug(self, trainer, module):
        if trainer.current_epoch == 2: raise RuntimeError("power cut")
        told(self, trainer, module)

    monkeypatch.setattr(segment.Progress, "on_train_epoch_start", pull_the_plug)
    with pytest.raises(RuntimeError, match="power cut"): segment.fit(recipe, table[6:12], table[12:], 0, killed)
    monkeypatch.setattr(segment.Progress, "on_train_epoch_start", told)
    _, again = segment.fit(recipe, table[6:12], table[12:], 0, killed)
    assert same(whole.folder / "best.safetensors", killed.folder / "best.safetensors")
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(again) == drop(history) and len(history) == 4


def test_a_stopped_run_is_resumed_from_a_shell(place, monkeypatch):
    judged = segment.judged
    monkeypatch.setattr(segment, "judged", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): train.run(**place, k_folds=2, seed=3)
    monkeypatch.setattr(segment, "judged", judged)
    partial = next(Path(place["outputs"]).glob(f"*{runs.PARTIAL}"))
    with pytest.raises(ValueError, match="epochs"): train.run(resume=partial, epochs=9)
    assert cli.main(["train", "--resume", str(partial)]) == 0
    assert (partial.with_name(partial.name.removesuffix(runs.PARTIAL)) / "segmentation.json").is_file() and not partial.exists()


@pytest.mark.slow
def test_several_devices_train_one_network(place, toys, tmp_path):
    recipe, table = some(place, toys)
    network, history = segment.fit(recipe, table[6:12], table[12:], 0, segment.Beside(tmp_path, gpus=2))
    assert len(history) == 2 and history[-1]["val_dice"] is not None
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in load_file(tmp_path / "best.safetensors").items())


def test_a_cohort_in_which_all_are_ill_gets_masks_and_no_decision(place, tmp_path):
    folder = write_toys(tmp_path / "ill", 8, 0)
    finished = train.run(**place | {"data_root": str(folder), "epochs": 1, "k_folds": 1})
    assert not (finished / "test_metrics.json").is_file() and (finished / "segmentation.json").is_file()
    assert "no decision for patients" in runs.describe(finished)
    assert "no decision about patients" in report.write(finished).read_text(encoding="utf8")


def test_given_validation_side_is_used_and_one_patient_on_two_sides_is_a_leak(place, toys, tmp_path):
    names = [f"P{i:02}" for i in range(16)]
    entry = lambda name: {"image": str(toys / f"{name}_image.nii.gz"), "label": str(toys / f"{name}_label.nii.gz")}
    valid = names[3:6] + names[13:]
    given = {"training": [entry(n) for n in names if n not in valid], "validation": [entry(n) for n in valid]}
    (tmp_path / "dataset_1.json").write_text(json.dumps(given))
    table = volumes.find(tmp_path / "dataset_1.json")
    recipe = segment.settled(jobs.plan(place | {"k_folds": 1})[1], table)
    split = segment.sides(recipe, table)
    assert set(split.case[split.fold == 0]) == set(table.case[table.given == "validation"]) and (split.fold == -1).any()
    with pytest.raises(ValueError, match="patient"): segment.sides(recipe, table.assign(patient="one"))


@pytest.mark.slow
def test_networks_are_compared_on_the_same_volumes(place, monkeypatch):
    monkeypatch.setitem(recipes.GRIDS, "segment", {name: {"network": name} for name in ("unet", "attention")})
    finished = train.run(**place | {"k_folds": 2, "epochs": 1, "run_grid": True})
    told = pd.read_csv(finished / "networks.csv")
    assert told[["a", "b"]].iloc[0].tolist() == ["unet", "attention"] and {"p", "p_holm", "low", "high"} < set(told)
    assert runs.read_json(finished / "model.json")["network"] in ("unet", "attention")


@pytest.mark.slow
def test_two_real_tumours_are_learnt_by_heart(data, tmp_path):
    "The same volumes are learnt from and drawn, so that Dice says that everything fits together."
    table = volumes.find(data / "mri_tumour_label")
    values = {"recipe": "segment", "scale": "demo", "modality": "mr", "skull": "none", "bias": False, "spacing_mm": [1.5, 1.5, 6.5],
              "patch_size": [64, 64, 16], "batch_size": 1, "epochs": 300, "validate_every": 25, "lr": 5e-3, "flip3_p": 0.0,
              "positive_weight": 3.0, "scale_intensity": 0.0, "shift_intensity": 0.0, "precision": "32"}
    recipe = segment.settled(jobs.plan(values)[1], table)
    ready = volumetric.build(table, recipe.volumetric, tmp_path / "packs", 1).assign(fold=0)
    (tmp_path / "fit").mkdir()
    network, _ = segment.fit(recipe, ready, ready, 0, segment.Beside(tmp_path / "fit"))
    found = segment.judged(recipe, network, ready, tmp_path)["cases"]
    assert (found.dice > 0.8).all() and (found.dice > found.baseline_dice).all(), found[["case", "dice", "baseline_dice"]]
    for row in ready.itertuples():
        image, mask = sitk.ReadImage(row.image), sitk.ReadImage(tmp_path / f"{row.case}.nii.gz")
        assert image.GetSize() == mask.GetSize() and np.allclose(image.GetOrigin(), mask.GetOrigin(), atol=1e-3)
        assert np.allclose(image.GetSpacing(), mask.GetSpacing()) and np.allclose(image.GetDirection(), mask.GetDirection(), atol=1e-6)
        assert np.array_equal(np.asarray(nib.load(tmp_path / f"{row.case}.nii.gz").dataobj), sitk.GetArrayFromImage(mask).T)


@pytest.mark.slow
def test_papermill_runs_the_recipe_of_volumes(place, tmp_path):
    values = {name: value for name, value in place.items() if name not in ("recipe", "outputs")}
    words = ["-p", "recipe", "segment", "-p", "outputs", str(tmp_path / "outputs"), "-y", json.dumps(values | {"k_folds": 1})]
    done = papermill(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert runs.read_json(runs.latest(tmp_path / "outputs") / "effective_config.json")["network"] == "unet"
