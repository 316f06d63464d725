"""Tables in plain text, as reports print them."""

from __future__ import annotations

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
