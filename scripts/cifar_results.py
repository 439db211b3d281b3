#!/usr/bin/env python3
"""Summarises trainings of build/release/examples/cifar beside the paper's accuracies.

    scripts/cifar_results.py --paper accuracy.csv --csv docs/results/cifar.csv FOLDER...

Each FOLDER is the --out of a training. Writes a row a training to the CSV file, with command and seed, and prints the table of
docs/results/cifar.md: best and last test accuracy beside the paper's mean and standard deviation (CSV columns table, dataset,
kernel, model, rate, setting, metric, mean, std).

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import csv
import pathlib
import re
import shlex

PAPER_NAMES = {"compact": "SmallNet", "fc": "FC(Arora18)", "cl": "ExpandNet-CL", "cl+fc": "ExpandNet-CL+FC",
               "ck": "ExpandNet-CK", "ck+fc": "ExpandNet-CK+FC", "acnet": "ACNet"}
PAPER_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
OTHER_RECIPE = ("--compute", "--weight-decay", "--batch", "--learning-rate", "--momentum", "--keep-momentum", "--double", "--init")
DEFAULTS = {"--model": "compact", "--kernel": "7", "--rate": "4", "--epochs": "150", "--seed": "1", "--dataset": "cifar10",
            "--blocks": "3"}


def read_training(folder):
    lines = (folder / "log.csv").read_text().splitlines()
    comments = [line[2:] for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not rows:
        raise SystemExit(f"{folder}: no epoch in log.csv")
    words = [part for word in shlex.split(comments[0]) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = dict(DEFAULTS)
    data = re.search(r"data set (\w+)", "\n".join(comments))
    if not data or data[1] not in PAPER_DATA:
        raise SystemExit(f"{folder}: a training on {data[1] if data else 'no named data set'}, which the paper has no row for")
    options.update({name: value for name, value in zip(words, words[1:]) if name in DEFAULTS})
    hidden = {"--data": "DIR", "--out": "DIR"}  # paths of one machine say nothing elsewhere
    shown = [hidden.get(before, word) for before, word in zip([""] + words, words) if word not in ("--resume",)]
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    parameters = re.search(r"(\d+) parameters", "\n".join(comments))
    return {
        "dataset": options["--dataset"], "kernel": int(options["--kernel"]), "blocks": int(options["--blocks"]),
        "model": options["--model"], "norms": "uniform" if "--uniform-norms" in words else "ones", "rate": options["--rate"], "parameters": parameters[1] if parameters else "",
        "seed": int(options["--seed"]), "epochs": len(rows), "epochs_planned": int(options["--epochs"]),
        "best": 100 * float(best["test_accuracy"]), "best_epoch": int(best["epoch"]),
        "last": 100 * float(rows[-1]["test_accuracy"]), "last_train": 100 * float(rows[-1]["train_accuracy"]),
        "other_recipe": " ".join(word for word in words if word in OTHER_RECIPE), "seconds": sum(float(row["seconds"]) for row in rows), "command": " ".join(shown),
    }


def paper_row(paper, training):
    if training["other_recipe"]:
        return None
    table = {3: "S3", 7: "S1"}.get(training["kernel"]) if training["blocks"] == 3 else "S5"
    for row in paper:
        if (row["table"], row["dataset"], row["kernel"], row["model"], row["setting"]) == (
                table, PAPER_DATA[training["dataset"]], str(training["kernel"]), PAPER_NAMES[training["model"]], "none"
        ) and row["rate"] in ("", training["rate"]):
            return row
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=pathlib.Path, required=True)
    parser.add_argument("--csv", type=pathlib.Path, required=True)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()
    with open(arguments.paper, newline="") as file:
        paper = list(csv.DictReader(file))
    trainings = sorted((read_training(folder) for folder in arguments.folders),
                       key=lambda t: (t["dataset"], t["blocks"], t["kernel"], list(PAPER_NAMES).index(t["model"]), t["norms"], t["seed"]))

    with open(arguments.csv, "w", newline="") as file:
        writer = csv.DictWriter(file, trainings[0].keys(), lineterminator="\n")
        writer.writeheader()
        for training in trainings:
            writer.writerow({key: f"{value:.2f}" if isinstance(value, float) else value for key, value in training.items()})

    print("| data | kernel | network | norms start at | parameters | seed | epochs | best | in epoch | last | paper | difference | within 3 deviations |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for training in trainings:
        row = paper_row(paper, training)
        cells = [PAPER_DATA[training["dataset"]], training["kernel"], PAPER_NAMES[training["model"]],
                 {"ones": "1", "uniform": "0..1"}[training["norms"]],
                 f"{int(training['parameters']):,}" if training["parameters"] else "", training["seed"],
                 training["epochs"] if training["epochs"] == training["epochs_planned"]
                 else f"**{training['epochs']} of {training['epochs_planned']}**",
                 f"{training['best']:.2f}", training["best_epoch"], f"{training['last']:.2f}"]
        if row:
            mean, std = float(row["mean"]), float(row["std"])
            difference = training["best"] - mean
            cells += [f"{mean:.2f} ± {std:.2f} ({row['table']})", f"{difference:+.2f}",
                      "yes" if abs(difference) <= 3 * std else f"**no**, {difference / std:+.1f}"]
        else:
            cells += ["", "", ""]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
