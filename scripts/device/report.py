#!/usr/bin/env python3
"""Writes what a check's steps have left so far as results.json and results.md.

    scripts/device/report.py WORK OUT

WORK/steps has a line for each step, and what each printed. Results of the other call are kept.
SPDX-License-Identifier: Apache-2.0
"""

import csv
import json
import os
import pathlib
import re
import sys
import tempfile


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


def parsed(path):
    try:
        return json.loads(read(path))
    except ValueError:
        return None


def parsed_lines(path):
    """The lines that are JSON objects; of a step that was cut, the last may not be."""
    rows = []
    for line in read(path).splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def medians(path):
    """Google Benchmark's, by name; of a step that was cut, those that it had written."""
    report, text = parsed(path), read(path)
    if report is None and "\n    }" in text:
        report = json.loads(text[: text.rindex("\n    }")] + "}]}")
    named = {}
    for row in (report or {}).get("benchmarks", []):
        if row.get("aggregate_name", "median") == "median":
            named[re.sub("/(repeats|iterations|min_time|manual_time).*", "", row["run_name"])] = row
    return named


def training(log):
    """The last and the best of a training's epochs."""
    rows = list(csv.DictReader(line for line in read(log).splitlines() if not line.startswith("#")))
    if not rows:
        return {"epochs": 0}
    accuracies = [float(row["test_accuracy"]) for row in rows]
    return {"epochs": len(rows), "test_accuracy": accuracies[-1], "best_test_accuracy": max(accuracies)}


def collected(work):
    """What each step found."""
    steps, results = work / "steps", {}
    results["machine"] = read(steps / "info.out")[:4000]
    for path in sorted(steps.glob("contraction-*.out"), key=lambda path: path.stat().st_mtime):
        for name, row in medians(path).items():
            results.setdefault("contraction", {})[name] = {
                "microseconds": row["real_time"],
                "tflops": row["flop/s"] / 1e12,
                "share_of_cublas": row["share_of_cublas"],
            }
    results["contraction_torch_graph"] = parsed(steps / "contraction_torch_graph.out")
    results["contraction_torch"] = {
        row["network"]: row["torch"] for row in parsed_lines(steps / "contraction_torch.out")
    }
    for path in sorted(steps.glob("rate_k*.out")):
        if report := parsed(path):
            rates = {
                row["model"] + row["mode"].removeprefix("contracted"): row["images_per_second"]
                for row in report["rows"]
            }
            results.setdefault("rates", {})[path.stem] = rates
    for path in sorted(steps.glob("rate_torch_*.out")):
        for row in parsed_lines(path):
            results.setdefault("rates_torch", {})[row["way"]] = row["images_per_second"]
    for path in sorted(work.glob("runs/*/log.csv")):
        results.setdefault("trainings", {})[path.parent.name] = training(path)
    for path in sorted(steps.glob("*check*.out")):
        if summary := re.findall(r"=+ ((?:ERROR|RACECHECK|LEAK) SUMMARY.*)", read(path)):
            results.setdefault("sanitizers", {})[path.stem] = summary
    return {name: value for name, value in results.items() if value}


def steps_of(work):
    """Each step's status, and how the output of those that failed ends."""
    steps = {}
    for line in read(work / "steps" / "list").splitlines():
        name, status, seconds = line.split("\t")
        steps[name] = {"status": status, "seconds": int(seconds)}
        if status.startswith("failed"):
            steps[name]["output"] = read(work / "steps" / f"{name}.log")[-1500:].strip()
    return steps


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def markdown(results):
    steps = [[name, step["status"], step["seconds"]] for name, step in results["steps"].items()]
    graph = results.get("contraction_torch_graph", {}).get("microseconds", {})
    loops = results.get("contraction_torch", {})
    contraction = []
    for name, row in results.get("contraction", {}).items():
        numbers = [f"{row['microseconds']:.1f}", f"{row['tflops']:.2f}", f"{row['share_of_cublas']:.2f}"]
        published = f"{loops[name]:.0f}" if name in loops else ""
        contraction.append([name, *numbers, graph.get(name, ""), published])
    rates = [
        [name, model, f"{rate:,.0f}"]
        for name, by_model in results.get("rates", {}).items()
        for model, rate in by_model.items()
    ]
    for way, rate in results.get("rates_torch", {}).items():
        rates.append(["PyTorch", way, f"{rate:,}"])
    trainings = [
        [name, run["epochs"], run.get("test_accuracy", ""), run.get("best_test_accuracy", "")]
        for name, run in results.get("trainings", {}).items()
    ]
    parts = [
        "# A check on a device\n",
        table(["step", "status", "s"], steps),
        table(["network", "us", "TFLOP/s", "of cuBLAS", "PyTorch in a graph, us", "as published, us"], contraction),
        table(["training step", "model", "images/s"], rates),
        table(["training", "epochs", "test accuracy", "best"], trainings),
    ]
    for name, step in results["steps"].items():
        if step.get("output"):
            parts.append(f"## {name}\n\n```\n{step['output']}\n```\n")
    return "\n".join(part for part in parts if part)


def replace(path, text):
    """Steps that run side by side report side by side."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    work, out = map(pathlib.Path, sys.argv[1:])
    before = parsed(out / "results.json") or {}
    results = before | collected(work)
    results["steps"] = before.get("steps", {}) | steps_of(work)
    replace(out / "results.json", json.dumps(results, indent=1) + "\n")
    replace(out / "results.md", markdown(results))


if __name__ == "__main__":
    main()
