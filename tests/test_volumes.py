"Volumes and masks from every layout and format, and every way in which a mask may not belong to its image."
import json
import shutil
from itertools import permutations, product
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK
from pydicom import dcmread
from pydicom.sr.codedict import codes

from ctbm import cohort, phantom, volumes
from ctbm.volumes import LPS, Volume, describe, differ, find, load, read, read_mask, read_series, write

AFFINE = np.array([[0.9, 0, 0, -20], [0, 0.88, -0.6, 5], [0, 0.19, 2.9, -7], [0, 0, 0, 1.0]])
BOX = (12, 14, 8)


def image(seed=0): return np.random.default_rng(seed).normal(100, 20, BOX).astype(np.float32)


def lesion(value=1):
    mask = np.zeros(BOX, np.uint8)
    mask[3:6, 4:8, 2:5] = value
    return mask


def pair(image_path, mask_path, seed=0, mask=None, affine=AFFINE):
    for path in (image_path, mask_path): path.parent.mkdir(parents=True, exist_ok=True)
    write(image_path, image(seed), AFFINE)
    write(mask_path, lesion() if mask is None else mask, affine)


@pytest.fixture(scope="module")
def tilted(tmp_path_factory):
    "Five slices of two synthetic patients, the first with a lesion and a tilted gantry, as `phantom.make_cohort` lays them out."
    folder = tmp_path_factory.mktemp("tilted")
    (folder / "masks").mkdir()
    truth = []
    for index, ill in ((0, True), (1, False)):
        patient = phantom.Patient(2, index, "easy")
        centre = np.abs(patient.positions_mm - patient.table_mm(patient.lesions[0].centre_mm)).argmin()
        numbers, header, masks, names = range(centre - 2, centre + 3), phantom.study_header(patient), [], []
        (folder / "CTs" / patient.id).mkdir(parents=True)
        for k in numbers:
            hu, mask = patient.render(patient.positions_mm[k], ill)
            names.append(phantom.slice_id(patient, k))
            phantom.write_dicom(phantom.image_dataset(header, patient, k, hu), folder / "CTs" / patient.id / f"{names[-1]}.dcm", "jpegls")
            truth.append({"ID": names[-1], "Label": int(mask.any()), "PatientID": patient.id})
            masks.append(mask)
        np.savez_compressed(folder / "masks" / f"{patient.id}.npz", ids=names, mask=masks,
                            affine=[phantom.slice_affine(patient, patient.positions_mm[k]) for k in numbers])
    pd.DataFrame(truth).to_csv(folder / "labels1.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def drawn(tilted):
    "The slices, the volume and the mask of a patient with lesions."
    table = cohort.scan(tilted / "CTs")
    for patient, slices in table.groupby("patient"):
        volume = read_series(slices)
        mask = read_mask(tilted / "masks" / f"{patient}.npz", volume, slices=slices)
        if mask.any(): return slices, volume, mask
    raise AssertionError("no patient with a lesion")


def segmentation(slices, pixels, kind="BINARY", segments=1, **kwargs):
    tissue = [highdicom.seg.SegmentDescription(k + 1, f"lesion {k + 1}", codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Metastasis,
                                               "MANUAL") for k in range(segments)]
    files = [dcmread(path) for path in volumes.in_order(slices)["path"]]
    return highdicom.seg.Segmentation(files, pixels, kind, tissue, highdicom.UID(), 1, highdicom.UID(), 1, "-", "-", "-", "-", **kwargs)


def test_real_nrrd(data, tmp_path):
    "Two real tumours: read as ITK reads them, found as pairs, and what is written overlays the input for both readers."
    folder = data / "mri_tumour_label"
    table = find(folder)
    assert table.attrs["layout"] == "images and masks by the end of their names" and table["case"].tolist() == ["brain1", "brain2"]
    assert table["problem"].isna().all() and table["label"].tolist() == [1, 1] and table["shape"][0] == "256x256x25"
    assert np.allclose(table["tumour_ml"], [16.4127, 1.7972], atol=1e-3) and table["sha"].nunique() == 2
    volume, mask = load(table.iloc[0])
    itk = SimpleITK.ReadImage(str(folder / "brain1_image.nrrd"))
    assert np.array_equal(volume.array, SimpleITK.GetArrayFromImage(itk).T)
    label = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "brain1_label.nrrd")))
    path = write(tmp_path / "mask.nii.gz", mask, volume.affine)
    back, ours = SimpleITK.ReadImage(str(path)), nibabel.load(path)
    assert np.array_equal(SimpleITK.GetArrayFromImage(back), label > 0) and np.array_equal(np.asarray(ours.dataobj), mask)
    assert ours.get_data_dtype() == np.uint8 and np.allclose(ours.affine, volume.affine, atol=1e-4)
    for index in [(0, 0, 0), (255, 0, 3), (100, 31, 24)]:
        there = itk.TransformIndexToPhysicalPoint(index)
        assert np.allclose(back.TransformIndexToPhysicalPoint(index), there, atol=1e-3)
        assert np.allclose((LPS @ volume.affine @ [*index, 1])[:3], there, atol=1e-9)


def test_real_nifti(data):
    "Patterns name what no layout knows; what nothing names is an error that lists what was looked for."
    folder = data / "nifti_ct"
    table = find(folder, images="*_ct_sm.nii.gz", masks="*_seg.nii.gz")
    assert table["case"].tolist() == ["example"] and table["label"].tolist() == [1] and table["dx_mm"].tolist() == [3]
    with pytest.raises(ValueError, match="no volumes with masks.*BIDS.*example_ct_sm.*by patterns"): find(folder)
    volume = read(folder / "scct.nii")
    assert volume.spacing_mm == (2, 2, 2) and np.array_equal(volume.affine, nibabel.load(folder / "scct.nii").affine)
    with pytest.raises(ValueError, match=r"shape 122 x 101 x 30, the image's 202 x 202 x 179; spacing 3 3 3 mm, the image's 1 1 1 mm; or"):
        read_mask(folder / "example_seg.nii.gz", read(folder / "ct_brain_atlas_1mm.nii.gz"))


def test_real_series(data):
    "A real series of even slices is a volume; uneven and incomplete ones say where."
    volume = read_series(cohort.scan(data / "phantom_philips_brain5mm"))
    assert volume.array.shape == (512, 512, 8) and np.allclose(volume.spacing_mm, (0.451, 0.451, 5), atol=1e-3)
    assert volume.array.flags.f_contiguous and volume.array.min() >= -1024
    for folder, says in {"headct_ge_hispeed_tilt18p5": "slices 24 and 25 of 28 lie 7.38 mm apart and most 4.22 mm",
                         "pydicom_ct/tiny_head_CT2": "lie 202.50 mm apart"}.items():
        with pytest.raises(ValueError, match=says): read_series(cohort.scan(data / folder))
    said = []
    for _, slices in cohort.images(cohort.scan(data / "geometry_headers_dicom2nifti")).groupby("series"):
        try: said.append(np.round(np.degrees(np.arctan(read_series(slices).affine[2, 1] / read_series(slices).affine[1, 1]))))
        except ValueError as error: said.append(str(error).split("as if ")[1][:16])
    assert sorted(map(str, said)) == ["1 were missing; ", "1 were missing; ", "14.0"]


def test_every_order_of_axes(tmp_path):
    "A mask in any of the 48 orders and directions of its axes lies on the same voxels."
    like = Volume(image(), AFFINE)
    mask = np.random.default_rng(1).integers(0, 3, BOX).astype(np.uint8)
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        turn = np.column_stack([axes, signs])
        turned = nibabel.orientations.apply_orientation(mask, turn)
        path = write(tmp_path / "mask.nii.gz", turned, AFFINE @ nibabel.orientations.inv_ornt_aff(turn, mask.shape))
        assert np.array_equal(read_mask(path, like), mask > 0)
        assert np.array_equal(read_mask(path, like, labels=(2,)), mask == 2)


def test_geometry_that_differs(tmp_path):
    "Spacing, orientation, shape and place are told apart, each with both values, and rounding is let pass."
    like, path = Volume(image(), AFFINE), tmp_path / "mask.nii.gz"
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    moved = AFFINE.copy()
    moved[0, 3] += 0.4
    wrong = {"spacing 1.8 0.9003 2.961 mm, the image's 0.9 0.9003 2.961 mm": (lesion(), AFFINE @ np.diag([2, 1, 1, 1])),
             r"orientation \w+, the image's \w+, \d\.\d degrees apart": (lesion(), turn @ AFFINE),
             "shape 12 x 14 x 7, the image's 12 x 14 x 8": (lesion()[..., :7], AFFINE),
             r"origin -19\.6 5 -7 mm, the image's -20 5 -7 mm": (lesion(), moved)}
    for says, (mask, affine) in wrong.items():
        with pytest.raises(ValueError, match=f"mask.nii.gz does not lie on its image: .*{says}.*Resample it"):
            read_mask(write(path, mask, affine), like)
    barely = AFFINE + np.diag([1e-5, 0, 0, 0])
    barely[:3, 3] += 1e-3
    assert not differ(like, Volume(lesion(), barely)) and np.array_equal(read_mask(write(path, lesion(), barely), like), lesion())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_formats(tmp_path, suffix):
    "The same volume from every format that holds one."
    affine = np.array([[-0.9, 0, 0, 20], [0, 0, 2.5, 5], [0, -0.8, 0, 7], [0, 0, 0, 1.0]])
    if suffix.startswith(".nii"): nibabel.save(nibabel.Nifti1Image(image(), affine), tmp_path / f"v{suffix}")
    else:
        stored, lps = SimpleITK.GetImageFromArray(image().T), LPS @ affine
        stored.SetSpacing((0.9, 0.8, 2.5))
        stored.SetDirection((lps[:3, :3] / (0.9, 0.8, 2.5)).ravel().tolist())
        stored.SetOrigin(lps[:3, 3].tolist())
        SimpleITK.WriteImage(stored, tmp_path / f"v{suffix}")
    volume = read(tmp_path / f"v{suffix}")
    assert np.array_equal(volume.array, image()) and np.allclose(volume.affine, affine, atol=1e-5) and volume.array.dtype == np.float32


def test_files_that_are_no_volume(tmp_path):
    "Each is named, and said what it is."
    save = lambda name, array: nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name)
    save("time.nii.gz", np.zeros((3, 3, 3, 5), np.int16))
    save("flat.nii", np.zeros((9, 9), np.int16))
    save("colour.nii", np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save("none.nii", np.zeros((0, 3, 3), np.int16))
    save("folded.nii", image())
    folded = nibabel.Nifti1Image(image(), None)
    folded.set_sform(np.diag([1, 1, 0, 1.0]), 1)
    nibabel.save(folded, tmp_path / "folded.nii")
    metres = nibabel.Nifti1Image(image(), np.eye(4))
    metres.header.set_xyzt_units("micron")
    nibabel.save(metres, tmp_path / "micron.nii")
    whole = write(tmp_path / "whole.nii.gz", image(), AFFINE).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    nibabel.save(nibabel.Nifti1Image(image(), AFFINE), tmp_path / "short.nii")
    (tmp_path / "short.nii").write_bytes((tmp_path / "short.nii").read_bytes()[:2000])
    (tmp_path / "text.mha").write_text("ObjectType = Image\n")
    (tmp_path / "zero.nrrd").touch()
    SimpleITK.WriteImage(SimpleITK.Image([4, 4, 4], SimpleITK.sitkVectorUInt8, 3), tmp_path / "rgb.nrrd")
    SimpleITK.WriteImage(SimpleITK.Image([4, 4], SimpleITK.sitkUInt8), tmp_path / "slice.mha")
    says = {"time.nii.gz": "4 axes, 3 x 3 x 3 x 5", "flat.nii": "2 axes", "colour.nii": "colours", "none.nii": "empty",
            "folded.nii": "affine", "micron.nii": "micron", "cut.nii.gz": "cut short", "short.nii": "cut short",
            "text.mha": "damaged", "zero.nrrd": "damaged", "rgb.nrrd": "3 values a voxel", "slice.mha": "2 axes", "name.png": "in none"}
    (tmp_path / "name.png").touch()
    for name, what in says.items():
        with pytest.raises(ValueError, match=f"{name}.*{what}"): read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere.nii"): read(tmp_path / "nowhere.nii")
    with pytest.raises(ValueError, match="written as .nii.gz"): write(tmp_path / "x.nrrd", image(), AFFINE)


def test_what_masks_hold(tmp_path):
    "More labels are one, or those that are named; probabilities, holes, negative numbers and images are refused; empty is empty."
    like, path = Volume(image(), AFFINE), tmp_path / "m.nii.gz"
    several = lesion() + 2 * np.roll(lesion(), 5, axis=0)
    assert np.array_equal(read_mask(write(path, several, AFFINE), like), several > 0)
    assert np.array_equal(read_mask(path, like, (2, 7)), several == 2)
    assert not read_mask(write(path, lesion(0), AFFINE), like).any()
    noise = np.random.default_rng(0).integers(0, 900, BOX).astype(np.int16)
    for says, mask in {"fractions": lesion() * np.float32(0.3), "no number": np.where(lesion(), np.nan, 0).astype(np.float32),
                       "negative": lesion().astype(np.int16) * -1, "different numbers": noise}.items():
        with pytest.raises(ValueError, match=f"m.nii.gz holds .*{says}"): read_mask(write(path, mask, AFFINE), like)
    assert read_mask(path, like, (5,)).sum() == (noise == 5).sum()  # the numbers of an atlas may be named


def test_sheared_files(tmp_path, drawn):
    "The affine of a tilted series survives; ITK, which knows no shear, refuses such a file instead of misplacing it."
    _, volume, mask = drawn
    path = write(tmp_path / "sheared.nii.gz", mask, volume.affine)
    assert np.array_equal(read_mask(path, volume), mask)
    with pytest.raises(RuntimeError, match="orthonormal"): SimpleITK.ReadImage(str(path))
    assert not list(tmp_path.glob(".*"))


def test_dicom_seg(tmp_path, drawn):
    "By reference and by position, one segment or several, few slices or all; what does not fit is refused."
    slices, volume, mask = drawn
    read_one = lambda seg, **kwargs: (seg.save_as(tmp_path / "s.dcm"), read_mask(tmp_path / "s.dcm", volume, **kwargs))[1]
    for omit in (True, False):
        seg = segmentation(slices, mask.T, omit_empty_frames=omit)
        for given in (slices, slices.sample(frac=1, random_state=0), None): assert np.array_equal(read_one(seg, slices=given), mask)
    second = np.roll(mask, 20, axis=0)
    seg = segmentation(slices, np.stack([mask.T, second.T], -1), segments=2)
    for given in (slices, None):
        assert np.array_equal(read_one(seg, slices=given), mask | second)
        assert np.array_equal(read_one(seg, slices=given, labels=(2,)), second) and not read_one(seg, slices=given, labels=(9,)).any()
    part = slices[slices["position_mm"] < slices["position_mm"].max()]
    with pytest.raises(ValueError, match="lies outside the image"): read_mask(tmp_path / "s.dcm", read_series(part), slices=part)
    seg = segmentation(slices, mask.T * np.float32(0.4), "FRACTIONAL", fractional_type="PROBABILITY")
    for given in (slices, None):
        with pytest.raises(ValueError, match="s.dcm holds fractions"): read_one(seg, slices=given)
    with pytest.raises(ValueError, match="no DICOM SEG but CT"): read_mask(slices["path"].iloc[0], volume)
    (tmp_path / "x.dcm").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x.dcm is no DICOM SEG|x.dcm cannot be read"): read_mask(tmp_path / "x.dcm", volume)


def test_seg_of_a_nifti(tmp_path, drawn):
    "A SEG drawn on a series finds its place on the same volume as NIfTI, and none on another."
    slices, volume, mask = drawn
    segmentation(slices, mask.T).save_as(tmp_path / "s.dcm")
    write(tmp_path / "v.nii.gz", volume.array, volume.affine)
    assert np.array_equal(read_mask(tmp_path / "s.dcm", read(tmp_path / "v.nii.gz")), mask)
    sparser = Volume(volume.array, volume.affine @ np.diag([1, 1, 2, 1]))
    with pytest.raises(ValueError, match="lies outside|has "): read_mask(tmp_path / "s.dcm", sparser)


def test_synthetic_series(tilted, drawn, tmp_path):
    "Series with masks by patient; a negative one is empty; a mask of other slices is refused."
    table = find(tilted)
    slices, volume, mask = drawn
    assert table.attrs["layout"] == "CT series in CTs" and table["problem"].isna().all() and sorted(table["label"]) == [0, 1]
    truth = pd.read_csv(tilted / "labels1.csv").groupby("PatientID")["Label"].max()
    assert table.set_index("patient")["label"].to_dict() == truth.to_dict()
    row = table[table["label"] == 1].iloc[0]
    again, found = load(row)
    assert np.array_equal(again.array, volume.array) and np.array_equal(found, mask)
    assert row["tumour_ml"] == pytest.approx(mask.sum() * abs(np.linalg.det(volume.affine[:3, :3])) / 1000)
    other = tilted / "masks" / f"{table[table['label'] == 0].iloc[0]['patient']}.npz"
    with pytest.raises(ValueError, match="holds 5 of the 5 slices not"): read_mask(other, volume, slices=slices)
    with pytest.raises(ValueError, match="belongs to a DICOM series"): read_mask(other, volume)
    with np.load(tilted / "masks" / f"{row['patient']}.npz") as stored: shifted = dict(stored)
    shifted["affine"][:, 2, 3] += 3
    np.savez(tmp_path / "shifted.npz", **shifted)
    with pytest.raises(ValueError, match=r"lies 3\.00 mm from"): read_mask(tmp_path / "shifted.npz", volume, slices=slices)


def test_masks_of_series(tilted, drawn, tmp_path):
    "By the patient's name as NIfTI, by the series' UID, by what a SEG refers to; two masks, or a label without one, are problems."
    slices, volume, mask = drawn
    patient = slices["patient"].iloc[0]
    shutil.copytree(tilted / "CTs", tmp_path / "scans")
    shutil.copy(tilted / "labels1.csv", tmp_path / "truth.csv")
    given = dict(series="scans", labels="truth.csv", masks="drawn")
    row = lambda **more: find(tmp_path, **given | more).set_index("patient").loc[patient]
    other = find(tmp_path, **given).set_index("patient").drop(patient).iloc[0]
    assert row()["problem"] == "no mask: the label says 1 and nothing is drawn" and other["problem"] is None
    assert other["label"] == 0 and other["mask"] is None and other["tumour_ml"] == 0 and not load(other)[1].any()
    flipped = volume.affine @ np.array([[1, 0, 0, 0], [0, -1, 0, 511], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    (tmp_path / "drawn").mkdir()
    by_name = write(tmp_path / "drawn" / f"{patient}_mask.nii.gz", mask[:, ::-1], flipped)
    assert row()["problem"] is None and np.array_equal(load(row())[1], mask)
    by_name.unlink()
    segmentation(slices, mask.T).save_as(tmp_path / "drawn" / "any name.dcm")
    assert row()["problem"] is None and np.array_equal(load(row())[1], mask)
    shutil.move(tmp_path / "drawn" / "any name.dcm", tmp_path / "scans" / "seg.dcm")
    assert row()["problem"] is None and np.array_equal(load(row())[1], mask)
    (tmp_path / "scans" / "seg.dcm").unlink()
    write(tmp_path / "drawn" / f"{slices['series'].iloc[0]}.nii.gz", mask, volume.affine)
    assert row()["problem"] is None and row()["tumour_ml"] > 0
    (tmp_path / "drawn" / patient).mkdir()
    write(tmp_path / "drawn" / f"{slices['series'].iloc[0]}_seg.nii.gz", mask, volume.affine)
    assert row()["problem"].startswith("2 masks: ")


def test_two_series_of_a_patient(tilted, drawn, tmp_path):
    "Each is a case of its own; a mask that names the patient alone is nobody's, planes by name know their series."
    slices, volume, mask = drawn
    patient, uid = slices["patient"].iloc[0], highdicom.UID()
    (tmp_path / "CTs").mkdir()
    for path in slices["path"]:
        shutil.copy(path, tmp_path / "CTs")
        other = dcmread(path)
        other.SeriesInstanceUID, other.SOPInstanceUID = uid, highdicom.UID()
        other.save_as(tmp_path / "CTs" / f"second {Path(path).name}")
    (tmp_path / "masks").mkdir()
    by_name = write(tmp_path / "masks" / f"{patient}.nii.gz", mask, volume.affine)
    table = find(tmp_path)
    assert table["patient"].tolist() == [patient] * 2 and table["case"].is_unique and table["series"].nunique() == 2
    assert table["problem"].str.contains("named by patient, which has 2 series").all()
    by_name.rename(tmp_path / "masks" / f"{uid}.nii.gz")
    table = find(tmp_path).set_index("series", drop=False)
    assert table.loc[uid, "problem"] is None and table["problem"].drop(uid).iloc[0] == "no mask"
    assert np.array_equal(load(table.loc[uid])[1], mask)  # one folder holds both series
    (tmp_path / "masks" / f"{uid}.nii.gz").unlink()
    shutil.copy(tilted / "masks" / f"{patient}.npz", tmp_path / "masks")
    table = find(tmp_path).set_index("series", drop=False)
    assert "5 of the 5 slices not" in table.loc[uid, "problem"] and table["problem"].drop(uid).isna().all()


def test_slices_of_a_flat_cohort(tilted, tmp_path):
    "Two slices of a patient are no volume, and say so."
    (tmp_path / "CTs").mkdir()
    for folder in (tilted / "CTs").iterdir():
        for path in sorted(folder.iterdir())[:2]: shutil.copy(path, tmp_path / "CTs")
    table = find(tmp_path)
    assert len(table) == 2 and table["problem"].str.contains("2 usable slices: a volume needs 3").all()
    assert "0 usable, 2 with a problem" in describe(table)


def test_decathlon(tmp_path):
    "Lists by name and by habit, absolute paths of another machine, a case in both lists, a broken file among good ones."
    for k in range(3): pair(tmp_path / "imagesTr" / f"t_{k}.nii.gz", tmp_path / "labelsTr" / f"t_{k}.nii.gz", k, lesion(k))
    (tmp_path / "imagesTs").mkdir()
    write(tmp_path / "imagesTs" / "t_9.nii.gz", image(9), AFFINE)
    entry = lambda k, where="./": {"image": f"{where}imagesTr/t_{k}.nii.gz", "label": f"{where}labelsTr/t_{k}.nii.gz"}
    content = {"name": "t", "training": [entry(0), entry(1, "/cluster/home/somebody/data/")], "validation": [entry(2), entry(1), entry(7)],
               "test": ["./imagesTs/t_9.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    table = find(tmp_path)
    assert table.attrs["layout"] == "Decathlon list dataset.json"
    assert table["given"].tolist() == ["training"] * 2 + ["validation"] * 3 + ["test"]
    assert table["label"].tolist()[:3] == [0, 1, 1] and table["problem"].isna().tolist() == [True] * 3 + [False] * 3
    assert table["problem"][3] == "listed twice: in training and in validation" and "no file" in table["problem"][4]
    assert table["problem"][5] == "no mask" and table["case"].is_unique and table["patient"][3] == table["patient"][1]
    (tmp_path / "dataset.json").rename(tmp_path / "dataset_1.json")
    named = [find(tmp_path, datalist="dataset_1.json"), find(tmp_path / "dataset_1.json")]
    assert all(each.drop(columns="sha").equals(named[0].drop(columns="sha")) for each in named)
    (tmp_path / "split_0.json").write_text(json.dumps({"validation": [entry(2)]}))
    assert find(tmp_path, datalist="split_0.json")["given"].tolist() == ["validation"]
    for text, says in {"{": "is not JSON", "{}": "no list of training", '{"training": [3]}': "each entry names one image"}.items():
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=says): find(tmp_path, datalist="bad.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"): find(tmp_path, datalist="none.json")
    by_name = find(tmp_path)
    assert by_name.attrs["layout"] == "Decathlon folders" and len(by_name) == 3 and by_name.attrs["unused"] == ["imagesTs/t_9.nii.gz"]
    assert "1 other files of volumes lie there and are not used, as imagesTs/t_9.nii.gz" in describe(by_name)


LAYOUTS = {
    "nnU-Net folders": ("imagesTr/case_{}_0000.nii.gz", "labelsTr/case_{}.nii.gz", "case_{}"),
    "published folders, bias corrected": ("NSCLC/ID{}/reg_img_cropped_bias_correc.nii.gz", "NSCLC/ID{}/reg_mask_cropped_corrected.nii.gz",
                                          "NSCLC_ID{}"),
    "images and masks in two folders": ("images/s{}.nii.gz", "masks/s{}.nii.gz", "s{}"),
    "images and masks by the end of their names": ("P{}/x-T1c.nii.gz", "P{}/x-seg.nii.gz", "P{}_x"),
    "a folder for each patient": ("P{}/image.nii.gz", "P{}/mask.nii.gz", "P{}"),
    "BIDS": ("sub-0{}/anat/sub-0{}_ce-gd_T1w.nii.gz", "derivatives/manual/sub-0{}/anat/sub-0{}_label-lesion_mask.nii.gz", "sub-0{}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    "Recognised by itself, with the patient's name, and what lacks its half is said."
    where, mask, case = LAYOUTS[layout]
    named = lambda pattern, k: tmp_path / pattern.replace("{}", str(k))
    for k in (1, 2): pair(named(where, k), named(mask, k), k)
    pair(named(where, 3), named(mask, 3), 3)
    named(mask, 3).unlink()
    pair(named(where, 4), named(mask, 4), 4)
    named(where, 4).unlink()
    table = find(tmp_path).set_index("case", drop=False)
    assert find(tmp_path).attrs["layout"] == layout and sorted(table["case"]) == [case.replace("{}", str(k)) for k in (1, 2, 3, 4)]
    assert table["patient"].tolist() == table["case"].tolist() and table["problem"].isna().sum() == 2
    assert table["problem"].iloc[2] == "no mask" and table["problem"].iloc[3].startswith("no image: ")


def test_bids_sessions(tmp_path):
    "Sessions are volumes of one patient; brain masks are no tumours; several images are a question to the user."
    for session in (1, 2):
        stem = f"sub-7_ses-{session}"
        where, masks = tmp_path / "sub-7" / f"ses-{session}" / "anat", tmp_path / "derivatives" / "x"
        pair(where / f"{stem}_T1w.nii.gz", masks / f"{stem}_dseg.nii.gz", session)
        write(masks / f"{stem}_desc-brain_mask.nii.gz", lesion(), AFFINE)
    table = find(tmp_path)
    assert table["case"].tolist() == ["sub-7_ses-1", "sub-7_ses-2"] and set(table["patient"]) == {"sub-7"} and table["problem"].isna().all()
    write(tmp_path / "sub-7" / "ses-2" / "anat" / "sub-7_ses-2_FLAIR.nii.gz", image(5), AFFINE)
    assert find(tmp_path)["problem"][1].startswith("2 images: ") and find(tmp_path, images="**/*_T1w")["problem"].isna().all()
    (tmp_path / "labels.csv").write_text("PatientID,Label\n7,1\n")
    assert find(tmp_path, images="**/*_T1w", labels="labels.csv")["label"].tolist() == [1, 1]


def test_table_of_volumes(tmp_path, tilted):
    "A CSV names images, masks, patients and labels; what was found can be written and found again."
    pair(tmp_path / "a.nii.gz", tmp_path / "m.nii.gz", 1, lesion(2))
    write(tmp_path / "b.nii.gz", image(2), AFFINE)
    scan = next((tilted / "CTs").iterdir())
    mask = tilted / "masks" / f"{scan.name}.npz"
    rows = ["a.nii.gz;m.nii.gz;P1;;1 2;training", "b.nii.gz;;P1;0;;test", f"{scan};{mask};P2;;;", "no.nii;;P3;;;", ";;P4;;;"]
    (tmp_path / "volumes.csv").write_text("\n".join(["Image;Mask;Patient;Label;Mask_labels;Given", *rows]))
    table = find(tmp_path)
    assert table.attrs["layout"] == "table volumes.csv" and table["patient"].tolist() == ["P1", "P1", "P2", "P3", "P4"]
    assert table["kind"].tolist() == ["file", "file", "series", "file", "file"] and table["label"].tolist()[:2] == [1, 0]
    assert table["problem"].isna().tolist() == [True] * 3 + [False] * 2 and table["given"].tolist()[:2] == ["training", "test"]
    assert np.array_equal(load(table.iloc[0])[1], lesion()) and not load(table.iloc[1])[1].any() and load(table.iloc[2])[1].shape[2] == 5
    (tmp_path / "again").mkdir()
    table.drop(index=[3, 4]).to_csv(tmp_path / "again" / "volumes.csv", index=False)
    again = find(tmp_path / "again")
    assert again.drop(columns="mask_labels").equals(table.drop(index=[3, 4]).drop(columns="mask_labels"))
    back = pd.read_csv(tmp_path / "again" / "volumes.csv")  # as a run reads its own table
    assert np.array_equal(load(back.iloc[0])[1], lesion()) and not load(next(back.iloc[1:2].itertuples()))[1].any()
    for text, says in {"a\nx\n": "no column image", "image,label\na.nii.gz,2\n": "must be 0 or 1", "image\n": "no rows",
                       "image,given\na.nii.gz,tset\n": "did you mean 'test'"}.items():
        (tmp_path / "volumes.csv").write_text(text)
        with pytest.raises(ValueError, match=says): find(tmp_path)


def test_labels_and_contradictions(tmp_path):
    "Labels of patients rule; a mask that says otherwise is a problem; a negative needs no mask."
    for name, mask in {"a": lesion(), "b": lesion(), "c": lesion(0), "d": np.ones(BOX, np.uint8), "e": lesion(0)}.items():
        pair(tmp_path / f"{name}_image.nii.gz", tmp_path / f"{name}_mask.nii.gz", ord(name), mask)
    for name in "fg": write(tmp_path / f"{name}_image.nii.gz", image(ord(name)), AFFINE)
    (tmp_path / "labels1.csv").write_text("PatientID,Label\na,1\nb,0\nc,1\nf,0\n")
    table = find(tmp_path).set_index("case", drop=False)
    assert table["label"].tolist() == [1, 0, 1, 1, 0, 0, pd.NA]
    assert table["problem"].isna().tolist() == [True, False, False, False, True, True, False]
    assert "says 0 and the mask holds 36" in table["problem"]["b"] and "mask is empty" in table["problem"]["c"]
    assert "fills 100%" in table["problem"]["d"] and table["problem"]["g"] == "no mask" and not load(table.loc["f"])[1].any()
    assert load(table.loc["g"])[1] is None
    (tmp_path / "labels1.csv").write_text("PatientID,Label\nelsewhere,1\n")
    with pytest.raises(ValueError, match="no row names a volume"): find(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.csv"): find(tmp_path, labels="none.csv")


def test_patients_and_names(tmp_path):
    "Patients by an expression; names safe for files and different in more than capitals; files of the same bytes share a hash."
    for name in ("P1/v1", "P1/v2", "p1/v1", "P ü/v1"): pair(tmp_path / name / "image.nii.gz", tmp_path / name / "mask.nii.gz")
    table = find(tmp_path, patient=r"^([^/]+)/")
    assert sorted(table["patient"]) == ["P ü", "P1", "P1", "p1"] and table["case"].str.casefold().is_unique
    assert table["case"].str.fullmatch(r"[A-Za-z0-9._-]+").all() and table["sha"].nunique() == 1
    assert "4 images are not alone" in describe(table)
    with pytest.raises(ValueError, match="finds no group"): find(tmp_path, patient="[0-9]+")
    assert find(tmp_path, mask_labels=(3,))["label"].tolist() == [0] * 4


def test_one_bad_file_among_many(tmp_path):
    "In several processes, each fault is the problem of its row, in the order of the files."
    for k in range(volumes.WORTH_PROCESSES): pair(tmp_path / f"{k:02}_image.nii.gz", tmp_path / f"{k:02}_mask.nii.gz", k)
    (tmp_path / "03_image.nii.gz").write_bytes(b"cut")
    write(tmp_path / "05_image.nii.gz", np.full(BOX, np.nan, np.float32), AFFINE)
    holes = image()
    holes[0, 0, :2] = np.nan, np.inf
    write(tmp_path / "07_image.nii.gz", holes, AFFINE)
    table = find(tmp_path, jobs=2)
    assert table["case"].tolist() == [f"{k:02}" for k in range(volumes.WORTH_PROCESSES)] and table["problem"].notna().sum() == 2
    assert "damaged" in table["problem"][3] and table["problem"][5] == "no voxel of the image is a number" and table["nan_voxels"][7] == 2
    volume, mask = load(table.iloc[7])
    finite = holes[np.isfinite(holes)]
    assert np.isfinite(volume.array).all() and (volume.array[0, 0, :2] == finite.min()).all() and np.array_equal(mask, lesion())
    said = describe(table)
    assert "12 volumes of 12 patients, 10 usable, 2 with a problem" in said and "no number in 2" in said


def test_folds_for_other_tools(tmp_path, tilted):
    "Both lists in every fold, a patient on one side, masks that any tool reads."
    for k in range(4): pair(tmp_path / "a" / f"{k}_image.nii.gz", tmp_path / "a" / f"{k}_mask.nii.gz", k)
    table = pd.concat([find(tmp_path / "a"), find(tilted)], ignore_index=True).assign(fold=[0, 1, 1, -1, 0, 1])
    paths = volumes.write_datalists(tmp_path / "folds", table)
    assert [path.name for path in paths] == ["split_0.json", "split_1.json", "dataset.json"]
    splits = [json.loads(path.read_text()) for path in paths]
    sides = [{given: {entry["case"] for entry in split[given]} for given in ("training", "validation")} for split in splits[:2]]
    assert sides[0]["training"] == sides[1]["validation"] and not sides[0]["training"] & sides[0]["validation"]
    assert len(splits[2]["training"]) == 5 and [entry["case"] for entry in splits[2]["test"]] == ["3"] and splits[2]["numTraining"] == 5
    for entry in splits[2]["training"]:
        assert Path(entry["image"]).is_absolute() and np.isin(read(entry["label"]).array, (0, 1)).all()
    again = find(tmp_path / "folds")
    assert again["problem"].isna().all() and again["tumour_ml"].sum() == pytest.approx(table["tumour_ml"].sum())
    with pytest.raises(ValueError, match="patient X stands in 3 folds"): volumes.write_datalists(tmp_path, table.assign(patient="X"))
