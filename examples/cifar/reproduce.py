#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures, by `cifar train`: runs what is missing of their trainings, sets ours beside theirs.

    reproduce.py table S3 --data DIR --rows 'cifar10-*' --seeds 1     a table, its trainings and table-S3.md
    reproduce.py figure S2 --kernel 3 --data DIR                      a figure, its trainings and figure-S2-*.svg
    reproduce.py next --minutes 90 --data DIR                         the most wanted trainings of all of them
    reproduce.py draw                                                 docs/results, from the finished trainings

Each training has a folder in OUT/runs, named by all that tells it from others: what is interrupted goes on where it
was, what is done is not done again, and tables share what they have in common. Every network is contracted, and the
compact one kept if it recognises as many test images. Exit codes: 0 all is well; 1 a training, a file or gnuplot
failed; 2 the command line is wrong.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import experiments
import figures
import results
from experiments import DATASETS, Budget, Failure, contracts, curves_of, number_in, read_rows, runs_of

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = 3 * 60  # minutes of a training that does not run on one core
FILES = {  # by which a data set is known, in the folder or below it
    "cifar10": ("data_batch_1.bin", "cifar-10-batches-bin/data_batch_1.bin"),
    "cifar100": ("train.bin", "cifar-100-binary/train.bin"),
    "mnist": ("train-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte"),
}


class Usage(Exception):
    """A command line, or a line of what is wanted, that says nothing."""


class TimeIsUp(Exception):
    """What is interrupted goes on at the next call."""


# ---- trainings ------------------------------------------------------------------------------------------


def folder_of(options, name):
    return options.out / "runs" / name


def has_data(options, dataset):
    return any((options.data / file).exists() for file in FILES[dataset])


def words(options):
    for name, value in options.items():
        yield f"--{name}"
        if value is not True:
            yield value


@contextlib.contextmanager
def locked(path):
    """A folder, made if need be, that no other program locks meanwhile."""
    path.mkdir(parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Failure(f"{path}: another process trains in it; wait for it, or name another folder") from None
    finally:
        os.close(folder)


class Trainings:
    """Runs trainings in a folder, several side by side, until the time is up."""

    def __init__(self, options, end=float("inf")):
        self.options, self.end = options, end
        self.processes, self.lock = set(), threading.Lock()

    def is_over(self):
        return time.monotonic() >= self.end

    def cifar(self, title, *arguments):
        """What the command prints. Throws Failure with its error, TimeIsUp."""
        program = self.options.cifar.resolve()  # a path, not a name to look up
        command = ["setpriv", "--pdeathsig", "KILL", program, *map(str, arguments)]
        with self.lock:
            if self.is_over():
                raise TimeIsUp
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self.processes.add(process)
        last = ""
        for line in process.stderr:
            last = line.rstrip("\n")
            if last.startswith("epoch"):
                print(f"{title}: {last}", file=sys.stderr, flush=True)
        text, code = process.stdout.read(), process.wait()
        with self.lock:
            self.processes.discard(process)
        if code == 0:
            return text
        if self.is_over():
            raise TimeIsUp
        said = last.removeprefix("cifar: error: ")
        raise Failure(said if said != last or last.startswith("setpriv") else f"it ended with {code}: {text.strip()}")

    def stop(self):
        with self.lock:
            self.end = time.monotonic()
            for process in self.processes:
                process.kill()

    def complete(self, run, threads):
        """Trains and contracts, as far as that is not done."""
        folder = folder_of(self.options, run.name)
        best, compact = folder / "best.onnx", folder / "compact.onnx"
        data = ["--data", self.options.data, "--dataset", run.options["dataset"]]
        on = ["--threads", threads]
        device, network = self.device(run)
        for need, name in (("init", run.init), ("teacher", run.teacher)):
            if name:
                network[need] = folder_of(self.options, name) / "best.onnx"
        if len(results.log_of(folder)) < run.options["epochs"]:
            compact.unlink(missing_ok=True)  # of an earlier network
        # At its end already, it checks that the folder is this training's.
        where = ["--device", "cuda"] if device == "cuda" else on
        self.cifar(run.name, "train", *data, *words(network), *where, "--out", folder, "--resume")
        if not contracts(run.name):
            return
        if not compact.exists():  # nor is it, where it recognises other test images
            self.cifar(run.name, "contract", best, *data, *on, "-o", compact)
            return
        outputs = [self.cifar(run.name, "eval", network, *data, *on, "--json") for network in (best, compact)]
        if len({json.loads(output)["correct"] for output in outputs}) > 1:
            raise Failure(f"{compact}: it recognises other test images than {best.name}; remove it")

    def device(self, run):
        """What computes a training, and its options there: a GPU compares no gradients, and computes blocks layer by
        layer, which a training does to its end or not at all."""
        options = {name: value for name, value in run.options.items() if name != "dataset"}
        device = "cpu" if "similarities" in options else self.options.device
        if options.get("compute") == "auto":
            log = folder_of(self.options, run.name) / "log.csv"
            begun = log.read_text() if log.exists() else ""
            layered = "--compute layered" in begun if begun else device == "cuda"
            options["compute"] = "layered" if layered else "auto"
            device = device if layered else "cpu"
        return device, options

    def run_all(self, runs):
        """Runs them after those that they need. Returns what went wrong, by the names of those that did not end well;
        what the end of the time interrupted did not go wrong."""
        runs = list({run.name: run for run in runs}.values())
        cores = len(os.sched_getaffinity(0))
        jobs = max(1, min(self.options.jobs or cores, len(runs)))
        needed = {name for run in runs for name in run.needs}
        # Teachers first: they take longest.
        waiting = sorted(runs, key=lambda run: (run.options["model"] != "resnet18", run.name not in needed))
        done, running, failures = set(), {}, {}
        with locked(self.options.out / "runs"), ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or running:
                    ready = [run for run in waiting if done.issuperset(run.needs)]
                    waiting = [run for run in waiting if run not in ready]
                    running |= {pool.submit(self.complete, run, max(1, cores // jobs)): run for run in ready}
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        run = running.pop(future)
                        try:
                            future.result()
                            done.add(run.name)
                        except TimeIsUp:
                            waiting = []
                        except (Failure, OSError, ValueError) as error:
                            failures[run.name] = f"{run.name}: {error}"
            except BaseException:
                self.stop()
                raise
        return failures | {run.name: f"{run.name}: not run, for it needs one that failed" for run in waiting}


def report(failures):
    for failure in failures.values():
        print(f"reproduce: {failure}", file=sys.stderr)
    return 1 if failures else 0


def print_missing(options, runs):
    for name in dict.fromkeys(run.name for run in runs):
        if not results.finished(folder_of(options, name)):
            print(name)
    return 0


# ---- tables ---------------------------------------------------------------------------------------------


def budget_of(options):
    return Budget(options.epochs, options.teacher_width, options.teacher_epochs, options.uniform_norms)


def table_plan(options):
    """The rows of a table that the patterns name, all for no pattern, with their trainings by seed: each the runs that
    it takes, itself last."""
    rows = [row for row in read_rows(options.paper) if row.table == options.name]
    for pattern in options.rows or []:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise Usage(f"no row of table {options.name} is named '{pattern}'; there are {names}")
    seeds, patterns = range(1, options.seeds + 1), options.rows or ["*"]
    chosen = [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]
    return [(row, [runs_of(row, seed, budget_of(options)) for seed in seeds]) for row in chosen]


def seeds_in_turn(plan):
    return [runs for of_seed in zip(*(by_seed for _, by_seed in plan)) for runs in of_seed]


def filled_rows(plan, training_of):
    """The rows of a table, each with the trainings that there are of it."""
    return [(row, [line for runs in by_seed if (line := training_of(runs[-1].name))]) for row, by_seed in plan]


def reproduce_table(options):
    plan = table_plan(options)
    if options.list:
        for row, _ in plan:
            for metric, mean, deviation in row.published:
                print(f"{row.name:40} {mean:.2f} ± {deviation:.2f}  {metric}")
        return 0
    if not options.data and not options.trainings and not options.missing:
        raise Usage("trainings need the data sets' folder, --data")
    known = results.read_trainings(options.trainings) if options.trainings else {}
    wanted = [runs for runs in seeds_in_turn(plan) if runs[-1].name not in known]
    if options.data:
        there = [name for name, dataset in DATASETS.items() if has_data(options, dataset)]
        lacking = dict.fromkeys(row.dataset for row, _ in plan if row.dataset not in there)
        if all(row.dataset in lacking for row, _ in plan):
            raise Failure(f"{options.data}: there is none of the data sets of table {options.name}")
        for name in lacking:
            print(f"Without {name}, whose rows stay empty: {options.data} has no such files.", file=sys.stderr)
        wanted = [runs for runs in wanted if has_data(options, runs[-1].options["dataset"])]
    if options.missing:
        lacking = [runs for runs in wanted if not results.finished(folder_of(options, runs[-1].name))]
        return print_missing(options, [run for runs in lacking for run in runs])
    failures = Trainings(options).run_all([run for runs in wanted for run in runs]) if options.data else {}

    def training_of(name):
        return known.get(name) or (None if name in failures else results.finished(folder_of(options, name)))

    filled = filled_rows(plan, training_of)
    text, lines = results.results_table([pair for pair in filled if pair[1]], budget_of(options))
    empty = sum(not trainings for _, trainings in filled)
    markdown = f"""# Table {options.name}, reproduced

`{options.command}`

In percent; seeds from 1 on. The paper's are means and standard deviations of five trainings of 150 epochs; three
deviations count the paper's and ours. "Contracted" says that each compact network recognises as many test images as the
expanded one it came from.

{chr(10).join(lines)}
"""
    if empty:
        markdown += f"\n{empty} row{'s' * (empty > 1)} of the table without a training.\n"
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"table-{options.name}{budget_of(options).marks}"
    results.write_text(options.out / f"{name}.csv", text)
    results.write_text(options.out / f"{name}.md", markdown)
    print(markdown, end="")
    return report(failures)


# ---- figures --------------------------------------------------------------------------------------------


def figure_plan(options):
    """A figure's name, which says all that tells it from others, and its curves."""
    compares = options.name != "S4"
    if (options.batches and not compares) or (options.points and options.name != "S1"):
        raise Usage("--batches is for the figures S1, S2 and S3, --points for S1")
    dataset = options.dataset or ("cifar100" if options.name == "S3" else "cifar10")
    batches = options.batches or experiments.BATCHES
    name = f"figure-{options.name}-{dataset}-k{options.kernel}{Budget(options.epochs).marks}"
    name += f"-b{batches}" * (batches != experiments.BATCHES)
    return name, dataset, curves_of(options.name, dataset, options.kernel, options.epochs, batches)


def reproduce_figure(options):
    if options.missing:
        return print_missing(options, [run for _, run in figure_plan(options)[2]])
    if not options.data:
        raise Usage("trainings need the data sets' folder, --data")
    return report(make_figure(Trainings(options), options))


def make_figure(trainings, options):
    """Its trainings, and figure-NAME.* in OUT. Returns what went wrong in training, and then there is no figure."""
    name, dataset, curves = figure_plan(options)
    if not has_data(options, dataset):
        raise Failure(f"{options.data}: there is no {dataset}")
    failures = trainings.run_all([run for _, run in curves])
    if failures or trainings.is_over():
        return failures
    published = {dataset: name for name, dataset in DATASETS.items()}[dataset]
    title = f"{published}, kernel {options.kernel}, {options.epochs} epochs"
    if options.name != "S1":
        folders = [(each, folder_of(options, run.name)) for each, run in curves]
        figures.plot_training(options.out, name, title, folders, options.name != "S4")
        return {}
    panels = []
    for each, run in curves:
        panels.append((each, f"{name}-{run.options['model']}.csv"))
        where = ["--data", options.data, "--dataset", dataset, "--points", options.points or 31]
        compact = folder_of(options, run.name) / "compact.onnx"
        trainings.cifar(name, "landscape", compact, *where, "-o", options.out / panels[-1][1])
    figures.plot_landscapes(options.out, name, title, panels)
    return {}


def keep_figure(options, name):
    """Copies a figure to the others, each file whole; the one by which it is known last."""
    own = re.compile(rf"{re.escape(name)}(-[a-z+]+)?\.(csv|gp|svg|png)")
    files = [path for path in options.out.iterdir() if own.fullmatch(path.name)]
    for path in sorted(files, key=lambda path: path.suffix == ".svg"):
        copy = options.figures / f".{path.name}"
        shutil.copy(path, copy)
        os.replace(copy, options.figures / path.name)


# ---- the queue ------------------------------------------------------------------------------------------


@dataclass
class Wanted:
    """A training or a figure that is missing, by a line of what is wanted, and how long it still takes."""

    line: argparse.Namespace  # its options
    title: str
    runs: list
    minutes: float


def collect(options, failures):
    """Appends the trainings that have ended to the file of finished ones, but those whose folders are damaged."""
    known, new = results.read_trainings(options.trainings), {}
    for folder in sorted((options.out / "runs").glob("*"), key=lambda folder: folder.stat().st_mtime):
        try:
            line = None if folder.name in known else results.finished(folder)
        except Failure as failure:
            failures[folder.name], line = str(failure), None
        if line:
            new[folder.name] = line | {"commit": options.commit or commit(), "machine": options.machine}
            print(f"{folder.name}: {line['best']}%, {float(line['seconds']) / 60:.0f} minutes", flush=True)
    if new:
        results.append_trainings(options.trainings, new.values())
    return known | new


def minutes_of(run, known, options, guess):
    """How long a training still takes, by the median of those of its kind, on this machine if there are any."""

    def kind_of(training):  # what decides it: not the data set, nor how weights start or labels are drawn
        kind = re.sub(r"^(cifar100|cifar10|mnist)-", "", training)
        return re.sub(r"-(uniform|init|corrupted\d+|decayed|product)(?=-|$)", "", kind)

    training, epochs, _ = experiments.parts_of(run.name)
    alike = [
        line
        for line in known.values()
        if line["seconds"]
        and kind_of(line["training"]) == kind_of(training)
        and line["machine"].startswith("NVIDIA") == (options.device == "cuda")
    ]
    here = [line for line in alike if line["machine"] == options.machine]
    rates = [float(line["seconds"]) / int(line["epochs"]) for line in here or alike]
    log = results.log_of(folder_of(options, run.name))
    if log:
        rates.append(statistics.fmean(epoch["seconds"] for epoch in log))
    seconds = statistics.median(rates) if rates else 60 * guess / epochs
    return seconds * max(0, epochs - len(log)) / 60


def plan_of_line(line, options):
    """The options of a line of what is wanted, and what it wants: titles with their runs."""
    command = shlex.split(line["options"])
    if command[:1] == ["table"]:
        command += ["--paper", str(options.paper), "--seeds", line["seeds"]]
        command += ["--rows", *line["rows"].split()] if line["rows"] else []
    own = parser_of().parse_args(command)
    if own.run not in (reproduce_table, reproduce_figure) or own.missing or getattr(own, "list", False):
        raise Usage("it is no table and no figure")
    own.out, own.data, own.device, own.jobs = options.out, options.data, options.device, options.jobs
    if own.run is reproduce_table:
        return own, [(runs[-1].name, runs) for runs in seeds_in_turn(table_plan(own))]
    name, _, curves = figure_plan(own)
    return own, [(name, [run for _, run in curves])]


def missing(options, known, failures):
    """What is wanted and missing, the most wanted first, but what has a damaged folder."""
    found, without = {}, set()
    for number, line in enumerate(experiments.read_csv(options.wanted, "options,rows,seeds,minutes".split(",")), 2):
        try:
            own, plan = plan_of_line(line, options)
            guess = number_in(line["minutes"], 0, 1e6)
        except (Usage, ValueError) as error:
            raise Failure(f"{options.wanted}: line {number}: \"{line['options']}\" is refused: {error}") from None
        for title, runs in plan:
            dataset = runs[-1].options["dataset"]
            if title in found or title in known or (options.figures / f"{title}.svg").exists():
                continue
            if not has_data(options, dataset):
                without.add(dataset)
                continue
            try:
                minutes = sum(minutes_of(run, known, options, guess) for run in runs)
                if not results.finished(folder_of(options, title)):
                    found[title] = Wanted(own, title, runs, minutes)
            except Failure as failure:
                failures[title] = str(failure)
    for dataset in without:
        print(f"Without {dataset}: {options.data} has no such files.", file=sys.stderr)
    return list(found.values())


def run_next(options):
    """The queue. A training is started only if it ends in time; what is interrupted goes on at the next call."""
    if options.device == "cuda" and not options.machine:
        raise Usage("--device cuda needs the GPU's name, --machine")
    options.machine = options.machine or machine()
    tried, failures = set(), {}
    if options.list:
        for each in missing(options, results.read_trainings(options.trainings), failures):
            print(f"{each.minutes:6.0f} {each.title}")
        return report(failures)
    trainings = Trainings(options, time.monotonic() + 60 * options.minutes)
    timer = threading.Timer(60 * options.minutes, trainings.stop)
    timer.daemon = True
    timer.start()
    alone = options.device == "cpu" and len(os.sched_getaffinity(0)) == 1
    while True:
        known = collect(options, failures)
        left = (trainings.end - time.monotonic()) / 60
        if trainings.is_over():
            break
        wanted = [each for each in missing(options, known, failures) if each.title not in tried]
        if options.jobs:  # all that the line of the first still lacks, whether or not it ends in time
            chosen = [each for each in wanted if each.line is wanted[0].line]
        else:
            chosen = [each for each in wanted if each.minutes <= left and not (alone and each.minutes > LONG)][:1]
        if not chosen:
            break
        for each in chosen:
            print(f"{each.title}: about {each.minutes:.0f} of {left:.0f} minutes", flush=True)
            tried.add(each.title)
        own = chosen[0].line
        if own.run is reproduce_table:
            failures |= trainings.run_all([run for each in chosen for run in each.runs])
            continue
        title = chosen[0].title
        try:
            failed = make_figure(trainings, own)
            if not failed and not trainings.is_over():
                keep_figure(options, title)
        except TimeIsUp:  # in a landscape
            continue
        except Failure as failure:
            failed = {title: f"{title}: {failure}"}
        failures |= failed
    return report(failures)


# ---- docs/results ---------------------------------------------------------------------------------------

SHORT = ["--epochs", "10"]
SHORT_TEACHER = ["--teacher-width", "8", "--teacher-epochs", "12"]
DRAWN = [
    *[(table, []) for table in experiments.TABLES],
    *[(table, ["--uniform-norms"]) for table in ("S1", "S3")],
    *[(table, SHORT + SHORT_TEACHER) for table in ("S1", "S3", "S4")],
    ("S7", SHORT),
]


def draw_results(options):
    """The tables of finished trainings, as CSV and in the page, between the comments that name them; the picture."""
    known, drawn = results.read_trainings(options.results / "trainings.csv"), {}
    for table, budget in DRAWN:
        own = parser_of().parse_args(["table", table, *budget])
        filled = [pair for pair in filled_rows(table_plan(own), known.get) if pair[1]]
        if filled:
            drawn[f"table-{table}{budget_of(own).marks}"] = results.results_table(filled, budget_of(own))
    page = options.results / "experiments.md"

    def table_of(match):
        if match[1] not in drawn:
            raise Failure(f"{page}: there is no {match[1]}; there are {', '.join(drawn) or 'none'}")
        if "<!-- " in match[2]:
            raise Failure(f"{page}: {match[1]} has no <!-- end -->")
        return "\n".join([f"<!-- {match[1]} -->", "", *drawn[match[1]][1], "", "<!-- end -->"])

    between = re.compile(r"<!-- (table-\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
    text = between.sub(table_of, experiments.read_text(page))
    figures.draw_accuracy(
        [drawn[name][0] for name in ("table-S1", "table-S3") if name in drawn],
        options.results / "figures",
        list(experiments.MODELS),
    )
    for name, (table, _) in drawn.items():
        results.write_text(options.results / "tables" / f"{name}.csv", table)
    results.write_text(page, text)
    return 0


# ---- the command line -----------------------------------------------------------------------------------


def commit():
    command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise Failure(f"{ROOT} is no clone of a repository; name the program's commit, --commit")
    return ended.stdout.strip()


def machine():
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return (model[1] if model else os.uname().machine) + (" AVX-512" if "avx512f" in text else "")


def checked(least, most, kind=int):
    """A type of arguments: numbers in a range."""

    def value(text):
        try:
            return number_in(text, least, most, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return value


def path(text):
    if not text or any("\udc80" <= c <= "\udcff" for c in text):
        raise argparse.ArgumentTypeError("a path is UTF-8, and not empty")
    return Path(text)


def folder(text):
    if not path(text).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is no folder")
    return Path(text)


def odd(text):
    number = checked(3, 1001)(text)
    if number % 2 == 0:
        raise argparse.ArgumentTypeError(f"{number} is not odd")
    return number


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Usage(message)


def parser_of():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="subcommand", required=True)
    docs = ROOT / "docs/results"

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    table = command("table", reproduce_table, "A table: its trainings, table-NAME.md and .csv")
    figure = command("figure", reproduce_figure, "A figure: its trainings, figure-NAME-*.csv, .gp, .svg and .png")
    queue = command("next", run_next, "The most wanted trainings that are missing and end in time")
    draw = command("draw", draw_results, "The tables and the picture of docs/results, from its finished trainings")

    table.add_argument("name", choices=experiments.TABLES)
    figure.add_argument("name", choices=experiments.FIGURES, help="S1 landscapes, S2 and S3 curves, S4 weight decay")
    for each in (table, figure, queue):
        wanted = each is queue
        each.add_argument("--data", type=folder, required=wanted, help="of the data sets' binary versions")
        each.add_argument("--out", type=path, default=Path("cifar-reproduced"), help="of trainings and results")
        each.add_argument("--cifar", type=path, default=ROOT / "build/release/examples/cifar", help="the program")
        each.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of what a GPU computes")
        jobs = "start all that a line of wanted.csv lacks, so many side by side, whether or not it ends in time"
        jobs = jobs if wanted else "trainings side by side; by default one for each core"
        each.add_argument("--jobs", type=checked(1, 256), default=0, help=jobs)
    for each in (table, figure):
        each.add_argument("--epochs", type=checked(1, 999_999), default=150, help="of all but the teacher's training")
        each.add_argument("--missing", action="store_true", help="print what would be trained, and run nothing")
    for each in (table, queue):
        each.add_argument("--paper", type=path, default=ROOT / "examples/data/accuracy.csv", help="what is published")
    table.add_argument("--rows", nargs="+", action="extend", help="by name; * stands for anything")
    table.add_argument("--list", action="store_true", help="print the rows' names and the paper's numbers")
    table.add_argument("--seeds", type=checked(1, 1000), default=5, help="trainings of each row")
    table.add_argument("--uniform-norms", action="store_true", help="batch norms start uniform in 0 to 1, as published")
    table.add_argument("--teacher-width", type=checked(1, 1024), default=64, help="of the ResNet-18's first stage")
    table.add_argument("--teacher-epochs", type=checked(1, 999_999), default=200, help="of its training")
    finished = "of finished trainings, which rows take and do not run again; nothing is run without --data"
    table.add_argument("--trainings", type=path, help=finished)
    figure.add_argument("--dataset", choices=list(DATASETS.values()), help="cifar100 for S3, otherwise cifar10")
    figure.add_argument("--kernel", type=int, choices=[3, 5, 7, 9], default=3, help="of the networks")
    compared = f"whose gradients S1, S2 and S3 compare after each epoch, by default {experiments.BATCHES}"
    figure.add_argument("--batches", type=checked(3, 10_000), help=compared)
    figure.add_argument("--points", type=odd, help="of S1's landscapes along each direction, by default 31")
    queue.add_argument("--minutes", type=checked(0, 1e6, float), required=True, help="until when trainings end")
    queue.add_argument("--list", action="store_true", help="print what is missing with its minutes, and run nothing")
    queue.add_argument("--wanted", type=path, default=docs / "wanted.csv", help="what is wanted, the first first")
    queue.add_argument("--trainings", type=path, default=docs / "trainings.csv", help="to take and to append to")
    queue.add_argument("--figures", type=folder, default=docs / "figures", help="where figures are kept")
    queue.add_argument("--commit", help="that the program was built from, if not HEAD")
    queue.add_argument("--machine", help="as the finished trainings name it, if not the processor")
    draw.add_argument("--results", type=folder, default=docs, help="the folder of page and trainings")
    return parser


def main():
    def fail(message, code=1):
        print(f"reproduce: error: {message}", file=sys.stderr)
        return code

    def interrupted(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    if sys.stdout is None:
        return fail("standard output is closed")
    try:
        options = parser_of().parse_args()
        options.command = shlex.join(["reproduce.py", *sys.argv[1:]])
        code = options.run(options)
        sys.stdout.flush()
        return code
    except Usage as error:
        return fail(f"{error}; see --help", 2)
    except KeyboardInterrupt:
        return fail("interrupted; it goes on when it is started again")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain at its end
        return fail("standard output is closed")
    except (Failure, OSError) as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
