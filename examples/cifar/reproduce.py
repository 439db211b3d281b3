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
from fnmatch import fnmatchcase
from pathlib import Path

import experiments
import figures
import results
from experiments import DATASETS, Budget, curves_of, read_rows, runs_of

ROOT = Path(__file__).resolve().parent.parent.parent
LONG = 3 * 60  # minutes of a training that does not run on one core
FILES = {  # by which a data set is known, in the folder or below it
    "cifar10": ("data_batch_1.bin", "cifar-10-batches-bin/data_batch_1.bin"),
    "cifar100": ("train.bin", "cifar-100-binary/train.bin"),
    "mnist": ("train-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte"),
}


class Failure(Exception):
    """What went wrong, in a line."""


# ---- trainings ------------------------------------------------------------------------------------------


class LockedFolder:
    """A folder, made if need be, that no other program locks until it is closed."""

    def __init__(self, path):
        path.mkdir(parents=True, exist_ok=True)
        self.folder = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self.folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise Failure(f"{path}: another process trains in it; wait for it, or name another folder") from None

    def close(self):
        os.close(self.folder)


class Trainings:
    """Runs trainings in a folder, several side by side, until the time is up."""

    def __init__(self, options, end=None):
        self.options, self.end = options, end
        self.out = options.out / "runs"
        self.processes, self.lock = set(), threading.Lock()

    def folder(self, run):
        return self.out / run.name

    def cifar(self, *arguments):
        """What the command prints. Failure with its error; subprocess.TimeoutExpired at the end of the time."""
        title, *rest = arguments
        command = ["setpriv", "--pdeathsig", "KILL", self.options.cifar, *map(str, rest)]
        with self.lock:
            if self.end and time.monotonic() >= self.end:
                raise subprocess.TimeoutExpired(command, 0)
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self.processes.add(process)
        timer = threading.Timer(self.end - time.monotonic(), process.kill) if self.end else None
        if timer:
            timer.start()
        try:
            last = ""
            for line in process.stderr:
                last = line.rstrip("\n")
                if last.startswith("epoch"):
                    print(f"{title}: {last}", file=sys.stderr, flush=True)
            text = process.stdout.read()
            if process.wait() == 0:
                return text
        finally:
            if timer:
                timer.cancel()
            process.kill()
            process.wait()
            with self.lock:
                self.processes.discard(process)
        if self.end and time.monotonic() >= self.end:
            raise subprocess.TimeoutExpired(command, 0)
        raise Failure(last.removeprefix("cifar: error: ") or f"it ended with {process.returncode}: {text.strip()}")

    def complete(self, run, threads):
        """Trains and contracts, as far as that is not done."""
        folder, options = self.folder(run), self.options
        best, compact = folder / "best.onnx", folder / "compact.onnx"
        data = ["--data", options.data, "--dataset", run.options["dataset"]]
        on = ["--threads", threads]
        device, network = self.device(run)
        for name in ("init", "teacher"):
            if getattr(run, name):
                network[name] = self.out / getattr(run, name) / "best.onnx"
        log = results.log_of(folder)
        if not log or log[-1]["epoch"] < run.options["epochs"]:
            compact.unlink(missing_ok=True)  # of an earlier network
        # At its end already, it checks that the folder is this training's.
        where = ["--device", "cuda"] if device == "cuda" else on
        self.cifar(run.name, "train", *data, *words(network), *where, "--out", folder, "--resume")
        if not run.contracts:
            return
        if not compact.exists():  # nor is it, where it recognises other test images
            self.cifar(run.name, "contract", best, *data, *on, "-o", compact)
            return
        outputs = [self.cifar(run.name, "eval", network, *data, *on, "--json") for network in (best, compact)]
        if len({json.loads(output)["correct"] for output in outputs}) > 1:
            raise Failure(f"{compact}: it recognises other test images than {best.name}; remove it")

    def stop(self):
        """Ends what runs; a training goes on from its last epoch."""
        with self.lock:
            self.end = time.monotonic()
            for process in self.processes:
                process.kill()

    def device(self, run):
        """What computes a training, and its options there: a GPU compares no gradients, and computes blocks layer by
        layer, which a training does to its end or not at all."""
        options = {name: value for name, value in run.options.items() if name != "dataset"}
        device = "cpu" if "similarities" in options else self.options.device
        if options.get("compute") == "auto":
            log = self.folder(run) / "log.csv"
            begun = log.read_text() if log.exists() else ""
            layered = "--compute layered" in begun if begun else device == "cuda"
            options["compute"] = "layered" if layered else "auto"
            device = device if layered else "cpu"
        return device, options

    def run_all(self, runs):
        """Runs them after those that they need, and returns what went wrong, a line for each that did not end well."""
        cores = len(os.sched_getaffinity(0))
        jobs = max(1, min(self.options.jobs or cores, len(runs)))
        needed = {name for run in runs for name in run.needs}
        # Teachers first: they take longest.
        waiting = sorted(runs, key=lambda run: (run.options["model"] != "resnet18", run.name not in needed))
        done, running, failures = set(), {}, []
        with contextlib.closing(LockedFolder(self.out)), ThreadPoolExecutor(jobs) as pool:
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
                        except (Failure, OSError, ValueError) as error:
                            failures.append(f"{run.name}: {error}")
            except BaseException:
                self.stop()
                raise
        return failures + [f"{run.name}: not run, for it needs one that failed" for run in waiting]


def words(options):
    return [
        word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", value])
    ]


# ---- tables and figures ---------------------------------------------------------------------------------


def has_data(options, dataset):
    return options.data and any((options.data / file).exists() for file in FILES[dataset])


def chosen_rows(options):
    """The rows of a table that the patterns name, all for no pattern."""
    rows = [row for row in read_rows(options.paper) if row.table == options.name]
    for pattern in options.rows or []:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            options.refuse(f"no row of table {options.name} is named '{pattern}'; there are {names}")
    return [row for row in rows if not options.rows or any(fnmatchcase(row.name, each) for each in options.rows)]


def budget_of(options):
    return Budget(options.epochs, options.teacher_width, options.teacher_epochs, options.uniform_norms)


def table_runs(options):
    """The trainings of a table, one seed after another: each with those that it needs, itself last."""
    seeds = range(1, options.seeds + 1)
    return [runs_of(row, seed, budget_of(options)) for seed in seeds for row in chosen_rows(options)]


def table_rows(options, training_of):
    """The rows of a table, each with the trainings that there are of its names."""
    for row in chosen_rows(options):
        names = (runs_of(row, seed, budget_of(options))[-1].name for seed in range(1, options.seeds + 1))
        yield row, [training for name in names if (training := training_of(name))]


def figure_name(options):
    return f"figure-{options.name}-{options.dataset}-k{options.kernel}"


def figure_curves(options):
    options.dataset = options.dataset or ("cifar100" if options.name == "S3" else "cifar10")
    return curves_of(options.name, options.dataset, options.kernel, options.epochs, options.batches)


def unfinished(options, runs):
    return [run for run in runs if not results.finished(options.out / "runs" / run.name)]


def known_trainings(options):
    return results.read_trainings(options.trainings) if options.trainings else {}


def print_missing(options, runs):
    for name in dict.fromkeys(run.name for run in unfinished(options, runs)):
        print(name)
    return 0


def report(failures):
    for failure in failures:
        print(f"reproduce: {failure}", file=sys.stderr)
    return 1 if failures else 0


def reproduce_table(options):
    rows, known = chosen_rows(options), known_trainings(options)
    if options.list:
        for row in rows:
            for metric, mean, deviation in row.published:
                print(f"{row.name:40} {mean:.2f} ± {deviation:.2f}  {metric}")
        return 0
    wanted = [runs for runs in table_runs(options) if runs[-1].name not in known]
    if options.missing:
        return print_missing(options, [run for runs in wanted if unfinished(options, runs[-1:]) for run in runs])
    failures = []
    if options.data:
        there = [name for name, dataset in DATASETS.items() if has_data(options, dataset)]
        if not any(row.dataset in there for row in rows):
            raise Failure(f"{options.data}: there is none of the data sets of table {options.name}")
        for name in dict.fromkeys(row.dataset for row in rows if row.dataset not in there):
            print(f"Without {name}, whose rows stay empty: {options.data} has no such files.", file=sys.stderr)
        runs = {run.name: run for each in wanted for run in each if has_data(options, run.options["dataset"])}
        failures = Trainings(options).run_all(list(runs.values()))
    filled = list(table_rows(options, lambda name: results.finished(options.out / "runs" / name) or known.get(name)))
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
    path = options.out / f"table-{options.name}{budget_of(options).marks}"
    results.write_text(path.with_name(path.name + ".csv"), text)
    results.write_text(path.with_name(path.name + ".md"), markdown)
    print(markdown, end="")
    return report(failures)


def reproduce_figure(options):
    curves = figure_curves(options)
    if options.missing:
        return print_missing(options, [run for _, run in curves])
    return report(make_figure(Trainings(options), options, curves))


def make_figure(trainings, options, curves):
    """Its trainings, and figure-NAME.* in OUT; what went wrong in training, and then there is no figure."""
    if not has_data(options, options.dataset):
        raise Failure(f"{options.data}: there is no {options.dataset}")
    failures = trainings.run_all([run for _, run in curves])
    if failures:
        return failures
    published = {dataset: name for name, dataset in DATASETS.items()}[options.dataset]
    name, title = figure_name(options), f"{published}, kernel {options.kernel}, {options.epochs} epochs"
    if options.name != "S1":
        figures.plot_training(options.out, name, title, [(each, trainings.folder(run)) for each, run in curves])
        return []
    panels = []
    for each, run in curves:
        file = f"{name}-{run.options['model']}.csv"
        network, data = trainings.folder(run) / "compact.onnx", ["--data", options.data, "--dataset", options.dataset]
        trainings.cifar(name, "landscape", network, *data, "--points", options.points, "-o", options.out / file)
        panels.append((each, file))
    figures.plot_landscapes(options.out, name, title, panels)
    return []


# ---- the queue ------------------------------------------------------------------------------------------


def collect(options):
    """Appends the trainings that have ended to the file of finished ones."""
    known = results.read_trainings(options.trainings)
    folders = sorted((options.out / "runs").glob("*"), key=lambda folder: folder.stat().st_mtime)
    for folder in folders:
        if folder.name not in known and (line := results.finished(folder)):
            line |= {"commit": options.commit, "machine": options.machine}
            known[folder.name] = line
            with open(options.trainings, "a") as file:
                file.write(",".join(line[column] for column in results.COLUMNS) + "\n")
            print(f"{folder.name}: {line['best']}%, {float(line['seconds']) / 60:.0f} minutes", flush=True)
    return known


def minutes_of(run, known, options, guess):
    """How long a training still takes, by the median of those of its kind, on this machine if there are any."""

    def kind_of(training):  # what decides it: not the data set, nor how weights start or labels are drawn
        kind = re.sub(r"^(cifar100|cifar10|mnist)-", "", training)
        return re.sub(r"-(uniform|init|corrupted\d+|decayed|product)(?=-|$)", "", kind)

    training, epochs, _ = results.parts_of(run.name)
    alike = [
        line
        for line in known.values()
        if line["seconds"]
        and kind_of(line["training"]) == kind_of(training)
        and line["machine"].startswith("NVIDIA") == (options.device == "cuda")
    ]
    here = [line for line in alike if line["machine"] == options.machine]
    rates = [float(line["seconds"]) / int(line["epochs"]) for line in here or alike]
    log = results.log_of(options.out / "runs" / run.name)
    if log:
        rates.append(statistics.fmean(epoch["seconds"] for epoch in log))
    seconds = statistics.median(rates) if rates else 60 * guess / epochs
    return seconds * max(0, epochs - len(log)) / 60


def candidates(options, known):
    """What is wanted and missing, the most wanted first: the line's own options, a title, its runs, and minutes."""
    seen = set()
    for number, line in enumerate(experiments.read_csv(options.wanted, "options,rows,seeds,minutes".split(",")), 2):
        command = shlex.split(line["options"])
        if line["rows"]:
            command += ["--paper", str(options.paper), "--rows", *line["rows"].split(), "--seeds", line["seeds"]]
        try:
            own = parser_of().parse_args(command)
            own.out, own.data, own.refuse = options.out, options.data, fail
            if own.run is reproduce_table:
                wanted = [(runs[-1].name, runs) for runs in table_runs(own)]
                wanted = [(name, runs) for name, runs in wanted if name not in known and unfinished(own, runs[-1:])]
            else:
                runs, name = [run for _, run in figure_curves(own)], figure_name(own)
                wanted = [] if (options.figures / f"{name}.svg").exists() else [(name, runs)]
            guess = float(line["minutes"])
        except (SystemExit, AttributeError, ValueError) as error:
            raise Failure(f"{options.wanted}: line {number}: \"{line['options']}\" is refused: {error}") from None
        for title, runs in wanted:
            if title not in seen:
                seen.add(title)
                lacking = unfinished(own, runs)
                yield own, title, lacking, sum(minutes_of(run, known, options, guess) for run in lacking)


def run_next(options):
    """The queue. A training is started only if it ends in time; what is interrupted goes on at the next call."""
    end = time.monotonic() + 60 * options.minutes
    trainings = Trainings(options, end)
    alone = options.device == "cpu" and len(os.sched_getaffinity(0)) == 1
    tried, failures = set(), []
    with contextlib.suppress(subprocess.TimeoutExpired):
        while True:
            known = collect(options)
            left = (end - time.monotonic()) / 60
            wanted = list(candidates(options, known))
            if options.list:
                for _, title, _, minutes in wanted:
                    print(f"{minutes:6.0f} {title}")
            if options.list or left <= 0:
                break
            if options.jobs:  # all that the line of the first still lacks, whether or not it ends in time
                fresh = [each for each in wanted if each[1] not in tried]
                chosen = [each for each in fresh if each[0] is fresh[0][0]]
            else:
                fits = [each for each in wanted if each[1] not in tried and each[3] <= left]
                chosen = [each for each in fits if not (alone and each[3] > LONG)][:1]
            if not chosen:
                break
            own = chosen[0][0]
            for _, title, _, minutes in chosen:
                print(f"{title}: about {minutes:.0f} of {left:.0f} minutes", flush=True)
                tried.add(title)
            if own.run is reproduce_table:
                runs = {run.name: run for _, _, each, _ in chosen for run in each}
                failures += trainings.run_all(list(runs.values()))
            else:
                failures += make_figure(trainings, own, figure_curves(own))
                for path in options.out.glob(f"{figure_name(own)}*"):
                    if path.suffix in (".csv", ".gp", ".svg", ".png"):
                        shutil.copy(path, options.figures)
    if not options.list:
        collect(options)
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
    known, drawn, csvs = results.read_trainings(options.results / "trainings.csv"), {}, {}
    for table, budget in DRAWN:
        own = parser_of().parse_args(["table", table, *budget])
        name = f"table-{table}{budget_of(own).marks}"
        filled = [pair for pair in table_rows(own, known.get) if pair[1]]
        if filled:
            csvs[name], drawn[name] = results.results_table(filled, budget_of(own))
            results.write_text(options.results / "tables" / f"{name}.csv", csvs[name])

    def table_of(match):
        if match[1] not in drawn:
            raise Failure(f"{page}: there is no {match[1]}; there are {', '.join(drawn)}")
        return "\n".join([f"<!-- {match[1]} -->", "", *drawn[match[1]], "", "<!-- end -->"])

    page = options.results / "experiments.md"
    between = r"<!-- (table-\S+) -->\n.*?<!-- end -->"
    results.write_text(page, re.sub(between, table_of, page.read_text(), flags=re.DOTALL))
    tables = [csvs["table-S1"], csvs["table-S3"]]
    figures.draw_accuracy(tables, options.results / "figures", list(experiments.MODELS))
    return 0


# ---- the command line -----------------------------------------------------------------------------------


def commit():
    command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def machine():
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return (model[1] if model else os.uname().machine) + (" AVX-512" if "avx512f" in text else "")


def positive(text):
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 to 999999")
    return int(text)


def folder(text):
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is no folder")
    return Path(text)


def parser_of():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="subcommand", required=True)
    docs = ROOT / "docs/results"

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run, refuse=added.error)
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
        each.add_argument("--out", type=Path, default=Path("cifar-reproduced"), help="of trainings and results")
        each.add_argument("--cifar", default=ROOT / "build/release/examples/cifar", help="the program")
        each.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of what a GPU computes")
        jobs = "start all that a line of wanted.csv lacks, so many side by side, whether or not it ends in time"
        jobs = jobs if wanted else "trainings side by side; by default one for each core"
        each.add_argument("--jobs", type=positive, default=0, help=jobs)
    for each in (table, figure):
        each.add_argument("--epochs", type=positive, default=150, help="of every training but the teacher's")
        each.add_argument("--missing", action="store_true", help="print what is not done, and run nothing")
    for each in (table, queue):
        each.add_argument("--paper", type=Path, default=ROOT / "examples/data/accuracy.csv", help="what is published")
    table.add_argument("--rows", nargs="+", action="extend", help="by name; * stands for anything")
    table.add_argument("--list", action="store_true", help="print the rows' names and the paper's numbers")
    table.add_argument("--seeds", type=positive, default=5, help="trainings of each row")
    table.add_argument("--uniform-norms", action="store_true", help="batch norms start uniform in 0 to 1, as published")
    table.add_argument("--teacher-width", type=positive, default=64, help="channels of the ResNet-18's first stage")
    table.add_argument("--teacher-epochs", type=positive, default=200, help="of its training")
    finished = "of finished trainings, which rows take and do not run again; without --data rows take nothing else"
    table.add_argument("--trainings", type=Path, help=finished)
    figure.add_argument("--dataset", choices=list(DATASETS.values()), help="cifar100 for S3, otherwise cifar10")
    figure.add_argument("--kernel", type=int, choices=[3, 5, 7, 9], default=3, help="of the networks")
    compared = "whose gradients are compared after each epoch"
    figure.add_argument("--batches", type=positive, default=experiments.BATCHES, help=compared)
    figure.add_argument("--points", type=positive, default=31, help="of a landscape along each direction; odd")
    queue.add_argument("--minutes", type=float, required=True, help="until when trainings end")
    queue.add_argument("--list", action="store_true", help="print what is missing with its minutes, and run nothing")
    queue.add_argument("--wanted", type=Path, default=docs / "wanted.csv", help="what is wanted, the first first")
    queue.add_argument("--trainings", type=Path, default=docs / "trainings.csv", help="to take and to append to")
    queue.add_argument("--figures", type=Path, default=docs / "figures", help="where figures are kept")
    queue.add_argument("--commit", default=None, help="that the program was built from, if not HEAD")
    queue.add_argument("--machine", default=machine(), help="as the finished trainings name it")
    draw.add_argument("--results", type=Path, default=docs, help="the folder of page and trainings")
    return parser


def fail(message):
    sys.exit(f"reproduce: error: {message}")


def main():
    options = parser_of().parse_args()
    options.command = shlex.join(["reproduce.py", *sys.argv[1:]])
    if options.run in (reproduce_table, reproduce_figure) and not options.data:
        only_read = options.missing or (options.run is reproduce_table and (options.list or options.trainings))
        if not only_read:
            options.refuse("trainings need the data sets' folder, --data")
    if options.run is run_next:
        options.commit = options.commit or commit()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return options.run(options)
    except FileNotFoundError as error:
        missing = " (Debian: apt install gnuplot-nox)" if error.filename == "gnuplot" else ""
        fail(f"{error}{missing}")
    except (Failure, OSError, ValueError, subprocess.CalledProcessError) as error:
        fail(error)


if __name__ == "__main__":
    sys.exit(main())
