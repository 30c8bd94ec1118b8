"Files to scores, beside what a user would write in plain PyTorch: slices per second and ratios, in one process, in turns."

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pydicom import dcmread
from torch.utils.data import DataLoader, Dataset

from ctbm import bundle, predict
from ctbm.learning import prepare
from ctbm.phantom import make_cohort

MALLOPT = {"trim threshold": -1, "top pad": -2, "mmap threshold": -3, "mmap max": -4}  # glibc's malloc.h
KEEP = {"mmap max": 0, "trim threshold": 2**31 - 1, "top pad": 64 * 2**20}  # large arrays are kept for the next one
USUAL = {"mmap max": 65536, "trim threshold": 128 * 2**10, "top pad": 0, "mmap threshold": 128 * 2**10}


class Files(Dataset):
    "pydicom's own pixel array and rescale, then the run's preprocessing"

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self): return len(self.paths)

    def __getitem__(self, i):
        ds = dcmread(self.paths[i])
        hu = ds.pixel_array.astype(np.float32) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        image = self.preprocess(np.maximum(hu, -1024), tuple(map(float, ds.PixelSpacing)))
        return torch.from_numpy(np.rint(image * 255).astype(np.uint8))


@torch.no_grad()
def by_hand(made, network, batches):
    "Scores of what comes in batches, in fp32"
    return torch.cat([torch.sigmoid(network(prepare(images, made.network).contiguous())).squeeze(1) for images in batches]).numpy()


def ways(run, folder, engines, jobs, workers):
    "What takes turns; each returns the scores of all slices, by path"
    made = bundle.load(run)
    network = bundle.load(run).network.to(memory_format=torch.contiguous_format)  # as a user would load it
    files = Files(sorted(folder.rglob("*.dcm")), made.preprocess)
    if not len(files): sys.exit(f"no .dcm file below {folder}")
    loader = DataLoader(files, batch_size=32, num_workers=workers)
    found = {"one at a time": lambda: by_hand(made, network, (files[i][None] for i in range(len(files)))),
             f"DataLoader, {workers} workers": lambda: by_hand(made, network, loader)}
    for engine in engines:
        predictor = predict.load(run, engine=engine, num_workers=jobs)
        predictor.look(np.zeros((1, *files[0].shape), np.uint8))  # what is made once is not counted
        found[f"ctbm, {engine}"] = lambda predictor=predictor: predictor(folder)
    return len(files), found


def turns(jobs, rounds):
    "Seconds of each job in each round; the jobs take turns, so that a busy machine is equally unkind to all"
    seconds = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_: seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title, count, seconds):
    "Median slices per second and the median of the ratios to the first within a round"
    first = next(iter(seconds.values()))
    print(f"\n{title}\n{'':28} {'slices/s':>9} {'ratio':>7}")
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, each, strict=True))
        print(f"{name:28} {count / statistics.median(each):9.1f} {ratio:6.2f}x", flush=True)


def with_memory(settings, job):
    "A job that first tells glibc how to keep memory"
    libc = ctypes.CDLL("libc.so.6")

    def run():
        for name, value in settings.items(): libc.mallopt(MALLOPT[name], value)
        libc.malloc_trim(0)
        return job()
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run, or a bundle")
    parser.add_argument("folder", type=Path, nargs="?", help="DICOM files; by default a synthetic cohort of whole series")
    parser.add_argument("--engines", nargs="+", default=["torch", "onnx"], help="names in ctbm.export.ENGINES")
    parser.add_argument("--jobs", type=int, help="processes of ctbm; by default one for each processor")
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mallopt", action="store_true", help="also compare glibc's habits of giving memory back (Linux)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or make_cohort(Path(place) / "cohort", n_patients=8, layout="patients")
        count, jobs = ways(args.run, folder, args.engines, args.jobs, args.workers)
        title = f"{count} slices, {bundle.load(args.run).model['backbone']}, {torch.get_num_threads()} threads"
        table(title, count, turns(jobs, args.rounds))
        if args.mallopt:
            made = bundle.load(args.run)
            spec, whole = made.preprocess, predict.load(args.run, num_workers=args.jobs)
            images = np.random.default_rng(0).integers(0, 256, (64, len(spec.windows), spec.size, spec.size), np.uint8)
            parts = {"the whole way": (lambda: whole(folder), count), "the network alone": (lambda: made.look(images), len(images))}
            for name, (job, n) in parts.items():
                both = {"as usual": with_memory(USUAL, job), "memory kept": with_memory(KEEP, job)}
                table(f"{name}: glibc", n, turns(both, args.rounds))
