# SPDX-License-Identifier: Apache-2.0
"""Expanded training in PyTorch: layers expanded, contracted in every step, and contracted for good."""

from .blocks import Verdict, VerificationError, from_blocks, verify
from .expansion import Report, contract_, expand_, report
from .shapes import Error, ExpansionError, InexactError, ShapeError
