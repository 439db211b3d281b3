#!/usr/bin/env python3
"""Contracts SmallNet's expanded layers as the published PyTorch code does, beside bench_product, in one run.

The published contraction of ExpandNets multiplies 1x1 layers channel by channel in a Python loop (CL) and composes
kxk kernels by a transposed convolution (CK); this is that method, and the same with an einsum in place of each loop,
checked against the layers' own outputs first.

    benchmarks/peers/contract_torch.py build/release/benchmarks/bench_product

Rounds alternate between the two, so that both see the same machine; medians are compared.
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
    sys.exit("contract_torch.py: PyTorch is not installed; nothing compared")


def conv(inside, outside, kernel):
    return nn.Conv2d(inside, outside, kernel)


LAYERS = {
    "SmallNet_CL_8_32_64_16_k7": nn.Sequential(conv(8, 32, 1), conv(32, 64, 7), conv(64, 16, 1)),
    "SmallNet_CL_16_64_128_32_k7": nn.Sequential(conv(16, 64, 1), conv(64, 128, 7), conv(128, 32, 1)),
    "SmallNet_CK_8_32_64_16_k7": nn.Sequential(conv(8, 32, 3), conv(32, 64, 3), conv(64, 16, 3)),
    "SmallNet_CK_16_64_128_32_k7": nn.Sequential(conv(16, 64, 3), conv(64, 128, 3), conv(128, 32, 3)),
    "SmallNet_FC_512_2048_256_64": nn.Sequential(
        nn.Linear(512, 2048), nn.Linear(2048, 256), nn.Linear(256, 64)
    ),
}


def spatial_then_bias(first, second, weight):
    bias = second[1] + second[0].flatten(2).sum(2) @ first[1]
    return weight, bias


def pointwise_then_spatial(first, second):
    (w1, _), (w2, _) = first, second
    rows = torch.empty(w2.shape[0], w1.shape[1], w2.shape[2] * w2.shape[3])
    for out, kernel in enumerate(w2.flatten(2)):
        rows[out] = w1.flatten(1).t() @ kernel
    return spatial_then_bias(first, second, rows.view(w2.shape[0], w1.shape[1], *w2.shape[2:]))


def spatial_then_pointwise(first, second):
    (w1, b1), (w2, b2) = first, second
    columns = torch.empty(w2.shape[0], w1.shape[1], w1.shape[2] * w1.shape[3])
    kernels = w1.flatten(2)
    for channel in range(w1.shape[1]):
        columns[:, channel] = w2.flatten(1) @ kernels[:, channel]
    return columns.view(w2.shape[0], *w1.shape[1:]), w2.flatten(1) @ b1 + b2


def pointwise_then_spatial_einsum(first, second):
    weight = torch.einsum("omyx,mc->ocyx", second[0], first[0].flatten(1))
    return spatial_then_bias(first, second, weight)


def spatial_then_pointwise_einsum(first, second):
    weight = torch.einsum("om,mcyx->ocyx", second[0].flatten(1), first[0])
    return weight, second[0].flatten(1) @ first[1] + second[1]


PUBLISHED = pointwise_then_spatial, spatial_then_pointwise
EINSUM = pointwise_then_spatial_einsum, spatial_then_pointwise_einsum


def spatial_then_spatial(first, second):
    return spatial_then_bias(first, second, nn.functional.conv_transpose2d(second[0], first[0]))


def linear_then_linear(first, second):
    return second[0] @ first[0], second[0] @ first[1] + second[1]


def contract(layers, pointwise_first=pointwise_then_spatial, pointwise_last=spatial_then_pointwise):
    product = (layers[0].weight, layers[0].bias)
    for layer in layers[1:]:
        following = (layer.weight, layer.bias)
        if product[0].dim() == 2:
            product = linear_then_linear(product, following)
        elif product[0].shape[2] == 1:
            product = pointwise_first(product, following)
        elif following[0].shape[2] == 1:
            product = pointwise_last(product, following)
        else:
            product = spatial_then_spatial(product, following)
    return product


def check(layers):
    """The method is right: the contracted layer does what the layers do."""
    for method in (PUBLISHED, EINSUM):
        weight, bias = contract(layers, *method)
        size = weight.shape[-1] + 2
        x = torch.randn(2, weight.shape[1], *([size, size] if weight.dim() == 4 else []))
        apply = nn.functional.conv2d if weight.dim() == 4 else nn.functional.linear
        torch.testing.assert_close(apply(x, weight, bias), layers(x), rtol=1e-3, atol=1e-4)


def microseconds_torch(layers, method, at_least=0.3):
    contract(layers, *method)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least or len(times) < 5:
        start = time.perf_counter()
        contract(layers, *method)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def microseconds_ours(binary, name):
    command = [binary, f"--benchmark_filter=^{name}$", "--benchmark_format=json", "--benchmark_min_time=0.3"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (row,) = report["benchmarks"]
    return row["real_time"]


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("binary", help="bench_product, as built by the preset release")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}; microseconds, medians of {options.rounds} alternating rounds")
    threads = torch.get_num_threads()
    columns = [(method, count) for method in (PUBLISHED, EINSUM) for count in (1, threads)]
    names = [f"{name}, {count}" for name in ("published", "einsum") for count in (1, threads)]
    print(f"{'layer':<30}{'ours, 1 thread':>16}" + "".join(f"{name:>16}{'ratio':>8}" for name in names))
    for name, layers in LAYERS.items():
        check(layers)
        ours, theirs = [], [[] for _ in columns]
        for _ in range(options.rounds):
            ours.append(microseconds_ours(options.binary, name))
            for times, (method, count) in zip(theirs, columns, strict=True):
                torch.set_num_threads(count)
                times.append(microseconds_torch(layers, method))
        mine = statistics.median(ours)
        ratios = "".join(f"{time:>16.0f}{time / mine:>8.1f}" for time in map(statistics.median, theirs))
        print(f"{name:<30}{mine:>16.0f}{ratios}")


if __name__ == "__main__":
    main()
