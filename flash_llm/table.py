"""Plain text tables of reports, and how layers are sorted and grouped in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")
_Key = TypeVar("_Key", bound=Hashable)


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
    """Return a layer's name with * for each index: layers.*.mlp.up_proj."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def grouped(rows: Iterable[_Row], key: Callable[[_Row], _Key]) -> dict[_Key, list[_Row]]:
    """Return the rows by their key, in the order in which the keys first occur."""
    groups: dict[_Key, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape as reports print it: 4096x14336."""
    return "x".join(map(str, shape))


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


def stored_text(format: str, values: str) -> str:
    """Return the format of a packed weight and, if they are not of 16 bits, its values."""
    return format if values == "16-bit" else f"{format} {values}"
