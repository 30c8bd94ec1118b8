"Losses against other people's arithmetic, at the edges, and in training."
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import fbeta_score, log_loss
from timm.loss import AsymmetricLossMultiLabel
from torch import nn
from torch.nn import functional as F

from ctbm.losses import LOSSES, Objective, alpha_of, focal, l1_penalty, loss_named


@pytest.fixture
def slices():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(500, generator=generator), (torch.rand(500, generator=generator) < 0.2).float()


def test_focal_is_the_formula(slices):
    logit, target = slices
    p, y = torch.sigmoid(logit.double()).numpy(), target.numpy()
    for alpha, gamma in ((0.25, 2), (0.945, 2), (0.5, 0), (0.75, 1), (0.9, 5)):
        terms = -np.where(y == 1, alpha * (1 - p) ** gamma * np.log(p), (1 - alpha) * p**gamma * np.log(1 - p))
        assert focal(logit, target, alpha, gamma).item() == pytest.approx(terms.mean(), rel=1e-5)


def test_against_scikit_learn_and_timm(slices):
    logit, target = slices
    p, y = torch.sigmoid(logit.double()).numpy(), target.numpy()
    assert LOSSES["bce"](logit, target, None, 2).item() == pytest.approx(log_loss(y, p), rel=1e-5)
    weights = np.where(y == 1, 0.8, 0.2)
    weighted = log_loss(y, p, sample_weight=weights) * weights.mean()
    assert LOSSES["weighted_bce"](logit, target, 0.8, 2).item() == pytest.approx(weighted, rel=1e-5)
    theirs = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=0, clip=0.05, reduction="none")(logit, target).mean()
    torch.testing.assert_close(LOSSES["asymmetric"](logit, target, None, 4), theirs)
    decided = torch.where(logit > 0, 40.0, -40.0)
    assert LOSSES["soft_fbeta"](decided, target, None, 2).item() == pytest.approx(1 - fbeta_score(y, logit > 0, beta=2), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_gradients_are_right_and_finite(name, gamma, smoothing):
    loss = loss_named(Objective(loss=name, focal_alpha=0.9, focal_gamma=gamma, label_smoothing=smoothing), np.array([0, 1]))
    for target in (torch.zeros(6), torch.ones(6), torch.tensor([0.0, 1, 0, 1, 0, 1])):
        for scale in (0, 1, 50, 1000):
            logit = (scale * torch.tensor([-1.0, -1, 1, 1, 0.1, -0.1])).requires_grad_()
            value = loss(logit, target)
            value.backward()
            assert value.shape == () and value >= 0 and value.isfinite() and logit.grad.isfinite().all(), (scale, target, logit.grad)
    exact = lambda z: LOSSES[name](z, torch.tensor([0.0, 1, 1]).double(), 0.9, gamma)
    assert torch.autograd.gradcheck(exact, torch.tensor([0.3, -0.7, 1.1]).double().requires_grad_())


def test_training_on_focal_loss_gives_the_probabilities_that_it_asks_for():
    "5 % of the slices are positive and nothing tells them apart: alpha 0.95 asks for one half, and training finds it."
    target = torch.zeros(200).index_fill(0, torch.arange(10), 1.0)
    objective = Objective(loss="focal")
    loss, logit = loss_named(objective, target.numpy()), torch.tensor([-3.0], requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss(logit.expand(200), target).backward()
        optimizer.step()
    assert alpha_of(target.numpy()) == 0.95
    assert torch.sigmoid(logit).item() == pytest.approx(0.5, abs=1e-3)


def test_smoothing_is_inside_and_can_be_left_out(slices):
    logit, target = slices
    objective = Objective(label_smoothing=0.2)
    smoothed, plain = loss_named(objective, target.numpy()), loss_named(replace(objective, label_smoothing=0), target.numpy())
    assert torch.equal(plain(logit, target), F.binary_cross_entropy_with_logits(logit, target))
    assert torch.equal(smoothed(logit, target), F.binary_cross_entropy_with_logits(logit, 0.8 * target + 0.1))
    assert torch.equal(plain(logit, target.int()), plain(logit, target))
    with torch.autocast("cpu", torch.bfloat16): assert smoothed(logit.bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.ones(5, int), np.zeros(0, int)])
def test_one_class_has_no_alpha(labels):
    for name in ("focal", "weighted_bce"):
        with pytest.raises(ValueError, match="both classes"): loss_named(Objective(loss=name), labels)
        loss_named(Objective(loss=name, focal_alpha=0.75), labels)
    loss_named(Objective(), labels)


@pytest.mark.parametrize("wrong", [
    {"loss": "focus"}, {"focal_gamma": -1}, {"focal_gamma": 0.5}, {"focal_gamma": float("nan")}, {"focal_alpha": 0}, {"focal_alpha": 1.2},
    {"label_smoothing": -0.1}, {"l1_lambda": -1}, {"l1_lambda": float("nan")}])
def test_refusals_name_the_value(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}.*{value}"): Objective(**wrong)


def test_l1_is_of_trainable_weights_only():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 1))
    for parameter in network.parameters(): nn.init.constant_(parameter, -2)
    assert l1_penalty(network) == 2 * (2 * 9 + 8)
    network[0].requires_grad_(False)
    assert l1_penalty(network) == 2 * 8
    network.requires_grad_(False)
    assert l1_penalty(network) == 0
