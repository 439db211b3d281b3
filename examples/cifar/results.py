# SPDX-License-Identifier: Apache-2.0
"""What trainings came to, by their folders or the file of finished ones, and tables beside the paper's."""

import csv
import io
import math
import os
import re
import statistics
import tempfile

from experiments import Budget, Failure, contracts, full_name, number_in, parts_of, read_csv, read_text

COLUMNS = "training,seed,epochs,best,best_epoch,last,train_error,contracted,seconds,commit,machine".split(",")


def name_of(line):
    return full_name(line["training"], line["epochs"], line["seed"])


def write_text(path, text):
    """Replaces the file when all is written."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ---- the folder of a training ---------------------------------------------------------------------------


def log_of(folder):
    """The epochs of a training, without a last line that was cut short: dictionaries of numbers."""
    path = folder / "log.csv"
    if not path.exists():
        return []
    text = read_text(path)
    lines = [line for line in text[: text.rfind("\n") + 1].splitlines() if not line.startswith("#")]
    epochs = []
    try:
        for line in csv.DictReader(lines):
            epoch = {column: float(number) for column, number in line.items() if number}
            shares = [epoch["train_accuracy"], epoch["test_accuracy"]]
            if epoch["epoch"] != len(epochs) + 1:
                raise ValueError(f"epoch {epoch['epoch']:g} stands where {len(epochs) + 1} belongs")
            if not (all(0 <= share <= 1 for share in shares) and 0 <= epoch["seconds"] < math.inf):
                raise ValueError("an accuracy is not from 0 to 1, or the seconds are none")
            epochs.append(epoch)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise Failure(f"{path}: this is no log of a training: {error}") from error
    return epochs


def similarities_of(folder):
    """The cosines between the gradients of batches at the end of a training."""
    path = folder / "similarities.csv"
    head, *lines = read_text(path).splitlines() or [""]
    if head != "cosine_similarity":
        raise Failure(f'{path}: line 1: expected "cosine_similarity"')
    cosines = []
    for number, line in enumerate(lines, 2):
        try:
            cosines.append(number_in(line, -1, 1))
        except ValueError as error:
            raise Failure(f"{path}: line {number}: {error}") from error
    return cosines


def finished(folder):
    """The line of a training that has ended, but for commit and machine; None for one that has not."""
    parts, log = parts_of(folder.name), log_of(folder)
    if not parts or not log or len(log) < parts[1]:
        return None
    training, epochs, seed = parts
    compact = folder / "compact.onnx"
    if contracts(training) and not (compact.exists() and compact.stat().st_size):
        return None  # interrupted before it was contracted
    said = re.search(r"^# model (\S+), .* data set (\S+)$", read_text(folder / "log.csv"), re.MULTILINE)
    if not said or not re.match(rf"{said[2]}-.*{re.escape(said[1])}(-|$)", training) or len(log) > epochs:
        raise Failure(f"{folder}: its log is that of another training; remove the folder to train again")
    best = max(log, key=lambda epoch: epoch["test_accuracy"])
    return {
        "training": training,
        "seed": str(seed),
        "epochs": str(epochs),
        "best": f"{100 * best['test_accuracy']:.2f}",
        "best_epoch": f"{best['epoch']:.0f}",
        "last": f"{100 * log[-1]['test_accuracy']:.2f}",
        "train_error": f"{100 - 100 * log[-1]['train_accuracy']:.2f}",
        "contracted": "yes" if contracts(training) else "",
        "seconds": f"{sum(epoch['seconds'] for epoch in log):.0f}",
    }


# ---- the file of finished trainings ---------------------------------------------------------------------


def read_trainings(path):
    """The lines of finished trainings by their folders' names; accuracies in percent, empty what is not known.

    Of a training that was done again the last line counts. Failure naming the line.
    """

    trainings = {}
    for at, line in enumerate(read_csv(path, COLUMNS), 2):
        ranges = {
            "seed": (0, 2**63 - 1, int),
            "epochs": (1, 999_999, int),
            "best": (0, 100),
            "best_epoch": (1, 999_999, int),
            "last": (0, 100),
            "train_error": (0, 100),
            "seconds": (0, 1e12),
        }
        try:
            for column, limits in ranges.items():
                if line[column] or column in ("seed", "epochs", "best"):
                    number_in(line[column], *limits)
            if line["best_epoch"] and int(line["best_epoch"]) > int(line["epochs"]):
                raise ValueError("the best epoch is after the last")
            if line["last"] and float(line["last"]) > float(line["best"]):
                raise ValueError("the last accuracy is above the best")
            if line["contracted"] not in ("yes", "no", ""):
                raise ValueError(f"contracted is yes or no, not \"{line['contracted'][:40]}\"")
        except ValueError as error:
            raise Failure(f"{path}: line {at}: {error}") from error
        trainings[name_of(line)] = line
    return trainings


def append_trainings(path, lines):
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(lines)
    write_text(path, read_text(path) + text.getvalue())


# ---- tables ---------------------------------------------------------------------------------------------


def measured(trainings, metric):
    """Seeds, mean and sample deviation in percent of what is known; a deviation of None for one seed."""
    column = {"top1": "best", "best_test_error": "best", "last_test_error": "last", "train_error": "train_error"}[
        metric
    ]
    values = [float(training[column]) for training in trainings if training[column]]
    if metric in ("best_test_error", "last_test_error"):
        values = [100 - value for value in values]
    mean = statistics.fmean(values) if values else math.nan
    return len(values), mean, statistics.stdev(values) if len(values) > 1 else None


HEAD = (
    "table,dataset,kernel,model,rate,setting,norms,metric,seeds,epochs,teacher_width,teacher_epochs,mean,std,"
    "paper_mean,paper_std,difference,deviations,within,contracted\n"
)
MARKDOWN_HEAD = [
    "| data | kernel | network | setting | norms start at | measure | seeds | epochs | ours | paper | difference "
    "| within 3 deviations | contracted |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def results_table(rows, budget):
    """A table as CSV and as lines of Markdown, of pairs of a row and its trainings.

    A line for each row and measure that is known. A difference of more than three deviations is marked, which are
    sqrt(paper's² + ours²), and the paper's alone for one seed; another budget than the paper's is named instead.
    """
    text, lines, usual = HEAD, [*MARKDOWN_HEAD], Budget()
    for row, trainings in rows:
        teacher = bool(row.transfer)
        width, epochs = (budget.teacher_width, budget.teacher_epochs) if teacher else ("", "")
        published = budget.epochs == usual.epochs and (
            not teacher or (width, epochs) == (usual.teacher_width, usual.teacher_epochs)
        )
        rate = f"{row.rate:g}" if row.rate else ""
        each = {training["contracted"] for training in trainings}
        contracted = "no" if "no" in each else "yes" if each == {"yes"} else ""
        for metric, paper, paper_deviation in row.published:
            seeds, mean, deviation = measured(trainings, metric)
            if seeds == 0:
                continue
            difference, both = mean - paper, math.hypot(paper_deviation, deviation or 0)
            deviations = difference / both if both else math.copysign(math.inf, difference) if difference else 0.0
            within = abs(difference) <= 3 * both + 1e-9  # numbers of two decimals
            own = f"{deviation:.2f}" if deviation is not None else ""
            verdict = ("yes" if within else "no") if published else "other budget"
            text += (
                f"{row.table},{row.dataset},{row.kernel},{row.model},{rate},{row.setting},"
                f"{'uniform' if budget.uniform_norms else 'ones'},{metric},{seeds},{budget.epochs},{width},{epochs},"
                f"{mean:.2f},{own},{paper:.2f},{paper_deviation:.2f},{difference:+.2f},{deviations:+.2f},"
                f"{verdict},{contracted}\n"
            )
            cells = (
                row.dataset,
                row.kernel,
                row.model + (f", r = {rate}" if rate else ""),
                row.setting,
                "0 to 1" if budget.uniform_norms else "1",
                "best test accuracy" if metric == "top1" else metric.replace("_", " "),
                seeds,
                f"{budget.epochs}" + (f" (teacher of width {width}: {epochs})" if teacher else ""),
                f"{mean:.2f}" + (f" ± {own}" if own else ""),
                f"{paper:.2f} ± {paper_deviation:.2f}",
                f"{difference:+.2f}",
                f"**no**, {deviations:+.1f}" if verdict == "no" else verdict,
                contracted,
            )
            lines.append("".join(f"| {cell} " for cell in cells) + "|")
    return text, lines
