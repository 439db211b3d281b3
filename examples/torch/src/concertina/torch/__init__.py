# SPDX-License-Identifier: Apache-2.0
"""Expanded training in PyTorch: layers expanded, contracted in every step, and contracted for good."""

from .blocks import Verdict, VerificationError, from_blocks, verify
from .expansion import ExpandedWeight, Report, contract_, contract_together_, expand_, report
from .export import save
from .shapes import ContractionWarning, Error, ExpansionError, InexactError, ShapeError
from .training import contract_in_training_

__all__ = [
    "ContractionWarning",
    "Error",
    "ExpandedWeight",
    "ExpansionError",
    "InexactError",
    "Report",
    "ShapeError",
    "Verdict",
    "VerificationError",
    "contract_",
    "contract_in_training_",
    "contract_together_",
    "expand_",
    "from_blocks",
    "report",
    "save",
    "verify",
]
