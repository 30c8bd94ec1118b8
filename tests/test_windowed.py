"Three windows in a JPEG: real slices, the challenge's table, weak labels, and the same study as DICOM."
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from ctbm import bags, cohort, pack, phantom, preprocess, windowed

HOW = [cv2.IMWRITE_JPEG_QUALITY, 0, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
ASKED = preprocess.Preprocess(size=256, crop="none", windows=tuple(windowed.CHANNELS))
EXAMS = ["negative_exam_for_pe", "qa_motion", "qa_contrast", "flow_artifact", "rv_lv_ratio_gte_1", "rv_lv_ratio_lt_1", "leftsided_pe",
         "chronic_pe", "true_filling_defect_not_pe", "rightsided_pe", "acute_and_chronic_pe", "central_pe", "indeterminate"]


def packed(table): return np.stack([pack.pixels(preprocess.read_hu(row.path, row.frame), row, ASKED) for row in table.itertuples()])


def usable(table): return table[table["problem"].isna()].reset_index(drop=True)


def jpeg(path, picture, quality=95):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture[..., ::-1], [HOW[0], quality, *HOW[2:]])
    return path


@pytest.fixture(scope="module")
def chest_slices(data):
    "Real slices at 512 pixels: ten of one chest and two of others, and a head."
    found = [cohort.scan(data / name) for name in ("chest_lungdx", "lungmask_test", "headct_ge_hispeed_tilt18p5")]
    return pd.concat([usable(found[0]), usable(found[1]), usable(found[2])[::9]], ignore_index=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Two synthetic patients as DICOM, and as the layout with full colours at quality 95."
    home = tmp_path_factory.mktemp("windowed")
    phantom.make_cohort(home / "dicom", n_patients=2, layout="patients", positive=0.5, jobs=1, progress=False)
    slices = cohort.scan(home / "dicom" / "CTs")
    windowed.write_jpegs(slices, home / "jpegs")
    return home, slices


@pytest.fixture(scope="module")
def table(study):
    "What the challenge would publish of these two patients: the second is positive, and two of its slices show it."
    _, slices = study
    rows = slices[["study", "series", "instance"]].set_axis(["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"], axis=1)
    sick = slices["patient"] == slices["patient"].iloc[-1]
    rows["pe_present_on_image"] = (slices.index >= len(slices) - 2).astype(int)
    return rows.assign(**dict.fromkeys(EXAMS, 0)).assign(negative_exam_for_pe=(~sick).astype(int))


# Real slices


@pytest.mark.parametrize("quality", [95, 75, 50])
def test_real_slices_are_recovered_from_an_ordinary_jpeg(chest_slices, tmp_path, quality):
    "As others write it: colours at half the size. Measured: 17, 25 and 29 HU on average, half of the soft tissue within 8, 13 and 16."
    for i, row in enumerate(chest_slices.itertuples()):
        hu = preprocess.read_hu(row.path, row.frame)
        picture = np.rint(np.moveaxis(ASKED(hu), 0, -1) * 255).astype(np.uint8)
        found = preprocess.read_hu(jpeg(tmp_path / f"{i}.jpg", picture, quality))
        true = np.clip(cv2.resize(hu, (256, 256), interpolation=cv2.INTER_AREA), -1024, 450)
        off = np.abs(found - true)
        assert off.mean() < {95: 20, 75: 29, 50: 33}[quality] and np.median(off[np.abs(true) < 150]) < {95: 10, 75: 16, 50: 19}[quality]


def test_other_pictures_are_refused(chest_slices, tmp_path):
    for i, row in enumerate(chest_slices.iloc[::4].itertuples()):
        hu = preprocess.read_hu(row.path, row.frame)
        right = windowed.colours(hu)
        for name, picture in {"order": right[..., ::-1], "green_blue": right[..., [0, 2, 1]],
                              "lung_500": np.dstack([windowed.colours(hu - 100)[..., 0], right[..., 1:]])}.items():
            with pytest.raises(preprocess.Unreadable, match="contradict each other"):
                preprocess.read_hu(jpeg(tmp_path / f"{name}_{i}.jpg", picture))


def test_a_brain_window_in_grey_is_refused(data, tmp_path):
    paths = sorted((data / "ich_ctich_3patients").glob("*.jpg"))[::10]
    assert len(paths) > 5
    for path in paths:
        with pytest.raises(preprocess.Unreadable, match="grey picture"): preprocess.read_hu(path)
    slices = cohort.scan(data / "ich_ctich_3patients")
    assert set(cohort.kind(slices["problem"])) == {"not DICOM"} and slices["problem"].str.contains("JPEG outside the layout").any()


# The layout


def test_the_same_study_as_dicom_and_as_jpeg(study):
    home, slices = study
    jpegs = cohort.scan(home / "jpegs")
    assert jpegs["problem"].isna().all() and (jpegs["rows"] == 256).all() and jpegs["lossy"].all()
    both = slices.merge(jpegs, on="instance", suffixes=("", "_jpeg"))
    assert len(both) == len(slices) == len(jpegs) and (both["study"] == both["patient_jpeg"]).all()
    for _, one in both.groupby("patient"): assert one.sort_values("position_mm")["in_series_jpeg"].tolist() == list(range(len(one)))
    off = np.abs(packed(slices).astype(int) - packed(jpegs.set_index("instance").loc[slices["instance"]].reset_index()))
    assert off.mean() < 1.5 and np.percentile(off, 95) <= 4


def test_pixels_of_256_come_back_but_for_the_noise_of_jpeg(study, tmp_path):
    "Without a reduction in size nothing is averaged, and only rounding and JPEG remain."
    _, slices = study
    hu = np.stack([preprocess.read_hu(row.path)[::2, ::2] for row in slices.iloc[5:25:5].itertuples()])
    true = np.stack([ASKED(one) for one in hu]) * 255
    for quality, most in ((100, 6), (95, 40)):
        for i, one in enumerate(hu):
            picture = windowed.colours(one)
            cv2.imwrite(str(tmp_path / f"{i}.jpg"), picture[..., ::-1], [HOW[0], quality, HOW[2], cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444])
        off = np.abs(np.stack([ASKED(windowed.read_hu(tmp_path / f"{i}.jpg")) for i in range(len(hu))]) * 255 - true)
        assert off.max() <= most and off.mean() < 1


def test_a_zip_gives_the_table_of_its_folder(study, tmp_path):
    home, _ = study
    plain = cohort.scan(home / "jpegs")
    shutil.make_archive(str(tmp_path / "jpegs"), "zip", home / "jpegs")
    packed_ = cohort.scan(tmp_path / "jpegs.zip")
    pd.testing.assert_frame_equal(packed_.drop(columns=["path", "folder"]), plain.drop(columns=["path", "folder"]))


def test_numbers_order_a_series_however_they_are_written(tmp_path):
    picture = windowed.colours(np.full((16, 16), 40.0))
    for number in (2, 10, 9, 100): jpeg(tmp_path / "S" / "axial" / f"{number}_1.{1000 - number}.jpg", picture)
    slices = cohort.scan(tmp_path)
    assert slices["in_series"].tolist() == [2, 9, 10, 100] and slices["position_mm"].isna().all()
    assert list(cohort.findings(slices)["code"]) == ["patient-fallback", "windowed"]
    assert bags.in_order(slices.assign(label=0).sample(frac=1, random_state=0))["in_series"].tolist() == [2, 9, 10, 100]


def test_broken_jpegs_say_what_is_wrong(study, tmp_path):
    home, _ = study
    whole = next((home / "jpegs").rglob("*.jpg")).read_bytes()
    files = {"1_cut.jpg": whole[:-400], "2_empty.jpg": b"", "3_text.jpg": b"Dear colleague", "4_good.jpg": whole, "photo.jpg": whole}
    (tmp_path / "S" / "axial").mkdir(parents=True)
    for name, data in files.items(): (tmp_path / "S" / "axial" / name).write_bytes(data)
    problems = dict(zip(*cohort.scan(tmp_path)[["slice_id", "problem"]].to_numpy().T, strict=True))
    assert problems["good"] is None and problems["cut"].startswith("truncated") and "outside the layout" in problems["photo"]
    assert problems["text"].startswith("unreadable") and problems["2_empty"].startswith("empty file")
    with pytest.raises(preprocess.Unreadable, match="cut short"): preprocess.read_hu(tmp_path / "S" / "axial" / "1_cut.jpg")
    with pytest.raises(FileNotFoundError): preprocess.read_hu(tmp_path / "nothing.jpg")


def test_a_pack_goes_on_where_one_jpeg_is_no_slice(study, tmp_path):
    home, _ = study
    shutil.copytree(next((home / "jpegs").iterdir()), tmp_path / "in" / "S")
    path = sorted((tmp_path / "in").rglob("*.jpg"))[3]
    picture = windowed.decoded(path.read_bytes())
    cv2.imwrite(str(path), picture)  # red and blue exchanged
    made = pack.build(cohort.scan(tmp_path / "in"), ASKED, tmp_path / "packs", jobs=1)
    aside = made.table[made.table["problem"].notna()]
    assert len(aside) == 1 and "contradict" in aside["problem"].iloc[0] and len(made.images) >= len(made.table) - 1


def test_what_has_no_uid_cannot_be_written(study, tmp_path):
    _, slices = study
    with pytest.raises(ValueError, match="lacks study, series or SOPInstanceUID"):
        windowed.write_jpegs(slices.assign(series=None), tmp_path)


# The labels of the challenge


@pytest.mark.parametrize("kind", ["dicom", "jpegs"])
def test_the_challenge_labels_dicom_and_jpeg_alike(study, table, tmp_path, kind):
    home, slices = study
    table.to_csv(tmp_path / "train.csv", index=False)
    assert len(table.columns) == 17
    joined = cohort.join_labels(cohort.scan(home / kind / ("CTs" if kind == "dicom" else "")), tmp_path / "train.csv")
    ready = cohort.usable(joined)
    assert len(ready) == len(slices) and not joined["weak"].any()
    assert set(ready["instance"][ready["label"] == 1]) == set(table["SOPInstanceUID"][table["pe_present_on_image"] == 1])
    assert set(ready["patient"]) == set(slices["patient" if kind == "dicom" else "study"])


def test_the_challenges_own_tree_of_dicom(study, table, tmp_path):
    "<study>/<series>/<SOPInstanceUID>.dcm, where the headers name no patient."
    _, slices = study
    for row in slices.iloc[::6].itertuples():
        path = tmp_path / "train" / row.study / row.series / f"{row.instance}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, path)
    table.to_csv(tmp_path / "train.csv", index=False)
    joined = cohort.join_labels(cohort.scan(tmp_path / "train"), tmp_path / "train.csv")
    assert len(cohort.usable(joined)) == len(slices.iloc[::6]) and set(cohort.kind(joined["problem"].dropna())) == {"no file"}


def test_exams_that_cannot_be_used_are_set_aside_whole(study, table, tmp_path):
    home, slices = study
    sick, well = slices["study"].iloc[-1], slices["study"].iloc[0]
    of = table["StudyInstanceUID"]
    for name, changed, who in (("indeterminate study", table.assign(indeterminate=(of == sick).astype(int)), sick),
                               ("contradictory study", table.assign(negative_exam_for_pe=1), sick)):
        changed.to_csv(tmp_path / "train.csv", index=False)
        joined = cohort.join_labels(cohort.scan(home / "jpegs"), tmp_path / "train.csv")
        aside = joined[joined["problem"].notna()]
        assert set(cohort.kind(aside["problem"])) == {name} and set(aside["study"]) == {who} and len(aside) == (of == who).sum()
        assert set(cohort.usable(joined)["study"]) == {well}
        severity = cohort.findings(joined).query("code == @name.replace(' ', '-')")["severity"].unique().tolist()
        assert severity == ["error" if name.startswith("contra") else "warning"]


def test_a_strange_value_of_the_challenge_names_its_column(table, tmp_path):
    table.assign(negative_exam_for_pe="?").to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ValueError, match="negative_exam_for_pe must be 0 or 1; found '[?]' on line 2"):
        cohort.read_labels(tmp_path / "train.csv")


# Weak labels


@pytest.mark.parametrize("key", ["PatientID", "StudyInstanceUID", "Study", "both"])
def test_a_label_of_a_study_is_that_of_every_slice(study, tmp_path, key):
    home, slices = study
    one = slices.drop_duplicates("study")
    columns = {"PatientID": one["patient"], "Label": [0, 1]}
    if key != "PatientID": columns[key if key != "both" else "StudyInstanceUID"] = one["study"]
    if key in ("StudyInstanceUID", "Study"): del columns["PatientID"]
    pd.DataFrame(columns).to_csv(tmp_path / "weak.csv", index=False)
    joined = cohort.join_labels(slices, tmp_path / "weak.csv", write_clean=tmp_path / "clean.csv")
    again = cohort.join_labels(slices, tmp_path / "clean.csv")
    for ready in (cohort.usable(joined), cohort.usable(again)):
        assert len(ready) == len(slices) and ready["weak"].all()
        assert ready.groupby("study")["label"].agg(["min", "max"]).loc[one["study"]].to_numpy().tolist() == [[0, 0], [1, 1]]
    assert "weak-label" in set(cohort.findings(joined)["code"]) and "weak: each that of its patient or study" in cohort.describe(joined)
    assert cohort.checks(joined)["weak"] == len(slices)


def test_weak_labels_of_folders_and_of_jpegs(study, tmp_path):
    home, slices = study
    folders = sorted({path.name for path in (home / "dicom" / "CTs").iterdir()})
    (tmp_path / "weak.csv").write_text("PatientID,Label\n" + "".join(f"{name},{i}\n" for i, name in enumerate(folders)))
    ready = cohort.usable(cohort.join_labels(slices, tmp_path / "weak.csv"))
    assert sorted(ready["patient"].unique()) == folders and ready["weak"].all()
    (tmp_path / "weak.csv").write_text("Study,Label\n" + "".join(f"{name},{i}\n" for i, name in enumerate(slices["study"].unique())))
    assert len(cohort.usable(cohort.join_labels(cohort.scan(home / "jpegs"), tmp_path / "weak.csv"))) == len(slices)


@pytest.mark.parametrize("text, said", [
    ("PatientID,Label\nnobody,1\n", "none of its 1 rows names the patient or study of an image"),
    ("PatientID,Label\n,1\n", "no PatientID or StudyInstanceUID on line 2"),
    ("PatientID,Label\nP,2\n", "Label must be 0 or 1; found '2' on line 2"),
    ("StudyInstanceUID,Metastasis\nP,1\n", "or PatientID or StudyInstanceUID, and Label, for labels of whole patients"),
])
def test_weak_labels_that_cannot_be_joined_say_why(study, tmp_path, text, said):
    (tmp_path / "weak.csv").write_text(text)
    with pytest.raises(ValueError, match=said): cohort.join_labels(study[1], tmp_path / "weak.csv")


def test_a_patient_and_his_study_are_not_labelled_both(study, tmp_path):
    _, slices = study
    later = slices.assign(study=np.where(slices.index % 2, slices["study"], slices["study"] + ".1"))
    first = later.iloc[0]
    (tmp_path / "weak.csv").write_text(f"PatientID,Study,Label\n{first.patient},,1\n,{later.study.iloc[1]},0\n")
    with pytest.raises(ValueError, match="lines 2 and 3 label the same image"): cohort.join_labels(later, tmp_path / "weak.csv")
