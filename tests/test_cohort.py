"The cohort table on real files and on label files of every odd form."
import os
import shutil
import subprocess
import sys
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ctbm.cohort import COLUMNS, describe, findings, images, join_labels, kind, read_labels, scan, series


def slice_at(path, z_mm=0.0, patient="P", **tags):
    "A CT slice of 4 x 4 pixels, small enough to write thousands."
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dict(
        SOPClassUID=CTImageStorage, SOPInstanceUID=f"1.2.{crc32(str(path).encode())}", Modality="CT", PatientID=patient,
        StudyInstanceUID=f"1.3.{len(patient)}", SeriesInstanceUID="1.4", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, z_mm], PixelSpacing=[1, 1], SliceThickness=5,
        Rows=4, Columns=4, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=16, BitsStored=16, HighBit=15,
        PixelRepresentation=1, RescaleSlope=1, RescaleIntercept=-1024, PixelData=bytes(32)) | tags
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword, value in header.items():
        if value is not None: setattr(image, keyword, value)
    image.save_as(path, enforce_file_format=True)


def names_by_problem(slices):
    aside = slices[slices["problem"].notna()]
    return dict(zip(aside["slice_id"], kind(aside["problem"]), strict=True))


def codes(slices): return set(findings(slices)["code"])


@pytest.fixture
def flat(tmp_path):
    "Four slices in one folder."
    for z_mm, name in enumerate("abcd"): slice_at(tmp_path / "CTs" / f"{name}.dcm", 5.0 * z_mm)
    return tmp_path


@pytest.fixture
def nested(tmp_path):
    "Two patients, a folder each, whose files have the same names."
    for patient in ("P1", "P22"):
        for z_mm in range(3): slice_at(tmp_path / "CTs" / patient / f"{z_mm:03}.dcm", 5.0 * z_mm, patient)
    return tmp_path


def joined(folder, text, encoding="utf-8", **options):
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return join_labels(scan(folder / "CTs"), folder / "labels.csv", **options)


def usable(table):
    ready = table[table["problem"].isna() & table["label"].notna()]
    return dict(zip(ready["slice_id"], ready["label"], strict=True))


# Real images


def test_ge_head_is_tilted_and_unevenly_spaced(data):
    slices = scan(data / "headct_ge_hispeed_tilt18p5")
    head = slices[slices["problem"].isna()]
    assert list(slices)[:19] == list(COLUMNS)[:19] and len(head) == 28 and head["path"].map(os.path.isfile).all()
    assert names_by_problem(slices) == {"LICENSE": "not DICOM"}
    assert np.allclose(head["tilt_deg"], 18.5, atol=0.01) and np.allclose(head["tilt_tag_deg"], 18.5)
    assert head["position_mm"].is_monotonic_increasing and head["slice_id"].tolist() == [f"{n:02}" for n in range(1, 29)]
    assert set(head["patient_from"]) == {"PatientID"} and (head["rows"] == 512).all() and set(head["thickness_mm"]) == {4, 7}
    (stack,) = series(slices).itertuples()
    assert stack.spacings_mm == (1.08, 4.0, 7.0) and stack.missing == 0 and stack.n == 28
    assert {"tilt", "uneven-spacing", "mixed-thickness", "padding"} <= codes(slices) and not codes(slices) & {"missing-slice", "tilt-tag"}
    assert "1.08 4 7" in describe(slices)


def test_philips_phantom_sets_scout_and_summary_aside(data):
    slices = scan(data / "phantom_philips_brain5mm")
    assert names_by_problem(slices) == {"LICENSE": "not DICOM", "scout_I10": "localizer", "examsummary_I30": "secondary capture"}
    assert images(slices)["slice_id"].tolist() == ["I50", "I60", "I70", "I80", "I90", "I100", "I110", "I120"]  # not the order of the names
    assert series(slices)["spacings_mm"].tolist() == [(5.0,)]


def test_geometry_of_tilted_and_incomplete_series(data):
    slices = scan(data / "geometry_headers_dicom2nifti")
    by_folder = {path.split("geometry_headers_dicom2nifti/")[1].rsplit("/", 1)[0]: stack
                 for path, stack in zip(series(slices)["path"], series(slices).itertuples(), strict=True)}
    assert by_folder["gantrytilting/001"].tilt_deg == pytest.approx(14, abs=0.01)
    assert by_folder["gantrytilting/001"].spacings_mm == (4.85,)  # 5 mm of table, cos 14 degrees
    assert (by_folder["sliceincrement/001"].spacings_mm, by_folder["sliceincrement/001"].missing) == ((5.0, 10.0), 1)
    assert (by_folder["sliceincrement/002"].spacings_mm, by_folder["sliceincrement/002"].missing) == ((0.75, 1.5), 1)
    found = findings(slices)
    assert sorted(found[found["code"] == "missing-slice"]["path"].map(os.path.dirname).map(os.path.basename)) == ["001", "002"]
    assert {"uneven-spacing", "tilt", "no-thickness"} <= set(found["code"])


def test_perfusion_map_has_a_row_per_frame_and_is_not_hu(data):
    slices = scan(data / "enhanced_ct")
    frames = slices[slices["transfer_syntax"] == "1.2.840.10008.1.2.1"]
    assert frames["slice_id"].tolist() == ["CT0012.explicit_little_endian#1", "CT0012.explicit_little_endian#0"]  # by position
    assert frames["position_mm"].tolist() == [149, 159] and frames["frame"].tolist() == [1, 0] and set(frames["thickness_mm"]) == {10}
    assert set(kind(slices["problem"]).dropna()) == {"not HU", "not DICOM"} and "not-hu" in codes(slices)


def test_odd_files_have_a_reason_or_are_read(data):
    slices = scan(data / "odd_derived")
    assert names_by_problem(slices) == {"LICENSE": "not DICOM", "README": "not DICOM", "03_no_rescale_tags": "missing rescale",
                                        "19_empty_rescale": "missing rescale", "09_truncated_pixeldata": "truncated"}
    assert len(images(slices)) == 10
    assert slices.set_index("slice_id").loc["12_no_preamble_no_meta_implicit", "transfer_syntax"] == "1.2.840.10008.1.2"
    assert {"duplicate-position", "mixed-geometry"} <= codes(slices)  # ten versions of one slice
    for name, code in {"08_nonsquare_pixels": "non-square-pixels", "01_monochrome1_negslope": "photometric"}.items():
        assert code in codes(slices[slices["slice_id"] == name])


def test_pydicom_oddities(data):
    slices = scan(data / "pydicom_ct")
    assert names_by_problem(slices) == {
        "LICENSE": "not DICOM", "no_meta": "not DICOM", "meta_missing_tsyntax": "unreadable", "badVR": "not CT", "MR_truncated": "not CT",
        "MR_small_bigendian": "not CT", "SC_rgb_small_odd": "secondary capture"}
    tilted = slices.set_index("slice_id").loc["J2K_pixelrep_mismatch"]
    assert tilted["tilt_deg"] == pytest.approx(22, abs=0.01) and tilted["tilt_tag_deg"] == -22  # the sign of the tag is not the scanner's
    assert "tilt-tag" not in codes(slices)


def test_transfer_syntaxes_that_change_values_are_refused(data):
    slices = scan(data / "ts_matrix_ctimage_chest")
    refused = slices[kind(slices["problem"]) == "lossy JPEG"]
    assert sorted(refused["transfer_syntax"].str.rsplit(".", n=1).str[1]) == ["50", "51", "53", "55"]
    usable = images(slices)
    assert len(usable) == 12 and sorted(usable["transfer_syntax"][usable["lossy"]].str[-2:]) == ["81", "91"]
    assert "lossy" in codes(slices)


def test_a_compressed_file_cut_short_is_noticed(data, tmp_path):
    whole = (data / "odd_derived" / "16_j2k_lossless.dcm").read_bytes()
    (tmp_path / "whole.dcm").write_bytes(whole)
    for cut in (10, 1_000, 50_000): (tmp_path / f"cut{cut}.dcm").write_bytes(whole[:-cut])
    assert names_by_problem(scan(tmp_path)) == {"cut10": "truncated", "cut1000": "truncated", "cut50000": "truncated"}


def test_every_real_file_has_its_row(data):
    slices = scan(data)
    files = {os.path.join(here, name) for here, _, names in os.walk(data) for name in names}
    assert set(slices["path"]) == files
    assert slices["problem"].map(lambda problem: problem is None or ":" in problem).all()
    assert {"duplicate-image", "duplicate-position", "patient-fallback"} <= codes(slices)
    describe(slices)


# Folders


def test_a_folder_that_is_absent_or_empty_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist .looked at"): scan(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no file"): scan(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is empty"): scan(tmp_path / "file")


def test_the_contrast_agent_is_kept_as_it_stands(tmp_path):
    slice_at(tmp_path / "a.dcm", 0.0, ContrastBolusAgent="Omnipaque 300")
    slice_at(tmp_path / "b.dcm", 5.0)
    slice_at(tmp_path / "c.dcm", 10.0, ContrastBolusAgent="")
    assert scan(tmp_path)["contrast"].tolist() == ["Omnipaque 300", None, None]


def test_links_hidden_and_special_files(flat):
    folder = flat / "CTs"
    (folder / "loop").symlink_to(folder)
    (folder / "broken.dcm").symlink_to("nothing")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / ".cache").mkdir()
    shutil.copy(folder / "a.dcm", folder / ".cache" / "a.dcm")
    (folder / "empty.dcm").touch()
    os.mkfifo(folder / "pipe")  # reading it would wait for ever
    (flat / "elsewhere").mkdir()
    slice_at(flat / "elsewhere" / "e.dcm", 20.0)
    (folder / "linked").symlink_to(flat / "elsewhere")
    slices = scan(folder)
    assert names_by_problem(slices) == {"broken": "unreadable", ".DS_Store": "not DICOM", ".cache": "hidden folder",
                                        "empty": "empty file", "pipe": "unreadable"}
    assert images(slices)["slice_id"].tolist() == list("abcde")


def test_hostile_tags_cost_one_file_only(flat):
    folder = flat / "CTs"
    slice_at(folder / "no_place.dcm", ImagePositionPatient=None, ImageOrientationPatient=None, GantryDetectorTilt=-12)
    slice_at(folder / "no_pixels.dcm", PixelData=None)
    slice_at(folder / "no_size.dcm", Rows=None)
    slice_at(folder / "eight_bits.dcm", BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=bytes(16))
    slice_at(folder / "flat_slope.dcm", RescaleSlope=0)
    slice_at(folder / "no_frames.dcm", NumberOfFrames=0)  # an image all the same
    slice_at(folder / "many_frames.dcm", NumberOfFrames=10**9)
    (folder / "half.dcm").write_bytes((folder / "a.dcm").read_bytes()[:300])
    text = (folder / "b.dcm").read_bytes()
    (folder / "number.dcm").write_bytes(text.replace(b"-1024.0", b"nothing"))
    slices = scan(folder)
    found = names_by_problem(slices)
    half = found.pop("half")
    assert half in ("truncated", "unreadable", "not an image")
    assert found == {"no_pixels": "no pixel data", "no_size": "truncated", "eight_bits": "not HU", "flat_slope": "missing rescale",
                     "number": "missing rescale", "many_frames": "truncated"}
    assert "no_frames" in images(slices)["slice_id"].tolist() and len(slices) == len(list(folder.iterdir()))
    lost = slices.set_index("slice_id").loc["no_place"]
    assert np.isnan(lost["position_mm"]) and lost["tilt_deg"] == 12 and lost["problem"] is None and "no-position" in codes(slices)


def test_non_image_objects(flat):
    slice_at(flat / "CTs" / "state.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.11.1", Modality="PR", Rows=None, PixelData=None)
    slice_at(flat / "CTs" / "dose.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Modality="SR", Rows=None, PixelData=None)
    slice_at(flat / "CTs" / "pet.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.128", Modality="PT")
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID, directory.file_meta.TransferSyntaxUID = "1.2.840.10008.1.3.10", ExplicitVRLittleEndian
    directory.DirectoryRecordSequence = []
    directory.save_as(flat / "CTs" / "DICOMDIR", enforce_file_format=False)
    assert names_by_problem(scan(flat / "CTs")) == {
        "state": "not an image", "dose": "not an image", "DICOMDIR": "not an image", "pet": "not CT"}


def test_patients_fall_back_and_conflicts_are_found(tmp_path):
    slice_at(tmp_path / "1.dcm", patient="ANON", StudyInstanceUID="1.1", PatientBirthDate="19500101")
    slice_at(tmp_path / "2.dcm", patient="ANON", StudyInstanceUID="1.2", PatientBirthDate="19600101")
    slice_at(tmp_path / "3.dcm", patient=" ", StudyInstanceUID="1.9")
    slice_at(tmp_path / "4.dcm", patient="", StudyInstanceUID=None)
    slices = scan(tmp_path).set_index("slice_id")
    assert slices["patient"].to_dict() == {"1": "ANON", "2": "ANON", "3": "1.9", "4": "4"}
    assert slices["patient_from"].to_dict() == {"1": "PatientID", "2": "PatientID", "3": "StudyInstanceUID", "4": "ID"}
    assert {"patient-conflict", "placeholder-patient", "patient-fallback"} <= codes(scan(tmp_path))
    assert not any("1950" in str(value) for value in scan(tmp_path).to_numpy().ravel())  # no birth date in the table


def test_five_thousand_files_are_all_accounted_for(tmp_path):
    slice_at(tmp_path / "one.dcm")
    image = (tmp_path / "one.dcm").read_bytes()
    for n in range(5_000): (tmp_path / f"ID_{n:09x}.dcm").write_bytes(image if n % 100 else image[:-9])
    slices = scan(tmp_path, jobs=2)
    assert len(slices) == 5_001 and slices["path"].nunique() == 5_001
    assert kind(slices["problem"]).value_counts().to_dict() == {"truncated": 50}
    pd.testing.assert_frame_equal(slices, scan(tmp_path, jobs=1))


def test_import_is_light():
    heavy = {"torch", "matplotlib", "scipy", "sklearn", "ctbm.preprocess", "ctbm.phantom"}
    code = f"import sys, ctbm.cohort; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# Labels


@pytest.mark.parametrize("text, encoding", [
    ("ID,Label\na,0\nb,1\n", "utf-8"), (",ID,Label\n0,a,0\n1,b,1\n", "utf-8"), ("id, LABEL \n a.dcm , 0\nb.DCM,1\n", "utf-8-sig"),
    ("ID;Label\na;0.0\nb;1.0\n", "utf-8"), ("ID\tLabel\na\tFalse\nb\tTRUE\n", "utf-16"), ("\n\nID,Label\r\na,0\r\n\r\n,\r\nb,1", "utf-8"),
    ("Label,notes,ID\n0,\"fine, thanks\",a\n1,,b\n", "utf-8"), (",Label\na,0\nb,1\n", "utf-8")])
def test_label_files_of_many_forms(flat, text, encoding):
    assert usable(joined(flat, text, encoding)) == {"a": 0, "b": 1}


@pytest.mark.parametrize("text, encoding, message", [
    ("", "utf-8", "is empty"), ("ID,Label\n", "utf-8", "holds no labels"),
    ("name,value\na,0\n", "utf-8", "'name', 'value'; expected ID and Label"),
    ("ID,Label,ID\na,0,a\n", "utf-8", "once each"), ("ID,Label\na,2\nb,x\nc,1\n", "utf-8", "0 or 1; found '2' on line 2, 'x' on line 3"),
    ("ID,Label\n,1\n", "utf-8", "no ID on line 2"), ("ID,Label\nJosé,1\n", "latin-1", "line 2: not UTF-8"),
    ("ID,Label\na,1\n", "utf-16-le", "UTF-16"), ("ID,Label\na,0,5\n", "utf-8", "line 2: 3 cells"),
    ("a,0\nb,1\n", "utf-8", "found the columns 'a', '0'"),
    ("ID,Label\nx,1\ny,0\n", "utf-8", "none of its 2 IDs names an image")])
def test_label_files_that_are_refused(flat, text, encoding, message):
    with pytest.raises(ValueError, match=message) as error: joined(flat, text, encoding)
    assert "labels.csv" in str(error.value)


def test_a_label_file_that_is_absent(flat):
    with pytest.raises(FileNotFoundError, match="looked at"): join_labels(scan(flat / "CTs"), flat / "lables.csv")


def test_nothing_is_dropped_without_a_row(flat):
    shutil.copy(flat / "CTs/a.dcm", flat / "CTs/a (1).dcm")
    slice_at(flat / "CTs/e (1).dcm", 30.0)
    (flat / "CTs/a.png").write_bytes(b"\x89PNG")
    table = joined(flat, "ID,Label\na,0\na,1\nb,1\nb.dcm,1\nc,\nc,\ngone,0\n", write_clean=flat / "labels_clean.csv")
    assert usable(table) == {"a": 0, "b": 1}
    reasons = sorted(zip(table["slice_id"], kind(table["problem"]).fillna(""), strict=True))
    assert reasons == sorted([("a", ""), ("a", "conflicting label"), ("a", "not DICOM"), ("a (1)", "browser duplicate"), ("b", ""),
                              ("b", "duplicate label"), ("c", "empty label"), ("c", "duplicate label"), ("d", "no label"),
                              ("e (1)", "no label"), ("gone", "no file")])
    assert {"conflicting-label", "duplicate-label", "browser-duplicate", "no-file", "no-label", "empty-label"} <= codes(table)
    assert findings(table)["severity"].iloc[0] == "error" and str(table["label"].dtype) == "Int64"
    assert (flat / "labels_clean.csv").read_text() == "ID,Label\na,0\nb,1\n"
    assert "1 negative, 1 positive" in describe(table)
    with pytest.raises(ValueError, match="is the label file itself"):
        join_labels(scan(flat / "CTs"), flat / "labels.csv", write_clean=flat / "labels.csv")


def test_unlabelled_slices_leave_no_gap_in_the_series(flat):
    table = joined(flat, "ID,Label\na,0\nd,1\n")
    assert series(table)["spacings_mm"].tolist() == [(5.0,)] and "missing-slice" not in codes(table)


def test_a_labelled_file_that_cannot_be_used_keeps_its_reason(flat):
    slice_at(flat / "CTs/scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    table = joined(flat, "ID,Label\na,0\nscout,1\n")
    assert usable(table) == {"a": 0} and names_by_problem(table)["scout"] == "localizer" and "one-class" in codes(table)


def test_names_that_repeat_are_matched_by_patient(nested):
    rows = [("P1", "000", 0), ("P1", "001", 1), ("P22", "000", 1), ("P22", "001", 0), ("P22", "009", 1)]
    owned = joined(nested, "ID,Label,PatientID\n" + "".join(f"{name},{label},{patient}\n" for patient, name, label in rows))
    ready = owned[owned["problem"].isna()]
    expected = [(patient, name, label) for patient, name, label in rows if name != "009"]
    assert list(zip(ready["patient"], ready["slice_id"], ready["label"], strict=True)) == expected
    assert kind(owned["problem"]).value_counts().to_dict() == {"no label": 2, "no file": 1} and set(ready["patient_from"]) == {"labels"}
    by_path = joined(nested, "ID,Label\n" + "".join(f"{patient}/{name}.dcm,{label}\n" for patient, name, label in rows),
                     write_clean=nested / "clean.csv")
    assert by_path[by_path["problem"].isna()]["label"].tolist() == ready["label"].tolist()
    again = join_labels(scan(nested / "CTs"), nested / "clean.csv")
    assert again["label"].dropna().tolist() == ready["label"].tolist()
    with pytest.raises(ValueError, match="line 2: 000 names 2 images.*Add a PatientID column"): joined(nested, "ID,Label\n000,1\n")


def test_a_label_never_lands_on_another_patients_slice(nested):
    (nested / "CTs/P22/002.dcm").unlink()
    table = joined(nested, "ID,Label,PatientID\n000,0,P1\n002,1,P22\n")
    assert usable(table) == {"000": 0} and "no-file" in codes(table)


def test_the_label_file_names_the_patient(flat):
    table = joined(flat, "ID,Label,PatientID\na,0,X\nb,1,X\nc,0,Y\nd,1,\n")
    assert table["patient"].tolist() == ["P", "X", "X", "Y"] and table["patient_from"].tolist() == ["PatientID", *["labels"] * 3]
    assert {"patient-split", "study-shared"} <= codes(table) and set(table["header_patient"]) == {"P"}


def test_a_saved_table_is_as_good_as_a_new_one(nested):
    (nested / "CTs/notes.txt").write_text("seen")
    slices = scan(nested / "CTs")
    slices.to_parquet(nested / "slices.parquet")
    read_back = pd.read_parquet(nested / "slices.parquet")
    assert describe(read_back) == describe(slices)
    (nested / "labels.csv").write_text("ID,Label,PatientID\n000,0,P1\n001,1,P22\n")
    first, second = (join_labels(table, nested / "labels.csv") for table in (slices, read_back))
    pd.testing.assert_frame_equal(first, second)


def test_a_folder_without_any_slice_is_described(tmp_path):
    (tmp_path / "notes.txt").write_text("seen")
    page = describe(scan(tmp_path))
    assert "1 file, 1 row: 0 usable, 1 set aside" in page and "not-dicom" in page and series(scan(tmp_path)).empty


def test_read_labels_on_a_large_file(tmp_path):
    csv = tmp_path / "labels1.csv"
    pd.DataFrame(dict(ID=[f"ID_{n:09x}" for n in range(5_122)], Label=[int(n < 279) for n in range(5_122)])).to_csv(csv)
    labels = read_labels(csv)
    assert len(labels) == 5_122 and labels["label"].sum() == 279


def test_a_real_header_without_text_tags_is_not_copied(data):
    "The birth date and name of a header stay in the file."
    path = data / "enhanced_ct" / "CT0012.explicit_little_endian.dcm"
    header = dcmread(path, stop_before_pixels=True)
    cells = " ".join(map(str, scan(path.parent).to_numpy().ravel()))
    assert str(header.PatientBirthDate) not in cells and str(header.PatientName) not in cells
