#!/usr/bin/env python3
"""Times PyTorch's training step of SmallNet on a GPU as fast as it goes: a whole step in one CUDA graph.

A step is zero_grad, forward, cross entropy, backward and the fused torch.optim.SGD with momentum, on one random batch
in the device's memory, without augmentation; an expanded network's layers are computed in turn, as the published code
does. Timed in both memory formats, with and without TF32, eager and as a graph; `cifar bench --device cuda` is the
other side. Each way is printed when it is done.

    benchmarks/peers/train_torch_graph.py [--kernel 7] [--models compact,cl] [--batches 128,512] [--ways graph,eager]
        [--cudnn search] [--seconds 0.4] [--within 60] [--json]

cuDNN's kernels are searched for, which takes seconds for each model and way, or what its heuristics propose.

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import itertools
import json
import sys
import time

try:
    import torch
    from torch import nn
except ImportError:
    sys.exit("train_torch_graph.py: PyTorch is not installed; nothing measured")

from train_torch import network

RATE = 4


def step_of(model, kernel, batch, memory_format):
    """A function that does one training step."""
    layers = network(model, kernel, RATE).to(memory_format=memory_format)
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(10, (batch,))

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss(layers(images), labels).backward()
        optimizer.step()

    return step


def captured(step):
    """The step as a graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_kept=step):  # the graph has the addresses of its tensors
        graph.replay()

    return replay


def steps_per_second(step, at_least):
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < at_least:
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        count += 20
    return count / passed


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kernel", type=int, default=7)
    arguments.add_argument("--models", default="compact,cl", help="with commas")
    arguments.add_argument("--batches", default="128,512", help="images of a step, with commas")
    arguments.add_argument("--ways", default="graph,eager", help="with commas")
    arguments.add_argument("--cudnn", choices=["search", "heuristics"], default="search", help="its kernels")
    arguments.add_argument("--seconds", type=float, default=0.4, help="for each way, at least")
    arguments.add_argument("--within", type=float, help="seconds after which nothing more is begun")
    arguments.add_argument("--json", action="store_true", help="print a line of JSON for each way")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("train_torch_graph.py: there is no CUDA device; nothing measured")
    torch.set_default_device("cuda")
    torch.backends.cudnn.benchmark = options.cudnn == "search"
    if not options.json:
        print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}: images a second, kernel {options.kernel}")
    runs = {"eager": lambda step: step, "graph": captured}
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    batches = [int(batch) for batch in options.batches.split(",")]
    ways, models = options.ways.split(","), options.models.split(",")
    start = time.perf_counter()
    for batch, precision, layout, way, model in itertools.product(batches, ("float", "tf32"), formats, ways, models):
        if options.within and time.perf_counter() - start > options.within:
            break
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        step = runs[way](step_of(model, options.kernel, batch, formats[layout]))
        rate = round(batch * steps_per_second(step, options.seconds))
        name = f"{model}, batch {batch}, {precision}, {layout}, {way}"
        if options.json:
            print(json.dumps({"way": f"{name}, {options.cudnn}", "images_per_second": rate}), flush=True)
        else:
            print(f"{name:<48}{rate:>12,}", flush=True)


if __name__ == "__main__":
    main()
