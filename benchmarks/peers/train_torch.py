#!/usr/bin/env python3
"""Times PyTorch training SmallNet and its expansions layer by layer, beside cifar bench on the same cores, in one run.

Expanded networks are trained as the published PyTorch code does: every layer computed in turn. A step is zero_grad,
forward, cross entropy, backward and torch.optim.SGD with momentum, eager, without torch.compile. Each model is timed in
both memory formats, contiguous and channels_last, and its faster one counts.

    benchmarks/peers/train_torch.py build/release/examples/cifar [--threads 2] [--batch 128] [--kernel 7] [--rate 4]
        [--rounds 3] [--models compact,cl,cl+fc,ck,ck+fc] [--seconds 2] [--json]

Rounds alternate between the two, never both at once; medians are compared. Both networks' parameters are counted first.
SPDX-License-Identifier: Apache-2.0
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

try:
    import torch
    from torch import nn
except ImportError:
    sys.exit(
        "train_torch.py: PyTorch is not installed; nothing compared. To install it: "
        "python3 -m pip install torch --index-url https://download.pytorch.org/whl/cpu"
    )

MODELS = ["compact", "fc", "cl", "cl+fc", "ck", "ck+fc"]
DEFAULT_MODELS = {7: ["compact", "cl", "cl+fc", "ck", "ck+fc"], 3: ["compact", "cl", "cl+fc"]}
CLASSES = 10
PARAMETERS_K7_R4 = {"compact": 66186, "cl": 547102, "cl+fc": 2105886, "ck": 186982, "ck+fc": 1745766}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def convolutions(model, inside, outside, kernel, padding, rate):
    """A convolution, or the layers it expands into: padding stands on the first, and all have biases."""

    def wide(channels):
        return math.floor(rate * channels + 0.5)

    if "cl" in model:
        kernels = [1, kernel, 1]
    elif "ck" in model:
        kernels = [3] * ((kernel - 1) // 2)
    else:
        kernels = [kernel]
    widths = [inside, outside]
    if len(kernels) == 3:
        widths = [3, 3, wide(8), 8] if inside == 3 else [inside, wide(inside), wide(outside), outside]
    return [
        nn.Conv2d(m, n, k, padding=0 if i else padding)
        for i, (m, n, k) in enumerate(zip(widths, widths[1:], kernels))
    ]


def linears(model, inside, outside, rate):
    widths = [inside, outside]
    if "fc" in model:
        widths[1:1] = [math.floor(rate * width + 0.5) for width in widths]
    return [nn.Linear(m, n) for m, n in zip(widths, widths[1:])]


def network(model, kernel, rate):
    padding = {7: 3, 3: 0}[kernel]
    layers, channels, size = [], 3, 32
    for outside in (8, 16, 32):
        layers += convolutions(model, channels, outside, kernel, padding, rate)
        layers += [nn.BatchNorm2d(outside), nn.ReLU(), nn.MaxPool2d(2)]
        channels, size = outside, (size + 2 * padding - kernel + 1) // 2
    layers += [nn.Flatten(), *linears(model, channels * size * size, 64, rate), nn.ReLU(), nn.Linear(64, CLASSES)]
    return nn.Sequential(*layers)


def parameter_count(layers):
    return sum(parameter.numel() for parameter in layers.parameters())


def check():
    """The networks are the published ones: they have their numbers of parameters."""
    for model, expected in PARAMETERS_K7_R4.items():
        counted = parameter_count(network(model, 7, 4))
        assert counted == expected, f"{model}: {counted} parameters, not {expected}"


def images_per_second_torch(model, memory_format, options):
    torch.manual_seed(0)
    layers = network(model, options.kernel, options.rate).to(memory_format=memory_format)
    images = torch.randn(options.batch, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(CLASSES, (options.batch,))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layers(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def timed(at_least, steps):
        times, begin = [], time.perf_counter()
        while time.perf_counter() - begin < at_least or len(times) < steps:
            start = time.perf_counter()
            loss = step()
            times.append(time.perf_counter() - start)
        if not torch.isfinite(loss):
            sys.exit(f"train_torch.py: PyTorch's loss of {model} is {loss.item()}; its times would say nothing")
        return times

    timed(options.seconds / 7, 3)  # warms up
    return options.batch / statistics.median(timed(options.seconds, 5))


def report_of(options):
    """What one run of cifar bench prints."""
    command = [options.tool, "bench", "--json", "--models", ",".join(options.models)]
    for name in ("kernel", "rate", "batch", "threads", "seconds"):
        command += [f"--{name}", f"{getattr(options, name):.10g}"]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        sys.exit(
            f"train_torch.py: cannot run {options.tool}: {error.strerror}; "
            "the preset release builds it as build/release/examples/cifar"
        )
    if process.returncode != 0:
        said = process.stderr.strip() or "it wrote nothing to stderr"
        sys.exit(f"train_torch.py: {' '.join(command)} exited with {process.returncode}:\n{said}")
    try:
        report = json.loads(process.stdout)
        for name in ("kernel", "rate", "batch", "threads"):
            if report[name] != getattr(options, name):
                sys.exit(f"train_torch.py: {options.tool} ran with {name} {report[name]}, not {getattr(options, name)}")
        for row in report["rows"]:
            if not row["images_per_second"] > 0 or row["mode"] not in ("contracted", "layered"):
                raise ValueError(f"a row {row}")
        absent = set(options.models) - {row["model"] for row in report["rows"]}
        if absent or not {row["model"] for row in report["rows"]} <= set(options.models):
            raise ValueError("rows of other models than asked for")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"train_torch.py: {options.tool} bench --json printed something else than expected: {error!r}")
    return report


def check_same_networks(report, options):
    for row in report["rows"]:
        counted = parameter_count(network(row["model"], options.kernel, options.rate))
        if row.get("parameters", counted) != counted:
            sys.exit(f"train_torch.py: {row['model']} has {row['parameters']} parameters here, {counted} in PyTorch")


def compare(options):
    """Ours and PyTorch's images per second in alternating rounds, as rows of medians."""
    ours, torchs = {}, {(model, name): [] for model in options.models for name in FORMATS}
    for _ in range(options.rounds):
        report = report_of(options)
        check_same_networks(report, options)
        for row in report["rows"]:
            ours.setdefault((row["model"], row["mode"]), []).append(row["images_per_second"])
        for model, name in torchs:
            torchs[model, name].append(images_per_second_torch(model, FORMATS[name], options))
    rows = []
    for (model, mode), rates in ours.items():
        name = max(FORMATS, key=lambda each: statistics.median(torchs[model, each]))
        theirs = torchs[model, name]
        rows.append(
            {
                "model": model,
                "mode": mode,
                "parameters": parameter_count(network(model, options.kernel, options.rate)),
                "images_per_second": statistics.median(rates),
                "torch_images_per_second": statistics.median(theirs),
                "torch_memory_format": name,
                "ratio": statistics.median(mine / other for mine, other in zip(rates, theirs, strict=True)),
            }
        )
    return rows, report.get("augmentation")


def parse():
    def number(type_, least, including=True):
        def parsed(text):
            value = type_(text)
            if not math.isfinite(value) or value < least or (value == least and not including):
                raise argparse.ArgumentTypeError(f"{text} is not {'at least' if including else 'more than'} {least}")
            return value

        parsed.__name__ = type_.__name__
        return parsed

    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("tool", help="cifar, as built by the preset release")
    arguments.add_argument("--threads", type=number(int, 1), default=2)
    arguments.add_argument("--batch", type=number(int, 2), default=128, help="images of a step")
    arguments.add_argument("--kernel", type=int, choices=sorted(DEFAULT_MODELS), default=7)
    arguments.add_argument("--rate", type=number(float, 1), default=4, help="expansion rate r")
    arguments.add_argument("--rounds", type=number(int, 1), default=3)
    arguments.add_argument("--models", help=f"of {','.join(MODELS)}; by default all but fc that the kernel has")
    arguments.add_argument("--seconds", type=number(float, 0, False), default=2, help="for each form in a round")
    arguments.add_argument("--json", action="store_true", help="print JSON")
    options = arguments.parse_args()
    options.models = options.models.split(",") if options.models else DEFAULT_MODELS[options.kernel]
    options.models = list(dict.fromkeys(options.models))
    for model in options.models:
        if model not in MODELS:
            arguments.error(f"there is no model '{model}'; there are {', '.join(MODELS)}")
        if "ck" in model and options.kernel == 3:
            arguments.error(f"a 3x3 convolution has nothing for {model} to expand into; kernel 7 has")
    if os.sep not in options.tool and os.path.exists(options.tool):
        options.tool = os.path.join(os.curdir, options.tool)
    return options


def main():
    options = parse()
    check()
    torch.set_num_threads(options.threads)
    rows, augmentation = compare(options)
    included = {True: "included", False: "excluded", None: "not reported"}[augmentation]
    if options.json:
        names = ("threads", "batch", "kernel", "rate", "rounds", "seconds")
        settings = {name: getattr(options, name) for name in names}
        pytorch = {"version": torch.__version__, "compile": False, "augmentation": False, "data_loading": False}
        print(json.dumps({**settings, "augmentation": augmentation, "torch": pytorch, "rows": rows}, indent=2))
        return
    print(
        f"Training steps of SmallNet, images a second: kernel {options.kernel}, rate {options.rate:g}, "
        f"batch {options.batch}, {options.threads} thread{'s' if options.threads > 1 else ''}; "
        f"medians of {options.rounds} alternating round{'s' if options.rounds > 1 else ''}."
    )
    print(
        f"PyTorch {torch.__version__}: eager, no torch.compile; the faster memory format; one random batch in memory, "
        f"neither data loading nor augmentation. Ours: augmentation {included}."
    )
    print(f"{'model':<10}{'ours':<12}{'img/s':>10}{'PyTorch, layered':>18}{'ratio':>8}  {'format':<15}PyTorch")
    for row in rows:
        print(
            f"{row['model']:<10}{row['mode']:<12}{row['images_per_second']:>10.0f}"
            f"{row['torch_images_per_second']:>18.0f}{row['ratio']:>8.2f}  {row['torch_memory_format']:<15}"
            f"{torch.__version__}"
        )


if __name__ == "__main__":
    main()
