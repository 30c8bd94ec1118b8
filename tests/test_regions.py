"The report of a run that draws masks, of one without a decision about patients, and comparisons; the tables of the runs are drawn."
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from ctbm import cli, lesions, recipes, regions, report, results, runs
from tests.test_report import Page

DIAGONAL_MM = 250.0


def drawn_lesions(rng, n: int, skill: float) -> pd.DataFrame:
    "n lesions of a patient and what a network of some skill, 0 to 1, finds of them."
    longest = np.clip(rng.lognormal(2.3, 0.6, n), 2, 60)
    found = rng.random(n) < np.clip(skill + 0.25 * np.log(longest / 10), 0.05, 0.99)
    dice = np.where(found, rng.beta(8 * skill + 1, 3, n), 0)
    return pd.DataFrame({"lesion": np.arange(1, n + 1), "volume_ml": np.pi / 6 * longest**3 / 1000, "longest_mm": longest,
                         "size": [lesions.size_class(mm) for mm in longest], "found": found, "dice": dice,
                         "score": np.where(found, rng.uniform(0.5, 1, n), np.nan)})


def drawn_case(rng, ill: bool, skill: float) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    "A volume's figures, its lesions, and what was drawn in it."
    own, false = drawn_lesions(rng, 1 + rng.poisson(1.5) if ill else 0, skill), int(rng.poisson(0.3 if ill else 0.15))
    n, found, truth = len(own), int(own.found.sum()), own.volume_ml.sum()
    scores = np.concatenate([own.score[own.found], rng.uniform(0.3, 0.8, false)])
    parts = pd.DataFrame({"candidate": np.arange(1, found + false + 1), "score": scores, "volume_ml": rng.uniform(0.05, 2, found + false),
                          "hit": [*own.lesion[own.found], *[0] * false]})
    rule = "" if n and len(parts) else "prediction empty" if n else "truth empty" if len(parts) else "both empty"
    dice = {"": (own.dice * own.volume_ml).sum() / truth if n else 0.0, "both empty": 1.0}.get(rule, 0.0)
    far = {"": rng.uniform(1, 40), "both empty": 0.0}.get(rule, DIAGONAL_MM)
    figures = {"dice": dice, "hd95_mm": far, "precision": rng.uniform(0.5, 1) if len(parts) else np.nan, "recall": dice if n else np.nan,
               "truth_ml": truth, "predicted_ml": parts.volume_ml.sum(), "lesions": n, "found": found, "candidates": len(parts),
               "false_positives": false,
               "lesion_sensitivity": found / n if n else np.nan, "lesion_precision": found / len(parts) if len(parts) else np.nan,
               "lesion_f1": 2 * found / (n + len(parts)) if n + len(parts) else np.nan, "rule": rule}
    return figures, own, parts


def drawn_run(
    folder: Path,  # the run, made here
    skill: float = 0.7,  # of the network, 0 to 1
    healthy: int = 20,  # patients without a metastasis
    ill: int = 30,  # patients with one
    k_folds: int = 3,
    network: str = "unet",
    seed: int = 1,  # of what the network makes of them; patients are the same for all seeds
) -> Path:
    "What a run of volumes leaves behind, with figures that are drawn and not measured."
    folder.mkdir(parents=True)
    people, rng = np.random.default_rng(0), np.random.default_rng(seed)
    base = replace(recipes.RECIPES["segment"], k_folds=k_folds, network=network)
    recipe = replace(base, rule=replace(base.rule, threshold_candidates="exact"))
    split = pd.DataFrame({"case": [f"{k:03}" for k in range(healthy + ill)],
                          "patient": [f"p{k // 2 if k < 4 else k}" for k in range(healthy + ill)],
                          "label": np.r_[np.ones(ill, int), np.zeros(healthy, int)]})
    split["fold"] = np.where(people.random(len(split)) < 0.35, -1, people.integers(0, max(k_folds, 4), len(split)) % max(k_folds, 4))
    if k_folds > 1: split.loc[split.fold >= k_folds, "fold"] = 0
    split.loc[:3, "fold"] = 0
    side = np.where(split.fold < 0, "test", runs.scores_name(k_folds))
    scored = split.assign(side=side)[(split.fold <= 0) | (k_folds > 1)]
    made = {"cases": [], "lesions": [], "candidates": []}
    for row in scored.itertuples():
        truth = np.random.default_rng([7, int(row.case)])  # lesions are the same in every run
        figures, own, parts = drawn_case(truth if seed == 1 else rng, bool(row.label), skill)
        who = {"side": row.side, "fold": row.fold, "case": row.case, "patient": row.patient}
        score = {"label": row.label, "score": np.clip(0.25 + 0.4 * row.label * skill + 0.15 * rng.normal(), 0, 1),
                 "baseline": rng.uniform(0, 1)}
        made["cases"].append(who | score | figures | {"baseline_dice": 0.3 * figures["dice"] if row.label else figures["dice"]})
        for name, table in (("lesions", own), ("candidates", parts)): made[name].append(table.assign(**who))
    tables = {"cases": pd.DataFrame(made["cases"]), **{k: pd.concat(made[k], ignore_index=True) for k in ("lesions", "candidates")}}
    written(folder, recipe, split, tables)
    return folder


def written(folder: Path, recipe, split, tables) -> None:
    "The files of a run."
    for name, table in tables.items(): runs.write_table(folder / f"{name}.csv", table)
    runs.write_table(folder / "split.csv", split)
    volumes = split.assign(kind="file", image=[f"imagesTr/{c}.nii.gz" for c in split.case], series=None, mask=None, given=None,
                           shape="240x240x155",
                           dx_mm=1.0, dy_mm=1.0, dz_mm=1.0, nan_voxels=0, problem=None, sha=[f"1e{k}" for k in range(len(split))],
                           tumour_ml=split.case.map(tables["cases"].set_index("case").truth_ml).fillna(2.0 * split.label))
    bad = volumes.iloc[:1].assign(case="torn", patient="torn", fold=np.nan, problem="truncated: image ends early", sha="zz")
    runs.write_table(folder / "volumes.csv", pd.concat([volumes, bad], ignore_index=True))
    runs.write_json(folder / "audit.json",
                    {"volumes": len(volumes) + 1, "usable": len(split), "linked": 0, "random_labels": False, "mark": "m"})
    runs.write_json(folder / "run_args.json", {"recipe": "segment", "data_root": "/home/me/brains", "masks": "/home/me/masks", "gpus": 1})
    chosen = {"recipe": "segment", "scale": "demo", "published": False, "candidate": None}
    runs.write_json(folder / "effective_config.json", chosen | recipes.flat(recipe))
    runs.write_json(folder / "model.json", {"kind": "volume", "network": recipe.network})
    facts = chosen | {"network": recipe.network, "seed": 42, "device": "cpu", "precision": "32-true", "seconds": {"all": 90.0}}
    runs.write_json(folder / "manifest.json", runs.manifest(facts))
    epochs = [{"fold": fold, "epoch": k, "lr": 1e-4, "train_loss": 1.4 / k**0.4, "val_dice": 0.7 * (1 - 0.9**k) if k % 2 == 0 else None,
               "best": k % 2 == 0, "seconds": 1.0} for fold in (*range(recipe.k_folds),
                                                                *["final"] * (recipe.k_folds > 1)) for k in range(1, 11)]
    runs.write_table(folder / "history.csv", pd.DataFrame(epochs))
    cases, own = tables["cases"], tables["lesions"]
    of = lambda table, side: table[table.side == side]
    sides = cases.side.unique()
    runs.write_json(folder / "segmentation.json", {side: lesions.summary(of(cases, side), of(own, side)) for side in sides})
    runs.write_table(folder / "folds.csv", lesions.by_fold(of(cases, sides[0])))
    curve = {side: lesions.froc(of(tables["candidates"], side), of(own, side), of(cases, side)) for side in sides}
    runs.write_table(folder / "froc.csv", pd.concat([table.assign(side=side) for side, table in curve.items()]))
    for name in ("froc", "dice", "sizes", "examples"): runs.save_figure(folder / f"{name}.png", plt.figure(figsize=(1, 1)))
    if cases.groupby("side").label.nunique().min() > 1: decision_files(folder, recipe, cases)


def decision_files(folder: Path, recipe, cases) -> None:
    "The patients' files, as every run leaves them."
    by = cases.groupby("patient")
    top = cases.loc[by.score.idxmax()].set_index("patient", drop=False)
    people = top.assign(label=by.label.max(), slices=by.size(), top_slice=top.case, slice_id=top.patient).reset_index(drop=True)
    oof, test = people[people.side != "test"], people[people.side == "test"]
    results.write_operating_point(folder, oof, dict.fromkeys(oof.fold.unique(), float("nan")), recipe)
    results.write_calibration(folder, oof, recipe)
    results.write_patients(folder, oof, recipe)
    results.write_test(folder, test)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    "Ill and healthy patients in three folds and a test set."
    return drawn_run(tmp_path_factory.mktemp("regions") / "run_unet")


@pytest.fixture(scope="module")
def html(run) -> str:
    return report.write(run).read_text(encoding="utf8")


@pytest.fixture(scope="module")
def ill_run(tmp_path_factory) -> Path:
    "One split, every patient ill, as in the published cohort."
    return drawn_run(tmp_path_factory.mktemp("regions") / "run_ill", healthy=0, k_folds=1)


def copied(run: Path, folder: Path) -> Path: return shutil.copytree(run, folder / run.name)


def words(html: str) -> str: return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_the_report_is_handed_over_and_whole(run, html):
    names = {"report.html", "report.json", "model_card.md", "checklist_claim.csv", "checklist_tripod.csv"}
    assert names <= {p.name for p in run.iterdir()} and not [p.name for p in run.iterdir() if p.name.startswith(".")]
    page = Page(html)
    assert not page.open and len(set(page.ids)) == len(page.ids)
    assert all(source.startswith("data:image/") for source in page.sources) and len(page.sources) >= 10
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} == set(page.ids)
    assert not page.tags & {"script", "iframe"} and "/home/" not in html and "/tmp/" not in html
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Summary", "Data", "Leak audit", "Model and training", "Masks", "Lesions", "Volumes to look at", "Patients", "Operating point",
                                                   "Calibration",
        "Decision curve and triage", "Limitations found by the run", "Reproduce", "Appendix: model card", "Appendix: CLAIM 2024",
        "Appendix: TRIPOD+AI", "Appendix: settings"]
    assert [s.title for s in report.sections(run)][:2] == ["Summary", "Data"]


def test_page_card_and_stored_figures_say_the_same(run, html):
    stored, text, card = runs.read_json(run / "segmentation.json"), words(html), (run / "model_card.md").read_text(encoding="utf8")
    for side in ("test", "out-of-fold"):
        for name in ("dice", "dice_all", "precision", "recall", "lesion_sensitivity", "clean"):
            assert report.interval(stored[side]["figures"][name]) in text, (side, name)
        for own in stored[side]["sizes"].values(): assert report.interval(own["sensitivity"], 2) in text
    assert report.interval(stored["test"]["figures"]["dice"]) in card
    assert report.interval(runs.read_json(run / "test_metrics.json")["figures"]["roc_auc"]) in card and report.interval(
        runs.read_json(run / "test_metrics.json")["figures"]["roc_auc"]) in text
    assert "1 truncated" in card and "truncated" in text, "what was set aside is named"


def test_dice_stands_beside_the_baseline_on_volumes_with_a_metastasis(run):
    n, cases = runs.read_json(run / "report.json"), pd.read_csv(run / "cases.csv", dtype={"case": str})
    for side in ("test", "out-of-fold"):
        ill = cases[(cases.side == side) & (cases.lesions > 0)]
        found = n["masks"][side]
        assert found["baseline"]["estimate"] == pytest.approx(ill.baseline_dice.mean())
        assert found["gain"]["estimate"] == pytest.approx(found["dice"]["estimate"] - found["baseline"]["estimate"])
        assert found["gain"]["low"] < found["gain"]["estimate"] < found["gain"]["high"]
    assert found["gain"]["volumes"] == len(ill), "two patients have two volumes"
    assert found["gain"]["patients"] == ill.patient.nunique() < len(ill)


def test_where_everyone_is_ill_nothing_is_decided_and_the_report_says_so(ill_run):
    text = words(report.write(ill_run).read_text(encoding="utf8"))
    assert "There is no decision about patients, because all" in text and "patients are ill" in text
    assert "how often the network draws one in a healthy head is not known" in text and "split once" in text
    assert "id='operating'" not in (ill_run / "report.html").read_text(encoding="utf8")
    card = (ill_run / "model_card.md").read_text(encoding="utf8")
    assert "No decision about patients" in card and "{" not in card
    claim = pd.read_csv(ill_run / "checklist_claim.csv")
    assert claim["item"].tolist() == list(range(1, 45)) and not claim.answer.str.contains("slices|[Pp]ixel", regex=True).any()


def test_a_decision_that_is_missing_is_not_a_decision(run, tmp_path):
    copy = copied(run, tmp_path)
    (copy / "calibration.json").unlink()
    assert "the run has no calibration.json" in words(report.write(copy).read_text(encoding="utf8"))


def test_what_belongs_together_and_lies_apart_is_found(run, tmp_path):
    copy = copied(run, tmp_path)
    split, volumes = (pd.read_csv(copy / name, dtype={"case": str, "sha": str}) for name in ("split.csv", "volumes.csv"))
    inside, test = split.case[split.fold == 1].iat[0], split.case[split.fold < 0].iat[0]
    split.loc[split.case == inside, "patient"] = split.patient[split.case == test].iat[0]
    volumes.loc[volumes.case.isin([inside, test]), "sha"] = "0e12"
    runs.write_table(copy / "split.csv", split)
    runs.write_table(copy / "volumes.csv", volumes)
    text = words(report.write(copy).read_text(encoding="utf8"))
    assert "Leaks: 1 patient(s) and 1 image(s) lie in more than one fold or side" in text and "the figures are too good" in text


def test_limitations_come_from_the_numbers(run, tmp_path):
    copy = copied(run, tmp_path)
    cases, stored = pd.read_csv(copy / "cases.csv", dtype={"case": str}), runs.read_json(copy / "segmentation.json")
    cases["baseline_dice"] = cases.dice
    stored["test"]["figures"]["false_positives"]["estimate"] = 7.25
    for what in ("lesions", "patients"): stored["test"]["sizes"]["<10"][what] = 0
    runs.write_table(copy / "cases.csv", cases)
    runs.write_json(copy / "segmentation.json", stored)
    config = runs.read_json(copy / "effective_config.json")
    runs.write_json(copy / "effective_config.json", config | {"selection": "published", "scale": "full"})
    said = regions.numbers(regions.evidence(copy))["limitations"]
    for text in ("not clearly above that of grey levels alone", "draws 7.2 lesions per test volume",
                 "shorter than 10 mm: how small ones fare",
                 "The epoch was chosen on the volumes that were then scored"):
        assert any(text in line for line in said), (text, said)
    assert not any("scaled down" in line for line in said)


def test_a_folder_that_is_no_finished_run_is_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run folder"): regions.write(tmp_path / "nothing")
    copy = copied(run, tmp_path)
    (copy / "cases.csv").unlink()
    with pytest.raises(FileNotFoundError, match="has no cases.csv, without which there is no report"): report.write(copy)
    with pytest.raises(ValueError, match="prevalence is 7"): report.write(run, prevalence=7)


def test_two_networks_are_compared_volume_by_volume(run, tmp_path):
    other = drawn_run(tmp_path / "run_other", skill=0.45, network="segresnet")
    html = report.compare(run, other, tmp_path / "pair.html").read_text(encoding="utf8")
    page, text = Page(html), words(html)
    assert not page.open and page.ids == ["what", "masks_test", "masks_out_of_fold", "test"]
    assert "unet" in text and "segresnet" in text and "Wilcoxon" in text
    a, b = (regions.evidence(each) for each in (run, other))
    rows = regions.paired(a, b, "out-of-fold")
    found = regions.versus(rows[rows.lesions_a > 0]).loc["dice"]
    assert found.difference < 0 and found.high < 0, "the worse network is seen to be worse"
    assert found.difference == pytest.approx(lesions.compare(b.cases[b.cases.side == "out-of-fold"],
                                                             a.cases[a.cases.side == "out-of-fold"])[
        "difference"]["estimate"])
    assert cli.main(["report", str(run), str(tmp_path / "nothing")]) == 2


def test_other_volumes_are_not_compared(run, ill_run, tmp_path):
    copy = copied(run, tmp_path)
    cases = pd.read_csv(copy / "cases.csv", dtype={"case": str})
    runs.write_table(copy / "cases.csv", cases[cases.case != cases.case[cases.side == "test"].iat[0]])
    with pytest.raises(ValueError, match="the test volumes of .* differ: 1 are in one only"): report.compare(run, copy, tmp_path / "x.html")
    with pytest.raises(ValueError, match="the test volumes of .* differ"): report.compare(run, ill_run, tmp_path / "x.html")


def test_masks_stand_beside_a_run_that_scores_patients_only(run, ill_run):
    a, alone = regions.evidence(run), regions.evidence(ill_run)
    other = SimpleNamespace(**vars(a) | {"model": {"kind": "bag"}})
    found = regions.comparison(a, other)
    assert [section.anchor for section in found] == ["what", "test", "oof"] and "compared on patients" in found[0].blocks[0].text
    with pytest.raises(ValueError, match="run_ill has no decision about patients"): regions.comparison(alone, other)
