"""Tables in plain text, as reports print them, and the order and the kinds of layers in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")
_Key = TypeVar("_Key", bound=Hashable)


def aligned(table: Sequence[Sequence[str]], left: Container[int] = ()) -> list[str]:
    """Return the lines of a table, two spaces between columns.

    Args:
        table: lines of equally many cells, the titles among them.
        left: numbers of the columns that align left; the others, numbers mostly, align right.
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
    """Return what a layer has in common with those of other blocks: layers.*.mlp.up_proj."""
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
    """Return the smallest and the largest of some numbers, as one where they are printed alike."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    low, high = f"{known[0]:.{digits}f}", f"{known[-1]:.{digits}f}"
    return low if low == high else f"{low}..{high}"


def natural(name: str) -> tuple[list[str | int], str]:
    """Key to sort names with, by the values of the numbers in them: layers.2 before layers.10."""
    parts = re.split(r"([0-9]+)", name)
    # Text and numbers alternate, so like is compared with like. The name itself parts 01 from 1.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
