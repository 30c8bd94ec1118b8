"Packs under fire: killed builders, two builders at once, changed files."
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ctbm import cohort, pack
from ctbm.preprocess import Preprocess, read_hu

BUILD = """
import sys, time
import pandas as pd
from ctbm import pack
from ctbm.preprocess import Preprocess
if __name__ == "__main__":
    write = pack.write_rows
    def slowly(*args):
        time.sleep(float(sys.argv[3]))
        return write(*args)
    slowly.__qualname__ = "slowly"
    pack.write_rows, pack.CHUNK = slowly, 8
    pack.code_version = lambda: "the same for all of this test"
    print(pack.build(pd.read_pickle(sys.argv[1]), Preprocess(size=48), sys.argv[2], jobs=1).key)
"""


@pytest.fixture
def slices(cohort_folder):
    return cohort.join_labels(cohort.scan(cohort_folder / "CTs", jobs=1), cohort_folder / "labels1.csv")


@pytest.fixture
def build(slices, tmp_path):
    "Start a builder in a process of its own; `pause` slows every chunk down."
    slices.to_pickle(tmp_path / "slices.pkl")
    (tmp_path / "build.py").write_text(BUILD)

    def start(pause=0.0):
        words = [sys.executable, tmp_path / "build.py", tmp_path / "slices.pkl", tmp_path / "packs", str(pause)]
        return subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def finished(process):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out.strip().splitlines()[-1]


def chunk_times(partial: Path) -> dict[str, int]:
    "When each finished chunk was written; chunks go when the pack is complete, also while this is looking."
    times = {}
    for chunk in partial.glob("chunk_*.json"):
        with suppress(FileNotFoundError):
            times[chunk.name] = chunk.stat().st_mtime_ns
    return times


def check_content(folder: Path, slices):
    "Every image of a pack is what preprocessing its file gives."
    images = np.load(folder / "images.npy")
    order = slices.assign(sha=[pack.file_hash(p) for p in slices.path]).sort_values(["sha", "frame"])
    assert len(images) == len(order)
    for image, path in list(zip(images, order.path, strict=True))[::7]:
        assert np.abs(image / 255 - Preprocess(size=48)(read_hu(path))).max() <= 0.5 / 255 + 1e-6


def test_killed_build_goes_on_where_it_stopped(build, slices, tmp_path):
    process = build(pause=0.3)
    deadline = time.time() + 60
    while len(list((tmp_path / "packs").glob("*.partial/chunk_*.json"))) < 4:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (partial,) = (tmp_path / "packs").glob("*.partial")
    kept = chunk_times(partial)
    assert 4 <= len(kept) < 15 and not (tmp_path / "packs" / partial.stem).exists()
    process = build(pause=0.3)
    while process.poll() is None and partial.exists():
        now = chunk_times(partial)
        assert all(now.get(name, when) == when for name, when in kept.items()), "a finished chunk was written again"
        time.sleep(0.1)
    key = finished(process)
    check_content(tmp_path / "packs" / key, slices)


def test_two_builders_at_once_make_one_pack(build, slices, tmp_path):
    one, two = build(pause=0.05), build(pause=0.05)
    assert finished(one) == (key := finished(two))
    assert sorted(p.name for p in (tmp_path / "packs").iterdir()) == [key, f"{key}.lock"]
    check_content(tmp_path / "packs" / key, slices)


def test_a_file_given_twice_is_packed_once(slices, tmp_path):
    twice = pack.build(slices.iloc[[0, 1, 0, 2]], Preprocess(size=32), tmp_path, jobs=1)
    assert len(twice.images) == 3 and len(twice.table) == 4
    assert twice.table.row[0] == twice.table.row[2]


def test_nothing_to_pack_is_an_error(slices, tmp_path):
    with pytest.raises(ValueError, match="no usable slice"):
        pack.build(slices.assign(problem="unreadable: cut short"), Preprocess(size=32), tmp_path)


def test_non_square_pixels_are_packed_square(data, tmp_path):
    table = cohort.scan(data / "odd_derived", jobs=1)
    one = table[table.slice_id == "08_nonsquare_pixels"]
    made = pack.build(one, Preprocess(size=64, crop="none"), tmp_path, jobs=1)
    spec, hu = Preprocess(size=64, crop="none"), read_hu(one.path.item())
    want = spec(hu, (one.row_mm.item(), one.col_mm.item()))
    assert np.abs(made.images[0] / 255 - want).max() < 0.003
    assert np.abs(want - spec(hu)).max() > 0.1


def test_no_pixel_spacing_costs_that_slice(slices, tmp_path):
    "Where the spec counts in mm, a slice without a spacing, or with a nonsensical one, is a row with a problem; otherwise nothing changes."
    some = slices[:8].assign(row_mm=[None, 0, 900, *slices.row_mm[3:8]])
    made = pack.build(some, Preprocess(size=32, resample_mm=8, fit="scale"), tmp_path, jobs=1)
    why = made.table.problem
    assert why.notna().tolist() == [True] * 3 + [False] * 5
    assert why[:2].str.startswith("no pixel spacing: resample_mm 8 needs").all() and "another unit" in why[2]
    assert not made.images[made.table.row[:3]].any() and all(made.images[row].any() for row in made.table.row[3:])
    plain = pack.build(some[:2], Preprocess(size=32), tmp_path, jobs=1)
    assert plain.table.problem.isna().all()


def test_a_corrected_spacing_is_another_pack(slices, tmp_path):
    spec = Preprocess(size=32, resample_mm=8, fit="scale")
    one, two = (pack.build(slices[:2].assign(row_mm=mm, col_mm=mm), spec, tmp_path, jobs=1) for mm in (0.4, 0.8))
    assert one.key != two.key and (one.images != two.images).any()


def test_areas_are_measured_where_an_organ_is_named(data, tmp_path):
    "With NaN for the slice that cannot be read, also after a build that was stopped; without an organ, the pixels are the same."
    (tmp_path / "cut.dcm").write_bytes((data / "chest_lungdx" / "1-13.dcm").read_bytes()[:90_000])
    slices = cohort.scan(data / "chest_lungdx", jobs=1)
    slices = slices[slices.problem.isna()]
    slices = slices.assign(path=[*slices.path[:-1], str(tmp_path / "cut.dcm")])
    made = pack.build(slices, Preprocess(size=32, organ="lung"), tmp_path / "packs", jobs=1)
    assert made.table.problem.notna().tolist() == [False] * 9 + [True]
    assert made.table[["hu_min", "organ_area", "body_area"]].iloc[-1].isna().all()
    sound = made.table[:-1]
    assert (sound.organ_area < sound.body_area).all() and (sound.body_area < 0.7).all() and sound.organ_area.max() > 0.1
    assert str(made.table.organ_area.dtype) == str(made.table.body_area.dtype) == "float64"
    (tmp_path / "packs" / made.key).rename(tmp_path / "packs" / f"{made.key}.partial")
    again = pack.build(slices, Preprocess(size=32, organ="lung"), tmp_path / "packs", jobs=1)
    assert again.key == made.key and again.table.equals(made.table)
    plain = pack.build(slices, Preprocess(size=32), tmp_path / "packs", jobs=1)
    assert plain.table.organ_area.isna().all() and plain.key != made.key and np.array_equal(plain.images, made.images)
