"""Tables in plain text, as reports print them, and the order of the layers in them."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence


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


def natural(name: str) -> tuple[list[str | int], str]:
    """Key to sort names with, by the values of the numbers in them: layers.2 before layers.10."""
    parts = re.split(r"([0-9]+)", name)
    # Text and numbers alternate, so like is compared with like. The name itself parts 01 from 1.
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
