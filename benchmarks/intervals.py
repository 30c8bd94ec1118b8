"How often 95 % intervals hold the truth, in cohorts drawn from a model whose figures are known. Prints coverages, and speed as a ratio."

import sys
import time
import warnings
from typing import NamedTuple

import numpy as np
from pandas import DataFrame
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from ctbm.evaluate import area_interval, at_threshold, bootstrap, compare, delong, rarer_class, score

GAP = 1.3  # between the means of positive and negative slices, in standard deviations
BETTER = 1.6  # of a second model
CUT = 0.6  # operating point


class Cohort(NamedTuple):
    patients: int
    slices: int  # of a patient, on average
    between: float  # share of the scores' variance that lies between patients
    ill: float  # share of patients
    bleeding: float  # share of an ill patient's slices that are positive


COHORTS = {
    "independent, 75 patients, 15 ill": Cohort(75, 1, 0, 0.2, 1),
    "independent, 300 patients, 60 ill": Cohort(300, 1, 0, 0.2, 1),
    "10 slices a patient, 75 patients, 15 ill": Cohort(75, 10, 0.5, 0.2, 0.6),
    "10 slices a patient, 150 patients, 45 ill": Cohort(150, 10, 0.5, 0.3, 0.6),
}


def draw(cohort, rng):
    "Labels, the scores of two models that share half of their noise, and patients"
    number = 1 + rng.poisson(cohort.slices - 1, cohort.patients)
    patient = np.repeat(np.arange(cohort.patients), number)
    label = (rng.random(cohort.patients) < cohort.ill)[patient] & (rng.random(len(patient)) < cohort.bleeding)
    within = np.sqrt(1 - cohort.between)
    noise = [np.sqrt(cohort.between) * rng.normal(size=cohort.patients)[patient] + within * rng.normal(size=len(patient)) for _ in range(3)]
    return label, GAP * label + (noise[0] + noise[1]) / np.sqrt(2), BETTER * label + (noise[0] + noise[2]) / np.sqrt(2), patient


def truths(cohort, gap):
    "Figures of all slices there could be: two normal distributions of unit variance, `gap` apart"
    share = cohort.ill * cohort.bleeding

    def precision(x):
        found, false = share * norm.sf(x - gap), (1 - share) * norm.sf(x)
        return norm.pdf(x - gap) * found / (found + false)

    return {"roc_auc": norm.cdf(gap / np.sqrt(2)), "auprc": quad(precision, -8, 8 + gap)[0], "sensitivity": norm.sf(CUT - gap)}


def intervals(label, a, b, patient, resamples, seed):
    "Every interval of one cohort: (figure, method) -> low, high"
    ours, slices = (score(label, a, CUT, groups, resamples, seed) for groups in (patient, None))
    called = bootstrap(lambda w: at_threshold(label, a >= CUT, w), patient, resamples, seed, rarer_class(label, patient))
    found = {("sensitivity", "bootstrap"): called["sensitivity"]}
    for end, figures in (("", ours), (" of slices", slices)):
        found |= {(name, "bootstrap" + end): figures[name] for name in ("roc_auc", "auprc")}
        found["sensitivity", "Wilson" + end] = figures["sensitivity"]
    found = {key: (figure["low"], figure["high"]) for key, figure in found.items()}
    several = rarer_class(label, patient) if len(np.unique(patient)) < len(label) else None
    for method, groups in (("DeLong", patient), ("DeLong of slices", None)):
        (area,), ((variance,),) = delong(label, [a], groups)
        found["roc_auc", method] = area_interval(area, variance, several if groups is not None else None)
    versus = compare(label, a, b, patient, resamples=resamples, seed=seed)
    for name in ("roc_auc", "auprc"):
        found[f"{name}, difference", versus.test[name].split(",")[0]] = versus.low[name], versus.high[name]
    return found


def coverage(cohort, repeats=500, resamples=1000, seed=0):
    "Share of repeats in which the interval holds the truth, by figure and method; a repeat without an interval does not count"
    rng = np.random.default_rng(seed)
    known, better = truths(cohort, GAP), truths(cohort, BETTER)
    known |= {f"{name}, difference": better[name] - known[name] for name in better}
    held = {}
    for repeat in range(repeats):
        for key, (low, high) in intervals(*draw(cohort, rng), resamples, repeat).items():
            if not np.isnan(low): held.setdefault(key, []).append(low <= known[key[0]] <= high)
    return {key: float(np.mean(values)) for key, values in held.items()}


def seconds(job):
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def speed(rounds=20):
    "2,000 resamples of 5,000 slices: ours, and a loop over scikit-learn's AUROC and average precision on the same patients"
    rng = np.random.default_rng(0)
    patient = np.arange(5000) // 3
    label = rng.random(5000) < 0.1
    p = rng.normal(label)
    rows = [np.flatnonzero(patient == k) for k in range(patient.max() + 1)]

    def loop():
        for _ in range(rounds):
            some = np.concatenate([rows[k] for k in rng.integers(0, len(rows), len(rows))])
            roc_auc_score(label[some], p[some])
            average_precision_score(label[some], p[some])

    return min(seconds(lambda: score(label, p, 0.5, patient)) for _ in range(5)), seconds(loop) * 2000 / rounds


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    warnings.filterwarnings("error")
    table = DataFrame({name: coverage(cohort, repeats) for name, cohort in COHORTS.items()})
    table.columns = range(1, len(COHORTS) + 1)
    print(f"coverage of 95 % intervals in {repeats} repeats")
    print(table.sort_index().round(3).to_string())
    for number, name in enumerate(COHORTS, 1): print(f"  {number}  {name}")
    ours, loop = speed()
    print(f"2,000 resamples of 5,000 slices: {ours:.2f} s; a scikit-learn loop {loop:.0f} s, {loop / ours:.0f} times as long")
