#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the repository's Markdown: links and anchors lead somewhere, `folder/sources` that it names are there, prose
is at most 120 characters wide, as sources are, ```sh blocks name files and presets that are there, and the version is
the same everywhere.

usage: check.py [--commands BUILD_DIR]

With --commands it runs each ```sh block that a ```text block follows, in a folder where the repository is but
BUILD_DIR is build/release, and compares what is printed; times and outputs of networks are masked. Other blocks, which
take data or hours, are held to the options that the programs have.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
FENCED = re.compile(r"^```.*?^```$|^<!--.*?-->$", re.S | re.M)
COMMAND = re.compile(r"^```sh\n((?:(?!```).)*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.S | re.M)
NOISE = re.compile(r"^run .*$|\d[\d.e+-]* [mu]?s\b", re.M)
WIDTH = 120


def files():
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(set(folders) - {"build", "__pycache__", ".git"})
        yield from (Path(folder) / name for name in sorted(names))


def pages():
    return [path for path in files() if path.suffix == ".md"]


def check_sources():
    """Lines of what people write; pages have a check of their own, and data are as wide as they are."""
    for path in files():
        if path.suffix in (".md", ".csv", ".svg") or (ROOT / "tests/fuzz/corpus") in path.parents:
            continue
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            continue  # no text
        for number, line in enumerate(lines, start=1):
            if len(line) > WIDTH:
                yield f"{path.relative_to(ROOT)}:{number}: {len(line)} characters"


def blank(match):
    return "\n" * match[0].count("\n")


def anchors(page):
    """As GitHub and the site make them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub(blank, page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_page(page):
    name, text = page.relative_to(ROOT), FENCED.sub(blank, page.read_text())
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > WIDTH and not line.startswith("|") and " " in line[2:]:
            yield f"{name}:{number}: {len(line)} characters"
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            if not linked.exists():
                yield f"{name}:{number}: there is no {target}"
            elif anchor and linked.suffix == ".md" and anchor not in anchors(linked):
                yield f"{name}:{number}: no heading of {path or name} is #{anchor}"


def check_sources_named():
    """History may name what is gone."""
    paths = {"/".join(path.parts[i:]) for path in files() for i in range(len(path.parts))}
    for page in pages():
        if page.name == "CHANGELOG.md":
            continue
        for name in re.findall(r"`([\w.-]+/[\w./-]+\.(?:hpp|ipp|cuh|cpp|cu|py|sh))`", page.read_text()):
            if name not in paths:
                yield f"{page.relative_to(ROOT)}: there is no {name}"


def check_headers():
    """The table of docs/headers.md has the public headers, each once."""
    include = ROOT / "include/concertina"
    public = {str(path.relative_to(include)) for path in include.rglob("*.*h*") if "detail" not in path.parts}
    section = (ROOT / "docs/headers.md").read_text().partition("## Which header")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.M)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)] + ["concertina.hpp"]
    for name in sorted(public.symmetric_difference(named) | {name for name in named if named.count(name) > 1}):
        yield f"docs/headers.md: {name} is a public header and a row of the table, once"


def calls(block):
    """The words of each command of a ```sh block."""
    words = []
    for line in block.replace("\\\n", " ").split("\n"):
        shell = shlex.shlex(line, posix=True, punctuation_chars=";&")
        shell.whitespace_split = True
        words += [*shell, ";"]
    return [list(call) for end, call in itertools.groupby(words, lambda word: word in ("&&", ";")) if not end]


def check_shell(page):
    presets = {preset["name"] for preset in json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"]}
    for block, _ in COMMAND.findall(page.read_text()):
        for call in calls(block):
            for before, word in zip([""] + call, call):
                if re.match(r"(scripts|tests|benchmarks|examples|\.ci)/", word) and not (ROOT / word).exists():
                    yield f"{page.relative_to(ROOT)}: there is no {word}"
                if before == "--preset" and word not in presets:
                    yield f"{page.relative_to(ROOT)}: there is no preset {word}"


def check_options(page, call, build):
    """Whether our programs have the options of a call."""
    program = build / "examples" / Path(call[0]).name
    if not program.is_file():
        return
    command = [program, *itertools.takewhile(re.compile("[a-z]+$").match, call[1:]), "--help"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for option in call:
        if option.startswith("-") and not re.search(rf"(?<![\w-]){option}(?![\w-])", told):
            yield f"{page.relative_to(ROOT)}: {' '.join(call[:2])} has no option {option}"


def check_versions():
    numbers = re.findall(r"VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", (ROOT / "include/concertina/version.hpp").read_text())
    for name in ("CHANGELOG.md", "CITATION.cff", "packaging/vcpkg/vcpkg.json"):
        if ".".join(numbers) not in (ROOT / name).read_text():
            yield f"{name}: says nothing of version {'.'.join(numbers)}"


def check_commands(build):
    masked = lambda text: NOISE.sub("*", text).strip()
    count = 0
    for page in pages():
        for commands, expected in COMMAND.findall(page.read_text()):
            if not expected:
                yield from (fault for call in calls(commands) for fault in check_options(page, call, build))
                continue
            count += 1
            with tempfile.TemporaryDirectory() as folder:
                for entry in ROOT.iterdir():
                    if entry.name != "build":
                        (Path(folder) / entry.name).symlink_to(entry)
                (Path(folder) / "build").mkdir()
                (Path(folder) / "build/release").symlink_to(build)
                path = f"{build / 'examples'}{os.pathsep}{os.environ['PATH']}"
                done = subprocess.run(["bash", "-ec", commands], cwd=folder, env={**os.environ, "PATH": path},
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode or masked(done.stdout) != masked(expected):
                yield f"{page.relative_to(ROOT)}: {commands}exits with {done.returncode} and prints\n{done.stdout}"
    if not count:
        yield "no page has a command with its output"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", type=lambda folder: Path(folder).resolve(), metavar="BUILD_DIR")
    build = parser.parse_args().commands
    if build:
        faults = list(check_commands(build))
    else:
        faults = [fault for page in pages() for check in (check_page, check_shell) for fault in check(page)]
        faults += [*check_sources(), *check_sources_named(), *check_headers(), *check_versions()]
    print("\n".join(faults) if faults else "all is well")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
