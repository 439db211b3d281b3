#!/usr/bin/env python3
"""Times PyTorch's training step of compact SmallNet on a GPU as fast as it goes: a whole step in one CUDA graph.

A step is zero_grad, forward, cross entropy, backward and the fused torch.optim.SGD with momentum, on one random batch
in the device's memory, without augmentation. Timed in both memory formats, with and without TF32, eager and as a graph;
`cifar bench --device cuda` is the other side.

    benchmarks/peers/train_torch_graph.py [--kernel 7] [--batches 128,512] [--seconds 0.4] [--json]

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


def smallnet(kernel):
    layers, channels = [], 3
    for out in (8, 16, 32):
        layers.append(nn.Conv2d(channels, out, kernel, padding=(kernel - 1) // 2))
        layers += [nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def step_of(kernel, batch, memory_format):
    """A function that does one training step."""
    model = smallnet(kernel).to(memory_format=memory_format)
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(10, (batch,))

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss(model(images), labels).backward()
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
    arguments.add_argument("--batches", default="128,512", help="images of a step, with commas")
    arguments.add_argument("--seconds", type=float, default=0.4, help="for each way, at least")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("train_torch_graph.py: there is no CUDA device; nothing measured")
    torch.set_default_device("cuda")
    torch.backends.cudnn.benchmark = True
    rates = {}
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    batches = [int(batch) for batch in options.batches.split(",")]
    for batch, tf32, (name, memory_format) in itertools.product(batches, (False, True), formats.items()):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        for way, run in (("eager", lambda step: step), ("graph", captured)):
            step = run(step_of(options.kernel, batch, memory_format))
            rate = batch * steps_per_second(step, options.seconds)
            rates[f"batch {batch}, {'tf32' if tf32 else 'float'}, {name}, {way}"] = round(rate)
    if options.json:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "images_per_second": rates}
        print(json.dumps(report, indent=1))
        return
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}: images a second, kernel {options.kernel}")
    for name, rate in rates.items():
        print(f"{name:<40}{rate:>12,}")


if __name__ == "__main__":
    main()
