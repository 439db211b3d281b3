#!/usr/bin/env python3
"""Prints the table of docs/blocks.md: each block of a folder, its expression, and how `concertina verify` found its fused kernel.

    scripts/block_table.py build/release/examples/concertina tests/reference/blocks

SPDX-License-Identifier: Apache-2.0
"""

import json
import pathlib
import struct
import subprocess
import sys


def header(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def leaf(node, tensors):
    kind = node.get("type", "conv")
    if kind == "avg_pool":
        return "avg" + "x".join(map(str, node["kernel"]))
    if kind in ("batch_norm", "scale"):
        return {"batch_norm": "bn", "scale": "s"}[kind]
    if kind == "linear":
        return "fc"
    kernel = "x".join(map(str, tensors[node["name"] + ".weight"]["shape"][2:]))
    return kernel if node.get("groups", 1) == 1 else f"{kernel}/g{node['groups']}"


def expression(node, tensors, nested=False):
    if "kind" not in node:
        return leaf(node, tensors)
    parts = node.get("layers", node.get("branches"))
    chain = node["kind"] == "chain"
    inner = [expression(part, tensors, chain and len(parts) > 1) for part in parts]
    between = {"chain": " * ", "sum": " + ", "concat": " \\| "}[node["kind"]]
    text = between.join(reversed(inner) if chain else inner) or "identity"
    return f"({text})" if nested and not chain and len(parts) > 1 else text


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    tool, folder = sys.argv[1:]
    run = subprocess.run([tool, "verify", "--json", folder], capture_output=True, text=True)
    print("| block | expression | fused kernel: error / bound, ulp | contraction: error / bound, ulp | proofs |")
    print("|---|---|---|---|---|")
    for found in json.loads(run.stdout):
        path = pathlib.Path(found["file"])
        tensors = header(path)
        text = expression(json.loads(tensors["__metadata__"]["chain"]), tensors)
        findings = {finding["name"]: finding for finding in found.get("findings", [])}

        def figures(name):
            each = findings[name]
            return f"{each['fraction']:.2g}, {each['ulps']:.2g}" if each["holds"] else "FAILS"

        proofs = [name for name in ("algebra", "rounding", "structure") if findings[name].get("holds")]
        print(f"| `{path.stem}` | {text} | {figures('F')} | {figures('rounding')} | {', '.join(proofs)} |")
    sys.exit(run.returncode)


if __name__ == "__main__":
    main()
