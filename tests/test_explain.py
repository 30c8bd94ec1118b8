"A run explained: the page and its table, data that is gone, masks that are not there, networks of other kinds, and nothing changed."
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from ctbm import explain, learning, models, patient, runs
from ctbm.bundle import WEIGHTS, rebuilt
from ctbm.preprocess import Preprocess, read_hu


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory) -> Path:
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("explained") / small_run.name))


@pytest.fixture(scope="module")
def done(run) -> Path:
    return explain.write(run, n=4)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)


def test_a_run_gets_a_page_a_table_and_pictures(run, done):
    assert done == run / "explain" and not list(run.glob("*.partial"))
    told, table = runs.read_json(done / "explain.json"), pd.read_csv(done / "explanations.csv")
    tested = table[table.pointing.notna()]
    split = pd.read_parquet(run / "features_df_split.parquet")
    ill = split[(split.fold < 0) & (split.label == 1)]
    assert told["tested"] and told["slices"] == len(ill) == tested.slice_id.nunique()
    assert set(tested.method) == set(told["methods"]) <= set(explain.METHODS)
    assert set(tested.slice_id) == set(ill.slice_id) and len(tested) == len(ill) * len(told["methods"])
    measures = [f"{m}{end}" for m in explain.MEASURES for end in ("", "_random", "_swapped", "_chance")]
    assert tested[measures].notna().all(axis=None) and tested[measures].ge(0).all(axis=None) and tested[measures].le(1).all(axis=None)
    pictures = table.picture.dropna()
    assert len(pictures) == 4 * len(told["methods"]) and all((done / name).is_file() for name in pictures)
    page = (done / "index.html").read_text()
    assert "Can the maps be read as places?" in page and "nothing here was tested" not in page and str(run) not in page


def test_the_area_is_that_of_the_mask_and_the_score_that_of_the_run(run, done):
    table = pd.read_csv(done / "explanations.csv").dropna(subset="pointing")
    truth = pd.read_csv(Path(runs.read_json(run / "manifest.json")["data_root"]) / "truth.csv").set_index("ID")
    assert np.allclose(table.area_mm2, truth.lesion_area_mm2[table.slice_id], atol=1)
    scores = pd.read_csv(run / "test_predictions.csv").set_index("id").prob
    assert np.allclose(table.score, scores[table.slice_id])


def test_writing_again_replaces_the_folder_and_says_the_same(run, done):
    before = (done / "explanations.csv").read_text()
    (done / "left_over").touch()
    assert explain.write(run, n=4) == done
    assert not (done / "left_over").exists() and (done / "explanations.csv").read_text() == before


def test_files_that_moved_are_found_through_data_root(run, tmp_path):
    was = Path(runs.read_json(run / "manifest.json")["data_root"])
    copy, lost = tmp_path / "moved", Path(shutil.copytree(run, tmp_path / "lost", ignore=shutil.ignore_patterns("explain")))
    shutil.copytree(was, copy)
    split = pd.read_parquet(lost / "features_df_split.parquet")
    nowhere = tmp_path / "nowhere"
    split["path"] = [str(nowhere / Path(path).relative_to(was)) for path in split.path]
    split.to_parquet(lost / "features_df_split.parquet")
    runs.write_json(lost / "manifest.json", runs.read_json(lost / "manifest.json") | {"data_root": str(nowhere)})
    with pytest.raises(FileNotFoundError, match="--data-root"):
        explain.write(lost)
    assert not list(lost.glob("explain*"))
    shutil.rmtree(copy / "masks")
    out = explain.write(lost, data_root=copy, out=tmp_path / "out", n=1, methods=["integrated_gradients"])
    told = runs.read_json(out / "explain.json")
    assert not told["tested"] and not told["figures"] and "nothing here was tested" in (out / "index.html").read_text()
    assert len(list((out / "pictures").iterdir())) == 1


def test_a_folder_that_is_no_run_and_a_method_that_is_none_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        explain.write(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'grad_cam'"):
        explain.write(run, methods=["gradcam"])


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnetv2_b0", "convnext_atto"])
def test_convolutional_networks_take_every_method_and_stay_as_they_were(backbone, images):
    network = models.create_model(backbone, 3, "none", 0.2, 64).train()
    next(network.parameters()).requires_grad_(False)
    modes, learns = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    before = learning.score(deepcopy(network), images, np.arange(3))
    for method in explain.METHODS:
        found = explain.saliency(method, network, images)
        assert found.shape == (3, 64, 64) and np.isfinite(found).all() and found.min() >= 0
        np.testing.assert_array_equal(found, explain.saliency(method, network, images))
    assert [m.training for m in network.modules()] == modes and [p.requires_grad for p in network.parameters()] == learns
    assert all(p.grad is None for p in network.parameters()) and not any(m._forward_hooks for m in network.modules())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    np.testing.assert_array_equal(learning.score(network, images, np.arange(3)), before)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_without_a_map_is_refused_by_grad_cam_and_taken_by_the_other(backbone, images):
    network = models.create_model(backbone, 3, "none", size=64).eval()
    with pytest.raises(ValueError, match=r"needs a last stage that is a map.*integrated_gradients"):
        explain.saliency("grad_cam", network, images[:1])
    assert not any(m._forward_hooks for m in network.modules())
    assert explain.saliency("integrated_gradients", network, images[:1]).max() > 0
    assert explain.usable(network, images, None) == (("integrated_gradients",), None)


def test_a_map_of_one_cell_is_no_map(images):
    network = models.create_model("resnet10t", 3, "none", size=32).eval()
    with pytest.raises(ValueError, match=r"more than one cell.*\(512, 1, 1\)"):
        explain.saliency("grad_cam", network, images[..., :32, :32])


def test_modes_come_back_after_an_error(monkeypatch, images):
    network = models.create_model("resnet10t", 3, "none", size=64).train()
    def fails(network, x): raise RuntimeError("on purpose")
    monkeypatch.setitem(explain.METHODS, "grad_cam", fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        explain.saliency("grad_cam", network, images)
    assert all(m.training for m in network.modules()) and all(p.requires_grad for p in network.parameters())


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, images):
    network, whole, sizes = models.create_model("resnet10t", 3, "none", size=64), explain.METHODS["grad_cam"], []
    def small(network, x):
        sizes.append(len(x))
        if len(x) > 1: raise torch.OutOfMemoryError("too large")
        return whole(network, x)
    expected = explain.saliency("grad_cam", network, images)
    monkeypatch.setitem(explain.METHODS, "grad_cam", small)
    np.testing.assert_allclose(explain.saliency("grad_cam", network, images, batch_size=3), expected, atol=1e-5)
    assert sizes[0] == 3 and sizes[-1] == 1


@pytest.mark.parametrize("values", [{"crop": "published", "floor": "published", "resize": "bilinear", "margin_px": 0},
                                    {"fit": "scale", "resample_mm": 1.0, "crop": "none"}, {"fit": "squeeze", "resample_mm": 2.0}])
def test_a_map_comes_back_to_the_pixels_of_a_real_head(data, values):
    "The bright base of a map of the bone window lies on bone."
    path = sorted((data / "headct_ge_hispeed_tilt18p5").rglob("*.dcm"))[12]
    hu, spec = read_hu(path), Preprocess(size=224, windows=((1000, 400),), **values)
    back = explain.to_source(spec(hu, (0.45, 0.45))[0], hu, (0.45, 0.45), spec)
    assert back.shape == hu.shape and back.max() > 0.5
    assert np.mean(hu[back > 0.8] > 600) > 0.95


def test_scores_of_the_run_do_not_change_by_explaining(run, done):
    split = pd.read_parquet(run / "features_df_split.parquet")
    test = split[split.fold < 0].reset_index(drop=True)
    model = runs.read_json(run / "model.json")
    network = rebuilt(model, run / WEIGHTS)
    packed = explain.seen(test, Preprocess.from_dict(model["preprocess"]))
    stored = pd.read_csv(run / "test_predictions.csv").set_index("id").prob[test.slice_id].to_numpy()
    explain.saliency("integrated_gradients", network, packed[:4])
    np.testing.assert_allclose(learning.score(network, packed, np.arange(len(packed))), stored, atol=1e-12)
    rows = explain.under_augmentation(network, packed, n=4)
    np.testing.assert_allclose(rows[0], stored, atol=1e-12)
    people = explain.pooled(rows, test.patient, "max")
    assert list(people.columns) == sorted(test.patient.unique()) and np.isfinite(explain.spread(people.to_numpy())).all()


@pytest.fixture
def bags(bag_run, tmp_path) -> Path:
    return Path(shutil.copytree(bag_run, tmp_path / bag_run.name))


def test_a_run_of_patients_is_asked_about_single_slices(bags):
    done = explain.write(bags, n=2, methods=["integrated_gradients"])
    told, table = runs.read_json(done / "explain.json"), pd.read_csv(done / "explanations.csv")
    split = pd.read_parquet(bags / "features_df_split.parquet").set_index("slice_id")
    alone, whole = pd.read_csv(bags / "test_slices.csv").set_index("id").score, pd.read_csv(bags / "test_predictions.csv")
    assert np.allclose(table.score, alone[table.slice_id]) and (table.label.to_numpy() == split.label[table.slice_id]).all()
    assert told["tested"] and table.pointing.notna().sum() == told["slices"] == (split[split.fold < 0].label == 1).sum()
    firm = {row["level"]: row for row in told["spread"]}
    assert firm["patients"]["rows"] == len(whole) and firm["patients"]["errors"] == (whole.pred != whole.label).sum()
    assert firm["slices"]["rows"] == len(alone) == (split.fold < 0).sum()
    page = (done / "index.html").read_text()
    assert "trained on whole patients" in page and "(max of 5 slices)" in page
    best = whole.sort_values("prob").iloc[-1]
    assert f"Patient {best.patient}: label {best.label}, score {best.prob:.2f}" in page
    (bags / "test_slices.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test_slices\.csv"):
        explain.write(bags)


def test_a_hidden_layer_and_a_learnt_pool_are_explained(bags, images):
    model = runs.read_json(bags / "model.json") | {"hidden": 8, "pooling": "attention"}
    runs.write_json(bags / "model.json", model)
    other = explain.twin(model, 5)
    save_file({k: v.cpu().contiguous() for k, v in other.state_dict().items()}, bags / WEIGHTS)
    network, (slices, _) = rebuilt(model, bags / WEIGHTS), explain.found_slices(bags, None)
    packed = explain.seen(slices, Preprocess.from_dict(model["preprocess"]))
    ask = lambda part: patient.patients(network, packed, part.assign(row=part.index)).set_index("patient").score
    alone, whole = explain.asked(network, packed, slices, None)
    np.testing.assert_allclose(alone, learning.score(network, packed, np.arange(len(packed))), atol=1e-12)
    np.testing.assert_allclose(whole, ask(slices).sort_index(), atol=1e-12)
    name = slices.patient[0]
    mine = patient.bags.in_order(slices[slices.patient == name])
    expected = [ask(mine)[name] - ask(mine.drop(index=i))[name] for i in mine.index]
    np.testing.assert_allclose(explain.left_out(network, packed[mine.index]), expected, atol=1e-12)
    assert "attention of 5 slices" in (explain.write(bags, n=1) / "index.html").read_text()
    large = explain.twin(model | {"in_chans": 3, "size": 64, "normalise": True}, 0)
    found = {method: explain.saliency(method, large, images) for method in explain.METHODS}
    assert all(each.shape == (3, 64, 64) and np.isfinite(each).all() for each in found.values()) and found[explain.FINE].max() > 0


@pytest.mark.parametrize("intensity", ["window", "zscore_slice"])
def test_what_is_black_gets_no_evidence(data, monkeypatch, intensity):
    "Also where z-scores put black above zero: gradients start from the slice's own darkest value."
    path = sorted((data / "headct_ge_hispeed_tilt18p5").rglob("*.dcm"))[12]
    spec = Preprocess(size=64, windows=("brain",), intensity=intensity)
    image = np.rint(spec(read_hu(path), (0.45, 0.45)) * 255).astype(np.uint8)[None]
    black = image[0, 0] == image.min()
    monkeypatch.setattr(explain.functional, "gaussian_blur", lambda found, *sizes: found)
    found = explain.saliency("integrated_gradients", models.create_model("resnet10t", 1, "none", size=64), image)[0]
    assert (image.min() > 0) == (intensity != "window") and black.mean() > 0.2 and (found[black] == 0).all() and found.max() > 0
