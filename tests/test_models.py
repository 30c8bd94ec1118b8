"Networks against torchvision's, weights from files in other people's layouts, and memory saved without changing a result."
import copy
import hashlib
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from ctbm import checkpoints, models, pooling

IMAGES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def torchvision_network(size, classes=1):
    "torchvision's EfficientNetV2, random but with the running statistics of images."
    torch.manual_seed(0)
    network = get_model(f"efficientnet_v2_{size}", num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d): module.momentum = 1.0
    with torch.no_grad(): network.train()(torch.rand(4, 3, 96, 96))
    return network.eval()


@pytest.fixture(scope="module")
def small():
    return torchvision_network("s")


def original(network):
    "A state dict as the original's wrapper gave it."
    return {"epoch": 15, "val_fbeta": 0.8, "best_threshold": 0.45,
            "model_state_dict": {f"model.{name}": tensor for name, tensor in network.state_dict().items()}}


def same(ours, theirs, atol=1e-5):
    with torch.no_grad(): a, b = ours.eval()(IMAGES), theirs(IMAGES)
    assert b.std() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("size", "tensors", "parameters"), [("s", 782, 20_178_769), ("m", 1120, 52_859_637), ("l", 1548, 117_235_553)])
def test_the_same_tensors_as_torchvision(size, tensors, parameters):
    with torch.device("meta"):
        theirs, ours = get_model(f"efficientnet_v2_{size}", num_classes=1), models.create_model(f"efficientnetv2_{size}", weights="none")
    shapes = [[tuple(v.shape) for v in network.state_dict().values()] for network in (theirs, ours)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == tensors
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == parameters
    norms = [[m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)] for network in (theirs, ours)]
    assert norms[0] == norms[1]


def test_the_same_output_as_torchvision_from_either_layout(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "bare.pth")
    torch.save(original(small), tmp_path / "original.pth")
    save_file(small.state_dict(), tmp_path / "sorted.safetensors")
    for name in ("bare.pth", "original.pth", "sorted.safetensors"):
        same(models.create_model("efficientnetv2_s", weights=str(tmp_path / name), dropout_p=0.3, drop_path_p=0.2), small)


def test_the_published_network_gives_torchvision_s_output():
    theirs = torchvision_network("m")
    with torch.device("meta"): ours = models.create_model("efficientnetv2_m", weights="none")
    ours.load_state_dict(checkpoints.renamed(theirs.state_dict(), "efficientnetv2_m"), assign=True)
    same(ours, theirs)


def test_a_thousand_classes_leave_the_features_and_one_new_logit(tmp_path):
    theirs = torchvision_network("s", classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "imagenet.pth")
    ours = models.create_model("efficientnetv2_s", weights=str(tmp_path / "imagenet.pth")).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(IMAGES), theirs.features(IMAGES), rtol=1e-5, atol=1e-5)
        assert ours(IMAGES).shape == (2, 1)
        grey = models.create_model("efficientnetv2_s", 1, str(tmp_path / "imagenet.pth")).eval()
        repeated = IMAGES[:, :1].expand(-1, 3, -1, -1)
        torch.testing.assert_close(grey.forward_features(IMAGES[:, :1]), ours.forward_features(repeated), rtol=1e-3, atol=1e-3)


def test_a_file_of_our_own_layout_keeps_its_logit(tmp_path):
    donor = models.create_model("test_efficientnet", weights="none")
    save_file(donor.state_dict(), tmp_path / "ours.safetensors")
    again = models.create_model("test_efficientnet", weights=str(tmp_path / "ours.safetensors"))
    assert all(torch.equal(tensor, donor.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("backbone", ["tf_efficientnetv2_s", "efficientnetv2_m", "resnet18", "vgg11"])
def test_torchvision_s_names_are_refused_elsewhere(small, backbone, tmp_path):
    torch.save(original(small), tmp_path / "best_model.pth")
    with pytest.raises(ValueError, match="backbone 'efficientnetv2_s', not"):
        models.create_model(backbone, weights=str(tmp_path / "best_model.pth"))


def test_every_tensor_or_none(small, tmp_path):
    state = small.state_dict()
    for changed in ({k: v for k, v in state.items() if k != "features.3.1.block.0.0.weight"}, state | {"extra": torch.zeros(1)},
                    state | {"features.0.1.bias": torch.zeros(5)}):
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(ValueError, match="does not fit"):
            models.create_model("efficientnetv2_s", weights=str(tmp_path / "changed.pth"))


@pytest.mark.parametrize("normalise", [True, False])
def test_normalisation_belongs_to_the_network(normalise):
    for backbone, mean, std in (("resnet18", 0.406, 0.225), ("efficientnetv2_s", 0.406, 0.225), ("efficientnetv2_l", 0.5, 0.5),
                                ("tf_efficientnetv2_m", 0.5, 0.5)):
        with torch.device("meta"): network = models.create_model(backbone, weights="none", normalise=normalise)
        expected = (IMAGES[:, 2] - mean) / std if normalise else IMAGES[:, 2]
        torch.testing.assert_close(models.normalise(IMAGES, network)[:, 2], expected)
    assert timm.get_pretrained_cfg("resnet18").mean == (0.485, 0.456, 0.406)


def test_stochastic_depth_where_there_is_any(small):
    with torch.device("meta"): network = models.create_model("efficientnetv2_s", weights="none", drop_path_p=0.2)
    ours = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert ours == pytest.approx([m.p for m in small.modules() if type(m).__name__ == "StochasticDepth" and m.p])
    with pytest.raises(ValueError, match="drop_path_p must be 0, not 0.1"): models.create_model("vgg11", weights="none", drop_path_p=0.1)


def test_torchvision_s_imagenet_weights_are_fetched_once(tmp_path, monkeypatch, forget_weights):
    theirs = torchvision_network("s", classes=1000)
    made, cache = tmp_path / "made.pth", tmp_path / "cache"
    torch.save(theirs.state_dict(), made)
    published = made.rename(tmp_path / f"efficientnet_v2_s-{hashlib.sha256(made.read_bytes()).hexdigest()[:8]}.pth")
    where = SimpleNamespace(url=published.as_uri(), transforms=lambda: SimpleNamespace(mean=[0.5] * 3, std=[0.5] * 3))
    monkeypatch.setattr(models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=where))
    monkeypatch.setattr(models, "get_dir", lambda: str(cache))
    for _ in range(2):
        network = models.create_model("efficientnetv2_s", weights="imagenet")
        assert torch.equal(network.conv_stem.weight, theirs.features[0][0].weight)
        assert models.provenance("efficientnetv2_s", "imagenet")["used"] == "imagenet"
        models.find_weights.cache_clear()
        published.unlink(missing_ok=True)
    (cache / "checkpoints" / published.name).unlink()
    with pytest.raises(FileNotFoundError, match="cannot be had from"): models.create_model("efficientnetv2_s", weights="imagenet")


@pytest.mark.parametrize("backbone", ["tf_efficientnetv2_b0", "resnet18"])
def test_saving_memory_changes_no_result(backbone):
    gradients, logits, states = [], [], []
    for saving in (False, True):
        torch.manual_seed(0)
        network = models.create_model(backbone, weights="none", dropout_p=0.3, drop_path_p=0.2)
        if saving: models.save_memory(network)
        models.freeze(network, 3)
        torch.manual_seed(1)
        for _ in range(2):
            models.train_unfrozen(network)
            logits.append(network(IMAGES))
            logits[-1].sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad})
        states.append(network.state_dict())
        with torch.no_grad(): logits.append(network.eval()(IMAGES))
    for plain, saved in zip(logits[:3], logits[3:], strict=True): torch.testing.assert_close(saved, plain, rtol=1e-5, atol=1e-5)
    for pair in (gradients, states):
        for name, tensor in pair[0].items(): torch.testing.assert_close(pair[1][name], tensor, rtol=1e-5, atol=1e-5)


def test_saving_memory_can_be_copied_and_saved(tmp_path):
    network = models.create_model("test_efficientnet", weights="none").train()
    models.save_memory(network)
    network(IMAGES).sum().backward()
    again = copy.deepcopy(network)
    before = again.bn1.num_batches_tracked.item()
    again(IMAGES)
    assert again.bn1.num_batches_tracked == before + 1
    with pytest.raises(ValueError, match="'vgg11' cannot compute"): models.save_memory(models.create_model("vgg11", weights="none"))


CLASSES = {"resnet50": "fc", "densenet121": "classifier", "inception_v3": "fc"}


def radimagenet(backbone, seed=0):
    "A random network of torchvision's, and the same as RadImageNet's authors wrapped it."
    torch.manual_seed(seed)
    theirs = get_model(backbone, **({"aux_logits": False, "init_weights": False} if backbone == "inception_v3" else {}))
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d): module.momentum = 1.0
    with torch.no_grad(): theirs.train()(IMAGES)
    official = nn.Module()
    official.backbone = nn.Sequential(*list(theirs.eval().children())[:-1])
    return theirs, official.state_dict()


@pytest.fixture(scope="module")
def resnet50():
    return radimagenet("resnet50")


def features(ours, x):
    with torch.no_grad(): return ours.eval().forward_head(ours.forward_features(x), pre_logits=True)


@pytest.mark.parametrize("backbone", CLASSES)
def test_radimagenet_s_three_files_give_torchvision_s_features(backbone, tmp_path, resnet50):
    theirs, state = resnet50 if backbone == "resnet50" else radimagenet(backbone)
    torch.save(state, tmp_path / "official.pt")
    ours = models.create_model(backbone, weights=str(tmp_path / "official.pt"), hidden=8)
    setattr(theirs, CLASSES[backbone], nn.Identity())
    with torch.no_grad(): expected = theirs(IMAGES)
    assert expected.std() > 1e-3
    torch.testing.assert_close(features(ours, IMAGES), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(models.normalise(IMAGES, ours), 2 * IMAGES - 1)
    assert models.normalisation(backbone, str(tmp_path / "official.pt"), False) is False


def test_a_layout_that_is_not_radimagenet_s_is_refused(tmp_path, resnet50):
    state = resnet50[1]
    some, file = "backbone.6.3.conv2.weight", tmp_path / "changed.pt"
    biased = {f"{name[:-6]}bias": tensor[:, 0, 0, 0] for name, tensor in state.items() if tensor.ndim == 4}
    for changed, says in (
            ({name: tensor for name, tensor in state.items() if name != some}, f"1 missing .{some}"),
            (state | {"fc.weight": torch.zeros(9, 2048)}, "1 left over"), (state | {some: torch.zeros(3, 3)}, "does not fit"),
            (state | biased, "Keras"), ({name.replace("backbone.", "net."): tensor for name, tensor in state.items()}, "does not fit"),
            ({}, "holds no tensors")):
        torch.save(changed, file)
        with pytest.raises(ValueError, match=says): models.create_model("resnet50", weights=str(file))
    torch.save(state, file)
    with pytest.raises(ValueError, match="backbone 'resnet50', not 'resnet18'"): models.create_model("resnet18", weights=str(file))


def test_wrappers_round_radimagenet_s_tensors_come_off(tmp_path, resnet50):
    theirs, state = resnet50
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    for i, content in enumerate((parallel, {"epoch": 3, "state_dict": state})):
        torch.save(content, tmp_path / f"{i}.pt")
        ours = models.create_model("resnet50", 1, str(tmp_path / f"{i}.pt"))
        assert torch.equal(ours.layer4[2].conv3.weight, theirs.layer4[2].conv3.weight)
        torch.testing.assert_close(ours.conv1.weight, theirs.conv1.weight.sum(1, keepdim=True))


def test_radimagenet_is_had_from_the_hub_or_not_at_all(tmp_path, monkeypatch, forget_weights, resnet50):
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    asked = []
    def absent(repo, name, local_files_only): asked.append((repo, name)); raise models.LocalEntryNotFoundError("not here")
    monkeypatch.setattr(models, "hf_hub_download", absent)
    with pytest.raises(FileNotFoundError, match=r"Lab-Rasool/RadImageNet.*ResNet50.pt.*github.com/BMEII-AI.*MIT.*10.1148") as error:
        models.create_model("resnet50", weights="radimagenet")
    assert asked == [("Lab-Rasool/RadImageNet", "ResNet50.pt")] and "give its path" in str(error.value)
    torch.save(resnet50[1], tmp_path / "ResNet50.pt")
    monkeypatch.setattr(models, "hf_hub_download", lambda repo, name, local_files_only: str(tmp_path / name))
    network = models.create_model("resnet50", weights="radimagenet")
    assert torch.equal(network.bn1.running_mean, resnet50[0].bn1.running_mean)
    told = models.provenance("resnet50", "radimagenet")
    assert told["asked"] == told["used"] == "radimagenet" and told["file"] == "ResNet50.pt" and told["normalise"] == "mean 0.5, std 0.5"
    again = models.create_model("resnet50", weights="none", normalise=models.normalisation("resnet50", "radimagenet", True))
    assert again.pretrained_cfg["mean"] == network.pretrained_cfg["mean"] == (0.5,) * 3
    with pytest.raises(ValueError, match="no weights for 'resnet18'"): models.create_model("resnet18", weights="radimagenet")


@pytest.mark.parametrize("which", [0, 1, None])
def test_a_patient_s_network_learns_where_it_should(which):
    torch.manual_seed(0)
    network = models.create_model("resnet10t", 1, "none", dropout_p=0.4, hidden=8, pooling="attention")
    trained = models.freeze(network, which)
    models.train_unfrozen(network)
    assert network.pooling.training and network.fc.training and network.layer1.training == (which is None)
    embedding = network.forward_head(network.forward_features(IMAGES[:, :1]), pre_logits=True)
    pooling.pooled(network.pooling, network.fc(embedding).squeeze(1), embedding, torch.tensor([2]), network.fc).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert not any(p.grad is not None for p in network.parameters() if not p.requires_grad)


def test_a_patient_s_network_goes_through_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    build = lambda file, **added: models.create_model("test_efficientnet", 1, str(file), **added)
    donor = build("none", hidden=8, pooling="gru")
    row = dict(val_f1=0.5, val_recall=1, val_specificity=0, val_accuracy=0.5, train_loss=1, val_loss=1, threshold=0.5, val_separation=0)
    optimizer = torch.optim.Adam(donor.parameters())
    file, = checkpoints.write_staged(tmp_path, donor, optimizer, [row], 1, best=True, last_of_stage=False)
    as_weights, loaded = build(file, hidden=8, pooling="gru"), build("none", hidden=8, pooling="gru")
    assert checkpoints.load_checkpoint(loaded, file) == 1
    for again in (as_weights, loaded):
        assert all(torch.equal(tensor, donor.state_dict()[name]) for name, tensor in again.state_dict().items())
    single = build("none", hidden=8)
    save_file(single.state_dict(), tmp_path / "slices.safetensors")
    bag = build(tmp_path / "slices.safetensors", hidden=8, pooling="gru")
    assert torch.equal(bag.classifier[3].weight, single.classifier[3].weight) and bag.pooling.gru.weight_ih_l0.any()
    for other in (dict(), dict(pooling="gru"), dict(hidden=8), dict(hidden=9, pooling="gru"), dict(hidden=8, pooling="max")):
        with pytest.raises(ValueError, match="does not fit"): build(file, **other)


def test_no_draw_and_no_tensor_is_changed_by_what_is_not_asked_for():
    torch.manual_seed(0)
    plain = models.create_model("resnet10t", weights="none")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", num_classes=1)
    theirs.fc.reset_parameters()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_models_stands_on_checkpoints_and_not_the_other_way():
    assert models.tensors is checkpoints.tensors and not hasattr(checkpoints, "create_model")
