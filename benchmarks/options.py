"""Options that benchmarks have in common, and checks of their values."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from rows import RESULTS


def add_row_options(parser: argparse.ArgumentParser, file: str) -> None:
    """Add ``--commit`` and ``--out``, by default ``file`` in the results; see :func:`rows_file`."""
    parser.add_argument("--commit", help="default: FLASH_LLM_COMMIT, else git")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / file, help=f"default: benchmarks/results/{file}"
    )


def rows_file(out: Path, gpu: str) -> Path:
    """Return the path of ``--out`` with the GPU's name for ``<gpu>``."""
    return out.with_name(out.name.replace("<gpu>", gpu))


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``; see :func:`require_device`."""
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")


def require_device(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with a message if ``--device`` asks for a GPU and there is none."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; use --device cpu")


def require_positive(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str
) -> None:
    """Exit with a message unless each named option, or every item of it, is at least 1."""
    for name in names:
        found = getattr(arguments, name)
        least = min(found) if isinstance(found, list) else found
        if least < 1:
            parser.error(f"--{name} must be positive, got {least}")


def require_fractions(parser: argparse.ArgumentParser, sparsities: Iterable[float]) -> None:
    """Exit with a message unless all sparsities lie in [0, 1]."""
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            parser.error(f"--sparsity must lie in [0, 1], got {sparsity}")
