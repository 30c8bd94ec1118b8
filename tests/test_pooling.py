"Pools on a network that sees real slices, in training, and against other people's arithmetic."
import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from ctbm import cohort, evaluate, pack, pooling
from ctbm.pooling import LEARNED, ORDERED, POOLS, log_sum_exp, neutral, padded, pool_named, pooled, weights
from ctbm.preprocess import Preprocess

UNLEARNED = [name for name in POOLS if name not in LEARNED]


@pytest.fixture(scope="module")
def head(data, tmp_path_factory) -> torch.Tensor:
    "A real head from below to above, float[28, 3, 64, 64]."
    slices = cohort.scan(data / "headct_ge_hispeed_tilt18p5", jobs=1)
    made = pack.build(slices, Preprocess(size=64), tmp_path_factory.mktemp("packs"), jobs=1)
    return torch.from_numpy(made.images[made.table.sort_values("position_mm").row]).float() / 255


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=1, in_chans=3).eval()


def patient_logits(network, pool, images, sizes) -> torch.Tensor:
    embeddings = network.forward_head(network.forward_features(images), pre_logits=True)
    classify = network.get_classifier()
    return pooled(pool, classify(embeddings).squeeze(1), embeddings, sizes, classify)


# A real head


@pytest.mark.parametrize("name", POOLS)
def test_order_of_real_slices(head, network, name):
    "Permuting a patient's slices changes nothing, but for the pool that reads them in order; nor does who else is in the batch."
    torch.manual_seed(1)
    pool = pool_named(name, network.num_features).eval()
    with torch.no_grad():
        one = patient_logits(network, pool, head, torch.tensor([28]))
        shuffled = patient_logits(network, pool, head[torch.randperm(28)], torch.tensor([28]))
        company = patient_logits(network, pool, torch.cat([head[:9], head, head[3:5]]), torch.tensor([9, 28, 2]))
    torch.testing.assert_close(company[1:2], one, rtol=1e-4, atol=1e-5)
    assert torch.allclose(shuffled, one, rtol=1e-4, atol=1e-5) == (name not in ORDERED)


@pytest.mark.parametrize("name", POOLS)
def test_gradients_reach_the_network(head, network, name):
    torch.manual_seed(1)
    pool, net = pool_named(name, network.num_features), copy.deepcopy(network)
    loss = F.binary_cross_entropy_with_logits(patient_logits(net, pool, head[:12], torch.tensor([7, 5])), torch.tensor([1.0, 0.0]))
    loss.backward()
    for module in (net, pool):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert net.conv1[0].weight.grad.abs().max() > 0 and all(p.grad.abs().max() > 0 for p in pool.parameters() if p.ndim > 1)


def test_a_pool_in_a_network_is_saved_with_it(network):
    for name in POOLS:
        net = copy.deepcopy(network)
        net.pooling = pool_named(name, net.num_features)
        extra = set(net.state_dict()) - set(network.state_dict())
        assert bool(extra) == (name in LEARNED) and all(key.startswith("pooling.") for key in extra)
        again = pickle.loads(pickle.dumps(net)).pooling
        x = torch.randn(4, net.num_features)
        ask = lambda pool, x=x: pooled(pool, x[:, 0], x, torch.tensor([4]), lambda e: e[..., 0])
        assert torch.equal(ask(again), ask(net.pooling))


# Numbers


@pytest.mark.parametrize("name", ["max", "noisy_or"])
def test_agrees_with_pooled_probabilities(name):
    "`evaluate.pool` on a table of slices says the same where the rule means the same."
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, 40)
    table = pd.DataFrame({"patient": np.repeat([f"P{i:02}" for i in range(40)], sizes), "label": 0})
    logits = rng.normal(-3, 2, len(table))
    theirs = evaluate.pool(table.assign(score=expit(logits)), name).score
    ours = pooled(pool_named(name, 1), torch.tensor(logits), torch.zeros(len(table), 1), torch.tensor(sizes), None)
    assert np.allclose(expit(ours.numpy()), theirs, atol=1e-12)


def test_noisy_or_keeps_what_probabilities_lose():
    "Sixty slices of one in a million, and logits as large as they come, in each precision."
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        one = torch.tensor(-13.8155, dtype=dtype)
        found = pooled(pool_named("noisy_or", 1), one.expand(60), torch.zeros(60, 1), torch.tensor([60]), None)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.item() == pytest.approx(one.item() + np.log(60), abs=1e-3)
    for z in (-1e4, -500, -90, -37, -36, 0, 36, 90, 1e4):
        logits = torch.full((3,), float(z), requires_grad=True)
        found = pooled(pool_named("noisy_or", 1), logits, torch.zeros(3, 1), torch.tensor([3]), None)
        found.backward()
        expected = float(np.log(np.expm1(3 * np.logaddexp(0, z)))) if abs(z) < 50 else z + np.log(3) if z < 0 else 3 * z
        assert found.item() == pytest.approx(expected, rel=1e-5) and logits.grad.isfinite().all() and (logits.grad > 0).all()


@pytest.mark.parametrize("name", POOLS)
def test_gradients_are_right(name):
    torch.manual_seed(0)
    pool, classify, sizes = pool_named(name, 3).double(), nn.Linear(3, 1).double(), torch.tensor([3, 1, 6])
    flat = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.linspace(-4, 3, 10, dtype=torch.float64)[torch.randperm(10)].requires_grad_()
    assert torch.autograd.gradcheck(lambda z, x: pooled(pool, z, x, sizes, classify), (logits, flat))


@pytest.mark.parametrize("name", POOLS)
def test_half_precision_in_the_network(name):
    "Under autocast the network answers in bfloat16; patients' logits are float32 and close to the exact ones."
    torch.manual_seed(0)
    pool, classify, x = pool_named(name, 32), nn.Linear(32, 1), torch.randn(30, 32)
    exact = pooled(pool, classify(x).squeeze(1), x, torch.tensor([10, 20]), classify)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classify(x).squeeze(1)
        found = pooled(pool, logits, x.bfloat16(), torch.tensor([10, 20]), classify)
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


# Training


def draw(patients, count, rng):
    "Embeddings of slices: noise, and for a positive patient two neighbours that carry a sign."
    x = torch.tensor(rng.normal(0, 1, (patients, count, 16)), dtype=torch.float32)
    labels = torch.tensor(rng.random(patients) < 0.5).float()
    for i in labels.nonzero().flatten(): x[i, (at := rng.integers(count - 1)) : at + 2, 0] += 5
    return x, labels


def learned(name, x, labels, steps=60) -> tuple[nn.Module, nn.Module]:
    "A pool and a classifier, trained; each started as its notebook advises."
    torch.manual_seed(0)
    pool, classify = pool_named(name, x.shape[2]), nn.Linear(x.shape[2], 1)
    if name == "attention": neutral(classify)
    if name == "noisy_or": nn.init.constant_(classify.bias, -3)
    optimizer = torch.optim.AdamW([*pool.parameters(), *classify.parameters()], 0.03, weight_decay=0.1)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(scored(pool, classify, x), labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return pool, classify


def scored(pool, classify, x) -> torch.Tensor:
    flat = x.flatten(0, 1)
    return pooled(pool, classify(flat).squeeze(1), flat, torch.full((len(x),), x.shape[1]), classify)


@pytest.mark.parametrize("name", POOLS)
def test_labels_of_patients_teach_slices(name, monkeypatch):
    "Two of twenty slices carry the sign. Every pool finds it, the mean with difficulty; without those two slices the score falls."
    monkeypatch.setattr(pooling, "WIDTH", 16)
    rng = np.random.default_rng(0)
    pool, classify = learned(name, *draw(128, 20, rng), steps=30 if name == "gru" else 60)
    x, labels = draw(400, 20, rng)
    with torch.no_grad():
        before = scored(pool, classify, x)
        assert roc_auc_score(labels, before) > (0.75 if name == "mean" else 0.9)
        after = scored(pool, classify, x.where(x[..., :1] < 3, 0))[labels == 1]
        assert (after < before[labels == 1]).float().mean() > 0.95
        if name == "attention":
            given = weights(pool, x.flatten(0, 1), torch.full((400,), 20)).view(400, 20)
            assert given[labels == 1].gather(1, x[labels == 1, :, 0].topk(2).indices).sum(1).median() > 0.5


def test_only_the_sequence_sees_neighbours(monkeypatch):
    "A lesion goes on through neighbouring slices, noise does not: the same two slices, adjacent or apart."
    monkeypatch.setattr(pooling, "WIDTH", 16)
    rng = np.random.default_rng(0)

    def pairs(patients, count=12):
        x = torch.tensor(rng.normal(0, 0.3, (patients, count, 4)), dtype=torch.float32)
        labels = torch.tensor(rng.random(patients) < 0.5).float()
        for i, adjacent in enumerate(labels):
            first = rng.integers(count - 5)
            x[i, [first, first + (1 if adjacent else rng.integers(3, 6))], 0] += 3
        return x, labels

    train, test = pairs(256), pairs(300)
    area = {}
    for name in ("gru", "attention", "max"):
        pool, classify = learned(name, *train, steps=40)
        with torch.no_grad(): area[name] = roc_auc_score(test[1], scored(pool, classify, test[0]))
    assert area["gru"] > 0.95 and max(area["attention"], area["max"]) < 0.65, area


def test_a_broken_network_is_not_hidden():
    for name in POOLS:
        x = torch.zeros(6, 4).index_fill(0, torch.tensor([4]), torch.nan)
        torch.manual_seed(0)
        found = pooled(pool_named(name, 4), x[:, 0], x, torch.tensor([3, 3]), lambda e: e[..., 0])
        assert found.isnan().tolist() == [False, True], name


# The number of slices


def test_bias_with_the_number_of_slices():
    "Negatives of 15 and of 60 slices, all from one distribution: which pools tell them apart by their number alone."
    rng = np.random.default_rng(0)
    sizes = torch.tensor([15, 60] * 500)
    flat = torch.tensor(rng.normal(-3, 1, int(sizes.sum())))
    area = {name: roc_auc_score(sizes == 60, pooled(pool_named(name, 1), flat, flat[:, None], sizes, None)) for name in UNLEARNED}
    assert area["noisy_or"] > 0.99 and area["top3"] > 0.9 and 0.75 < area["max"] < 0.85, area   # max: 60 / 75 exactly
    assert abs(area["mean"] - 0.5) < 0.05 and 0.5 < area["log_sum_exp"] < area["max"]
    table, mask = padded(flat, sizes)
    assert (log_sum_exp(table, mask) <= table.masked_fill(~mask, -torch.inf).amax(1)).all()


# Faults


def test_a_patient_without_slices_is_an_error():
    for sizes in ([0, 3], [3, 0], [-1, 4], [2], []):
        with pytest.raises(ValueError, match="at least one slice each"):
            pooled(pool_named("mean", 1), torch.zeros(3), torch.zeros(3, 1), torch.tensor(sizes, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="did you mean 'attention'"): pool_named("atention", 8)
