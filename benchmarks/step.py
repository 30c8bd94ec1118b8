"One training step of EfficientNetV2-M on the processor: seconds an image by the clock and of all cores, and peak memory."

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from ctbm.losses import Objective, loss_named
from ctbm.models import create_model, save_memory

WAYS = {  # batch, batches added up before a step, activation checkpointing
    "batch 8": (8, 1, False),
    "batch 8, checkpointing": (8, 1, True),
    "batch 4": (4, 1, False),
    "batch 4, checkpointing": (4, 1, True),
    "batch 4 x 2": (4, 2, False),
    "batch 4 x 2, checkpointing": (4, 2, True),
}


def measure(batch, parts, saving, backbone, size, steps):
    "Median seconds an image by the clock, the same added up over the cores, and the peak of resident memory in GiB"
    torch.manual_seed(0)
    network = create_model(backbone, weights="none", dropout_p=0.3, drop_path_p=0.2).to(memory_format=torch.channels_last).train()
    if saving: save_memory(network)
    labels = (torch.arange(batch) == 0).float()
    loss = loss_named(Objective(loss="focal"), labels.numpy())
    images = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    optimizer, seconds, work = torch.optim.Adam(network.parameters(), lr=1e-4), [], []
    for _ in range(steps):
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(parts):
            (loss(network(images).squeeze(1), labels) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append((time.perf_counter() - start) / (batch * parts))
        work.append((time.process_time() - worked) / (batch * parts))
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return statistics.median(seconds[1:]), statistics.median(work[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="tf_efficientnetv2_m")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("--way", choices=WAYS, help="measure this one here and print its three numbers")
    args = parser.parse_args()
    if args.way:
        print(*measure(*WAYS[args.way], args.backbone, args.size, args.steps))
        sys.exit()
    print(f"{args.backbone}, {args.size} x {args.size}, {torch.get_num_threads()} threads")
    print(f"{'':28} {'s/image':>13} {'all cores':>15} {'GiB':>15}")
    plain = None
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        found = [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
        plain = plain or found
        print(f"{way:28}", " ".join(f"{a:7.2f} {a / b:6.2f}x" for a, b in zip(found, plain, strict=True)), flush=True)
