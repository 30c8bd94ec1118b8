"Memory of one training step on patients: it grows with the cap, not with the longest patient. The peer is a bag of 15 slices."

import argparse
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from pandas import DataFrame

from ctbm import learning, recipes
from ctbm.bags import BagDataset, train_loader
from ctbm.patient import BagModule

WAYS = {  # slices of the longest patient, cap, activation checkpointing
    "15 slices, all": (15, None, False),
    "60 slices, all": (60, None, False),
    "60 slices, all, checkpointing": (60, None, True),
    "60 slices, cap 30": (60, 30, False),
    "600 slices, cap 30": (600, 30, False),
}


def measure(longest, cap, saving, backbone, size, pooling, steps):
    "Median seconds a step, and the peak of resident memory in GiB"
    values = {"backbone": backbone, "size": size, "bag_pooling": pooling, "max_slices": cap, "batch_size": 1, "weights": "none",
              "activation_checkpointing": saving, "precision": "32"}
    recipe = recipes.resolve("patient", "demo", values=values)
    long, short = np.repeat(["long", "short"], [longest, 2]), np.arange(longest + 2)
    table = DataFrame({"patient": long, "row": short % 8, "position_mm": short, "label": (short == 3).astype(int)})
    images = np.random.default_rng(0).integers(0, 255, (8, 1, size, size)).astype(np.uint8)
    network = learning.build(recipe, "none").train()
    module = BagModule(network, recipe, recipe.stages[-1], 0, np.array([0, 1]))
    optimizer, seconds = torch.optim.Adam(network.parameters()), []
    for epoch in range(steps):
        for batch in train_loader(BagDataset(images, table, cap), 1, 0, None, epoch):
            if not batch.labels.all(): continue
            start = time.perf_counter()
            module.training_step(batch, 0)["loss"].backward()
            optimizer.step(), optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pooling", default="max")
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--way", choices=WAYS, help="measure this one here and print its two numbers")
    args = parser.parse_args()
    if args.way:
        print(*measure(*WAYS[args.way], args.backbone, args.size, args.pooling, args.steps))
        sys.exit()
    print(f"{args.backbone}, {args.size} x {args.size}, pooling {args.pooling}, {torch.get_num_threads()} threads")
    print(f"{'':32} {'s/step':>14} {'GiB':>15}")
    plain = None
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        found = [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
        plain = plain or found
        print(f"{way:32}", " ".join(f"{a:7.2f} {a / b:6.2f}x" for a, b in zip(found, plain, strict=True)), flush=True)
