#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training steps of expanded networks: contracted by the package, by einsums written by hand, and layer by layer;
and of blocks with batch norms in training, contracted and layer by layer.

A step is forward, cross entropy, backward and SGD with momentum, on one random batch in memory. Rounds alternate
between the ways, medians are compared; first the ways' gradients are, in double. One thread's time is processor time,
which other programs disturb less; that of several is by the clock.
"""

import argparse
import copy
import json
import statistics
import time

import concertina.torch as ct
import torch
from concertina.torch import operators
from concertina.torch.expansion import originals
from torch import nn
from torch.nn import functional as F
from tutorial import small_net


def mobile_net():
    """MobileNetV1's layers at half its width, on 32x32 images."""

    def unit(inside, outside, kernel, stride=1, groups=1):
        conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outside), nn.ReLU()]

    layers, widths = unit(3, 16, 3), [16, 32, 64, 64, 128, 128, 256, 256, 256]
    for index, (inside, outside) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += unit(inside, inside, 3, 2 if index in (1, 3, 5) else 1, inside) + unit(inside, outside, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class BasicBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18():
    """With the 3x3 stem for 32x32 images."""
    layers, inside = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(inside, outside, stride), BasicBlock(outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETWORKS = {  # the network, its expansion, the batch
    "SmallNet CL": (small_net, {"strategy": "cl"}, 128),
    "SmallNet CK": (small_net, {"strategy": "ck"}, 128),
    "MobileNet CL": (mobile_net, {"strategy": "cl"}, 32),
    "ResNet-18 CL, rate 2": (resnet18, {"strategy": "cl", "rate": 2}, 32),
}


def conv_bn(inside, outside, kernel, groups=1, padding=0):
    return [nn.Conv2d(inside, outside, kernel, 1, padding, groups=groups, bias=False), nn.BatchNorm2d(outside)]


class Branches(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


BLOCKS = {  # of 32 channels
    "CL rate 4, a norm after each layer": lambda: nn.Sequential(
        *conv_bn(32, 128, 1, padding=1), *conv_bn(128, 128, 3), *conv_bn(128, 32, 1)
    ),
    "MobileOne 1x1, k = 4, skip": lambda: Branches(*(conv_bn(32, 32, 1) for _ in range(4)), [nn.BatchNorm2d(32)]),
    "MobileOne depthwise, 4 x 3x3 + 1x1 + skip": lambda: Branches(
        *(conv_bn(32, 32, 3, 32, 1) for _ in range(4)), conv_bn(32, 32, 1, 32), [nn.BatchNorm2d(32)]
    ),
    "ACNet": lambda: Branches(*(conv_bn(32, 32, k, 1, (k[0] // 2, k[1] // 2)) for k in ((3, 3), (3, 1), (1, 3)))),
    "RepVGG": lambda: Branches(conv_bn(32, 32, 3, 1, 1), conv_bn(32, 32, 1), [nn.BatchNorm2d(32)]),
}


def by_hand(model):
    """Contracted as one would without a package: two einsums for CL, transposed convolutions for CK."""

    def forward(self, x):
        weights = originals(self.parametrizations.weight)
        biases = originals(self.parametrizations.bias) if "bias" in self.parametrizations else []
        weight, bias, groups = weights[0], biases[0] if biases else None, self.groups
        for index, outer in enumerate(weights[1:], start=1):
            if bias is not None:
                bias = outer.sum((2, 3)) @ bias + biases[index]
            if weight[0, 0].numel() == 1:
                g = (groups, -1)
                weight = torch.einsum(
                    "gomyx,gmc->gocyx", outer.unflatten(0, g), weight.flatten(1).unflatten(0, g)
                ).flatten(0, 1)
            elif outer[0, 0].numel() == 1:
                g = (groups, -1)
                weight = torch.einsum(
                    "gom,gmcyx->gocyx", outer.flatten(1).unflatten(0, g), weight.unflatten(0, g)
                ).flatten(0, 1)
            else:
                weight = F.conv_transpose2d(outer, weight)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
            module.forward = forward.__get__(module)
    return model


def with_when(model, when):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ct.ExpandedWeight):
            module.when = when
    return model


def by_steps(model):
    """The package without its compiled operators."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ct.ExpandedWeight):
            module.contraction.encoded = None
    return model


def check(ways, device):
    """All ways have the same gradients, in double."""
    x, expected = torch.randn(2, 3, 32, 32, dtype=torch.double, device=device), None
    for name, model in ways.items():
        if name == "compact":
            continue
        model = copy.deepcopy(model).double()
        for module in model.modules():
            if "forward" in vars(module):  # bound to the module that was copied
                module.forward = module.forward.__func__.__get__(module)
        model(x).square().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        expected = gradients if expected is None else expected
        assert (gradients - expected).norm() <= 1e-10 * expected.norm(), name


def measure(ways, batch, seconds, rounds):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    x, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    optimizers = {name: torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9) for name, model in ways.items()}
    times = {name: [] for name in ways}

    def step(name):
        start = clock()
        optimizers[name].zero_grad()
        F.cross_entropy(ways[name](x), labels).backward()
        optimizers[name].step()
        return clock() - start

    for _ in range(rounds):
        for name in ways:
            step(name)
            begin, own = time.perf_counter(), []
            while not own or time.perf_counter() - begin < seconds:
                own.append(step(name))
            times[name].append(statistics.median(own))
    return {name: statistics.median(each) for name, each in times.items()}


def training_step(model, batch):
    x, labels = torch.randn(batch, 3, 32, 32, device="cuda"), torch.randint(10, (batch,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def contraction_alone(model, together=False):
    """All weights of a model contracted, and the gradients of the layers'."""
    parts = [m.parametrizations.weight for m in model.modules() if ct.expansion.is_expanded(m)]
    weights = [originals(own) for own in parts]
    gradients = [torch.randn(own[0].contraction.shape.weight_shape, device="cuda") for own in parts]

    def step():
        if together:
            pairs = zip(weights, parts, strict=True)
            results = operators.contract_many([(each, own[0].contraction.encoded) for each, own in pairs])
        else:
            results = [own[0].contraction.weight(each) for each, own in zip(weights, parts, strict=True)]
        torch.autograd.grad(results, [weight for own in weights for weight in own], gradients)

    return step


def measure_on_device(steps, seconds, rounds):
    """Milliseconds of a step, issued anew each time and replayed from a CUDA graph, by the device's events."""
    runs = {}
    for name, step in steps.items():
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            step()
        runs[name, "eager"], runs[name, "graph"] = step, graph.replay

    def timed(run, count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    times = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            count = max(3, round(1e3 * seconds / timed(run, 3)))
            times[key].append(timed(run, count))
    return {key: statistics.median(each) for key, each in times.items()}


def on_device(options):
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}; ms, medians of", end=" ")
    print(f"{options.rounds} alternating rounds\n")
    compiled = ["contracted", "together"] if operators.CUDA_AVAILABLE else []
    columns = ["compact", *compiled, "with PyTorch's operations", "by hand", "layer by layer"]
    alone = [*compiled, "with PyTorch's operations"]
    print("| network | run | " + " | ".join([*columns, *(f"alone: {column}" for column in alone)]) + " |")
    print("|---|---|" + "---|" * (len(columns) + len(alone)))
    for name in options.networks:
        make, expansion, batch = NETWORKS[name]
        torch.manual_seed(0)
        compact = make().cuda()
        model = ct.expand_(copy.deepcopy(compact), **expansion)
        every = {
            "compact": compact,
            "contracted": model,
            "together": ct.contract_together_(copy.deepcopy(model)),
            "with PyTorch's operations": by_steps(model),
            "by hand": by_hand(model),
            "layer by layer": with_when(model, "never"),
        }
        ways = {column: every[column] for column in columns}
        check(ways, "cuda")
        steps = {column: training_step(way, batch) for column, way in ways.items()}
        for column in alone:
            steps[f"alone: {column}"] = contraction_alone(ways[column], column == "together")
        times = measure_on_device(steps, options.seconds, options.rounds)
        for run in ("eager", "graph"):
            row = " | ".join(f"{times[column, run]:.3f}" for column in steps)
            print(f"| {name}, batch {batch} | {run} | {row} |", flush=True)
        if options.json:
            with open(options.json, "a") as file:
                own = {f"{column}, {run}": value for (column, run), value in times.items()}
                print(json.dumps({"network": name, "batch": batch, "milliseconds": own}), file=file)


def measure_blocks(threads, rounds):
    """Forward and backward, with the gradient of the input, on maps of 16x16, batch 128."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    for name, make in BLOCKS.items():
        torch.manual_seed(0)
        layered = make()
        always, auto = (ct.contract_in_training_(copy.deepcopy(layered), when) for when in ("always", "auto"))
        ways, times = [layered, always, auto], [[], [], []]
        x, gradient = torch.randn(128, 32, 16, 16, requires_grad=True), torch.randn(128, 32, 16, 16)
        for index in range(rounds + 1):
            for way, own in zip(ways, times, strict=True):
                start = clock()
                way(x).backward(gradient)
                own += [clock() - start] * (index > 0)
        milliseconds = [1e3 * statistics.median(own) for own in times]
        cells = " | ".join(f"{each:.1f}" for each in milliseconds)
        (contraction,) = type(always).contractions
        counted, own = contraction.multiply_adds(128, (16, 16))
        print(
            f"| {name} | {threads} | {cells} | {milliseconds[0] / milliseconds[1]:.2f} | {counted / own:.2f} |",
            flush=True,
        )


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--threads", default="1,2", help="numbers of threads, with commas")
    arguments.add_argument("--seconds", type=float, default=1, help="for each way in a round")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    arguments.add_argument("--blocks", action="store_true", help="the blocks with batch norms in training instead")
    arguments.add_argument("--device", action="store_true", help="on a CUDA device, eager and in a CUDA graph")
    arguments.add_argument("--json", help="with --device, a file to which a line is added for each network")
    options = arguments.parse_args()
    if options.device:
        if not torch.cuda.is_available():
            arguments.error("--device: there is no CUDA device")
        return on_device(options)
    if options.blocks:
        print(
            f"PyTorch {torch.__version__}; forward and backward in ms, medians of {options.rounds} alternating rounds\n"
        )
        print("| block | threads | layer by layer | contracted | auto | speed-up | multiply-adds |")
        print("|---|---|---|---|---|---|---|")
        for threads in map(int, options.threads.split(",")):
            measure_blocks(threads, options.rounds)
        return
    print(f"PyTorch {torch.__version__}; a training step in ms, medians of {options.rounds} alternating rounds\n")
    columns = ["compact", "contracted", "with PyTorch's operations", "by hand", "layer by layer"]
    if not operators.AVAILABLE:
        columns.remove("with PyTorch's operations")
    print("| network | threads | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for name in options.networks:
        make, expansion, batch = NETWORKS[name]
        torch.manual_seed(0)
        compact = make()
        model = ct.expand_(copy.deepcopy(compact), **expansion)
        ways = {"compact": compact, "contracted": model, "by hand": by_hand(model)}
        ways["layer by layer"] = with_when(model, "never")
        if operators.AVAILABLE:
            ways["with PyTorch's operations"] = by_steps(model)
        check(ways, "cpu")
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            times = measure(ways, batch, options.seconds, options.rounds)
            row = " | ".join(f"{1e3 * times[column]:.1f}" for column in columns)
            print(f"| {name}, batch {batch} | {threads} | {row} |", flush=True)


if __name__ == "__main__":
    main()
