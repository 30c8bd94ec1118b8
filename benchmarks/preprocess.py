"Reading and preparing one 512 x 512 slice, against what a careful user would write by hand. Prints medians and ratios."

import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from pydicom import dcmread
from scipy import ndimage
from torchvision.transforms.v2 import functional as tvf

from ctbm.phantom import make_cohort
from ctbm.preprocess import Preprocess, read_hu


def by_hand_hu(path):
    "pydicom's own pixel array and rescale"
    ds = dcmread(path)
    return ds.pixel_array.astype(np.float32) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


def by_hand(hu):
    "The largest piece of tissue at full resolution, three windows, an antialiased resize"
    labels, count = ndimage.label(hu > -300)
    head = labels == 1 + np.argmax(ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1)))
    rows, cols = np.flatnonzero(head.any(1)), np.flatnonzero(head.any(0))
    crop = hu[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    image = torch.from_numpy(np.stack([np.clip((crop - low) / 30, 0, 1) for low in (0, 30, 60)]))
    height, width = crop.shape
    scale = 256 / max(height, width)
    image = tvf.resize(image, [round(height * scale), round(width * scale)], antialias=True)
    bottom, right = 256 - image.shape[1], 256 - image.shape[2]
    return tvf.pad(image, [right // 2, bottom // 2, right - right // 2, bottom - bottom // 2]).numpy()


def medians(jobs, rounds=60):
    "Median milliseconds of each job; the jobs take turns, so that a busy machine is equally unkind to all"
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1: path = Path(sys.argv[1])
        else: path = next(make_cohort(Path(folder) / "cohort", n_patients=1).glob("CTs/**/*.dcm"))
        hu = read_hu(path)
        stages = {
            "read": {"by hand": lambda: by_hand_hu(path), "ctbm": lambda: read_hu(path)},
            "prepare": {
                "by hand": lambda: by_hand(hu),
                "ctbm": lambda: Preprocess()(hu),
                "ctbm published": lambda: Preprocess.published()(hu),
            },
        }
        for stage, jobs in stages.items():
            result = medians(jobs)
            for name, ms in result.items(): print(f"{stage:8} {name:15} {ms:6.2f} ms   {result['by hand'] / ms:4.1f}x")
