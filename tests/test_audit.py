"The audit on real files: a patient under two names, and labels that a header tells."
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian

from ctbm import audit, cohort, datasets, pack, phantom
from ctbm.preprocess import Preprocess


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    "60 patients with two slices each."
    folder = tmp_path_factory.mktemp("audit")
    return phantom.make_cohort(folder / "flat", n_patients=60, seed=11, slices_per_patient=2, positive=0.4, jobs=1, progress=False)


@pytest.fixture
def root(clean, tmp_path):
    "A copy of the cohort to spoil."
    shutil.copytree(clean / "CTs", tmp_path / "CTs")
    shutil.copy(clean / "labels1.csv", tmp_path)
    return tmp_path


def packed(root, size=96):
    table = cohort.join_labels(cohort.scan(root / "CTs", jobs=1), root / "labels1.csv")
    made = pack.build(table, Preprocess(size=size), root / "packs", jobs=1)
    return cohort.usable(made.table), made.images


def rewrite(path, change, to=None):
    "Change a file's header or pixels, uncompressed."
    file = dcmread(path)
    file.decompress(generate_instance_uid=False)
    change(file)
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
    file.save_as(to or path)


def under_another_name(root, patient, name, rewritten):
    "Copy a patient's files under another PatientID, other UIDs and other file names; label them as the originals."
    labels = pd.read_csv(root / "labels1.csv")
    for i, path in enumerate(sorted((root / "CTs").glob("*.dcm"))):
        if dcmread(path, stop_before_pixels=True).PatientID != patient: continue

        def change(file, i=i):
            file.PatientID, file.PatientName = name, name
            root_uid = f"2.25.{sum(map(ord, name))}"
            file.StudyInstanceUID, file.SeriesInstanceUID, file.SOPInstanceUID = f"{root_uid}.1", f"{root_uid}.2", f"{root_uid}.3.{i + 1}"
            rewritten(file)
        new = f"{name}_{i}"
        rewrite(path, change, root / "CTs" / f"{new}.dcm")
        labels.loc[len(labels)] = labels[labels["ID"] == path.stem].iloc[0].to_dict() | {"ID": new}
    labels.to_csv(root / "labels1.csv", index=False)


def noisy(file):
    "Add noise of 6 HU to the pixels, and move them by one."
    pixels = file.pixel_array.astype(np.float32)
    pixels = np.roll(pixels, 1, axis=1) + np.random.default_rng(0).normal(0, 6, pixels.shape)
    info = np.iinfo(file.pixel_array.dtype)
    file.PixelData = np.clip(np.rint(pixels), max(info.min, -2000), 4000).astype(file.pixel_array.dtype).tobytes()


def test_patient_under_another_name(root):
    patients = pd.Series([dcmread(p, stop_before_pixels=True).PatientID for p in sorted((root / "CTs").glob("*.dcm"))]).unique()
    under_another_name(root, patients[0], "TWIN", lambda file: None)
    under_another_name(root, patients[5], "NOISY", noisy)
    table, images = packed(root)
    assert table["patient"].nunique() == 62
    found = audit.links(table, images)
    assert {frozenset(pair) for pair in found[["patient_a", "patient_b"]].to_numpy()} == {
        frozenset({patients[0], "TWIN"}), frozenset({patients[5], "NOISY"})}, "these and nobody else"
    assert found.groupby("kind")["pairs"].sum().to_dict() == {"same pixels": 2, "near-identical": 2}

    naive = next(made for seed in range(20) if len(audit.leaks(made := datasets.split(table, folds=3, seed=seed), found)) == 2)
    told = audit.leaks(naive, images=images)
    assert (told["fold_a"] != told["fold_b"]).all()
    for name, original in (("TWIN", patients[0]), ("NOISY", patients[5])):
        assert told["what"].str.contains(f"{name} .*in (?:fold|the test)").sum() == told["what"].str.contains(original).sum() == 1

    joined = audit.merge(table, found)
    assert joined["patient"].nunique() == 60
    assert set(joined.loc[joined["labelled_patient"].isin(["TWIN", patients[0]]), "patient"]) == {" = ".join(sorted(["TWIN", patients[0]]))}
    for seed in range(5):
        after = datasets.split(joined, folds=3, seed=seed)
        assert audit.leaks(after, found).empty and audit.leaks(after, images=images).empty


def test_same_file_under_two_patients_of_the_label_file(root):
    "One DICOM patient that the label file calls two: files, studies and PatientID agree."
    labels, paths = pd.read_csv(root / "labels1.csv")[["ID", "Label"]], sorted((root / "CTs").glob("*.dcm"))
    owner = {p.stem: dcmread(p, stop_before_pixels=True).PatientID for p in paths}
    labels["PatientID"] = labels["ID"].map(owner)
    first = labels["PatientID"].iloc[0]
    labels.loc[labels["ID"] == labels.loc[labels["PatientID"] == first, "ID"].iloc[0], "PatientID"] = "ALIAS"
    shutil.copy(paths[7], root / "CTs" / "again.dcm")
    labels.loc[len(labels)] = {"ID": "again", "Label": 1 - labels.loc[labels["ID"] == paths[7].stem, "Label"].item(), "PatientID": "THIRD"}
    labels.to_csv(root / "labels1.csv", index=False)
    table, images = packed(root)
    found = audit.links(table, images)
    assert set(found.loc[(found[["patient_a", "patient_b"]] == "ALIAS").any(axis=1), "kind"]) == {"same study", "same header patient"}
    third = found[(found[["patient_a", "patient_b"]] == "THIRD").any(axis=1)].set_index("kind")
    assert set(third.index) == {"same file", "same study", "same header patient"}
    assert third.loc["same file", "what"].endswith("share 1 identical file, 1 of them under different labels")
    assert audit.merge(table, found)["patient"].nunique() == 60


def test_an_identifier_that_all_share_links_nobody(root):
    for path in (root / "CTs").glob("*.dcm"): rewrite(path, lambda file: setattr(file, "StudyInstanceUID", "1.2.3"))
    table, images = packed(root)
    found = audit.links(table, images)
    assert found["kind"].tolist() == [audit.NOBODY] and "StudyInstanceUID 1.2.3 stands under 60 of 60 patients" in found["what"][0]
    assert audit.merge(table, found)["patient"].tolist() == table["patient"].tolist()
    assert audit.leaks(table.assign(fold=pd.factorize(table["patient"])[0] % 3), found).empty


def spoil(root, change, share=1.0):
    "Change the headers of the files of positive patients."
    labels = pd.read_csv(root / "labels1.csv").set_index("ID")["Label"]
    owner = {p: dcmread(p, stop_before_pixels=True).PatientID for p in sorted((root / "CTs").glob("*.dcm"))}
    ill = sorted({owner[p] for p in owner if labels[p.stem] == 1})
    for path in [p for p in owner if owner[p] in ill[: round(share * len(ill))]]: rewrite(path, change)


def pad(file):
    "Another value outside the circle of reconstruction, stored and declared."
    pixels = file.pixel_array.astype(np.int32) + int(file.RescaleIntercept)
    outside = cv2.circle(np.ones(pixels.shape, np.uint8), (256, 256), 250, 0, -1) == 1
    pixels[outside] = -1500
    file.RescaleIntercept, file.PixelRepresentation, file.BitsStored, file.HighBit = 0, 1, 16, 15
    file.add_new("PixelPaddingValue", "SS", -1500)
    file.PixelData = pixels.astype("<i2").tobytes()


@pytest.mark.parametrize("header, change", [
    ("kernel", lambda file: setattr(file, "ConvolutionKernel", "SHARP")),
    ("manufacturer", lambda file: setattr(file, "Manufacturer", "ONCOLOGY")),
    ("thickness_mm", lambda file: setattr(file, "SliceThickness", 3.0)),
    ("padding", pad),
])
def test_header_that_tells_the_label(root, header, change):
    spoil(root, change, share=0.8)
    probe = audit.header_probe(packed(root)[0]).set_index("header")
    # rewriting leaves the file uncompressed, which tells the label as well, as it would in an archive
    assert probe.loc[header, "suspect"] and probe.loc[audit.ALL, "suspect"]
    with_padding = {"hu_min"} if header == "padding" else set()
    assert set(probe.index[probe["suspect"]]) <= {header, "transfer_syntax", audit.ALL} | with_padding
    assert probe.loc[header, "low"] > 0.6 and (probe["auroc"].between(probe["low"], probe["high"]) | probe["low"].isna()).all()


def test_clean_headers_tell_nothing(root):
    assert not audit.header_probe(packed(root)[0])["suspect"].any()


def test_canary_keeps_patients_whole(root):
    table, images = packed(root)
    canary = audit.shuffle_labels(table, seed=3)
    by_patient = canary.groupby("patient")["label"]
    assert by_patient.max().sum() == table.groupby("patient")["label"].max().sum()
    assert canary.drop(columns="label").equals(table.drop(columns="label"))
    assert audit.leaks(datasets.split(canary, folds=3), audit.links(canary, images)).empty
    assert (by_patient.max() != table.groupby("patient")["label"].max()).any()


@pytest.mark.parametrize("table, said", [
    (pd.DataFrame({"slice_id": ["a"], "patient": ["P"]}), "lacks ['label']"),
    (pd.DataFrame({"slice_id": ["a", "b"], "patient": ["P", None], "label": [0, 1]}), "lacks ['patient']"),
])
def test_what_cannot_be_audited(table, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")): audit.links(table)
    with pytest.raises(ValueError, match="no `fold`"): audit.leaks(table)


def test_probe_needs_both_classes():
    table = pd.DataFrame({"slice_id": list("abcd"), "patient": list("PQRS"), "label": [0, 0, 0, 1], "kernel": list("ABAB")})
    with pytest.raises(ValueError, match="1 of 4 slices are positive"): audit.header_probe(table)
    with pytest.raises(ValueError, match="none of the headers"): audit.header_probe(table.drop(columns="kernel"))
