#!/usr/bin/env python3
"""Folds MobileNetV1's expanded layers and batch norms as the published PyTorch code does, beside bench_fold, in a run.

The published contraction of depthwise layers multiplies one group of channels after another in a Python loop; batch
norms are fused by torch.nn.utils.fusion. The result is checked against the layers' own outputs first.

    benchmarks/peers/fold_torch.py build/release/benchmarks/bench_fold

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
    from torch.nn.utils.fusion import fuse_conv_bn_weights
except ImportError:
    sys.exit("fold_torch.py: PyTorch is not installed; nothing compared")

from contract_torch import pointwise_then_spatial, spatial_then_pointwise

WIDTHS = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
RATE = 4


def norm(channels):
    layer = nn.BatchNorm2d(channels).eval()
    nn.init.uniform_(layer.running_mean, -1, 1)
    nn.init.uniform_(layer.running_var, 0.1, 2.1)
    nn.init.uniform_(layer.weight, -2, 2)
    nn.init.uniform_(layer.bias, -1, 1)
    return layer


def network():
    def conv(inside, outside, kernel, **options):
        return nn.Conv2d(inside, outside, kernel, bias=False, **options)

    layers = [
        (
            [
                conv(3, 3 * RATE, 1, padding=1),
                conv(3 * RATE, 32 * RATE, 3, stride=2),
                conv(32 * RATE, 32, 1),
            ],
            norm(32),
        )
    ]
    for inside, outside in zip(WIDTHS, WIDTHS[1:]):
        wide = RATE * inside
        depthwise = [
            conv(inside, wide, 1, padding=1, groups=inside),
            conv(wide, wide, 3, groups=inside),
            conv(wide, inside, 1, groups=inside),
        ]
        layers += [(depthwise, norm(inside)), ([conv(inside, outside, 1)], norm(outside))]
    return layers


def contract_depthwise(first, second, third):
    w1, w2, w3 = first.weight, second.weight, third.weight
    rate, taps = w2.shape[1], w2.shape[2] * w2.shape[3]
    kernel = torch.empty(w2.shape[0], taps)
    for begin in range(0, w2.shape[0], rate):
        group = slice(begin, begin + rate)
        spatial = w2[group].flatten(2).transpose(1, 0).contiguous()
        kernel[group] = (w1[group].flatten(1).t() @ spatial.view(rate, -1)).view(rate, taps)
    kernel = (kernel.view(w3.shape[0], rate, taps) * w3.flatten(2)).sum(1)
    return kernel.view(w3.shape[0], 1, *w2.shape[2:])


def contract(layers):
    if len(layers) == 1:
        return layers[0].weight
    if layers[0].groups > 1:
        return contract_depthwise(*layers)
    pairs = [(layer.weight, torch.zeros(layer.out_channels)) for layer in layers]
    return spatial_then_pointwise(pointwise_then_spatial(pairs[0], pairs[1]), pairs[2])[0]


def fold(layers, batch_norm):
    return fuse_conv_bn_weights(
        contract(layers),
        None,
        batch_norm.running_mean,
        batch_norm.running_var,
        batch_norm.eps,
        batch_norm.weight,
        batch_norm.bias,
    )


def check(layers, batch_norm):
    weight, bias = fold(layers, batch_norm)
    x = torch.randn(1, layers[0].in_channels, 8, 8)
    expected = batch_norm(nn.Sequential(*layers)(x))
    stride = max(layer.stride[0] for layer in layers)
    y = nn.functional.conv2d(x, weight, bias, stride, layers[0].padding, 1, layers[0].groups)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def microseconds_torch(layers, at_least=0.5):
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < at_least or len(times) < 5:
        start = time.perf_counter()
        for each in layers:
            fold(*each)
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
    arguments.add_argument("binary", help="bench_fold, as built by the preset release")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = network()
    for each in layers:
        check(*each)
    rows = {"Fold_MobileNetV1": [], "Fold_MobileNetV1_in_double": [], "torch": []}
    for _ in range(options.rounds):
        for name in list(rows)[:2]:
            rows[name].append(microseconds_ours(options.binary, name))
        rows["torch"].append(microseconds_torch(layers))
    torch_time = statistics.median(rows.pop("torch"))
    print(f"PyTorch {torch.__version__}, 1 thread: {torch_time:.0f} us; medians of {options.rounds} alternating rounds")
    for name, times in rows.items():
        ours = statistics.median(times)
        print(f"{name:<30}{ours:>10.0f} us   torch / ours {torch_time / ours:.1f}")


if __name__ == "__main__":
    main()
