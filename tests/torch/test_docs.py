# SPDX-License-Identifier: Apache-2.0
"""Runs the Python of docs/torch.md: its ```python blocks in order, and what they need and a reader does not, comments
that begin with `<!-- python`."""

import re
import unittest

from support import ROOT, needs_torch

PAGE = ROOT / "docs/torch.md"
PIECE = re.compile(r"^(?:<!-- |```)python\n(.*?)^(?:-->|```)$", re.S | re.M)


class Documentation(unittest.TestCase):
    @needs_torch
    def test_page_runs(self):
        text, names = PAGE.read_text(), {}
        pieces = list(PIECE.finditer(text))
        self.assertGreater(len(pieces), 1)
        for piece in pieces:
            lines_before = text.count("\n", 0, piece.start(1))
            exec(compile("\n" * lines_before + piece[1], PAGE, "exec"), names)


if __name__ == "__main__":
    unittest.main()
