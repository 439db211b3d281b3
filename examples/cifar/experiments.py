# SPDX-License-Identifier: Apache-2.0
"""The rows of the paper's CIFAR tables and the curves of its figures, as trainings of `cifar train`."""

import csv
import math
import re
from dataclasses import dataclass, field

MODELS = {
    "SmallNet": "compact",
    "FC(Arora18)": "fc",
    "ACNet": "acnet",
    "ExpandNet-CL": "cl",
    "ExpandNet-CL+FC": "cl+fc",
    "ExpandNet-CK": "ck",
    "ExpandNet-CK+FC": "ck+fc",
}
EXPANDED = ("fc", "cl", "cl+fc", "ck", "ck+fc")
DATASETS = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "MNIST": "mnist"}
TRANSFERS = {"KD": "kd", "Hint": "hint", "PKT": "pkt"}
TABLES = ("S1", "S3", "S4", "S5", "S7", "S8", "S9")
FIGURES = ("S1", "S2", "S3", "S4")
METRICS = ("top1", "best_test_error", "last_test_error", "train_error")
BATCHES = 100  # whose gradients the figures compare


class Failure(Exception):
    """What went wrong, in a line: with the file, and what to do."""


def read_text(path):
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: byte {error.start} is not UTF-8") from error


def read_csv(path, columns):
    """The lines of a CSV file as dictionaries. Failure naming the line, OSError."""
    text = read_text(path)
    if text and not text.endswith("\n"):
        raise Failure(f"{path}: the last line does not end")
    try:
        reader = csv.DictReader(text.splitlines(), strict=True)
        lines = list(reader)
    except csv.Error as error:
        raise Failure(f"{path}: {error}") from error
    if reader.fieldnames != columns:
        raise Failure(f"{path}: line 1: expected \"{','.join(columns)}\"")
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise Failure(f"{path}: line {number}: expected {len(columns)} fields")
    return lines


def number_in(text, least, most, kind=float):
    """The number that a text is, ValueError where it is none or beyond its range."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        expected = "whole number" if kind is int else "number"
        raise ValueError(f'"{text[:40]}" is no {expected} from {least} to {most}')
    return value


# ---- names of trainings ---------------------------------------------------------------------------------


def network_name(model, kernel, rate):
    return f"k{kernel}-{model}" + (f"-r{rate:g}" if rate and model in EXPANDED else "")


def full_name(training, epochs, seed):
    """What a training is kept by: its folder's name."""
    return f"{training}-e{epochs}-s{seed}"


def parts_of(name):
    """Training, epochs and seed of a folder's name; None if it is none."""
    match = re.fullmatch(r"(.+)-e(\d+)-s(\d+)", name)
    return match and (match[1], int(match[2]), int(match[3]))


def contracts(name):
    """Whether a training's network contracts to a compact one."""
    return "nonlinear" not in name and "resnet18" not in name


# ---- tables ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of a table, in the paper's words, and what they mean; a ValueError where they mean nothing."""

    table: str
    dataset: str
    kernel: int
    model: str
    rate: float | None
    setting: str
    published: list = field(default_factory=list)  # measure, mean and deviation, in percent

    def __post_init__(self):
        def ours(what, names, word):
            if word not in names:
                raise ValueError(f"the {what} '{word}' is none of {', '.join(names)}")
            return names[word]

        plain = self.model.removesuffix("+Init")
        self.init = plain != self.model
        self.network = {"dataset": ours("data set", DATASETS, self.dataset), "model": ours("model", MODELS, plain)}
        self.transfer, self.corrupted = "", 0
        share = self.setting.removeprefix("corrupted-").removesuffix("%")
        if self.setting == f"corrupted-{share}%" and share.isdecimal() and 1 <= int(share) <= 100:
            self.corrupted = int(share)
        elif self.setting not in ("none", *TRANSFERS):
            raise ValueError(f"the setting '{self.setting}' is none of none, {', '.join(TRANSFERS)}, corrupted-N%")
        else:
            self.transfer = TRANSFERS.get(self.setting, "")

    @property
    def name(self):
        """What it is chosen by, such as cifar10-k7-cl+fc-r4-init-kd."""
        name = f"{self.network['dataset']}-{network_name(self.network['model'], self.kernel, self.rate)}"
        name += "-init" * self.init + (f"-{self.transfer}" if self.transfer else "")
        return name + (f"-corrupted{self.corrupted}" if self.corrupted else "")


def read_rows(path):
    """The rows of a file such as examples/data/accuracy.csv; those that differ in the measure alone are one."""
    columns = "table,dataset,kernel,model,rate,setting,metric,mean,std".split(",")
    rows = {}
    for number, line in enumerate(read_csv(path, columns), 2):
        try:
            kernel = number_in(line["kernel"], 1, 99, int)
            rate = number_in(line["rate"], 1e-3, 1e3) if line["rate"] else None
            row = Row(line["table"], line["dataset"], kernel, line["model"], rate, line["setting"])
            row = rows.setdefault((row.table, row.name), row)
            metric = line["metric"]
            if metric not in METRICS:
                raise ValueError(f"the measure '{metric}' is none of {', '.join(METRICS)}")
            if metric in (other for other, _, _ in row.published):
                raise ValueError(f"{metric} of {row.name} is there twice")
            row.published.append((metric, number_in(line["mean"], 0, 100), number_in(line["std"], 0, 100)))
        except ValueError as error:
            raise Failure(f"{path}: line {number}: {error}") from error
    return list(rows.values())


@dataclass(frozen=True)
class Budget:
    """How far trainings go and how: the paper's 150 epochs; of the teacher it says little."""

    epochs: int = 150
    teacher_width: int = 64
    teacher_epochs: int = 200
    uniform_norms: bool = False

    @property
    def marks(self):
        """What tells it from the usual one in a file's name, such as -e10-w8-e12."""
        usual = Budget()
        teacher = (self.teacher_width, self.teacher_epochs)
        marks = f"-e{self.epochs}" if self.epochs != usual.epochs else ""
        if teacher != (usual.teacher_width, usual.teacher_epochs):
            marks += f"-w{teacher[0]}-e{teacher[1]}"
        return marks + "-uniform" * self.uniform_norms


@dataclass(frozen=True)
class Run:
    """A training: its folder's name, which says all that tells it from others, and the options of `cifar train`."""

    name: str
    options: dict
    init: str = ""  # the runs that it starts and learns from
    teacher: str = ""

    @property
    def needs(self):
        return [name for name in (self.init, self.teacher) if name]


def run_of(training, seed, epochs, options, **needs):
    return Run(full_name(training, epochs, seed), options | {"epochs": epochs, "seed": seed}, **needs)


def network_options(dataset, model, kernel, rate, compute="contracted"):
    options = {"dataset": dataset, "model": model, "kernel": kernel}
    if model in EXPANDED:
        return options | {"rate": rate or 4, "compute": compute}
    return options | ({"compute": "auto"} if model == "acnet" else {})


def runs_of(row, seed, budget):
    """The trainings of a row with a seed: what it needs first, and itself last.

    +Init: the nonlinear counterpart is trained by the same recipe, without teacher, and the best network's parameters
    are where the linear one starts. Hint and PKT: Adam at 0.0001, as published. The teacher, one for all seeds, is a
    ResNet-18 trained with momentum kept, from the rate 0.1, with weight decay 0.0005. Table S5: the network of four
    convolutions, weight decay 0.0005.
    """
    dataset, model = row.network["dataset"], row.network["model"]
    deeper = row.table == "S5"
    options = network_options(dataset, model, row.kernel, row.rate)
    if deeper:
        options |= {"blocks": 4, "weight-decay": 5e-4}
    if budget.uniform_norms:
        options["uniform-norms"] = True
    network = network_name(model, row.kernel, row.rate)
    prefix = f"{dataset}{'-deeper' * deeper}-{network}{'-uniform' * budget.uniform_norms}"
    runs, marks, needs = [], "", {}
    if row.init:
        runs.append(run_of(f"{prefix}-nonlinear", seed, budget.epochs, options | {"compute": "nonlinear"}))
        needs["init"] = runs[-1].name
        marks += "-init"
    if row.transfer:
        teacher = {"dataset": dataset, "model": "resnet18", "width": budget.teacher_width}
        teacher |= {"learning-rate": 0.1, "keep-momentum": True, "weight-decay": 5e-4}
        runs.append(run_of(f"{dataset}-resnet18-w{budget.teacher_width}", 1, budget.teacher_epochs, teacher))
        needs["teacher"] = runs[-1].name
        options |= {"transfer": row.transfer}
        if row.transfer != "kd":
            options |= {"optimizer": "adam", "learning-rate": 1e-4}
        marks += f"-{row.transfer}-w{budget.teacher_width}-e{budget.teacher_epochs}"
    if row.corrupted:
        options["corrupt"] = row.corrupted / 100
        marks += f"-corrupted{row.corrupted}"
    return [*runs, run_of(prefix + marks, seed, budget.epochs, options, **needs)]


# ---- figures --------------------------------------------------------------------------------------------


def curves_of(figure, dataset, kernel, epochs, batches=BATCHES):
    """The curves of a figure: a title and a training of seed 1 each.

    S1, S2 and S3: SmallNet and all its expansions with this kernel, the gradients of so many batches compared; S4:
    SmallNet, FC and CL with weight decay, and these with that of their products.
    """

    def run(model, marks, options):
        network = network_name(model, kernel, 4)
        return run_of(f"{dataset}-{network}-{marks}", 1, epochs, network_options(dataset, model, kernel, 4) | options)

    titles = {model: title for title, model in MODELS.items()}
    if figure == "S4":
        decay = {"weight-decay": 5e-4}
        curves = [("SmallNet", run("compact", "decayed", decay))]
        for model in ("fc", "cl"):
            product = run(model, "decayed-product", decay | {"decay-of": "product"})
            curves += [(f"{titles[model]} product L2", product)]
            curves += [(f"{titles[model]} normal L2", run(model, "decayed", decay))]
        return curves
    models = ("compact", "fc", "cl", "cl+fc") + (("ck", "ck+fc") if kernel > 3 else ())
    marks = "similarities" + (str(batches) if batches != BATCHES else "")
    return [(titles[model], run(model, marks, {"similarities": batches})) for model in models]
