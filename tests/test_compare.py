"Recipes side by side: the tables against the stored figures, and the notebook through papermill."
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from scipy import ndimage

from ctbm import evaluate, jobs, recipes, report, runs, volumes
from tests.conftest import ROOT
from tests.test_cohort import slice_at


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
    figures = report.side_by_side(pair)["AUROC"]
    for figure in [*figures.xs("patients", level="of"), *figures["test"], *report.differences(pair).difference["test"]]:
        assert figure in said
    assert said.count("image/png") == 3 and '"output_type": "error"' not in said


def test_papermill_refuses_what_it_does_not_know(tmp_path):
    done = papermill(tmp_path / "out.ipynb", "-p", "k_fold", "3")
    assert done.returncode != 0 and "did you mean 'k_folds'" in done.stderr


TINY = {"scale": "demo", "num_workers": 1, "prep_plot_n": 0, "weights": "none", "size": 32, "backbone": "test_resnet", "hidden": 0,
        "resample_mm": 6.0, "epochs_head": 0, "epochs_ft": 1, "epochs_all": 1, "epochs_warmup": 1, "epochs_layer4": 0, "epochs_layer3": 0,
        "bias": False, "skull": "none", "spacing_mm": None, "patch_size": [16, 16, 16], "width": 4, "levels": 3, "epochs": 2, "lr": 0.01,
        "own": {"siamese": {"branches": "none"}}}


def write_heads(folder: Path, count: int = 16) -> Path:
    "Small CT series of heads, every second with bright balls, their masks, and a label for each slice."
    rng, grid, labels = np.random.default_rng(0), np.moveaxis(np.indices((64, 64, 6)), 0, -1), ["ID,Label,PatientID"]
    (folder / "masks").mkdir(parents=True)
    for k in range(count):
        name, far = f"P{k:02}", np.linalg.norm((grid[..., :2] - (31, 33)) / rng.uniform((22, 26), (25, 29)), axis=-1)
        soft = ndimage.gaussian_filter(rng.normal(0, 1, far.shape), (4, 4, 1))
        hu = np.select([far < 0.88, far < 1], [35 + 12 * soft / soft.std(), 900], -1000)
        mask = np.linalg.norm((grid - rng.integers((22, 22, 2), (40, 40, 4))) * (1, 1, 2), axis=-1) < (4 if k % 2 else 0)
        hu = np.rint(np.where(mask, 110, hu) + rng.normal(0, 2, hu.shape))
        for z in range(6):
            slice_at(folder / "CTs" / name / f"{name}_{z}.dcm", 5.0 * z, name,
                     StudyInstanceUID=f"1.3.{k + 1}", SeriesInstanceUID=f"1.4.{k + 1}", Rows=64, Columns=64, PixelSpacing=[3, 3],
                     PixelData=(hu[..., z].T + 1024).astype("<i2").tobytes())
            labels.append(f"{name}_{z},{int(mask[..., z].any())},{name}")
        volumes.write(folder / "masks" / f"{name}.nii.gz", mask.astype(np.uint8), volumes.LPS @ np.diag([3, 3, 5, 1.0]))
    (folder / "labels1.csv").write_text("\n".join(labels))
    return folder


@pytest.mark.parametrize("trained", [["slice_cv", "patient", "segment"], pytest.param(list(recipes.RECIPES), marks=pytest.mark.slow)],
                         ids=["one of each kind", "all"])
def test_papermill_trains_recipes_on_the_same_patients(tmp_path, trained):
    places = {"data_root": write_heads(tmp_path / "heads"), "outputs": tmp_path / "outputs", "packs": tmp_path / "packs"}
    understood = {"own", *(name for recipe in trained for name in jobs.parameters(recipe))}
    given = {k: v for k, v in TINY.items() if k in understood} | {name: str(place) for name, place in places.items()} | {"recipes": trained}
    done = papermill(tmp_path / "out.ipynb", "-y", json.dumps(given))
    assert done.returncode == 0, done.stderr[-2000:]
    finished = sorted((tmp_path / "outputs").glob("run_*"))
    found = report.named(finished)
    assert list(found) == trained, "named by recipe, in the order of training"
    sides = [e.split.groupby("patient").fold.first().to_dict() for e in found.values()]
    assert all(each == sides[0] for each in sides) and len(sides[0]) == 16, "one split of patients for all"
    assert {e.config["selection"] for e in found.values()} == {"published"}
    assert report.sides_of(found) == {"oof": "validation", "test": "test"}
    for name, e in found.items():
        rows = report.compared(found["slice_cv"], e, "test")["patients"][0]
        own = report.levels(e)["patients"][1].set_index("patient").score
        assert np.allclose(rows.set_index("patient").score_b, own[rows.patient]), name
    said = json.loads((tmp_path / "out.ipynb").read_text(encoding="utf8"))
    tables = "".join("".join(out.get("data", {}).get("text/html", "")) for cell in said["cells"] for out in cell.get("outputs", []))
    assert all(text in tables for text in report.differences(finished).loc["test"].loc["patients"].difference)
    assert "false lesions per volume" in tables and "parameters (millions)" in tables
    mixed = report.compare(finished[0], finished[-1], tmp_path / "mixed.html").read_text(encoding="utf8")
    assert "draws masks; a patient" in mixed and "Test set" in mixed
    with pytest.raises(ValueError, match="patients are in one only"):
        report.named([finished[0], without_a_patient(finished[-1], tmp_path / "other")])


def without_a_patient(run: Path, copy: Path) -> Path:
    "The same run, one test patient fewer."
    shutil.copytree(run, copy)
    runs.write_table(copy / "test_predictions.csv", pd.read_csv(copy / "test_predictions.csv", dtype={"id": str, "patient": str})[1:])
    return copy


def test_folds_of_other_samples_leave_the_test_set(pair, tmp_path):
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    table = pd.read_csv(other / "oof_predictions.csv", dtype={"id": str, "patient": str})
    runs.write_table(other / "oof_predictions.csv", table.assign(fold=1 - table.fold))
    with pytest.raises(ValueError, match="the folds of"): report.named([pair[0], other])
    ours, theirs = map(report.evidence, (pair[0], other))
    theirs.model = theirs.model | {"kind": "bag"}
    assert report.sides_of({"a": ours, "b": theirs}) == {"test": "test"}
    assert set(report.gaps({"a": ours, "b": theirs}).index.get_level_values("scores")) == {"test"}


def test_holm_is_over_all_that_stands_in_one_table(pair):
    a, b = map(report.evidence, pair)
    found = report.gaps({"a": a, "b": b, "c": b}).loc["test"].loc["patients"]
    p = found.p.dropna()
    raised, least = [], 0.0
    for k, value in enumerate(sorted(p)): raised.append(least := max(least, min(1, value * (len(p) - k))))
    assert sorted(found.p_holm.dropna()) == pytest.approx(raised) and len(found) == 12
    assert (found.xs("b", level="run").difference == found.xs("c", level="run").difference).all()


def test_costs_are_those_of_the_run(pair):
    e = report.evidence(pair[0])
    e.manifest = e.manifest | {"peak_mb": {"process": 800.0}}
    found = report.costs({"a": e, "b": report.evidence(pair[1])})
    assert found.loc["a", "memory (MB)"] == 800 and not found.drop(columns="GPU memory (MB)").isna().any(axis=None)
    assert found["all (min)"].to_numpy() * 60 == pytest.approx([sum(e.manifest["seconds"].values())] * 2)
    tensors = load_file(pair[0] / "final_model_state_dict.safetensors")
    counted = sum(v.size for k, v in tensors.items() if not k.endswith(report.NOT_LEARNT))
    assert found["parameters (millions)"].to_numpy() * 1e6 == pytest.approx([counted] * 2)
