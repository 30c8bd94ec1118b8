"Volumes as a network sees them, and the patches that it is taught on."
from dataclasses import replace

import numpy as np
import pytest
import torch

from ctbm import patches, volumes, volumetric
from ctbm.patches import PatchDataset, Patches
from ctbm.volumes import Volume
from ctbm.volumetric import Volumetric

SHARP = np.diag([2.0, 2, 2, 1])
PLAIN = Volumetric(bias=False, spacing_mm=None)


def blob(shape, centre, radius) -> np.ndarray:
    return np.linalg.norm(np.indices(shape) - np.reshape(centre, (3, 1, 1, 1)), axis=0) < radius


def head(shape=(40, 36, 32), seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(100, 5, shape)
    return np.where(blob(shape, np.array(shape) / 2, min(shape) * 0.45), noise, 0).astype(np.float32)


def middle(mask, affine) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(mask > 0).mean(axis=0) + affine[:3, 3]


@pytest.fixture
def folder(tmp_path):
    "Three volumes: two with a tumour, one with an empty mask."
    for k, name in enumerate(("anna", "bert", "carl")):
        mask = blob((40, 36, 32), (20, 18 - 3 * k, 16), 4 * (k < 2)).astype(np.uint8)
        volumes.write(tmp_path / f"{name}_image.nii.gz", head(seed=k) + 60 * mask, SHARP)
        volumes.write(tmp_path / f"{name}_label.nii.gz", mask, SHARP)
    return tmp_path


@pytest.fixture
def files(folder):
    return volumetric.build(volumes.find(folder), PLAIN, folder / "prepared", jobs=1).file.tolist()


TILT = np.array([[-1, 0, 0, 20], [0, -1, 1.2, 15], [0, 0.05, 5, -40], [0, 0, 0, 1.0]])
TURNED = np.array([[0, 0, 3.0, 5], [-1.5, 0, 0, 7], [0, 1.0, 0, 9], [0, 0, 0, 1]])


@pytest.mark.parametrize("affine", [SHARP, TILT, TURNED, np.diag([-0.7, 0.7, 6, 1])], ids=["plain", "tilt", "turned", "flat"])
@pytest.mark.parametrize("spacing", [(1.0, 1, 1), (2.0, 2, 3), None])
def test_a_lesion_stays_where_it_is(affine, spacing):
    mask = blob((40, 36, 32), (16, 20, 14), 7).astype(np.uint8)
    prepared = volumetric.prepare(Volume(head(), affine), mask, replace(PLAIN, spacing_mm=spacing), "mr")
    straight, mm = volumetric.plumb(prepared.affine)
    assert straight and (spacing is None or np.allclose(mm, spacing)) and prepared.source_shape == (40, 36, 32)
    assert (np.diag(prepared.affine)[:3] > 0).all(), "to the right, forward, up"
    assert np.linalg.norm(middle(mask, affine) - middle(prepared.mask, prepared.affine)) < 0.5 * max(volumetric.plumb(affine)[1])
    back = volumetric.restore(prepared.mask.astype(np.float32), prepared)
    assert back.shape == mask.shape and back.min() >= 0 and back.max() <= 1 + 1e-5
    assert 2 * ((back > 0.5) & (mask > 0)).sum() / ((back > 0.5).sum() + mask.sum()) > (0.9 if spacing != (2.0, 2, 3) else 0.8)


def test_own_grid_without_shear_is_untouched():
    image, mask = head(), blob((40, 36, 32), (16, 20, 14), 7).astype(np.uint8)
    prepared = volumetric.prepare(Volume(image, SHARP), mask, replace(PLAIN, crop=False), "mr")
    assert np.array_equal(prepared.affine, SHARP) and np.array_equal(prepared.mask, mask)
    assert np.array_equal(volumetric.restore(prepared.mask.astype(np.float32), prepared) > 0.5, mask > 0)
    cropped = volumetric.prepare(Volume(image, SHARP), mask, PLAIN, "mr")
    assert cropped.image.shape < prepared.image.shape and cropped.image.sum() == pytest.approx(prepared.image.sum(), rel=1e-5)


def test_real_tumours(data):
    table = volumes.find(data / "mri_tumour_label")
    for _, row in table.iterrows():
        volume, mask = volumes.load(row)
        prepared = volumetric.prepare(volume, mask, Volumetric(bias=False), "mr")
        assert prepared.mask.sum() / 1000 == pytest.approx(row.tumour_ml, rel=0.05), "ml, since a voxel is 1 mm3"
        assert prepared.image.min() == 0 and prepared.image[0][prepared.mask > 0].mean() > np.median(prepared.image[prepared.image > 0])
        back = volumetric.restore(prepared.mask.astype(np.float32), prepared) > 0.5
        assert 2 * (back & (mask > 0)).sum() / (back.sum() + mask.sum()) > 0.95


def test_real_ct(data):
    volume = volumes.read(data / "nifti_ct" / "example_ct_sm.nii.gz")
    with pytest.raises(ValueError, match="looks like CT"): volumetric.prepare(volume, None, Volumetric(bias=False), "mr")
    how = Volumetric(modality="ct", hu_windows=("brain", "subdural"), spacing_mm=(3, 3, 3))
    image = volumetric.prepare(volume, None, how, "ct").image
    assert len(image) == 2 and image.min() == 0 and image.max() == 1 and not np.array_equal(*image)


def test_skull_is_black_where_it_is_not_brain():
    mm = np.linalg.norm(np.indices((90, 90, 20)) * np.reshape((2, 2, 8), (3, 1, 1, 1)) - np.reshape((90, 90, 80), (3, 1, 1, 1)), axis=0)
    volume = Volume(np.select([mm < 66, mm < 74], [35, 1000], -1000).astype(np.float32), np.diag([-2.0, -2, 8, 1]))
    bare, full = (volumetric.prepare(volume, None, Volumetric(skull=skull), "ct") for skull in ("brain", "none"))
    assert full.image.max() == 1 and (bare.image > 0.9).mean() < 0.02 < (full.image > 0.9).mean(), "no bone"
    assert max(bare.mask.shape) < 150 and max(bare.mask.shape) < max(full.mask.shape), "cropped to the brain"
    assert (bare.image > 0.3).sum() == pytest.approx(4 / 3 * np.pi * 66**3, rel=0.15)


def test_build_is_cached_by_content(folder, monkeypatch):
    table = volumes.find(folder)
    table.loc[len(table)] = table.loc[0].to_dict() | {"case": "gone", "image": str(folder / "gone.nii.gz"), "sha": "0" * 32}
    table.loc[len(table)] = table.loc[0].to_dict() | {"case": "twin", "patient": "twin"}
    table.loc[len(table)] = table.loc[0].to_dict() | {"case": "bad", "problem": "no mask"}
    built = volumetric.build(table, PLAIN, folder / "prepared", jobs=1)
    assert built.problem.isna().tolist() == [True, True, True, False, True, False] and "gone.nii.gz" in built.problem[3]
    assert built.problem[5] == "no mask" and built.file[4] == built.file[0] and built.file.nunique() == 3
    monkeypatch.setattr(volumetric, "prepare", lambda *_: pytest.fail("prepared twice"))
    assert volumetric.build(volumes.find(folder), PLAIN, folder / "prepared", jobs=1).file.tolist() == built.file[:3].tolist()
    other = {volumetric.key_of(table.loc[0], how) for how in (PLAIN, replace(PLAIN, bias=True), replace(PLAIN, spacing_mm=(2, 2, 2)))}
    assert len(other) == 3


def test_build_in_processes_says_what_each_met(folder):
    table = volumes.find(folder).head(2).assign(image=[str(folder / "gone_1.nii.gz"), str(folder / "gone_2.nii.gz")], sha=["1", "2"])
    built = volumetric.build(table, PLAIN, folder / "prepared", jobs=2)
    assert all(f"gone_{k}.nii.gz" in problem for k, problem in zip((1, 2), built.problem, strict=True)) and built.file.isna().all()


def test_an_unfinished_volume_is_not_taken_for_one(folder, files, monkeypatch):
    before = {path.name for path in (folder / "prepared").iterdir()}
    def full(file, array): file.write(b"half"); raise OSError("no space left on device")
    monkeypatch.setattr(np, "save", full)
    built = volumetric.build(volumes.find(folder), replace(PLAIN, percentiles=(1, 99)), folder / "prepared", jobs=1)
    assert set(built.problem) == {"no space left on device"} and built.file.isna().all()
    assert {path.name for path in (folder / "prepared").iterdir()} == before, "nothing half-written is left"


@pytest.mark.parametrize("how, said", [({"modality": "ctt"}, "did you mean 'ct'"), ({"intensity": "window"}, "does not fit modality 'mr'"),
                                       ({"skull": "brain"}, "use skull \"none\""), ({"intensity": "zscore"}, "unknown intensity")])
def test_wrong_choices_are_said_at_once(folder, how, said):
    with pytest.raises(ValueError, match=said): volumetric.build(volumes.find(folder), replace(PLAIN, **how), folder / "p", jobs=1)


def test_mixed_and_useless_tables(folder):
    table = volumes.find(folder)
    mixed, flat = table.assign(kind=["file", "series", "file"]), Volume(np.ones((9, 9, 9), np.float32), SHARP)
    with pytest.raises(ValueError, match="mixes files"): volumetric.build(mixed, PLAIN, folder / "p", jobs=1)
    with pytest.raises(ValueError, match="no usable volume"): volumetric.build(table.assign(problem="bad"), PLAIN, folder / "p", jobs=1)
    with pytest.raises(ValueError, match="shows nothing"): volumetric.prepare(flat, None, PLAIN, "mr")


def test_negative_mr_values_are_lifted():
    ours = volumetric.prepare(Volume(head(), SHARP), None, PLAIN, "mr").image
    lifted = volumetric.prepare(Volume(head() - 50, SHARP), None, PLAIN, "mr").image
    assert np.allclose(ours, lifted, atol=1e-4)


CUBE = Patches(patch_size=(16, 16, 16))
KINDS = {"small": Patches(patch_size=(16, 24, 16)), "larger than the volume": Patches(patch_size=(48, 16, 64)),
         "roi": replace(CUBE, roi=True, roi_offset=40), "positive only": replace(CUBE, patches_per_volume=1, negative_weight=0.0)}


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_patches(files, how, recwarn):
    dataset, again = PatchDataset(files, how, seed=3), PatchDataset(files, how, seed=3)
    for i in (0, 2):
        item = dataset[i]
        for name in ("image", "mask"):
            assert item[name].shape == (how.patches_per_volume, 1, *how.patch_size) and item[name].dtype == torch.float32
            assert type(item[name]) is torch.Tensor
        assert set(item["mask"].unique().tolist()) <= {0, 1} and torch.isfinite(item["image"]).all()
        again[1]
        assert torch.equal(item["image"], again[i]["image"]), "whatever was read before"
    assert not dataset[2]["mask"].any() and dataset[2]["image"].any()
    dataset.epoch = 7
    assert not torch.equal(dataset[0]["image"], again[0]["image"])
    assert not torch.equal(PatchDataset(files, how, seed=4)[0]["image"], again[0]["image"])
    assert not recwarn.list, [str(warning.message) for warning in recwarn.list]


def test_weights_decide_what_is_seen(files):
    few = Patches(patch_size=(4, 4, 4), patches_per_volume=40, rotate3_p=0.0)
    items = [PatchDataset(files, replace(few, positive_weight=p, negative_weight=n), 0)[0] for p, n in ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0))]
    seen = [item["mask"].flatten(1).any(1).float().mean() for item in items]
    assert seen[0] == 1 and 0.3 < seen[1] < 0.8 and seen[2] < 0.3


def test_loaders(files):
    dataset = PatchDataset(files, Patches(patch_size=(16, 16, 16), patches_per_volume=2), seed=0)
    loader = patches.train_loader(dataset, 2, workers=2, seed=5)
    def epoch(loader, number):
        loader.sampler.set_epoch(number)
        return [batch["image"] for batch in loader]
    first, second, alone = epoch(loader, 0), epoch(loader, 1), epoch(patches.train_loader(dataset, 2, seed=5), 0)
    assert [len(batch) for batch in first] == [4, 2] and all(map(torch.equal, first, alone)) and not torch.equal(first[0], second[0])
    assert len({tuple(patches.Order(dataset, 5)) for dataset.epoch in range(8)}) > 1
    for whole, file in zip(patches.scan_loader(files), files, strict=True):
        assert np.array_equal(whole["image"][0].numpy(), volumetric.open_prepared(file).image) and whole["mask"].shape[:2] == (1, 1)
