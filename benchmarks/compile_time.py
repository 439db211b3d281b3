#!/usr/bin/env python3
"""What a call of the library costs a translation unit: user time and memory of the compiler, beside Eigen/Dense alone.

Each case is compiled in turn, the medians are printed: as a multiple of Eigen/Dense, header-only and with what
concertina::compiled has compiled.

    benchmarks/compile_time.py [--runs 3] [--compiler g++]

SPDX-License-Identifier: Apache-2.0
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONTRACT = """#include <concertina/contract.hpp>
concertina::Conv2d<float> product(const concertina::Conv2d<float>& outer, const concertina::Conv2d<float>& inner) {
  return concertina::contract(outer * inner);
}
"""
FIRST_STEPS = (ROOT / "examples/01_first_steps.cpp").read_text()
COMPILED = ["-DCONCERTINA_COMPILED"]
CASES = {
    "#include <Eigen/Dense>": ("#include <Eigen/Dense>\n", ["-O2"]),
    "#include <concertina/contract.hpp>": ("#include <concertina/contract.hpp>\n", ["-O2"]),
    "one contract of Conv2d<float>": (CONTRACT, ["-O2"]),
    "  with concertina::compiled": (CONTRACT, ["-O2", *COMPILED]),
    "examples/01_first_steps.cpp -O3": (FIRST_STEPS, ["-O3"]),
    "  with concertina::compiled ": (FIRST_STEPS, ["-O3", *COMPILED]),
}


def cost(compiler, source, options):
    """User seconds and peak MB of one compilation."""
    command = [compiler, "-std=c++20", *options, f"-I{ROOT}/include", "-isystem", "/usr/include/eigen3",
               "-x", "c++", "-c", "-", "-o", os.devnull]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        process.stdin.write(source)
        process.stdin.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return usage.ru_utime, usage.ru_maxrss / 1024


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--compiler", default="g++")
    options = arguments.parse_args()
    runs = [{name: cost(options.compiler, *case) for name, case in CASES.items()} for _ in range(options.runs)]
    eigen = statistics.median(run["#include <Eigen/Dense>"][0] for run in runs)
    for name in CASES:
        seconds, memory = (statistics.median(run[name][part] for run in runs) for part in (0, 1))
        print(f"{name:36} {seconds:6.2f} s {seconds / eigen:6.2f} times {memory:6.0f} MB")


if __name__ == "__main__":
    main()
