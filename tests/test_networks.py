"Segmentation networks at their published sizes: a training step, a sliding window, weights of the originals; and the losses."

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.networks.nets import DynUNet

from ctbm import networks, overlap

PATCH = (64, 64, 32)  # a step at 128 x 128 x 128 takes up to minutes of one core; the weights of all but unetr do not depend on the patch
SMALL = {"width": 4, "levels": 3, "patch_size": (32, 32, 32)}


def lesions(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    "A noisy patch with a large and a small bright cube, and its mask."
    mask = torch.zeros(1, 1, *shape)
    mask[..., 4:14, 4:14, 4:14] = mask[..., 20:23, 20:23, 20:23] = 1
    return mask + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), mask


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("unetr", "dynunet")]


@pytest.mark.parametrize("name", ["unet", "segresnet", "attention", *LARGE])
def test_a_training_step_and_a_sliding_window_at_the_published_size(name):
    torch.manual_seed(0)
    network = networks.create_network(name, patch_size=PATCH if name == "unetr" else (128, 128, 128))
    image, mask = lesions(PATCH)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    cost = overlap.loss_of(overlap.Overlap(blob_weight=0.5))(network(image), mask)
    cost.backward()
    trained = {key: p.detach().clone() for key, p in network.named_parameters() if p.requires_grad and p.ndim > 1}
    assert cost.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
    optimizer.step()
    assert [key for key, p in network.named_parameters() if key in trained and torch.equal(p, trained[key])] == []
    network.eval()
    with torch.no_grad():
        slid = sliding_window_inference(F.pad(image, (0, 0, 0, 0, 0, 16)), PATCH, 1, network, overlap=0.25, mode="gaussian")
    assert slid.shape == (1, 2, 80, 64, 32) and slid.isfinite().all()
    storages = [tensor.data_ptr() for tensor in network.state_dict().values() if tensor.numel()]
    assert len(set(storages)) == len(storages), "a tensor has two names: safetensors refuses it"


def test_dynunet_with_single_blocks_is_monais(monkeypatch):
    monkeypatch.setattr(networks, "BLOCKS", (1,))
    ours = networks.create_network("dynunet", patch_size=(64, 64, 64), width=2)
    kernels, strides = networks.plan((64, 64, 64), (1, 1, 1), 5)
    theirs = DynUNet(3, 1, 2, kernels, strides, strides[1:], ours.filters, norm_name=("INSTANCE", {"affine": True}), res_block=True,
                     deep_supervision=True, deep_supr_num=ours.deep_supr_num)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True): a.data.copy_(b.data)
    patch = torch.randn(1, 1, 64, 64, 64)
    assert ours(patch).shape == (1, 3, 2, 64, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(patch), theirs(patch))
        assert torch.equal(ours.eval()(patch), theirs.eval()(patch))


def test_thick_slices_are_halved_later():
    network = networks.create_network("dynunet", width=2, patch_size=(64, 64, 8), spacing_mm=(0.5, 0.5, 5))
    assert network.kernel_size[0] == (3, 3, 1) and network.strides[1] == (2, 2, 1)
    assert network(torch.randn(1, 1, 64, 64, 8)).shape[-3:] == (64, 64, 8)


@pytest.mark.parametrize("loss", ["dice_ce", *(pytest.param(n, marks=pytest.mark.slow) for n in overlap.OVERLAP_LOSSES if n != "dice_ce")])
def test_a_small_network_learns_a_patch_with_every_loss(loss):
    torch.manual_seed(0)
    image, mask = lesions((32, 32, 32))
    network, cost = networks.create_network("unet", **SMALL), overlap.loss_of(overlap.Overlap(loss, blob_weight=0.5))
    optimizer = torch.optim.AdamW(network.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        cost(network(image), mask).backward()
        optimizer.step()
    found = network(image).argmax(1, keepdim=True)
    assert 2 * (found * mask).sum() / (found.sum() + mask.sum()) > 0.9
    assert found[..., 20:23, 20:23, 20:23].float().mean() > 0.7, "the small lesion was missed"


def test_weights_of_another_monai_and_files_that_are_none(tmp_path):
    network = networks.create_network("unetr", **SMALL)
    state = {f"module.{key}": value for key, value in network.state_dict().items() if ".norm_cross_attn." not in key}
    torch.save(state | {"module.vit.blocks.0.cross_attn.to_q.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    networks.load_weights(other := networks.create_network("unetr", **SMALL), tmp_path / "weights.pth")
    loaded = other.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    torch.save(state | {"module.out.more": torch.zeros(3)}, tmp_path / "more.pth")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "weights.pth").read_bytes()[:1000])
    for name, words in (("more.pth", "1 left over .out.more."), ("damaged.pth", "damaged")):
        with pytest.raises(ValueError, match=f"{name}.*{words}"): networks.load_weights(other, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.pth"): networks.load_weights(other, tmp_path / "none.pth")


@pytest.mark.parametrize("asked, words", [
    ({"name": "unett"}, "did you mean 'unet'"), ({"name": "unet", "width": 3}, "width 3"), ({"name": "unet", "levels": 2}, "levels 2"),
    ({"name": "unet", "patch_size": (64, 64)}, "three whole numbers"),
    ({"name": "unetr", "patch_size": (100, 96, 96)}, r"\(96, 96, 96\) or \(112, 96, 96\)")])
def test_networks_that_cannot_be(asked, words):
    with pytest.raises(ValueError, match=words): networks.create_network(**asked)
