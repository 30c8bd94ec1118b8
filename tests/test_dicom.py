"Predictions as DICOM objects: valid, readable by others, pointing at the images they were made from, on real files as on synthetic ones."
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from highdicom.sr import srread
from PIL import Image
from pydicom import config, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from ctbm import cohort, dicom, phantom
from ctbm.preprocess import read_hu, window

MODEL = {"run": "run_20260101_120000", "recipe": "baseline", "version": "0.1.0", "sha256": "ab" * 32, "threshold": 0.5, "pooling": "max"}
RESULT = {"score": 0.9, "probability": 0.7, "decision": "positive", "triage": "review", "threshold": 0.5, "ood_score": 0.4,
          "folds_sd": 0.05, "tta_sd": float("nan"), "out_of_distribution": False, "problem": None,
          "mismatches": ["slice thickness 7 mm; training 4 to 6 mm"], "findings": ["tilt: 18.5 \N{DEGREE SIGN}"]}
ANSWERS = {"positive": codes.cid240.Present, "negative": codes.cid240.Absent, None: codes.cid240.Undetermined}


def prediction(folder) -> tuple[dict, pd.DataFrame]:
    "A made-up prediction about every readable slice of a folder, the first one set aside."
    table = cohort.scan(folder)
    table = table[table["problem"].isna()].sort_values(["position_mm", "frame"], ignore_index=True)
    used = np.arange(len(table)) > (0 if len(table) > 1 else -1)
    table = table.assign(used=used, why=np.where(used, None, "above the head"), ood_score=0.4,
                         score=np.where(used, np.linspace(0.9, 0.1, len(table)), np.nan))
    return RESULT | {"study": table["study"].iloc[0], "patient": table["patient"].iloc[0]}, table


def pictures(slices, n: int) -> dict:
    "Overlays of the first slices in use, without colour."
    rows = slices[slices["used"]].head(n)
    return {(r.path, r.frame): np.rint(255 * np.repeat(window(read_hu(r.path, r.frame), 40, 80)[..., None], 3, axis=2)).astype(np.uint8)
            for r in rows.itertuples()}


def errors(path) -> list[str]:
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    return [line for line in (said.stdout + said.stderr).splitlines() if "Error" in line]


def one_slice(folder, **changes):
    "One synthetic slice with attributes changed, as bytes would arrive from a careless archive."
    folder.mkdir(parents=True, exist_ok=True)
    patient = phantom.Patient(3, 0)
    image = phantom.image_dataset(phantom.study_header(patient), patient, 9, np.zeros((phantom.SIZE, phantom.SIZE), np.float32))
    phantom.write_dicom(image, folder / "image.dcm", "explicit")
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        for keyword, value in changes.items():
            if value is None: delattr(image, keyword)
            else: setattr(image, keyword, value)
        image.save_as(folder / "image.dcm")
    return folder


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    place = tmp_path_factory.mktemp("dicom") / "cohort"
    return phantom.make_cohort(place, n_patients=1, layout="patients", positive=1.0, progress=False) / "CTs"


@pytest.fixture(scope="module")
def head(data):
    return data / "headct_ge_hispeed_tilt18p5"


@pytest.fixture(scope="module")
def written(head, synthetic, tmp_path_factory) -> dict:
    "What `write` made of a real and of a synthetic series: prediction and files."
    made = {}
    for name, folder in (("head", head), ("synthetic", synthetic)):
        study, slices = prediction(folder)
        place, shown = tmp_path_factory.mktemp("out") / name, "no method; window level 40 HU, width 80 HU"
        files = dicom.write(place, study, slices, MODEL, pictures(slices, 2), shown)
        made[name] = study, slices, files
    return made


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (package dicom3tools)")
def test_dciodvfy_finds_no_error(written, head, tmp_path):
    study, slices = prediction(head)
    silent = dicom.report(study | dict.fromkeys(("decision", "score", "probability", "triage", "ood_score")), slices, MODEL)
    silent.save_as(tmp_path / "silent.dcm", enforce_file_format=True)
    for file in [tmp_path / "silent.dcm", *(f for _, _, files in written.values() for f in files)]:
        assert not errors(file), file.name


@pytest.mark.skipif(shutil.which("dsr2html") is None, reason="dsr2html is not installed (package dcmtk)")
def test_dcmtk_reads_the_report_and_finds_the_decision(written):
    for _, _, (report, *_) in written.values():
        page = subprocess.run(["dsr2html", report], capture_output=True, text=True, encoding="utf8")
        assert page.returncode == 0 and "UNVERIFIED" in page.stdout and "tilt: 18.5 \N{DEGREE SIGN}" in page.stdout
        assert page.stdout.index(dicom.STATEMENT) < page.stdout.index("neoplasm to brain: present") < page.stdout.index("Image Library")


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="dcm2pnm is not installed (package dcmtk)")
def test_dcmtk_draws_the_capture(written, tmp_path):
    for _, _, (_, capture, *_) in written.values():
        subprocess.run(["dcm2pnm", capture, tmp_path / "drawn.ppm"], check=True, capture_output=True)
        with Image.open(tmp_path / "drawn.ppm") as drawn: assert np.array_equal(np.asarray(drawn), dcmread(capture).pixel_array)


@pytest.mark.parametrize("name", ["head", "synthetic"])
def test_report_is_read_back(written, name):
    study, slices, (file, *_) = written[name]
    read, used = srread(file), slices[slices["used"]]
    whole, *each = read.content.get_image_measurement_groups()
    assert {entry[2] for entry in read.get_evidence()} == set(used["instance"])
    assert [(g.source_images[0].referenced_sop_instance_uid, g.get_measurements(dicom.SCORE)[0].value) for g in each] == list(
        zip(used["instance"], used["score"], strict=True)), "each score points at its slice"
    first = dcmread(used["path"].iloc[0], stop_before_pixels=True)
    axes = (codes.DCM.ImagePositionPatientX, codes.DCM.ImagePositionPatientY, codes.DCM.ImagePositionPatientZ)
    assert [each[0].get_measurements(axis)[0].value for axis in axes] == pytest.approx(list(map(float, first.ImagePositionPatient)))
    found = {m.name.meaning: (m.value, m.unit.value) for m in whole.get_measurements()}
    assert found == {"Score": (0.9, "1"), "Probability": (0.7, "1"), "Threshold Value": (0.5, "1"), "Out-of-distribution score": (0.4, "1"),
                     "Standard deviation of the score over the folds": (0.05, "1"),
                     "Slices used": (len(used), "{slices}"), "Slices set aside": (1, "{slices}")}
    assert whole.get_qualitative_evaluations(dicom.METASTASIS)[0].value == codes.cid240.Present
    (observer,) = read.content.get_observer_contexts()
    assert observer.observer_type == codes.DCM.Device and observer.observer_identifying_attributes.serial_number == MODEL["sha256"]
    for keyword in ("PatientID", "PatientName", "PatientSex", "StudyInstanceUID"): assert read[keyword].value == (first.get(keyword) or "")
    assert f"Frame of Reference UID: ...{first.FrameOfReferenceUID[-6:]}" in "\n".join(dicom.tree(read))
    assert (read.VerificationFlag, read.PreliminaryFlag, read.CompletionFlag) == ("UNVERIFIED", "PRELIMINARY", "COMPLETE")


@pytest.mark.parametrize("decision", [*ANSWERS, float("nan")])
def test_one_answer_for_each_decision_and_a_finding_only_where_there_is_one(head, decision):
    study, slices = prediction(head)
    text = dicom.report(study | {"decision": decision, "problem": "no slice shows brain"}, slices.head(3), MODEL)
    lines, decided = [line.strip() for line in dicom.tree(text)], isinstance(decision, str)
    answer = ANSWERS[decision if decided else None]
    assert [line for line in lines if line.startswith(dicom.METASTASIS.meaning)] == [
        f"{dicom.METASTASIS.meaning}: {answer.meaning} ({answer.value}, SCT)"]
    assert any(line.startswith("Finding:") for line in lines) == (decision == "positive")
    assert ("Why there is no decision: no slice shows brain" in lines) == (text.CompletionFlag == "PARTIAL") == (not decided)


def test_capture_keeps_picture_geometry_and_words(written, synthetic):
    study, slices, (_, *captures) = written["head"]
    for file, ((path, _), picture) in zip(captures, pictures(slices, 2).items(), strict=True):
        capture, source = dcmread(file), dcmread(path)
        rows, cols = picture.shape[:2]
        assert np.array_equal(capture.pixel_array[:rows, :cols], picture), "no word stands on the picture"
        assert capture.pixel_array[rows:].max() > 200 and capture.Rows > rows
        for keyword in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
            assert np.allclose(capture[keyword].value, source[keyword].value), keyword
        assert capture.FrameOfReferenceUID == source.FrameOfReferenceUID and capture.PatientOrientation == ["L", "PF"]
        assert capture.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert dicom.STATEMENT in capture.ImageComments and "level 40" in capture.DerivationDescription
        assert capture.BurnedInAnnotation == "YES"
        assert dicom.STATEMENT in capture.SeriesDescription


def test_names_are_new_and_stay(written, head):
    study, slices, files = written["head"]
    inputs = {v for f in head.glob("*.dcm") for h in [dcmread(f, stop_before_pixels=True)] for v in (h.SOPInstanceUID, h.SeriesInstanceUID)}
    heads = [dcmread(f, stop_before_pixels=True) for f in files]
    names = [h.SOPInstanceUID for h in heads]
    series = [h.SeriesInstanceUID for h in heads]
    assert len({*names, *series}) == len(names) + 2 and not {*names, *series} & inputs
    assert all(u.startswith("2.25.") for u in [*names, *series])
    moved = slices.sample(frac=1, random_state=0).assign(folder="elsewhere")
    assert dicom.report(study, moved, MODEL).SOPInstanceUID == names[0], "neither the order of the rows nor a folder counts"
    other = [dicom.report(study | {"score": 0.8}, slices, MODEL), dicom.report(study, slices, MODEL | {"sha256": "cd" * 32})]
    assert len({names[0], *(o.SOPInstanceUID for o in other)}) == 3


# ---- images as they come ---------------------------------------------------------------------------------------------


def objects(folder) -> list:
    "Report and capture of the first slice of a folder."
    study, slices = prediction(folder)
    path, frame = slices[["path", "frame"]].iloc[-1]
    return [dicom.report(study, slices, MODEL), dicom.capture(black(dicom.source(path)), path, ["a line"], MODEL, frame)]


def black(header) -> np.ndarray:
    "A picture of the size of an image."
    return np.zeros((header.Rows, header.Columns, 3), np.uint8)


@pytest.mark.parametrize("changes", [
    dict(PatientSex="male", StudyDate="12.03.2020", PatientBirthDate="1950", PatientAge="70"),
    dict(StudyDate=None, StudyTime=None, StudyID=None, AccessionNumber=None, ReferringPhysicianName=None, PatientName=None, PatientSex=None,
         PatientBirthDate=None, PatientID=None, BodyPartExamined=None),
    dict(SpecificCharacterSet="ISO_IR 192", PatientName="Grün^Zoë=山田^太郎", StudyDescription="Schädel"),
    dict(PatientName="Nobody", PixelSpacing=None, ImagePositionPatient=None, ImageOrientationPatient=None, FrameOfReferenceUID=None,
         SliceThickness=None),
    dict(LossyImageCompression="01", LossyImageCompressionRatio="8", LossyImageCompressionMethod="ISO_15444_1")],
    ids=["not valid", "absent", "alphabets", "no geometry", "lossy"])
def test_odd_headers(tmp_path, changes):
    folder = one_slice(tmp_path / "in", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = objects(folder)
    for k, dataset in enumerate(made):
        dataset.save_as(tmp_path / f"{k}.dcm", enforce_file_format=True)
        read = dcmread(tmp_path / f"{k}.dcm")
        if name := changes.get("PatientName"): assert read.PatientName == name
        if "PatientAge" in changes:
            assert read.PatientSex == read.StudyDate == read.PatientBirthDate == "" and "PatientAge" not in read
        if shutil.which("dciodvfy"): assert not errors(tmp_path / f"{k}.dcm")
    assert made[1].get("LossyImageCompression") == changes.get("LossyImageCompression")
    assert srread(tmp_path / "0.dcm").content.get_image_measurement_groups()


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_what_cannot_be_filed_is_an_error_that_names_the_file(tmp_path, keyword):
    folder = one_slice(tmp_path / "in", **{keyword: None})
    with pytest.raises(ValueError, match=rf"image\.dcm: {keyword} absent"): objects(folder)


def test_real_files_of_all_kinds(data, tmp_path):
    folders, seen = ["odd_derived", "phantom_philips_brain5mm", "geometry_headers_dicom2nifti", "chest_lungdx", "enhanced_ct"], 0
    for path in (f for folder in folders for f in sorted((data / folder).rglob("*")) if f.is_file()):
        try: header = dicom.source(path)
        except ValueError as error:
            assert str(path) in str(error) and (path.suffix in (".txt", "") or "absent" in str(error))
            continue
        seen += 1
        if seen % 4 or not header.get("Rows"): continue
        image = dicom.capture(black(header), path, ["a line"], MODEL)
        image.save_as(tmp_path / "capture.dcm", enforce_file_format=True)
        assert image.StudyInstanceUID == header.StudyInstanceUID
        if shutil.which("dciodvfy"): assert not errors(tmp_path / "capture.dcm")
    assert seen > 30


def test_frames_of_one_file(data, tmp_path):
    file = data / "enhanced_ct" / "CT0012.explicit_little_endian.dcm"
    header = dicom.source(file)
    slices = pd.DataFrame({"path": str(file), "frame": [0, 1], "used": True, "why": None, "score": [0.1, 0.8]})
    files = dicom.write(tmp_path / "out", RESULT | {"study": header.StudyInstanceUID}, slices, MODEL, {(str(file), 1): black(header)})
    groups = srread(files[0]).content.get_image_measurement_groups()[1:]
    assert [g.source_images[0].referenced_frame_numbers for g in groups] == [[2], [1]]
    assert [g.get_measurements(dicom.SCORE)[0].value for g in groups] == [0.8, 0.1]
    capture, own = dcmread(files[1]), dcmread(file).PerFrameFunctionalGroupsSequence[1]
    assert capture.SourceImageSequence[0].ReferencedFrameNumber == 2
    assert np.allclose(capture.ImagePositionPatient, own.PlanePositionSequence[0].ImagePositionPatient)
    if shutil.which("dciodvfy"): assert not [e for f in files for e in errors(f)]


def test_compressed_source(data):
    file = data / "odd_derived" / "16_j2k_lossless.dcm"
    image = dicom.capture(np.zeros((512, 512, 3), np.uint8), file, [], MODEL)
    assert image.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian and image.pixel_array.shape[2] == 3


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_two_studies_are_not_one_report(head, synthetic):
    (study, a), (_, b) = prediction(head), prediction(synthetic)
    with pytest.raises(ValueError, match="2 different StudyInstanceUID"): dicom.report(study, pd.concat([a, b]), MODEL)
    with pytest.raises(ValueError, match="the prediction is about"): dicom.report(study, b, MODEL)


def test_nothing_to_point_at(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    slices = pd.DataFrame({"path": [str(tmp_path / "notes.txt")], "frame": 0, "used": False, "why": "not DICOM", "score": np.nan})
    with pytest.raises(ValueError, match="no file of this study can be referenced.*notes.txt"):
        dicom.report(RESULT | {"decision": None, "study": None}, slices, MODEL)


def test_whole_or_not_at_all(head, tmp_path, monkeypatch):
    study, slices = prediction(head)
    slices = slices.head(3)
    shown = pictures(slices, 2)
    place, wrong = tmp_path / "out", {key: picture[:-1] if k else picture for k, (key, picture) in enumerate(shown.items())}
    with pytest.raises(ValueError, match=r"the picture is uint8 \(511, 512, 3\)"): dicom.write(place, study, slices, MODEL, wrong)
    with pytest.raises(ValueError, match="no slice of this study"): dicom.write(place, study, slices, MODEL, {("elsewhere", 0): None})
    with monkeypatch.context() as patch:
        def full(self, path, **_): raise OSError("no space left")
        patch.setattr(dicom.SCImage, "save_as", full)
        with pytest.raises(OSError, match="no space"): dicom.write(place, study, slices, MODEL, shown)
    assert not list(tmp_path.iterdir())
    files = dicom.write(place, study, slices, MODEL, shown)
    before = {f: f.read_bytes() for f in place.iterdir()}
    with pytest.raises(FileExistsError, match="Nothing was changed"): dicom.write(place, study, slices, MODEL)
    assert set(before) == set(files) and before == {f: f.read_bytes() for f in place.iterdir()}
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_import_is_light():
    code = "import sys, ctbm.dicom; print([m for m in ('torch', 'timm', 'matplotlib.pyplot', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
