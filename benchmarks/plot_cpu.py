"""Draw the rows of ``benchmarks/results/cpu.jsonl``: speed-ups against sparsity, a line per shape.

    python benchmarks/plot_cpu.py

``cpu-<cpu>-speedup.png``, one for each CPU, has a panel for N = 1 over torch's product in the dtype
of the weight, one for N = 1 over the fastest of torch's dtypes, and one for N = 8. Needs matplotlib
(extra ``plot``).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench_cpu import NAME_OF
from rows import RESULTS, read_rows


def over_own(row: dict) -> float:
    """Return the speed-up over torch in the dtype of the weight."""
    return row["dense_us"][NAME_OF[row["dtype"]]] / row["us"]


def over_fastest(row: dict) -> float:
    """Return the speed-up over the fastest of torch's dtypes."""
    return min(us for us in row["dense_us"].values() if us is not None) / row["us"]


# Tokens, the value to draw, and the title.
PANELS: tuple[tuple[int, Callable[[dict], float], str], ...] = (
    (1, over_own, "N = 1, over torch in the same dtype"),
    (1, over_fastest, "N = 1, over torch's fastest dtype"),
    (8, over_own, "N = 8, over torch in the same dtype"),
)


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Write the figure.

    Args:
        rows: of one dtype; at least one.
        title: of the figure.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = sorted({(row["M"], row["K"]) for row in rows}, key=lambda shape: shape[0] * shape[1])
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5.0 * len(PANELS), 4.4))
    colours = pyplot.get_cmap("viridis")
    for axis, (n, value, heading) in zip(axes, PANELS, strict=True):
        for i, (m, k) in enumerate(shapes):
            line = sorted(
                (row for row in rows if (row["M"], row["K"], row["N"]) == (m, k, n)),
                key=lambda row: row["sparsity"],
            )
            axis.plot(
                [row["sparsity"] for row in line],
                [value(row) for row in line],
                marker="o",
                color=colours(0.9 * i / max(len(shapes) - 1, 1)),
                label=f"{m}×{k}",
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("fraction of zeros")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("speed-up")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw the figure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=list(NAME_OF), default="bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    source = arguments.results / "cpu.jsonl"
    rows = [
        row
        for row in read_rows(source)
        if row["bench"] == "cpu"
        and (row["dtype"], row["mask"]) == (arguments.dtype, "uniform")
        and row["values"] == "16-bit"
        and row["N"] in (1, 8)
    ]
    if not rows:
        parser.error(f"{source} holds no rows of {arguments.dtype}")
    for cpu in sorted({row["cpu"] for row in rows}):
        of_cpu = [row for row in rows if row["cpu"] == cpu]
        # Several CPUs may have the same name: draw the instruction set with the most rows.
        (isa, _), *_ = Counter(row["isa"] for row in of_cpu).most_common(1)
        of_cpu = [row for row in of_cpu if row["isa"] == isa]
        facts = {f"{row['threads']} threads, {row['isa']}" for row in of_cpu}
        commits = ", ".join(sorted({str(row["commit"])[:9] for row in of_cpu}))
        path = source.with_name(f"cpu-{cpu}-speedup.png")
        title = f"SpMM, {arguments.dtype}, on {cpu}, {'; '.join(sorted(facts))} at {commits}"
        draw(of_cpu, title, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
