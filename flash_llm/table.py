"""Plain text tables of reports, and how layers are sorted and grouped in them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence


def aligned(table: Sequence[Sequence[str]], left: Container[int] = ()) -> list[str]:
    """Return the lines of a table, two spaces between columns.

    Args:
        table: lines with the same number of cells, titles included.
        left: indices of the columns that are aligned left; the others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def kind(name: str) -> str:
    """Return a layer's name without the numbers of its blocks: layers.*.mlp.up_proj."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def span(values: Iterable[float | None], digits: int = 4) -> str:
    """Return the range of some numbers as text; a single number if both ends are printed alike."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    low, high = f"{known[0]:.{digits}f}", f"{known[-1]:.{digits}f}"
    return low if low == high else f"{low}..{high}"


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares the numbers in names by value: layers.2 before layers.10."""
    parts = re.split(r"([0-9]+)", name)
    # Text and numbers alternate, so both are compared with their kind. The name distinguishes 01
    # from 1.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
