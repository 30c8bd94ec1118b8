"Texture augmentation on real slices, in the shapes and on the devices that training uses, and every one of its options."
from dataclasses import asdict, fields, replace

import cv2
import numpy as np
import pytest
import torch

from ctbm.datasets import Augmentation
from ctbm.decision import Decision
from ctbm.losses import Objective
from ctbm.preprocess import Preprocess, read_hu
from ctbm.texture import RULES, Alter, Texture, clahe, draw
from ctbm.thresholds import Rule

ALWAYS = Texture("by_class", texture_p_positive=1.0, texture_p_negative=1.0, brightness=0.0, contrast=0.0)
OTHER = {"texture": "by_class", "texture_p_positive": 0.1, "texture_p_negative": 0.1, "gamma_positive": (0.5, 0.6),
         "gamma_negative": (0.5, 0.6), "soft_blur_p": 0.0, "soft_blur_sigma": 1.5, "clahe_p": 0.0, "clahe_clip": 9.0, "clahe_tiles": 2,
         "sharpen_p": 0.0, "sharpen_times": 1, "brightness": 0.3, "contrast": 0.4}


def altered(spec: Texture, x: torch.Tensor, label: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return Alter(spec)(x, label, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def heads(data) -> torch.Tensor:
    "Six slices of a real head, three windows, the brain alone: float32[6, 3, 128, 128]"
    view = Preprocess(size=128, windows=("brain", "stroke", "subdural"), mask="brain")
    return torch.from_numpy(np.stack([view(read_hu(data / "headct_ge_hispeed_tilt18p5" / f"{n:02}.dcm")) for n in range(14, 26, 2)]))


def test_a_real_head_is_softer_as_a_positive_and_grainier_as_a_negative(heads):
    edges = lambda x: x.diff(dim=-1).abs().mean((1, 2, 3))
    kept = heads.clone()
    mild, strong = altered(ALWAYS, heads, torch.ones(6)), altered(ALWAYS, heads, torch.zeros(6))
    assert torch.equal(heads, kept), "the input was written to"
    assert (edges(mild) < edges(heads)).all() and (edges(strong) > 1.5 * edges(heads)).all()
    assert ((mild - heads).abs().mean((1, 2, 3)) * 3 < (strong - heads).abs().mean((1, 2, 3))).all()


def test_what_is_black_around_the_brain_stays_black(heads):
    "A blur may cross the border by its one pixel; nothing else lifts the background."
    outside = torch.nn.functional.max_pool2d(heads.amax(1, keepdim=True), 5, 1, 2) == 0
    assert outside.float().mean() > 0.1
    for label in (0.0, 1.0):
        got = altered(replace(ALWAYS, brightness=0.2, contrast=0.2), heads, torch.full((6,), label))
        assert (got.masked_select(outside) == 0).all() and got.min() >= 0 and got.max() <= 1


def test_clahe_is_that_of_opencv_inside_the_brain(heads):
    got = clahe(heads, 2.0, 8)
    for i, c in ((0, 0), (3, 2), (5, 1)):
        want = cv2.createCLAHE(2.0, (8, 8)).apply((heads[i, c] * 255).round().numpy().astype(np.uint8))
        inside = heads[i, c] > 0
        assert np.array_equal((got[i, c] * 255).round().numpy().astype(np.uint8)[inside], want[inside])


@pytest.mark.parametrize("rule", RULES)
def test_neither_memory_layout_nor_precision_matters(heads, rule):
    label = torch.tensor([0.0, 1, 0, 1, 0, 1])
    want = altered(Texture(rule), heads, label, 3)
    for x in (heads.contiguous(memory_format=torch.channels_last), heads.mT.contiguous().mT, heads.repeat_interleave(2, 0)[::2]):
        assert torch.equal(altered(Texture(rule), x, label, 3), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(altered(Texture(rule), heads, label, 3), want)
    assert want.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")
@pytest.mark.parametrize("rule", RULES)
def test_a_graphics_card_draws_the_same(heads, rule):
    label = torch.tensor([0.0, 1, 0, 1, 0, 1])
    there = altered(Texture(rule), heads.cuda(), label.cuda(), 3)
    change = (there.cpu() - altered(Texture(rule), heads, label, 3)).abs()
    assert there.is_cuda and change.mean() < 1e-3  # CLAHE may round a grey value otherwise


def test_by_class_and_same_spend_equal_numbers_and_none_spends_none(heads):
    "So that what is drawn after them, and with it the rest of a run, does not depend on labels."
    states = []
    for rule, label in (("same", 0.0), ("by_class", 0.0), ("by_class", 1.0), ("none", 0.0)):
        generator = torch.Generator().manual_seed(1)
        Alter(Texture(rule))(heads, torch.full((6,), label), generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])
    assert torch.equal(states[3], torch.Generator().manual_seed(1).get_state())


def test_same_treats_both_classes_alike():
    n = 20_000
    label = torch.arange(n) % 2.0
    drawn = draw(Texture("same"), label, torch.Generator().manual_seed(0))
    for value in (drawn.sigma > 0, drawn.equalised, drawn.sharpened, drawn.exponent != 1):
        share = [value[label == k].float().mean().item() for k in (0, 1)]
        assert 0.2 < share[0] < 0.7 and abs(share[0] - share[1]) < 0.03
    by_class = draw(Texture("by_class"), label, torch.Generator().manual_seed(0))
    assert not (by_class.sigma > 0)[label == 0].any() and not (by_class.equalised | by_class.sharpened)[label == 1].any()


@pytest.mark.parametrize("name", OTHER)
def test_every_option_does_something(heads, name):
    label = torch.tensor([0.0, 1]).repeat(12)
    x, spec = heads[:, :1].repeat(4, 1, 1, 1), Texture("same")
    assert set(OTHER) == {f.name for f in fields(Texture)}
    assert not torch.equal(altered(replace(spec, **{name: OTHER[name]}), x, label), altered(spec, x, label))


def test_options_have_names_of_their_own():
    "A recipe is written flat, so no two of its parts may use one name."
    ours = set(asdict(Texture()))
    for part in (Preprocess, Augmentation, Objective, Rule, Decision):
        assert not ours & {f.name for f in fields(part)}, part
