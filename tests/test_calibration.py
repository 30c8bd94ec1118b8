"Calibration under fire: against scikit-learn and slow references, on degenerate input, and its intervals against a known truth."
import json
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from ctbm.calibration import METHODS, apply, bins, cross_fit, fit, measure, plot_reliability, to_prevalence

matplotlib.use("Agg")
RNG = np.random.default_rng(0)
MIXED = RNG.random(40) < 0.4
DEGENERATE = {
    "one class": (np.zeros(30, int), RNG.random(30)),
    "other class": (np.ones(30, int), RNG.random(30)),
    "all equal": (MIXED, np.full(40, 0.3)),
    "all zero": (MIXED, np.zeros(40)),
    "all one": (MIXED, np.ones(40)),
    "separated": (np.arange(40) >= 30, np.linspace(0.05, 0.95, 40)),
    "separated the wrong way": (np.arange(40) < 10, np.linspace(0.05, 0.95, 40)),
    "touching": (np.array([0, 0, 1, 1]), np.array([0.2, 0.5, 0.5, 0.9])),
    "one positive": (np.arange(40) == 20, np.linspace(0.05, 0.95, 40)),
    "sure": (MIXED, (RNG.random(40) < 0.5).astype(float)),
    "sure and right": (MIXED, MIXED.astype(float)),
    "tiny": (MIXED, np.where(MIXED, 1e-300, 1e-200)),
    "nearly equal": (MIXED, 0.3 + 1e-16 * RNG.integers(0, 3, 40)),
    "saturated": (MIXED, expit(np.float32(RNG.normal(0, 30, 40))).astype(float)),
    "one row": (np.array([1]), np.array([0.7])),
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def clustered(patients, slope, shift, seed):
    "Slices of patients, whose true logit is slope * logit of the prediction + shift."
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 8, patients))
    x = rng.normal(-2, 1.2, patients)[patient] + rng.normal(0, 0.7, len(patient))
    return rng.random(len(x)) < expit(slope * x + shift), expit(x), patient


@pytest.mark.parametrize("seed", range(8))
def test_figures_are_scikit_learns(seed):
    y, p, patient = clustered(80, 0.4 + 0.3 * seed, seed / 4 - 1, seed)
    p = np.round(p, 2 + seed % 3).clip(0.01, 0.99)
    figures = {k: f["estimate"] for k, f in measure(y, p, patient, resamples=2).items()}
    exact = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, max_iter=500).fit(logit(p)[:, None], y)
    assert np.isclose(figures["slope"], exact.coef_[0, 0], atol=1e-8)
    assert np.isclose(figures["brier"], brier_score_loss(y, p), atol=1e-12)
    assert np.isclose(expit(logit(p) + figures["intercept"]).mean(), y.mean(), atol=1e-10)
    assert np.isclose(figures["scaled_brier"], 1 - brier_score_loss(y, p) / brier_score_loss(y, np.full(len(y), y.mean())), atol=1e-12)
    assert np.isclose(figures["mean_predicted"], p.mean(), atol=1e-12) and figures["prevalence"] == y.mean()


@pytest.mark.parametrize("seed", range(4))
def test_ici_is_that_of_a_slow_lowess(seed):
    y, p, _ = clustered(60, 0.6, 0.3, seed)
    k = int(np.ceil(len(p) * 2 / 3))
    smooth = []
    for at in p:
        width = np.sort(np.abs(p - at))[k - 1]
        near = (1 - (np.abs(p - at) / width).clip(0, 1) ** 3) ** 3
        smooth.append(np.polyfit(p - at, y, 1, w=np.sqrt(near))[1])
    expected = np.abs(np.clip(smooth, 0, 1) - p).mean()
    assert np.isclose(measure(y, p, resamples=1)["ici"]["estimate"], expected, rtol=0.02)


def test_intervals_cover_the_truth_with_clustered_slices():
    "Of 100 cohorts with true slope 0.7 and shift 0.5, about 95 % have both in their intervals."
    covered = {"slope": 0, "prevalence": 0}
    truth = clustered(200_000, 0.7, 0.5, 10_000)[0].mean()
    for seed in range(100):
        y, p, patient = clustered(80, 0.7, 0.5, seed)
        figures = measure(y, p, patient, resamples=150, seed=seed)
        for name, value in (("slope", 0.7), ("prevalence", truth)):
            covered[name] += figures[name]["low"] <= value <= figures[name]["high"]
    assert min(covered.values()) >= 88, covered


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input_is_nan_or_right(name):
    y, p = DEGENERATE[name]
    figures = measure(y, p, np.arange(len(y)) // 2, resamples=50)
    for figure in figures.values():
        assert figure["low"] <= figure["high"] or np.isnan(figure["low"]) and np.isnan(figure["high"])
        assert not np.isnan(figure["estimate"]) or figure["undefined"] > 0 and figure is not figures["brier"]
    estimate = {k: f["estimate"] for k, f in figures.items()}
    assert np.isclose(estimate["brier"], brier_score_loss(y, p, labels=[0, 1]) if len(set(y)) == 2 else np.mean((y - p) ** 2), atol=1e-12)
    if len(set(y)) < 2 or name in ("all equal", "separated", "separated the wrong way", "touching", "sure", "nearly equal", "tiny"):
        assert np.isnan(estimate["slope"])
    if name in ("one class", "other class", "all zero", "all one", "sure", "sure and right"):
        assert np.isnan(estimate["intercept"])
    if name == "all equal":
        assert np.isclose(estimate["intercept"], logit(y.mean()) - logit(0.3)) and np.isclose(estimate["ici"], abs(y.mean() - 0.3))
    assert 0 <= estimate["ici"] <= 1


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("method", METHODS)
def test_repairs_stay_finite_and_in_order(name, method):
    y, p = DEGENERATE[name]
    if len(set(y)) < 2 and method != "none":
        with pytest.raises(ValueError, match="positives and negatives"):
            fit(method, y, p)
        return
    fitted = fit(method, y, p)
    score = np.sort(np.concatenate([[0, 1e-15, 1e-9, 1e-4, 0.3, 0.5, 1 - 1e-9, 1], p]))
    after = apply(fitted, score)
    assert np.isfinite(after).all() and (np.diff(after) >= 0).all() and after.min() >= 0 and after.max() <= 1
    assert (after == apply(json.loads(json.dumps(fitted)), score)).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_ranking_stays(method):
    y, p, _ = clustered(200, 0.3, -1, 3)
    after = apply(fit(method, y, p), p)
    same = np.isclose(roc_auc_score(y, after), roc_auc_score(y, p), atol=1e-12)
    assert same or method == "isotonic" and roc_auc_score(y, after) >= roc_auc_score(y, p)


def test_repairs_find_a_planted_damage():
    y, p, _ = clustered(15_000, 1, 0, 4)
    x = logit(p)
    assert np.isclose(fit("prior", y, expit(x + 2))["shift"], -2, atol=0.05)
    assert np.isclose(fit("temperature", y, expit(x / 2.5))["temperature"], 1 / 2.5, rtol=0.05)
    damaged = fit("platt", y, expit(0.4 * x + 1.5))
    assert np.isclose(damaged["slope"], 2.5, rtol=0.05) and np.isclose(damaged["shift"], -2.5 * 1.5, rtol=0.05)
    assert np.abs(apply(fit("isotonic", y, p**3), p**3) - p).mean() < 0.02
    flipped = fit("platt", y, 1 - p)
    assert flipped["slope"] == 0.01 and np.isclose(apply(flipped, 1 - p).mean(), y.mean(), atol=1e-3)


def test_isotonic_is_scikit_learns_but_for_its_ends():
    y, p, _ = clustered(200, 1, 0, 5)
    theirs, ours = IsotonicRegression(out_of_bounds="clip").fit(p, y).predict(p), apply(fit("isotonic", y, p), p)
    least, most, between = (theirs == 0).sum(), (theirs == 1).sum(), theirs[(theirs > 0) & (theirs < 1)]
    ends = min(1 / (least + 2), between.min()), max((most + 1) / (most + 2), between.max())
    assert least and most and (ours.min(), ours.max()) == ends
    inner = (theirs > 0) & (theirs < 1)
    assert np.allclose(ours[inner], theirs[inner], atol=1e-12) and abs(ours.mean() - y.mean()) < 0.02


def test_cross_fitting_sees_no_label_of_its_own_fold():
    y, p, patient = clustered(200, 0.5, 0, 6)
    fold = patient % 4
    flipped = np.where(fold == 2, ~y, y)
    for method in METHODS:
        one, other = cross_fit(method, y, p, fold), cross_fit(method, flipped, p, fold)
        assert (one[fold == 2] == other[fold == 2]).all()
    with pytest.raises(ValueError, match="two folds"):
        cross_fit("platt", y, p, np.zeros(len(y)))
    with pytest.raises(ValueError, match="without fold 0.*all 2 labels are 1"):
        cross_fit("platt", [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])


def test_what_is_refused():
    for p in ([0.2, 1.2], [0.2, -0.1], [0.2, np.nan]):
        for call in (lambda p=p: measure([0, 1], p), lambda p=p: fit("platt", [0, 1], p), lambda p=p: apply({"method": "none"}, p)):
            with pytest.raises(ValueError, match="not probabilities"):
                call()
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        fit("temperatur", [0, 1], [0.2, 0.8])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        fit("platt", [0, 2], [0.2, 0.8])
    for prevalence in (0, 1, np.nan, -0.1):
        with pytest.raises(ValueError, match="prevalence wanted"):
            to_prevalence([0.2], 0.1, prevalence)


def test_prevalence_is_a_shift_of_the_logit():
    p = np.linspace(0.01, 0.99, 50)
    assert np.allclose(logit(to_prevalence(p, 0.5, 0.05)) - logit(p), logit(0.05), atol=1e-9)
    assert (to_prevalence([0, 1], 0.3, 0.6) == [0, 1]).all() and np.allclose(to_prevalence(p, 0.2, 0.2), p, atol=1e-15)


@pytest.mark.parametrize("name", DEGENERATE)
def test_plot_of_degenerate_input(name):
    y, p = DEGENERATE[name]
    ax = plot_reliability(y, p, np.arange(len(y)) // 2, label=name)
    ax.figure.canvas.draw()
    assert ax.get_title() == name and bins(y, p).slices.sum() == len(y)
    plt.close(ax.figure)
