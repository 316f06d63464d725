"""Draw the rows of ``benchmarks/results/accuracy.jsonl``: perplexity against what pruning saves.

    python benchmarks/plot_accuracy.py

``accuracy.png`` shows perplexity against sparsity, with a line per method and allocation.
``accuracy-bits.png`` shows it against bits per weight, with pruned weights in 16 bits and rounded.
Needs matplotlib (extra ``plot``).
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import RESULTS, read_rows

from flash_llm.prune.calibrate import ALLOCATIONS
from flash_llm.prune.methods import METHODS

STYLES = dict(zip(ALLOCATIONS, ("-", "--", ":"), strict=True))
# Of the second picture.
MARKERS = {"sparsegpt": "o", "admm": "s"}


def measured_on(row: dict) -> tuple:
    """Return what all rows that are compared must have in common."""
    return tuple(row[field] for field in ("model", "text", "nsamples", "seqlen", "seed"))


def conditions(row: dict) -> tuple:
    """Return what rows that differ in method, allocation and sparsity only have in common."""
    return (*measured_on(row), row["recover_epochs"], row["values"], row["rounding"])


@contextlib.contextmanager
def perplexity_axis(title: str, path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Give the axis of a new figure, which is written to ``path`` when its lines are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=size)
    yield axis
    axis.set_yscale("log")
    axis.set_ylabel("perplexity")
    axis.grid(alpha=0.3, which="both")
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_bits(rows: list[dict], title: str, path: Path) -> None:
    """Write the figure of perplexity against bits per weight.

    Args:
        rows: measured on the same; at least one.
        title: of the figure.
        path: of the picture.
    """

    def line_of(row: dict) -> tuple[str, str, int]:
        return row["values"], row["method"], row["recover_epochs"]

    colors = {values: f"C{i}" for i, values in enumerate(sorted({r["values"] for r in rows}))}
    with perplexity_axis(title, path, (8.5, 5.2)) as axis:
        for values, method, epochs in sorted({line_of(row) for row in rows if row["sparsity"]}):
            line = [r for r in rows if r["sparsity"] and line_of(r) == (values, method, epochs)]
            line.sort(key=lambda row: row["bits"])
            axis.plot(
                [row["bits"] for row in line],
                [row["perplexity"] for row in line],
                "-" if epochs else "--",
                marker=MARKERS[method],
                markersize=4,
                color=colors[values],
                label=f"zeros and {values}, {method}" + (", recovered" if epochs else ""),
            )
        for row in rows:
            if not row["sparsity"]:
                what = f"{row['values']}, no zeros" + (
                    ", recovered" if row["recover_epochs"] else ""
                )
                axis.plot(
                    *(row["bits"], row["perplexity"], "*" if row["recover_epochs"] else "D"),
                    color=colors[row["values"]],
                    markersize=9 if row["recover_epochs"] else 7,
                    markeredgecolor="black",
                )
                axis.annotate(
                    what,
                    (row["bits"], row["perplexity"]),
                    (5, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        axis.axhline(
            rows[0]["dense_perplexity"], color="black", linewidth=0.8, label="dense, 16-bit"
        )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("bits per weight: bitmap, values and scales")
        axis.legend(fontsize=7)


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Write the figure of perplexity against sparsity.

    Args:
        rows: measured under the same conditions; at least one.
        title: of the figure.
        path: of the picture.
    """
    with perplexity_axis(title, path, (7.0, 4.6)) as axis:
        for i, method in enumerate(METHODS):
            for allocation, style in STYLES.items():
                line = sorted(
                    (
                        row
                        for row in rows
                        if (row["method"], row["allocation"]) == (method, allocation)
                    ),
                    key=lambda row: row["sparsity"],
                )
                if line:
                    axis.plot(
                        [row["sparsity"] for row in line],
                        [row["perplexity"] for row in line],
                        style,
                        marker="o",
                        color=f"C{i}",
                        label=f"{method}, {allocation}",
                    )
        axis.axhline(rows[0]["dense_perplexity"], color="black", linewidth=0.8, label="dense")
        axis.set_xlabel("fraction of zeros")
        axis.legend(fontsize=8)


def main(argv: list[str] | None = None) -> int:
    """Draw the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    source = arguments.results / "accuracy.jsonl"
    rows = [row for row in read_rows(source) if row["bench"] == "accuracy"]
    if not rows:
        parser.error(f"{source} holds no rows")
    # Draw the conditions with the most rows.
    (chosen, _), *_ = Counter(map(conditions, rows)).most_common(1)
    model, text, nsamples, seqlen, *_ = chosen
    title = f"{model}, calibrated on {nsamples}x{seqlen} tokens\n{text}"
    path = source.with_name("accuracy.png")
    draw([row for row in rows if conditions(row) == chosen], title, path)
    print(path)
    swept = [
        row
        for row in rows
        if measured_on(row) == chosen[:5]
        and (row["method"] in MARKERS and row["allocation"] == "uniform")
        and row["rounding"] != "nearest"
    ]
    if {row["values"] for row in swept} - {"16-bit"}:
        path = source.with_name("accuracy-bits.png")
        draw_bits(swept, title, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
