"The reference of a cohort against real scans: what is said in words, and how far they are."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load, save
from sklearn.covariance import LedoitWolf

from ctbm import reference
from ctbm.cohort import images, scan
from ctbm.phantom import make_cohort
from ctbm.preprocess import read_hu
from ctbm.reference import Distance, mismatches


def measured(folder):
    "The table of a folder of scans, with the HU that a pack would measure."
    table = images(scan(folder, jobs=1)).reset_index(drop=True)
    hu = [read_hu(row.path, row.frame) for row in table.itertuples()]
    return table.assign(hu_min=[x.min() for x in hu], hu_max=[x.max() for x in hu], hu_mean=[x.mean() for x in hu])


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    "Whole series of two synthetic patients."
    folder = make_cohort(tmp_path_factory.mktemp("reference") / "cohort", 2, seed=1, layout="patients", jobs=1, progress=False)
    return measured(folder / "CTs")


@pytest.fixture(scope="module")
def head(data): return measured(data / "headct_ge_hispeed_tilt18p5")


def test_a_real_cohort_does_not_differ_from_itself(head, phantoms):
    for cohort in (head, phantoms, pd.concat([head, phantoms])):
        known = reference.ranges(cohort)
        assert json.loads(json.dumps(known, allow_nan=False)) == known
        assert not any(mismatches(known, one) for _, one in cohort.groupby("series"))


def test_a_real_head_against_phantoms(head, phantoms):
    "Thicknesses, a kernel and a manufacturer that the phantoms never had; the rest is alike."
    said = mismatches(reference.ranges(phantoms), head)
    assert any(sentence.startswith("slice thickness 4 and 7 mm; training 5 mm") for sentence in said), said
    assert any(sentence.startswith("kernel STD+; training ") for sentence in said), said
    assert not any("pixel size" in sentence or "matrix" in sentence or "value of a slice" in sentence for sentence in said), said
    agents = reference.ranges(phantoms)["words"]["contrast"]
    assert any("contrast" in sentence for sentence in said) == ("not recorded" not in agents)


def test_a_real_chest_and_lost_rescale_against_a_head(head, data):
    known = reference.ranges(head)
    said = " | ".join(mismatches(known, measured(data / "chest_lungdx")))
    for words in ("slice thickness 8 mm; training 4 to 7 mm", "pixel size 0.65 mm; training 0.49 mm", "kernel B40f; training STD+",
                  "manufacturer SIEMENS; training GE MEDICAL SYSTEMS", "gantry tilt 0 degrees; training 18.5 degrees"):
        assert words in said, said
    lost = head.assign(hu_min=head["hu_min"] + 1024, hu_max=head["hu_max"] + 1024, hu_mean=head["hu_mean"] + 1024)
    assert len(mismatches(known, lost)) == 3 and mismatches(known, head.assign(hu_max=head["hu_max"] + 50)) == []


def test_no_name_of_a_patient_leaves(head):
    text = json.dumps(reference.ranges(head.assign(contrast="Omnipaque, Mrs Smith")))
    named = {str(value) for column in ("patient", "study", "series", "path", "instance") for value in head[column]}
    assert "Smith" not in text and not any(value in text for value in named)


def test_old_tables_and_old_references(head):
    "Tables from before `contrast`, and those read back from parquet or CSV, compare as well."
    old = head.drop(columns=["contrast", "hu_mean", "kernel"])
    assert mismatches(reference.ranges(old), head) == [] and mismatches(reference.ranges(head), old) == []
    from_csv = head.assign(contrast=np.nan, kernel=np.nan, thickness_mm=np.nan, position_mm=np.nan)
    assert mismatches(reference.ranges(head), from_csv) == [] and mismatches(reference.ranges(from_csv), head) == []


def test_distance_through_a_file_and_against_scikit_learn():
    rng = np.random.default_rng(0)
    features, held = rng.gamma(2, size=(900, 12)), rng.gamma(2, size=(150, 12))
    distance = Distance.fit(features, np.arange(900), held)
    assert np.allclose(distance.mahalanobis(held) ** 2, LedoitWolf().fit(features).mahalanobis(held), rtol=1e-5)
    again = Distance.from_tensors(load(save(distance.tensors())))
    assert np.array_equal(again(held), distance(held)) and np.allclose(np.sort(distance(held)) * 151, np.arange(150))
    assert np.array_equal(np.concatenate([distance(part) for part in np.split(held, 10)]), distance(held))


def test_odd_features():
    rng = np.random.default_rng(0)
    dead = rng.normal(size=(50, 6)) * [1, 1, 1, 1, 1, 0]  # a feature that never varied
    distance = Distance.fit(dead, np.arange(50), dead[:20])
    assert np.isfinite(distance.whitening).all() and distance(dead[:1] + [[0, 0, 0, 0, 0, 5]]) == 20 / 21
    constant = Distance.fit(np.ones((5, 3)), np.arange(5), np.ones((4, 3)))
    assert constant(np.ones((1, 3))) == 0 and constant(np.zeros((1, 3))) == 0.8
    assert distance(np.full((1, 6), np.nan)) == 20 / 21  # not a number: nothing is further
    for n, patients, held in [(1, 1, dead), (50, 50, dead[:0]), (50, 49, dead), (50, 50, dead[:, :3])]:
        with pytest.raises(ValueError, match="held-out"): Distance.fit(dead[:n], np.arange(patients), held)
    with pytest.raises(ValueError, match="NaN|infinity"): Distance.fit(np.full((5, 3), np.nan), np.arange(5), np.ones((4, 3)))


def test_import_is_light():
    code = "import sys, ctbm.reference; print({'torch', 'matplotlib', 'ctbm.phantom'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
