"Decisions under fire: the triage guarantee by simulation, net benefit against its formula, degenerate input."
import json
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.special import expit

from ctbm.calibration import to_prevalence
from ctbm.decision import ZONES, assign, at_prevalence, highest_cut, net_benefit, plot_decision, plot_triage, triage, triage_outcome

matplotlib.use("Agg")
PATIENTS, REPEATS = 3000, 1500


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class World:
    "A population of patients with unequal numbers of correlated slices; what a cut misses in it is known exactly."
    def __init__(self, kind: str):
        rng = np.random.default_rng(0)
        self.count = rng.integers(1, 13, PATIENTS)
        self.patient = np.repeat(np.arange(PATIENTS), self.count)
        n, level = len(self.patient), rng.normal(0, 1, PATIENTS)
        noise = rng.normal(0, 1, n)
        self.score = expit({
            "independent": noise,
            "clustered": 1.5 * level[self.patient] + 0.4 * noise,
            "few slices score low": (level + 0.3 * self.count)[self.patient] + 0.3 * noise,
            "bimodal": np.where(level > -1, 3.0, -4.0)[self.patient] + 0.1 * noise,
            "ties": np.round(level[self.patient] + noise),
            "two values": np.where(level[self.patient] + noise > -1.5, 2.0, -2.0),
        }[kind])
        self.rows = np.split(np.arange(n), np.cumsum(self.count)[:-1])
        self.order = np.argsort(self.score)
        self.below = np.concatenate([[0], np.cumsum((1 / self.count)[self.patient][self.order])]) / PATIENTS

    def missed(self, cut: float) -> float:
        "The expected share of a new patient's slices below the cut."
        return self.below[np.searchsorted(self.score[self.order], cut, side="left")]

    def draw(self, patients: int, rng) -> tuple[np.ndarray, np.ndarray]:
        rows = [self.rows[k] for k in rng.integers(0, PATIENTS, patients)]
        return self.score[np.concatenate(rows)], np.repeat(np.arange(patients), [len(r) for r in rows])


@pytest.mark.parametrize("kind", ["independent", "clustered", "few slices score low", "bimodal", "ties", "two values"])
@pytest.mark.parametrize(("patients", "level"), [(25, 0.05), (60, 0.05), (60, 0.2)])
def test_missed_share_keeps_to_its_level(kind, patients, level):
    world, rng = World(kind), np.random.default_rng(1)
    missed = [world.missed(highest_cut(*world.draw(patients, rng), level)) for _ in range(REPEATS)]
    mean, error = np.mean(missed), np.std(missed) / np.sqrt(REPEATS)
    assert mean <= level + 3 * error, f"{mean:.4f} is more than {level}"
    if kind not in ("ties", "two values"):  # a tie is not split, so that less is ruled out than might be
        assert mean >= level - 1 / (patients + 1) - 3 * error, f"{mean:.4f} is needlessly far below {level}"


def test_percentile_over_slices_breaks_the_promise():
    world, rng = World("few slices score low"), np.random.default_rng(1)
    drawn = [world.draw(60, rng) for _ in range(REPEATS)]
    naive = np.mean([world.missed(np.quantile(score, 0.05)) for score, _ in drawn])
    slices_as_patients = np.mean([world.missed(highest_cut(score, np.arange(len(score)), 0.05)) for score, _ in drawn])
    assert naive > 0.10 and slices_as_patients > 0.10
    assert np.mean([world.missed(highest_cut(*one, 0.05)) for one in drawn]) < 0.052


def test_both_errors_of_the_whole_triage_keep_to_their_levels():
    "Positives and negatives in the same patients; misses and false alarms of `triage` itself, also when the zones meet."
    for shift, met in ((1.5, False), (6.0, True)):
        rng, missed, alarmed, single = np.random.default_rng(2), [], [], 0
        for _ in range(200):
            patient = np.repeat(np.arange(80), rng.integers(1, 8, 80))
            label = rng.random(80)[patient] * 0.7 + rng.random(len(patient)) * 0.3 > 0.6
            score = expit(rng.normal(0, 1, 80)[patient] + rng.normal(0, 0.5, len(patient)) + np.where(label, shift, 0) - 1)
            known = patient < 60
            found = triage(label[known], score[known], patient[known], miss=0.1, false_alarm=0.1)
            single += found["rule_out_below"] == found["rule_in_from"]
            outcome = triage_outcome(label[~known], score[~known], patient[~known], found)
            missed.append(outcome["missed_by_patient"]["estimate"])
            alarmed.append(outcome["false_alarms_by_patient"]["estimate"])
        for shares in (missed, alarmed):
            assert np.nanmean(shares) <= 0.1 + 3 * np.nanstd(shares) / np.sqrt(200)
            assert met or np.nanmean(shares) >= 0.1 - 2 / 20 * 0.5 - 3 * np.nanstd(shares) / np.sqrt(200)
        assert (single > 190) == met


def test_fewest_patients_that_can_promise_anything():
    for level in (0.05, 0.01, 0.1, 0.3, 1 / 3):
        needed = int(np.ceil(1 / level - 1 - 1e-9))
        assert highest_cut(np.arange(float(needed)), np.arange(needed), level) == 0
        assert highest_cut(np.arange(needed - 1.0), np.arange(needed - 1), level) is None
        few = triage(np.ones(needed - 1, int), np.linspace(0.1, 0.9, needed - 1), miss=level)
        assert few["rule_out_below"] is None and few["remarks"][0].endswith(f"it takes {needed}.")
        assert few["rule_in_from"] is None and "0 patients on the negative" in few["remarks"][1]


def test_ties_and_steps_of_the_cuts():
    label = np.r_[np.ones(40, int), np.zeros(40, int)]
    score = np.r_[np.full(20, 0.4), np.full(20, 0.8), np.full(20, 0.1), np.full(20, 0.6)]
    found = triage(label, score, miss=0.05, false_alarm=0.05)
    assert found["rule_out_below"] == 0.4 and found["rule_in_from"] == np.nextafter(0.6, 1)
    zones = assign(json.loads(json.dumps(found)), score)
    assert zones.tolist() == ["review"] * 20 + ["rule in"] * 20 + ["rule out"] * 20 + ["review"] * 20
    assert set(assign(found, [0.0, 1.0, 0.5])) == set(ZONES)
    assert triage(label, np.full(80, 0.3))["rule_in_from"] > 0.3, "all equal: everything is for review"
    assert set(assign(triage(label, np.full(80, 0.3)), score=np.full(5, 0.3))) == {"review"}
    everywhere = triage(label, np.where(label, 1.0, 0.0))
    assert everywhere["rule_out_below"] == everywhere["rule_in_from"] and 0 < everywhere["rule_in_from"] <= 0.5 + 1e-9


def test_groups_are_what_counts():
    "Two copies of every slice are worth no more than one; as patients of their own they would be."
    rng = np.random.default_rng(3)
    label, score = rng.random(200) < 0.3, rng.random(200)
    once, twice = triage(label, score, np.arange(200)), triage(np.tile(label, 2), np.tile(score, 2), np.tile(np.arange(200), 2))
    assert once == twice and twice["positive_patients"] == label.sum()
    assert triage(label, score) == once


def test_net_benefit_is_its_formula():
    rng = np.random.default_rng(4)
    p = rng.beta(1, 8, 900)
    y, patient = rng.random(900) < p, np.arange(900) // 3
    for prevalence in (None, 0.02, 0.4):
        table = net_benefit(y, p, [0.05, 0.2, 0.5], patient, prevalence, resamples=100)
        share, moved = (y.mean(), p) if prevalence is None else (prevalence, to_prevalence(p, y.mean(), prevalence))
        for _, row in table.iterrows():
            called = moved >= row.threshold
            worth = called[y].mean() * share - called[~y].mean() * (1 - share) * row.threshold / (1 - row.threshold)
            assert np.isclose(row.model, worth, atol=1e-12)
            assert row.low <= row.model <= row.high or worth == 0 and np.isnan(row.low), "nothing called: no interval"
            assert np.isclose(row["all"], share - (1 - share) * row.threshold / (1 - row.threshold)) and row.none == 0
    assert list(table) == ["threshold", "model", "low", "high", "all", "none"]


def test_at_prevalence_counts_a_thousand():
    for sens, spec, prevalence, risk in ((0.69, 0.964, 0.055, 1 / 11), (1, 1, 0.3, 0.5), (0.5, 0.5, 1, 0.1), (0.9, 0.2, 0, 0.1)):
        found = at_prevalence(sens, spec, prevalence, risk)
        tp, fp, fn, tn = (found[k] for k in ("true_positives", "false_positives", "false_negatives", "true_negatives"))
        assert np.isclose(tp + fp + fn + tn, 1000) and np.isclose(tp + fn, 1000 * prevalence)
        assert np.isclose(found["net_benefit"], (tp - fp * risk / (1 - risk)) / 1000)
    assert np.isnan(at_prevalence(np.nan, 0.9, 0.1, 0.1)["ppv"]) and np.isnan(at_prevalence(0.5, 1, 0, 0.1)["ppv"])


def test_one_class_and_one_patient_are_marked():
    zeros, p = np.zeros(30, int), np.linspace(0.1, 0.9, 30)
    table = net_benefit(zeros, p, [0.2, 0.5], resamples=20)
    assert (table.model < 0).all() and np.isclose(table.model[0], -(p >= 0.2).mean() / 4)
    with pytest.raises(ValueError, match="all 30 labels are 0"):
        net_benefit(zeros, p, prevalence=0.1)
    outcome = triage_outcome(zeros, p, None, triage(zeros, p))
    assert np.isnan(outcome["missed"]["estimate"]) and np.isnan(outcome["missed_by_patient"]["estimate"])
    alone = triage([0, 1, 1], [0.1, 0.6, 0.7], ["a"] * 3)
    assert alone["rule_out_below"] is None and alone["positive_patients"] == alone["negative_patients"] == 1
    assert set(assign(alone, [0.0, 1.0])) == {"review"} and len(alone["remarks"]) == 2
    one = triage_outcome([0, 1, 1], [0.1, 0.6, 0.7], ["a"] * 3, alone)
    assert one["review"]["estimate"] == 1 and one["missed_by_patient"]["high"] > 0.9, "one patient says next to nothing"
    assert triage([0, 1] * 50, np.linspace(0, 1, 100), miss=0, false_alarm=0)["rule_out_below"] is None


def test_what_is_refused():
    cases = {
        "not probabilities": lambda: net_benefit([0, 1], [-2.0, 3.0]),
        "threshold probabilities": lambda: net_benefit([0, 1], [0.2, 0.3], [0.0, 0.5]),
        "prevalence wanted": lambda: net_benefit([0, 1], [0.2, 0.3], prevalence=1.0),
        "labels must be 0 or 1": lambda: triage([0, 2], [0.2, 0.3]),
        "scores are NaN or infinite": lambda: triage([0, 1], [0.2, np.nan]),
        "1 of 2 scores are NaN": lambda: assign({"rule_out_below": 0.1, "rule_in_from": None}, [0.2, np.nan]),
        "miss is 1": lambda: triage([0, 1], [0.2, 0.3], miss=1),
        "false_alarm is -0.1": lambda: triage([0, 1], [0.2, 0.3], false_alarm=-0.1),
        "sens is 1.2": lambda: at_prevalence(1.2, 0.9, 0.1, 0.1),
        "threshold_probability is 1": lambda: at_prevalence(0.9, 0.9, 0.1, 1),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_plots_of_degenerate_input():
    label, p = np.arange(60) % 5 == 0, np.linspace(0, 1, 60)
    for y, score in ((label, p), (label, np.full(60, 0.3)), (np.zeros(60, int), p), (np.ones(60, int), p), (label, label.astype(float))):
        for ax in (plot_triage(y, score, triage(y, score)), plot_decision(net_benefit(y, score, resamples=20))):
            ax.figure.canvas.draw()
            assert ax.get_xlim()[0] < ax.get_xlim()[1] and ax.get_ylim()[0] < ax.get_ylim()[1]
            plt.close(ax.figure)
