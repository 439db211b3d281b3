#!/usr/bin/env python3
"""Contracts the networks of bench_cuda_contraction in PyTorch as fast as it goes: batched products, in one CUDA graph.

The published code, which contract_torch_cuda.py times, loops over channels and groups in Python. Here every product is
one einsum, or for two kernels a convolution or a matrix product that is folded, whichever is fastest; a network's are
captured in one graph; each is checked against the layers applied one after another. Weights alone: the biases are left
out, which bench_cuda_contraction contracts too. Also measured is what the card gives PyTorch at most, in large products
and in copies.

    benchmarks/peers/contract_torch_graph.py [--json] [--device cuda]

Medians of CUDA events, in microseconds. With --device cpu the method alone is checked.
SPDX-License-Identifier: Apache-2.0
"""

import argparse
import json
import statistics
import sys

try:
    import torch
    from torch.nn import functional
except ImportError:
    sys.exit("contract_torch_graph.py: PyTorch is not installed; nothing measured")


def transposed(outer, inner):
    """The full convolution of two kernels as a transposed one."""
    return functional.conv_transpose2d(outer, inner)


def padded(outer, inner):
    """The same as a convolution of the outer kernel with zeros around it."""
    height, width = inner.shape[2:]
    return functional.conv2d(outer, inner.flip(2, 3).transpose(0, 1), padding=(height - 1, width - 1))


def folded(outer, inner):
    """One matrix product for all pairs of taps, whose results are added up where they meet."""
    kernel, taps = inner.shape[2:], outer.shape[2:]
    pairs = torch.einsum("omp,mk->okp", outer.flatten(2), inner.flatten(1))
    return functional.fold(pairs, [k + t - 1 for k, t in zip(kernel, taps)], tuple(kernel))


KERNEL_PRODUCTS = {function.__name__: function for function in (transposed, padded, folded)}


class Dense:
    """Layers [out][in][k][k], the first applied first."""

    def __init__(self, widths, kernels):
        self.layers = [torch.rand(o, i, k, k) - 0.5 for i, o, k in zip(widths, widths[1:], kernels)]
        self.groups = 1

    def contract(self, multiply):
        product = self.layers[0]
        for layer in self.layers[1:]:
            if layer.shape[-1] == 1:
                product = torch.einsum("om,mcab->ocab", layer[:, :, 0, 0], product)
            elif product.shape[-1] == 1:
                product = torch.einsum("omab,mc->ocab", layer, product[:, :, 0, 0])
            else:
                product = multiply(layer, product)
        return product


class Depthwise:
    """A depthwise 3x3 as CL: layers [r c][1][1][1], [r c][r][3][3] and [c][r][1][1] in c groups."""

    def __init__(self, channels, rate=4):
        self.layers = [
            torch.rand(rate * channels, 1, 1, 1) - 0.5,
            torch.rand(rate * channels, rate, 3, 3) - 0.5,
            torch.rand(channels, rate, 1, 1) - 0.5,
        ]
        self.groups = channels

    def contract(self, _):
        first, middle, last = self.layers
        c, r = self.groups, last.shape[1]
        product = torch.einsum("cr,crmk,cm->ck", last.view(c, r), middle.view(c, r, r, 9), first.view(c, r))
        return product.view(c, 1, 3, 3)


def networks():
    def cl(inside, wide, wider, outside, kernel):
        return Dense([inside, wide, wider, outside], [1, kernel, 1])

    def ck(*widths):
        return Dense(widths, [3] * (len(widths) - 1))

    small_cl = [cl(3, 3, 32, 8, 7), cl(8, 32, 64, 16, 7), cl(16, 64, 128, 32, 7)]
    small_ck = [ck(3, 3, 32, 8), ck(8, 32, 64, 16), ck(16, 64, 128, 32)]
    fc = [Dense([512, 2048, 256, 64], [1, 1, 1])]
    depthwise = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024]
    return {
        "SmallNet_CL": small_cl,
        "SmallNet_CK": small_ck,
        "SmallNet_CL_FC": small_cl + fc,
        "SmallNet_CK_FC": small_ck + fc,
        "MobileNet_CL": [cl(3, 12, 128, 32, 3)] + [Depthwise(channels) for channels in depthwise],
        "AlexNet_CK_11_5": [ck(3, 12, 256, 256, 256, 64), ck(64, 256, 192)],
        "UNet_CL_512": [cl(512, 2048, 2048, 512, 3)],
        "CK_128": [ck(128, 128, 128)],
        "CK_256": [ck(256, 256, 256)],
        "CK_512": [ck(512, 512, 512)],
        "CK_256_of_3": [ck(256, 256, 256, 256)],
    }


def check(chain, multiply):
    """Throws AssertionError unless the product acts as the layers do."""
    product = chain.contract(multiply)
    side = product.shape[-1] + 2
    x = torch.rand(2, chain.layers[0].shape[1] * chain.groups, side, side)
    expected = x
    for layer in chain.layers:
        expected = functional.conv2d(expected, layer, groups=chain.groups)
    found = functional.conv2d(x, product, groups=chain.groups)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def microseconds(work, rounds=15, launches=5):
    """Of one replay of a graph that has captured the work, the median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / launches)
    return statistics.median(times)


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def most(side=8192, numbers=1 << 29):
    """What the card gives in a large product of each kind, and in a copy, which reads and writes."""
    found = {}
    for name, tf32, dtype in (
        ("float_tflops", False, torch.float32),
        ("tf32_tflops", True, torch.float32),
        ("bfloat16_tflops", False, torch.bfloat16),
    ):
        allow_tf32(tf32)
        a, b = (torch.randn(side, side, dtype=dtype) for _ in range(2))
        found[name] = 2 * side**3 / microseconds(lambda: a @ b, rounds=5) / 1e6
    allow_tf32(False)
    source = torch.empty(numbers, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["copy_terabytes_per_second"] = 2 * numbers / microseconds(lambda: target.copy_(source), rounds=5) / 1e6
    return found


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    options = arguments.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("contract_torch_graph.py: there is no CUDA device; nothing measured")
    torch.manual_seed(0)
    torch.set_default_device(options.device)
    torch.backends.cudnn.benchmark = True
    allow_tf32(False)
    chains = networks()
    for network in chains.values():
        for chain in network:
            for multiply in KERNEL_PRODUCTS.values():
                check(chain, multiply)
    if options.device == "cpu":
        print("contract_torch_graph.py: the products act as the layers do; nothing measured")
        return
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "most": most()}
    report["microseconds"], report["kernel_products"] = {}, {}
    for name, network in chains.items():
        times = {
            how: round(microseconds(lambda: [chain.contract(multiply) for chain in network]), 1)
            for how, multiply in KERNEL_PRODUCTS.items()
            if "CK" in name or multiply is transposed  # others have no product of two kernels
        }
        report["microseconds"][name] = min(times.values())
        report["kernel_products"][name] = times
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"PyTorch {report['torch']}, {report['device']}; microseconds, medians")
    for name, time in (report["microseconds"] | report["most"]).items():
        print(f"{name:<28}{time:>12.1f}")


if __name__ == "__main__":
    main()
