#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles the ```cuda blocks of docs/cuda.md, as one function; exits with 77 where there is no nvcc.

usage: cuda.py FOLDER NVCC_OPTION...

What they need and a reader does not stands in a comment, `<!-- cuda` on a line of its own up to `-->`.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/cuda.md"
PIECE = re.compile(r"^(?:<!-- |```)cuda\n(.*?)^(?:-->|```)$", re.S | re.M)
TOP = re.compile(r"^(?:#include|using namespace) .*\n", re.M)


def main():
    folder, *options = sys.argv[1:]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        print("skipped: there is no nvcc")
        sys.exit(77)
    text = PAGE.read_text()
    pieces = [f'#line {text.count(chr(10), 0, piece.start(1)) + 1} "{PAGE}"\n{piece[1]}'
              for piece in PIECE.finditer(text)]
    if len(pieces) < 2:
        sys.exit(f"{PAGE}: no ```cuda block, or nothing that it needs")
    code = "".join(pieces)
    source = Path(folder) / "cuda_page.cu"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(TOP.findall(code)) + "void page() {\n" + TOP.sub("\n", code) + "}\n")
    # To PTX: what ptxas makes of it is the matter of other tests.
    command = [nvcc, "-std=c++20", "-gencode=arch=compute_80,code=compute_80", f"-I{ROOT}/include", *options, "-c",
               source, "-o", source.with_suffix(".o")]
    sys.exit(subprocess.run(command, check=False).returncode != 0)


if __name__ == "__main__":
    main()
