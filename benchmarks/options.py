"""Options that benchmarks have in common, and checks of what they were given."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from rows import RESULTS


def add_row_options(parser: argparse.ArgumentParser, file: str) -> None:
    """Add the options of where rows go: to ``file`` in the results, as of which commit."""
    parser.add_argument("--commit", help="default: FLASH_LLM_COMMIT, else git")
    parser.add_argument("--out", type=Path, default=RESULTS / file)


def require_positive(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str
) -> None:
    """End with a message unless the named options are all at least 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")


def require_fractions(parser: argparse.ArgumentParser, sparsities: Iterable[float]) -> None:
    """End with a message unless all sparsities lie in [0, 1]."""
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            parser.error(f"--sparsity must lie in [0, 1], got {sparsity}")
