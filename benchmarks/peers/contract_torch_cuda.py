#!/usr/bin/env python3
"""Contracts whole networks' expanded layers on a GPU as the published PyTorch code does, beside bench_cuda_contraction.

The published contraction multiplies 1x1 layers channel by channel and depthwise layers group by group in Python loops,
and composes kxk kernels by a transposed convolution; each layer's is checked against the layers' own outputs first.

    benchmarks/peers/contract_torch_cuda.py build/cuda/benchmarks/bench_cuda_contraction

Both are timed by CUDA events, warm, on the same GPU in alternating rounds; medians are compared. With --device cpu the
method alone is checked, without the other side.
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
    """The networks of bench_cuda_contraction: layers, and how a network's are contracted."""
    import contract_torch
    import fold_torch

    def conv(inside, outside, kernel, **options):
        return nn.Conv2d(inside, outside, kernel, **options)

    def plain(chains):
        for layers in chains:
            contract_torch.check(layers)
        return lambda: [contract_torch.contract(layers) for layers in chains]

    def cl(widths, kernel):
        kernels = [1, kernel, 1]
        return nn.Sequential(*(conv(i, o, k) for i, o, k in zip(widths, widths[1:], kernels)))

    def ck(widths):
        return nn.Sequential(*(conv(i, o, 3) for i, o in zip(widths, widths[1:])))

    fc = nn.Sequential(nn.Linear(512, 2048), nn.Linear(2048, 256), nn.Linear(256, 64))
    small_cl = [cl(widths, 7) for widths in ([3, 3, 32, 8], [8, 32, 64, 16], [16, 64, 128, 32])]
    small_ck = [ck(widths) for widths in ([3, 3, 32, 8], [8, 32, 64, 16], [16, 64, 128, 32])]
    folded = fold_torch.network()
    for layers, norm in folded:
        fold_torch.check(layers, norm)
    mobilenet = [layers for layers, _ in folded if len(layers) > 1]
    return {
        "SmallNet_CL": plain(small_cl),
        "SmallNet_CK": plain(small_ck),
        "SmallNet_CL_FC": plain(small_cl + [fc]),
        "SmallNet_CK_FC": plain(small_ck + [fc]),
        "MobileNet_CL": lambda: [fold_torch.contract(layers) for layers in mobilenet],
        "AlexNet_CK_11_5": plain([ck([3, 12, 256, 256, 256, 64]), ck([64, 256, 192])]),
        "UNet_CL_512": plain([cl([512, 2048, 2048, 512], 3)]),
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
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = arguments.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("contract_torch_cuda.py: there is no CUDA device; nothing compared")
    if options.device == "cuda" and not options.binary:
        arguments.error("the binary is missing")
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"PyTorch {torch.__version__}, {where}; microseconds, medians of {options.rounds} alternating rounds")
    for name, contract in networks().items():
        ours, theirs = [], []
        for _ in range(options.rounds):
            if options.binary:
                ours.append(microseconds_ours(options.binary, name))
            theirs.append(microseconds_torch(contract, options.device))
        torch_time = statistics.median(theirs)
        compared = ""
        if ours:
            mine = statistics.median(ours)
            compared = f"   ours {mine:>10.1f}   torch / ours {torch_time / mine:.1f}"
        print(f"{name:<20}torch {torch_time:>12.1f}{compared}")


if __name__ == "__main__":
    main()
