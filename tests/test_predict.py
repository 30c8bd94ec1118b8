"Prediction: the stored scores again, bit for bit; folders as they come; stops and faults; without the training data."
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from pydicom.fileset import FileSet
from pydicom.uid import MRImageStorage, generate_uid

from ctbm import bundle, cli, phantom, predict, runs


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    "Three patients, not those of the training cohort, each with a whole series."
    return phantom.make_cohort(tmp_path_factory.mktemp("new") / "cohort", n_patients=3, seed=7, layout="patients") / "CTs"


@pytest.fixture(scope="module")
def whole(small_run, series) -> predict.Prediction:
    return predict.load(small_run).predict(series)


def changed(path: Path, out: Path, **values) -> Path:
    "A DICOM file as another instance, with other values in its header."
    image = dcmread(path)
    for name, value in {"SOPInstanceUID": generate_uid(), **values}.items(): setattr(image, name, value)
    image.file_meta.MediaStorageSOPInstanceUID, image.file_meta.MediaStorageSOPClassUID = image.SOPInstanceUID, image.SOPClassUID
    out.parent.mkdir(exist_ok=True)
    image.save_as(out)
    return out


def test_prediction_repeats_the_test_scores_bit_for_bit(small_run, tmp_path):
    split = pd.read_parquet(small_run / "features_df_split.parquet")
    for path in split.path[split.fold == -1]: shutil.copy(path, tmp_path)
    stored = pd.read_csv(small_run / "test_predictions.csv", dtype={"id": str})
    predicted = predict.load(small_run).predict(tmp_path).slices
    both = predicted.merge(stored, left_on="slice_id", right_on="id", suffixes=("", "_stored"), validate="one_to_one")
    assert len(both) == len(stored) == len(predicted) > 10
    assert (both.score == both.prob).all() and (both.probability == both.calibrated).all()
    assert (both.triage == both.triage_stored).all() and ((both.decision == "positive") == (both.pred == 1)).all()
    for path in list(tmp_path.iterdir())[::2]: path.unlink()
    fewer = predict.load(small_run).predict(tmp_path).slices.set_index("slice_id").score
    assert (fewer == stored.set_index("id").prob[fewer.index]).all(), "in other company"


def test_a_patient_is_decided_as_the_run_decides_patients(small_run, whole):
    pooled, studies = runs.read_json(small_run / "patients.json"), whole.studies
    best = whole.slices[whole.slices.used].groupby("patient").score.max()
    assert np.array_equal(studies.score, best[studies.patient])
    assert ((studies.decision == "positive") == (studies.score >= pooled["operating_point"]["threshold"])).all()
    assert studies.slices.sum() == whole.slices.used.sum() == len(whole.slices)
    assert studies.mismatches.str.contains("training 2 a series").all()


def test_tables_have_the_types_they_say(whole, tmp_path):
    for table, columns in ((whole.studies, predict.STUDIES), (whole.slices, predict.SLICES)):
        assert {name: str(kind) for name, kind in table.dtypes.items()} == columns
        runs.write_table(tmp_path / "table.parquet", table)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)


def test_every_kind_of_source_gives_the_same_scores(small_run, series, whole, tmp_path):
    one = sorted(series.iterdir())[0]
    wanted = whole.slices[whole.slices.patient == one.name].set_index("slice_id").score
    disc = FileSet()
    for path in one.iterdir(): disc.add(path)
    disc.write(tmp_path / "disc")
    with zipfile.ZipFile(tmp_path / "scans.zip", "w") as archive:
        for path in one.iterdir(): archive.write(path, f"export/{one.name}/{path.name}")
    predictor = predict.load(small_run)
    for source in (one, tmp_path / "scans.zip", tmp_path / "disc" / "DICOMDIR"):
        found = predictor.predict(source)
        assert len(found.studies) == 1 and np.array_equal(np.sort(found.slices.score[found.slices.used]), np.sort(wanted)), source
    single = sorted(one.iterdir())[5]
    assert predictor(single).score.item() == wanted[single.stem]


def test_a_folder_as_it_comes(small_run, series, whole, tmp_path):
    folder = Path(shutil.copytree(series, tmp_path / "scans"))
    cut, double, other = sorted(folder.iterdir())
    files = sorted(cut.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:3000])
    files[1].write_bytes(b"scrambled" * 100)
    (cut / "readme.txt").write_text("not a scan")
    for i, path in enumerate(sorted(double.iterdir())[:6]):
        changed(path, double / f"thin_{i}.dcm", SeriesInstanceUID="1.2.3", SliceThickness=1)
    again = sorted(double.glob("ID_*"))[3]
    shutil.copy(again, double / f"{again.stem} (1).dcm")
    changed(sorted(other.iterdir())[0], other / "scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.2.4")
    changed(sorted(other.iterdir())[0], folder / "MR" / "1.dcm", Modality="MR", PatientID="MR1", SOPClassUID=MRImageStorage)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    for name in ("1.dcm", "2.dcm"): (folder / "broken" / name).write_bytes(bytes(128) + b"DICM" + b"?" * 40)

    found = predict.load(small_run).predict(folder)
    studies, slices, before = (table.set_index(key) for table, key in
                               ((found.studies, "patient"), (found.slices, "file"), (whole.studies, "patient")))
    assert set(studies.index) == {cut.name, double.name, other.name, "MR1", "empty", "broken"}
    assert studies.slices[cut.name] == before.slices[cut.name] - 2 and studies.slices[double.name] == before.slices[double.name]
    assert studies.score[double.name] == before.score[double.name] and studies.score[other.name] == before.score[other.name]
    assert "6 slices of 1 mm, series 1.2.3: other series: " in studies.other_series[double.name]
    assert studies.set_aside[[cut.name, double.name, other.name]].tolist() == [3, 7, 1]
    assert "1 x localizer" in studies.other_series[other.name]
    assert studies.problem[["MR1", "empty", "broken"]].tolist() == ["no usable slice: 1 x not CT", "empty folder",
                                                                  "no usable slice: 2 x unreadable"]
    assert studies.decision[["MR1", "empty", "broken"]].isna().all() and studies.problem[[cut.name, double.name]].isna().all()
    why = slices.why.str.split(":").str[0]
    assert why[f"{cut.name}/{files[0].name}"] == "truncated" and why[f"{cut.name}/{files[1].name}"] == "not DICOM"
    assert why[f"{cut.name}/readme.txt"] == "not DICOM" and why[f"{other.name}/scout.dcm"] == "localizer"
    assert sorted(why[slices.index.str.contains(again.stem)].fillna("used")) == ["duplicate", "used"]
    assert slices.why.notna().to_numpy().tolist() == (~slices.used).to_numpy().tolist()
    counts = predict.counts(found)
    assert counts["predicted"] == 3 and counts["not_predicted"] == 3 and counts["slices_not_used"]["other series"] == 6


def test_a_part_of_a_head_does_not_stand_for_it(small_run, series, whole, tmp_path):
    one = Path(shutil.copytree(sorted(series.iterdir())[0], tmp_path / "one"))
    middle = whole.slices[whole.slices.patient == sorted(series.iterdir())[0].name]
    for row in middle.sort_values("position_mm").iloc[10:13].itertuples():
        changed(Path(row.path), one / f"stub_{row.slice_id}.dcm", SeriesInstanceUID="1.2.3")
    row = predict.load(small_run)(one).iloc[0]
    assert row.slices == len(middle) and "covers less than half" in row.other_series
    for path in one.glob("ID_*"): path.unlink()
    alone = predict.load(small_run)(one).iloc[0]
    assert alone.slices == 3 and "mm of the patient were seen" in alone.findings


def test_every_study_of_a_patient_has_a_row(small_run, series, tmp_path):
    one = Path(shutil.copytree(sorted(series.iterdir())[0], tmp_path / "one"))
    later = {"StudyInstanceUID": "1.2.9", "SeriesInstanceUID": "1.2.9.1"}
    for i, path in enumerate(sorted(one.iterdir())[:3]):
        changed(path, one / f"mr_{i}.dcm", Modality="MR", SOPClassUID=MRImageStorage, **later)
    studies = predict.load(small_run)(one)
    assert studies.patient.nunique() == 1 and studies.study.nunique() == len(studies) == 2
    assert studies.set_index("study").problem["1.2.9"] == "no usable slice: 3 x not CT"


def test_the_next_series_stands_in_where_the_best_cannot_be_decoded(small_run, series, tmp_path):
    one = Path(shutil.copytree(sorted(series.iterdir())[0], tmp_path / "one"))
    for i, path in enumerate(sorted(one.iterdir())[:5]): changed(path, one / f"spare_{i}.dcm", SeriesInstanceUID="1.2.3")
    for path in one.glob("ID_*"):
        image = dcmread(path)
        image.decompress()
        image.PixelData, image.BitsStored = image.PixelData[: len(image.PixelData) // 2 * 2], 16
        image["PixelData"].VR = "OW"
        del image.PixelRepresentation
        image.save_as(path)
    found = predict.load(small_run).predict(one)
    assert found.studies.slices.item() == 5 and found.studies.series.item() == "1.2.3"
    assert found.slices.why[~found.slices.used].str.startswith("undecodable").all()
    for path in one.glob("spare_*"): path.unlink()
    lost = predict.load(small_run)(one)
    assert np.isnan(lost.score.item()) and lost.problem.item().startswith("no slice could be decoded")


def test_real_head_is_scored_with_its_mismatches(small_run, data):
    found = predict.load(small_run).predict(data / "headct_ge_hispeed_tilt18p5")
    row = found.studies.iloc[0]
    assert len(found.studies) == 1 and row.slices == 28 and 0 < row.score < 1 and 0 <= row.ood_score <= 1
    assert "manufacturer GE" in row.mismatches and "slice thickness" in row.mismatches and "gantry tilt 18.5" in row.findings


def test_noise_is_out_of_distribution(small_run, series, tmp_path):
    rng = np.random.default_rng(0)
    for path in sorted(sorted(series.iterdir())[0].iterdir())[:8]:
        image = dcmread(path)
        image.decompress()
        image.PixelData = rng.integers(0, 2000, image.pixel_array.shape).astype(np.uint16).tobytes()
        image.save_as(tmp_path / path.name)
    assert predict.load(small_run)(tmp_path).out_of_distribution.item()


def test_spread_over_folds_and_turned_images(small_run, series, whole):
    found = predict.load(small_run, ensemble=True, tta=3)(series)
    pd.testing.assert_series_equal(found.score, whole.studies.score)
    for name in ("folds", "tta"):
        assert (found[f"{name}_least"] <= found[f"{name}_mean"]).all() and (found[f"{name}_mean"] <= found[f"{name}_most"]).all()
        assert (found[f"{name}_sd"] > 0).all() and whole.studies[f"{name}_sd"].isna().all()


def test_one_turned_look_is_compared_with_the_plain_one(small_run, series, whole):
    row = predict.load(small_run, tta=1)(sorted(series.iterdir())[0]).iloc[0]
    assert row.tta_sd > 0 and row.score in (row.tta_least, row.tta_most)


def test_stopped_prediction_goes_on(small_run, series, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "UNIT", 20)
    calls, score = [], predict.SCORERS["slice"]

    def stop(*given):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return score(*given)

    monkeypatch.setitem(predict.SCORERS, "slice", stop)
    with pytest.raises(KeyboardInterrupt): predict.write(predict.load(small_run), series, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(calls) == 2
    with pytest.raises(FileExistsError, match="started otherwise"): predict.write(predict.load(small_run, tta=2), series, tmp_path / "out")
    found = predict.write(predict.load(small_run), series, tmp_path / "out")
    assert len(calls) == 4, "two of three units were left to do"
    pd.testing.assert_frame_equal(found.studies, whole.studies)
    pd.testing.assert_frame_equal(found.slices, whole.slices)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predict.json", "slices.csv", "slices.parquet", "studies.csv", "studies.parquet"]


def test_bundle_predicts_where_data_and_run_are_gone(small_run, series, whole, tmp_path):
    bundle.write(small_run, tmp_path / "model.zip")
    shutil.copytree(series, tmp_path / "scans")
    words = ["predict", "model.zip", "scans", "--out", "out"]
    done = subprocess.run([sys.executable, "-m", "ctbm.cli", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 predicted, 0 not" in done.stdout
    found = pd.read_parquet(tmp_path / "out" / "studies.parquet")
    pd.testing.assert_frame_equal(found, whole.studies)
    again = subprocess.run([sys.executable, "-m", "ctbm.cli", *words], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and "out exists" in again.stderr


def test_exit_status_counts_who_was_left_out(small_run, series, tmp_path, capsys):
    one = sorted(series.iterdir())[0]
    shutil.copytree(one, tmp_path / "scans" / one.name)
    (tmp_path / "scans" / "nobody").mkdir()
    assert cli.main(["predict", str(small_run), str(tmp_path / "scans"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "1 predicted, 1 not" in said and "nobody: empty folder" in said
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["counts"]["not_predicted"] == 1


@pytest.mark.parametrize(("words", "said"), [
    (["no/run", "."], "no/run does not exist"),
    (["RUN", "no/scans"], "no/scans"),
    (["RUN", ".", "--engine", "fast"], "did you mean"),
    (["RUN", ".", "--tta", "-1"], "tta is -1"),
    (["RUN", "benchmarks"], "holds no DICOM file"),
])
def test_refused_in_one_line(small_run, tmp_path, capsys, words, said):
    words = [str(small_run) if word == "RUN" else word for word in words]
    assert cli.main(["predict", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_results_do_not_go_among_the_scans_nor_over_a_strangers_folder(small_run, series, tmp_path, monkeypatch):
    predictor = predict.load(small_run)
    with pytest.raises(ValueError, match="among the scans"): predict.write(predictor, series, series / "out")
    mine = tmp_path / "out.partial" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("three years")
    with pytest.raises(FileExistsError, match="no unfinished prediction"): predict.write(predictor, series, tmp_path / "out")
    assert mine.read_text() == "three years"
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"?" * 40)
    monkeypatch.chdir(tmp_path)
    assert predictor("broken.dcm").patient.item() == "broken.dcm"
