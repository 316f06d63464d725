"""Draw the rows of ``benchmarks/results/accuracy.jsonl``: perplexity against sparsity.

    python benchmarks/plot_accuracy.py

``accuracy.png`` has a line per method and allocation. Needs matplotlib (extra ``plot``).
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from rows import RESULTS, read_rows

from flash_llm.prune.calibrate import ALLOCATIONS
from flash_llm.prune.methods import METHODS

STYLES = dict(zip(ALLOCATIONS, ("-", "--", ":"), strict=True))


def conditions(row: dict) -> tuple:
    """Return what rows that are compared must have in common."""
    return tuple(
        row[field] for field in ("model", "text", "nsamples", "seqlen", "seed", "recover_epochs")
    )


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Write the figure.

    Args:
        rows: measured under the same conditions; at least one.
        title: of the figure.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.0, 4.6))
    for i, method in enumerate(METHODS):
        for allocation, style in STYLES.items():
            line = sorted(
                (row for row in rows if (row["method"], row["allocation"]) == (method, allocation)),
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
    axis.set_yscale("log")
    axis.set_xlabel("fraction of zeros")
    axis.set_ylabel("perplexity")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw the figure; returns the exit status."""
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
    path = source.with_name("accuracy.png")
    title = f"{model}, calibrated on {nsamples}x{seqlen} tokens\n{text}"
    draw([row for row in rows if conditions(row) == chosen], title, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
