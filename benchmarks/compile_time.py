#!/usr/bin/env python3
"""Compile time of including concertina over Eigen alone: median of alternating runs, for each compiler found.

    benchmarks/include_cost.py [--runs 9]

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def seconds(compiler, header):
    command = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", f"-I{ROOT}/include", "-isystem", "/usr/include/eigen3", "-"]
    start = time.perf_counter()
    subprocess.run(command, input=f"#include <{header}>\n", text=True, check=True)
    return time.perf_counter() - start


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=9)
    runs = arguments.parse_args().runs
    for compiler in filter(shutil.which, ("g++", "clang++-19")):
        pairs = [(seconds(compiler, "concertina/concertina.hpp"), seconds(compiler, "Eigen/Dense")) for _ in range(runs)]
        ours, eigen = (statistics.median(side) for side in zip(*pairs))
        print(f"{compiler}: concertina.hpp {ours:.2f} s, Eigen/Dense {eigen:.2f} s, cost {ours - eigen:.2f} s")


if __name__ == "__main__":
    main()
