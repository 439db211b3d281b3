#!/usr/bin/env python3
"""Contracts whole networks' expanded layers on a GPU as the published PyTorch code does, beside bench_cuda_contraction.

The published contraction multiplies 1x1 layers channel by channel and depthwise layers group by group in Python loops,
and composes kxk kernels by a transposed convolution; each layer's is checked against the layers' own outputs first.

    benchmarks/peers/contract_torch_cuda.py build/cuda/benchmarks/bench_cuda_contraction

Both are timed by CUDA events, warm, on the same GPU in alternating rounds; medians are compared. Without the binary the
published method alone is checked and timed, with --device cpu on the CPU. Each network is printed when it is done.
SPDX-License-Identifier: Apache-2.0
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

try:
    import torch
    from torch import nn
except ImportError:
    sys.exit("contract_torch_cuda.py: PyTorch is not installed; nothing compared")


def networks():
    """The networks of bench_cuda_contraction: what makes and checks a network, and returns what contracts it."""
    import contract_torch
    import fold_torch

    def conv(inside, outside, kernel, **options):
        return nn.Conv2d(inside, outside, kernel, **options)

    def plain(*chains):
        chains = [chain() for chain in chains]
        for layers in chains:
            contract_torch.check(layers)
        return lambda: [contract_torch.contract(layers) for layers in chains]

    def cl(*widths, kernel=7):
        kernels = [1, kernel, 1]
        return lambda: nn.Sequential(*(conv(i, o, k) for i, o, k in zip(widths, widths[1:], kernels)))

    def ck(*widths):
        return lambda: nn.Sequential(*(conv(i, o, 3) for i, o in zip(widths, widths[1:])))

    def fc():
        return nn.Sequential(nn.Linear(512, 2048), nn.Linear(2048, 256), nn.Linear(256, 64))

    def mobilenet():
        chains = [(layers, norm) for layers, norm in fold_torch.network() if len(layers) > 1]
        for layers, norm in chains:
            fold_torch.check(layers, norm)
        return lambda: [fold_torch.contract(layers) for layers, _ in chains]

    small_cl = [cl(3, 3, 32, 8), cl(8, 32, 64, 16), cl(16, 64, 128, 32)]
    small_ck = [ck(3, 3, 32, 8), ck(8, 32, 64, 16), ck(16, 64, 128, 32)]
    return {
        "SmallNet_CL": lambda: plain(*small_cl),
        "SmallNet_CK": lambda: plain(*small_ck),
        "SmallNet_CL_FC": lambda: plain(*small_cl, fc),
        "SmallNet_CK_FC": lambda: plain(*small_ck, fc),
        "MobileNet_CL": mobilenet,
        "AlexNet_CK_11_5": lambda: plain(ck(3, 12, 256, 256, 256, 64), ck(64, 256, 192)),
        "UNet_CL_512": lambda: plain(cl(512, 2048, 2048, 512, kernel=3)),
    }


def microseconds_torch(contract, device, at_least=0.5):
    contract()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least or len(times) < 5:
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contract()
            stop.record()
            stop.synchronize()
            times.append(1e3 * start.elapsed_time(stop))
        else:
            start = time.perf_counter()
            contract()
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def microseconds_ours(binary, name):
    command = [binary, f"--benchmark_filter=^{name}/", "--benchmark_format=json", "--benchmark_min_time=0.3"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (row,) = (row for row in report["benchmarks"] if row["aggregate_name"] == "median")
    return row["real_time"]


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("binary", nargs="?", help="bench_cuda_contraction, as built by the preset cuda")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--networks", default="", help="those whose names begin so")
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments.add_argument("--json", action="store_true", help="print a line of JSON for each network")
    options = arguments.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("contract_torch_cuda.py: there is no CUDA device; nothing compared")
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    if not options.json:
        print(f"PyTorch {torch.__version__}, {where}; microseconds, medians of {options.rounds} alternating rounds")
    for name, make in networks().items():
        if not name.startswith(options.networks):
            continue
        contract = make()
        ours, theirs = [], []
        for _ in range(options.rounds):
            if options.binary:
                ours.append(microseconds_ours(options.binary, name))
            theirs.append(microseconds_torch(contract, options.device))
        row = {"network": name, "torch": statistics.median(theirs)}
        if ours:
            row["ours"] = statistics.median(ours)
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        compared = f"   ours {row['ours']:>10.1f}   torch / ours {row['torch'] / row['ours']:.1f}" if ours else ""
        print(f"{name:<20}torch {row['torch']:>12.1f}{compared}", flush=True)


if __name__ == "__main__":
    main()
