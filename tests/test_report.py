"The report of a run, of a control run, of a comparison; read as a file, and opened in a browser where there is one."
import re
import shutil
import warnings
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import fbeta_score

from ctbm import cli, evaluate, recipes, report, results, runs, train
from tests.browser import browser_page
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def run(cohort_folder, tmp_path_factory) -> Path:
    "A small run with a table of attributes; training ends with the report."
    place = tmp_path_factory.mktemp("reports")
    data = place / "data"
    data.mkdir()
    for name in ("CTs", "labels1.csv"):
        (data / name).symlink_to(cohort_folder / name)
    truth = pd.read_csv(cohort_folder / "truth.csv")
    known = truth.assign(lesion_mm2=truth.lesion_area_mm2.where(truth.label == 1))
    known[["ID", "age", "lesion_mm2"]].to_csv(data / "more.csv", index=False)
    places = {"data_root": str(data), "outputs": str(place / "outputs"), "packs": str(place / "packs")}
    return train.run(**places, attributes="more.csv", **SMALL | {"report": True})


@pytest.fixture(scope="module")
def html(run) -> str:
    return (run / "report.html").read_text(encoding="utf8")


@pytest.fixture(scope="module")
def slice_run(bag_run, tmp_path_factory) -> Path:
    "What a run that scores slices leaves on the patients and the split of `bag_run`; its scores are drawn, a little higher for positives."
    made, rng = copied(bag_run, tmp_path_factory.mktemp("slice_run")), np.random.default_rng(0)
    recipe = recipes.override(recipes.resolve("slice_cv", "demo"), {"k_folds": 1, "backbone": "resnet10t", "size": 32})
    for name in ("report.html", "report.json", *report.MAYBE.values()): (made / name).unlink(missing_ok=True)
    split = report.load(made / "features_df_split.parquet")
    scored = split.assign(score=0.3 * rng.random(len(split)) + 0.2 * split.label + 0.2, baseline=rng.random(len(split)))
    oof, asked = scored[scored.fold == 0], {"recipe": "slice_cv", "scale": "demo", "published": False, "candidate": None}
    runs.write_json(made / "effective_config.json", asked | recipes.flat(recipe))
    runs.write_json(made / "model.json", runs.read_json(made / "model.json") | {"kind": "slice", "pooling": None})
    results.write_operating_point(made, oof, {0: 0.9}, recipe)
    results.write_calibration(made, oof, recipe)
    results.write_patients(made, oof, recipe)
    results.write_test(made, scored[scored.fold < 0])
    return made


def copied(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / run.name, ignore=shutil.ignore_patterns("folds", "*.safetensors"))


class Page(HTMLParser):
    "What a page is made of: every tag closed, every address it names."

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.tags = [], [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        assert tag != "img" or attrs["alt"], "a picture without words for those who cannot see it"
        if tag not in ("meta", "link", "img", "br"): self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes what it did not open"


def test_a_run_ends_in_a_report(run):
    names = {"report.html", "report.json", "model_card.md", "checklist_claim.csv", "checklist_tripod.csv"}
    assert names <= {p.name for p in run.iterdir()}
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


def test_page_is_whole_and_asks_for_nothing(html):
    page = Page(html)
    assert not page.open and len(set(page.ids)) == len(page.ids)
    assert all(source.startswith("data:image/") for source in page.sources) and len(page.sources) >= 15
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} == set(page.ids)
    assert not [link for link in page.links if not link.startswith(("#", "data:"))]
    assert not page.tags & {"script", "iframe", "object", "video"} and not re.search(r"@import|url\(", html)
    assert "/tmp/" not in html and "/home/" not in html, "somebody's folders are in the page"


def test_every_section_and_every_interval_is_there(run, html):
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    wanted = ["Summary", "Data", "Leak audit", "Model and training", "Discrimination", "Operating point", "Calibration",
              "Decision curve and triage", "Patients", "Subgroups and shifts", "Errors to look at", "Limitations found by the run",
              "Reproduce", "Appendix: model card", "Appendix: CLAIM 2024", "Appendix: TRIPOD+AI", "Appendix: findings in the files"]
    assert titles == wanted
    n = runs.read_json(run / "report.json")
    shown = [*n["slices"]["figures"]["test"].values(), *n["slices"]["figures"]["out-of-fold"].values(), *n["triage"]["outcome"].values(),
             *n["patients"]["figures"]["test"].values(), *(n["patients"]["outcome"][k] for k in report.OUTCOMES["patients"]),
             *(n["calibration"]["test"]["platt"][k] for k in report.MEASURES)]
    for figure in shown:
        assert report.interval(figure) in html.replace(" <span>", " ").replace("</span>", "")
    assert "age" in html and "lesion_mm2" in html, "attributes are looked at"


def test_page_card_and_stored_figures_say_the_same(run, html):
    stored, card = runs.read_json(run / "test_metrics.json"), (run / "model_card.md").read_text(encoding="utf8")
    for name in ("roc_auc", "auprc", "sensitivity", "specificity"):
        said = report.interval(stored["figures"][name])
        assert said in html and said in card
    test = pd.read_csv(run / "test_predictions.csv", dtype={"patient": str})
    again = evaluate.score(test.label, test.prob, stored["threshold"], test.patient)
    assert again["roc_auc"]["low"] == stored["figures"]["roc_auc"]["low"] or np.isnan(again["roc_auc"]["low"])
    claim, tripod = (pd.read_csv(run / f"checklist_{name}.csv", dtype=str) for name in ("claim", "tripod"))
    assert len(claim) == 44 and len(tripod) == 52
    for table in (claim, tripod):
        assert (table.answer.str.contains("AUTHOR:") == (table.answered_by == "author")).all() and table.answered_by.nunique() == 2
        assert set(table["where"].dropna()) <= set(Page(html).ids)


def test_same_run_same_report(run, html):
    report.write(run)
    assert (run / "report.html").read_text(encoding="utf8") == html


def test_prevalence_of_the_user(run, tmp_path):
    copy = copied(run, tmp_path)
    html = report.write(copy, prevalence=0.07).read_text(encoding="utf8")
    assert "7 % (stated use)" in html
    with pytest.raises(ValueError, match="prevalence is 7"):
        report.write(copy, prevalence=7)


def single_split(run: Path, folder: Path, selection: str) -> Path:
    "What a run of focal_f2 leaves: one split, its validation scores being those of fold 0 of a run with two folds."
    made, recipe = copied(run, folder), replace(recipes.resolve("focal_f2", "demo"), k_folds=1, selection=selection)
    for name in ("report.html", "report.json", "model_card.md", "checklist_claim.csv", "checklist_tripod.csv"):
        (made / name).unlink()
    tables = {name: report.load(run / name) for name in ("oof_predictions.csv", "test_predictions.csv", "history.csv")}
    oof, test = (tables[f"{name}_predictions.csv"].rename(columns={"id": "slice_id", "prob": "score"}) for name in ("oof", "test"))
    asked = {"recipe": "focal_f2", "scale": "demo", "published": False, "candidate": None}
    runs.write_json(made / "run_args.json", {"recipe": "focal_f2", "scale": "demo"})
    runs.write_json(made / "manifest.json", runs.read_json(run / "manifest.json") | {"focal_alpha": 0.8125})
    runs.write_json(made / "effective_config.json", asked | recipes.flat(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.write_operating_point(made, oof[oof.fold == 0], {0: 0.99}, recipe)
        results.write_calibration(made, oof[oof.fold == 0], recipe)
        results.write_test(made, test)
        results.write_history(made, tables["history.csv"].query("fold == '0' and stage == 'ft'").assign(stage="all"))
    return made


@pytest.mark.parametrize("selection", ["published", "inner_holdout"])
def test_a_single_split_is_told_as_one(run, tmp_path, selection):
    made = single_split(run, tmp_path, selection)
    html = report.write(made).read_text(encoding="utf8")
    text = re.sub("<[^>]*>", " ", re.sub(r"<style>.*?</style>|data:image[^'\"]*", "", html, flags=re.S))
    told = [text, *((made / name).read_text(encoding="utf8") for name in ("model_card.md", "checklist_claim.csv", "checklist_tripod.csv")),
            runs.describe(made)]
    for each in told:
        assert "validation" in each and not re.search(r"out.of.fold|\bfolds?\b|cross-validation", each.replace("Cross-validated AUROC", ""))
    split = pd.read_csv(made / "split.csv", dtype={"patient": str})
    for fold, side in ((1, "training"), (0, "validation"), (-1, "test")):
        part = split[split.fold == fold]
        assert f"{100 * part.patient.nunique() / split.patient.nunique():.0f} % {side}" in text
        assert f"{side} (n = {len(part):,} slices)" in text
    assert "focal, alpha 0.812 (from the labels as training draws them), gamma 2" in text
    assert "elastic deformation" in text and "every pixel 2.25 mm wide" in text and "by F2 on" in text
    assert ("Epoch and threshold were chosen on the same validation slices" in text) == (selection == "published")
    assert "The patients were split once" in text and "parts of the validation patients" in text
    assert runs.read_json(made / "cv_metrics.json")["std_metric"] is None and "nan" not in text.lower().replace("provenance", "")


def test_too_few_patients_to_judge_the_calibration_are_said(run, tmp_path):
    made = single_split(run, tmp_path, "published")
    oof = report.load(made / "oof_predictions.csv").rename(columns={"id": "slice_id"})
    ill = oof.patient[oof.label == 1].iloc[0]
    results.write_calibration(made, oof[(oof.label == 0) | (oof.patient == ill)], recipes.resolve("focal_f2", "demo"))
    html = report.write(made).read_text(encoding="utf8")
    assert html.count("too few validation patients of a class to calibrate each other") == 2, "a limitation, on the page and in the card"
    assert report.evidence(made).oof.calibrated.isna().all() and "not defined" in html


def test_a_run_of_an_older_version_is_named(run, tmp_path):
    old = copied(run, tmp_path)
    config = runs.read_json(old / "effective_config.json")
    runs.write_json(old / "effective_config.json", {k: v for k, v in config.items() if k != "monitor"})
    with pytest.raises(FileNotFoundError, match="monitor in effective_config.json.*train again"):
        report.evidence(old)


def test_control_run_is_marked_loudly(run, tmp_path):
    copy = copied(run, tmp_path)
    runs.write_json(copy / "audit.json", runs.read_json(copy / "audit.json") | {"random_labels": True})
    html, card = report.write(copy).read_text(encoding="utf8"), (copy / "model_card.md").read_text(encoding="utf8")
    assert "CONTROL RUN" in html.split("</section>")[0] and "class='loud'" in html and "CONTROL RUN" in card.split("##")[0]
    assert "with shuffled labels the AUROC is" in html


@pytest.mark.parametrize(("change", "said"), [
    (lambda run: run.with_name("nowhere"), "there is no run folder"),
    (lambda run: run.rename(run.with_name(run.name + runs.PARTIAL)), "ctbm train --resume"),
    (lambda run: (run / "calibration.json").unlink() or run, "has no calibration.json"),
])
def test_what_cannot_be_reported_is_named(run, tmp_path, change, said, capfd):
    wrong = change(copied(run, tmp_path))
    with pytest.raises(FileNotFoundError, match=said):
        report.write(wrong)
    assert cli.main(["report", str(wrong)]) == 2 and said in capfd.readouterr().err


def test_planted_leak_and_header_are_verdicts(run, tmp_path):
    copy = copied(run, tmp_path)
    audit = runs.read_json(copy / "audit.json")
    audit["headers"][0] |= {"header": "kernel", "auroc": 0.95, "low": 0.9, "high": 0.98, "suspect": True}
    runs.write_json(copy / "audit.json", audit | {"leaks": 2})
    summary = report.write(copy).read_text(encoding="utf8").split("</section>")[0]
    assert "Leaks: 2 pair(s)" in summary and "can be predicted from kernel" in summary and summary.count("class='bad'") >= 2


def test_texts_from_files_cannot_run(run, tmp_path):
    copy = copied(run, tmp_path)
    findings = pd.read_csv(copy / "findings.csv")
    findings.loc[len(findings)] = ["error", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a.dcm"]
    findings.to_csv(copy / "findings.csv", index=False)
    html = report.write(copy).read_text(encoding="utf8")
    assert "<script" not in html and "<img src=x" not in html and "&lt;script&gt;" in html


def test_run_without_the_extras(run, tmp_path):
    copy = copied(run, tmp_path)
    for name in report.MAYBE.values():
        (copy / name).unlink(missing_ok=True)
    html = report.write(copy).read_text(encoding="utf8")
    assert "No table of attributes" in html and "No shifts were run" in html and "no pictures of its errors" in html


def test_a_network_that_calls_nothing_positive(run, tmp_path):
    copy = copied(run, tmp_path)
    chosen = runs.read_json(copy / "threshold_selection.json")
    runs.write_json(copy / "threshold_selection.json", chosen | {"threshold": 0.999})
    html = report.write(copy).read_text(encoding="utf8")
    assert "not defined" in html and "nan" not in re.sub(r"data:image[^'\"]*", "", html).lower().replace("provenance", "")


@pytest.mark.parametrize(("score", "judged"), [
    (lambda label: label, "better"), (lambda label: np.ones(len(label)), "no better"), (lambda label: np.zeros(len(label)), "worse"),
    (lambda label: np.where(np.arange(len(label)) == np.flatnonzero(label == 0)[0], 0, 1), "not clearly better")])
def test_f1_is_judged_beside_that_of_calling_everyone_positive(score, judged):
    label = np.repeat([0, 1], [20, 20])
    figures = {"figures": {"test": evaluate.score(label, score(label), 0.5)}}
    rows = report.beside_everyone({"unit": "slices", "slices": figures, "patients": figures})
    assert rows.judged.tolist() == [judged] * 2 and np.allclose(rows["all positive"], 2 / 3) and (rows.said.str.endswith(judged)).all()
    assert [*report.beside_everyone({"unit": "patients", "patients": figures}).index] == ["patients"]


def test_a_run_no_better_than_calling_everyone_positive_says_so(run, tmp_path):
    copy = copied(run, tmp_path)
    chosen, pooled = (runs.read_json(copy / f"{name}.json") for name in ("threshold_selection", "patients"))
    runs.write_json(copy / "threshold_selection.json", chosen | {"threshold": 0.0})
    runs.write_json(copy / "patients.json", pooled | {"operating_point": pooled["operating_point"] | {"threshold": 0.0}})
    page, card = words(report.write(copy).read_text(encoding="utf8")), (copy / "model_card.md").read_text(encoding="utf8")
    test = report.load(copy / "test_predictions.csv")
    for of, label in (("slices", test.label), ("patients", test.groupby("patient").label.max())):
        trivial = report.number(fbeta_score(label, np.ones(len(label)), beta=1))
        for text in (page, card):
            assert re.search(rf"F1 of {of} is {trivial} [^:]*, that of calling every {of[:-1]} positive {trivial}, [^:]*: no better", text)
            assert f"The test F1 of {of} is no better than that of calling every {of[:-1]} positive ({trivial})." in text


def test_two_runs_on_the_same_patients(run, tmp_path):
    other = copied(run, tmp_path / "other")
    test = pd.read_csv(other / "test_predictions.csv", dtype={"id": str, "patient": str})
    rng = np.random.default_rng(0)
    test = test.assign(prob=0.5 * test.prob + 0.5 * rng.random(len(test))).sample(frac=1, random_state=0)
    runs.write_table(other / "test_predictions.csv", test)
    runs.write_json(other / "effective_config.json", runs.read_json(other / "effective_config.json") | {"lr_ft": 0.123})
    html = report.compare(run, other, tmp_path / "pair.html").read_text(encoding="utf8")
    assert not Page(html).open and "DeLong" in html and "paired bootstrap" in html and "lr_ft" in html and "0.123" in html
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["What is compared", "Test set", "Out-of-fold scores"] and html.count(">F2<") == 4
    assert cli.main(["report", str(run), str(other), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text(encoding="utf8") == html


def test_runs_with_other_folds_are_compared_on_the_test_set_only(run, tmp_path):
    other = copied(run, tmp_path / "other")
    oof = pd.read_csv(other / "oof_predictions.csv", dtype={"id": str, "patient": str})
    runs.write_table(other / "oof_predictions.csv", oof.assign(fold=1 - oof.fold))
    html = report.compare(run, other, tmp_path / "pair.html").read_text(encoding="utf8")
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["What is compared", "Test set"] and f"{len(oof)} folds differ" in html


def test_runs_on_other_patients_are_not_compared(run, tmp_path):
    a = report.evidence(run)
    fewer, other = (SimpleNamespace(**vars(a) | {"test": test}) for test in (a.test[1:], a.test.assign(label=1 - a.test.label)))
    with pytest.raises(ValueError, match="1 slices are in one only"):
        report.paired(a, fewer)
    with pytest.raises(ValueError, match=f"{len(a.test)} labels"):
        report.paired(a, other)


def words(html: str) -> str:
    "What a reader sees of a page."
    return re.sub(r"\s+", " ", unescape(re.sub("<[^>]*>", " ", re.sub(r"<style>.*?</style>|data:image[^'\"]*", "", html, flags=re.S))))


OF_SLICES = (
    "[Ss]lices, (at the )?threshold", "scores single", r"slices of \d", "[Tt]est slices", "Three zones of slices", "slice classifier",
    r"n = \d+ slices", r"\(slices\)", "Subgroups, [^.]*slices", "equally many slices", "too few slices", "validation slices",
    "with (positive|negative) slices", r"Patients, test \(", "a slice's score", r"batch of \d+ slices", "Slice label", "one axial slice",
    "Slices, test")


def test_a_run_of_patients_is_told_in_patients(bag_run):
    n, html = runs.read_json(bag_run / "report.json"), (bag_run / "report.html").read_text(encoding="utf8")
    text, e = words(html), report.evidence(bag_run)
    files = ("model_card.md", "checklist_claim.csv", "checklist_tripod.csv")
    told = {name: (bag_run / name).read_text(encoding="utf8") for name in files} | {"page": text, "describe": runs.describe(bag_run)}
    for name, each in told.items():
        assert not (found := [p for p in OF_SLICES if re.search(p, each)]), (name, found)
    assert not Page(html).open and "nan" not in text.lower().replace("provenance", "")
    count = f"{len(e.test)} patients, {e.test.label.sum()} positive"
    assert f"Blue: test ({count})" in text and f"test ({count})" in told["describe"] and f"validation (n = {len(e.oof)} patients)" in text
    split = pd.read_csv(bag_run / "split.csv", dtype={"patient": str})
    for fold, side in ((1, "training"), (0, "validation"), (-1, "test")):
        part = split[split.fold == fold]
        assert f"{side} (n = {part.patient.nunique()} patients)" in text
        assert n["flow"]["parts"][side]["slices"] == len(part) and n["flow"]["parts"][side]["patients"] == part.patient.nunique()
    assert n["unit"] == "patients" and "slices" not in n, "figures of patients under the name of slices"
    stored = runs.read_json(bag_run / "test_metrics.json")["figures"]
    assert n["patients"]["figures"]["test"]["roc_auc"] == stored["roc_auc"] and n["patients"]["threshold"] == e.chosen["threshold"]
    assert all(report.interval(stored["sensitivity"]) in told[name] for name in ("page", "model_card.md"))


def test_a_run_of_patients_says_how_bags_are_made_and_pooled(bag_run, tmp_path):
    copy, text = copied(bag_run, tmp_path), words((bag_run / "report.html").read_text(encoding="utf8"))
    for said in ("in training at most 12, drawn anew each epoch, a positive one among them", "at most 1.5 times as many negative ones",
                 "plus 3 times that of single slices by their own labels", "less than 0.3 apart",
                 "the highest logit (max), over all slices", "outside the brain black", "z-scored over the brain's pixels",
                 "goes on from the last epoch", "4 patients,"):
        assert said in text, said
    titles = re.findall(r"<h2>(.*?)</h2>", (bag_run / "report.html").read_text(encoding="utf8"))
    assert "From slices to patients" in titles and "Patients" not in titles
    pools = pd.read_csv(bag_run / "pooling.csv").set_index(["side", "pooling"]).loc[("test", "mean of slices")]
    assert report.interval({"estimate": pools.roc_auc, "low": pools.roc_auc_low, "high": pools.roc_auc_high}) in text
    config = runs.read_json(copy / "effective_config.json")
    runs.write_json(copy / "effective_config.json", config | {
        "bag_pooling": "attention", "hidden": 512, "texture": "by_class", "max_slices": None, "negative_ratio": None, "slice_weight": 0.0,
        "lr_body_layer3": [1e-5, 5e-6], "weight_decay_body_layer3": 1e-4})
    runs.write_json(copy / "patients.json", runs.read_json(copy / "patients.json") | {"pooling": "attention"})
    (copy / "pooling.csv").write_text((copy / "pooling.csv").read_text().replace(",max,", ",attention,"))
    text = words(report.write(copy).read_text(encoding="utf8"))
    for said in ("a layer of 512 units, one logit", "whose weights are learnt (attention)", "so that texture tells the label",
                 "every patient once an epoch", "the last one first, at 1e-05, 5e-06, weight decay 0.0001", "max of slices",
                 "attention (of the run)"):
        assert said in text, said
    assert "by their own labels" not in text


def test_patients_have_the_headers_and_attributes_of_their_slices(bag_run, tmp_path):
    copy = copied(bag_run, tmp_path)
    split = report.load(copy / "features_df_split.parquet")
    count = np.arange(len(split))
    table = pd.DataFrame({"id": split.slice_id, "lesion_mm": count.astype(float), "sex": np.where(count % 5, "f", "m")})
    runs.write_table(copy / "attributes.csv", table)
    e = report.evidence(copy)
    largest = table.groupby(split.patient.to_numpy()).lesion_mm.max()
    assert e.samples.set_index("id").lesion_mm.to_dict() == largest.to_dict()
    assert set(e.samples.sex) == {"f"} and e.samples.manufacturer.notna().all()
    text = words(report.write(copy).read_text(encoding="utf8"))
    assert "lesion_mm" in text and f"{len(e.test)} (100.0 %)" in text


def test_a_run_of_patients_without_the_extras(bag_run, tmp_path):
    copy = copied(bag_run, tmp_path)
    for name in report.MAYBE.values(): (copy / name).unlink(missing_ok=True)
    text = words(report.write(copy).read_text(encoding="utf8"))
    assert "nothing stands beside its pool" in text and "No shifts were run" in text and "training (n = " in text


def test_slices_against_patients_are_compared_on_patients(bag_run, slice_run, tmp_path):
    html = report.compare(slice_run, bag_run, tmp_path / "pair.html").read_text(encoding="utf8")
    text, e = words(html), report.evidence(slice_run)
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["What is compared", "Test set", "Validation scores"] and not Page(html).open
    assert "A scores slices, pooled afterwards by its own rule (max), at its own threshold for patients; B scores patients" in text
    assert "Slices." not in text and "DeLong" in text and "paired bootstrap" in text
    people = evaluate.pool(e.test, "max")
    rows, cuts = report.compared(e, report.evidence(bag_run), "test")["patients"]
    assert rows.score_a.tolist() == people.score.tolist() and cuts[0] == e.pooled["operating_point"]["threshold"]
    assert rows.label.tolist() == people.label.tolist() and rows.patient.tolist() == people.patient.tolist()
    beside, apart = (table([slice_run, bag_run]) for table in (report.side_by_side, report.differences))
    assert set(beside.index) == {(side, "patients", run) for side in ("validation", "test") for run in ("slice_cv", "patient")}
    stored = runs.read_json(bag_run / "test_metrics.json")["figures"]
    assert beside.loc[("test", "patients", "patient"), "AUROC"] == report.interval(stored["roc_auc"])
    assert set(apart.index.get_level_values("of")) == {"patients"} and len(apart) == 12


def test_two_runs_of_patients(bag_run, tmp_path):
    other = copied(bag_run, tmp_path / "other")
    test = pd.read_csv(other / "test_predictions.csv", dtype={"id": str, "patient": str})
    runs.write_table(other / "test_predictions.csv", test.assign(prob=1 - test.prob).iloc[::-1])
    text = words(report.compare(bag_run, other, tmp_path / "pair.html").read_text(encoding="utf8"))
    assert f"Both scored the same {len(test)} test patients ({test.label.sum()} positive)" in text
    assert "every patient with both scores" in text
    fewer = SimpleNamespace(**vars(report.evidence(other)) | {"test": test[1:].rename(columns={"prob": "score"})})
    with pytest.raises(ValueError, match="the test sets of .* differ: 1 patients are in one only"):
        report.paired(report.evidence(bag_run), fewer)


@pytest.mark.parametrize("width", [1240, 390])
def test_a_browser_opens_it_without_complaint(run, width):
    with browser_page(width, 900) as page:
        page.goto((run / "report.html").as_uri())
        assert "Reproduce" in page.inner_text("body") and not page.said
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
