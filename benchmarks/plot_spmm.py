"""Draw the rows of ``benchmarks/results/spmm-<gpu>.jsonl`` for one shape.

    python benchmarks/plot_spmm.py h200 --shape 28672x7168

``spmm-<gpu>-speedup.png``: speed-up over cuBLAS against sparsity, a line per N, and dense FP8 at
N = 8 as a dashed line. ``spmm-<gpu>-floor.png``: the time to read the packed bytes as a fraction of
our time. Each has a panel with prefetch (programmatic dependent launch) and one without. Needs
matplotlib (extra ``plot``).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rows import MASKS, RESULTS, read_rows
from shapes import parse_shape

TOKENS = (1, 8, 16, 32, 64)
FP8_TOKENS = 8
PDL_TITLES = {True: "with prefetch (PDL)", False: "without prefetch"}


def best_rows(rows: list[dict]) -> list[dict]:
    """Return one row per case: that of the format "auto" or, without one, of the fastest format."""
    best: dict[tuple, dict] = {}
    fields = ("M", "K", "N", "sparsity", "mask", "dtype", "pdl")
    for row in sorted(rows, key=lambda r: (r["format"] != "auto", r["us"])):
        best.setdefault(tuple(row[field] for field in fields), row)
    return list(best.values())


def speed_up(row: dict) -> float:
    """Return the speed-up over cuBLAS."""
    return row["cublas_us"] / row["us"]


def of_floor(row: dict) -> float:
    """Return the time to read the payload as a fraction of our time."""
    return row["stream_floor_us"] / row["us"]


def draw(rows: list[dict], title: str, path: Path, value: Callable[[dict], float]) -> None:
    """Write one figure: ``value`` of the rows against sparsity.

    Args:
        rows: one per case, all of one shape, mask and dtype; at least one.
        title: of the figure.
        path: of the picture.
        value: :func:`speed_up` or :func:`of_floor`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [pdl for pdl in PDL_TITLES if any(row["pdl"] == pdl for row in rows)]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.0 * len(panels), 4.6), sharey=True, squeeze=False
    )
    colours = pyplot.get_cmap("viridis")
    for axis, pdl in zip(axes.flat, panels, strict=True):
        for i, n in enumerate(TOKENS):
            line = sorted(
                (row for row in rows if (row["N"], row["pdl"]) == (n, pdl)),
                key=lambda row: row["sparsity"],
            )
            sparsities = [row["sparsity"] for row in line]
            if line:
                colour = colours(0.9 * i / (len(TOKENS) - 1))
                values = [value(row) for row in line]
                axis.plot(sparsities, values, marker="o", color=colour, label=f"N = {n}")
            dense = [row for row in line if row["fp8_us"]] if n == FP8_TOKENS else []
            if value is speed_up and dense:
                axis.plot(
                    [row["sparsity"] for row in dense],
                    [row["cublas_us"] / row["fp8_us"] for row in dense],
                    linestyle="--",
                    color="tab:red",
                    label=f"dense FP8, N = {n}",
                )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(PDL_TITLES[pdl], fontsize=10)
        axis.set_xlabel("fraction of zeros")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel(
        "speed-up over cuBLAS" if value is speed_up else "time to read the packed bytes / our time"
    )
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw both figures of one GPU; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gpu", help="such as h200")
    parser.add_argument("--shape", default="opt-30b.fc1", help="MxK or a layer")
    parser.add_argument("--mask", choices=MASKS, default="uniform")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    source = arguments.results / f"spmm-{arguments.gpu}.jsonl"
    try:
        m, k = parse_shape(arguments.shape)
    except ValueError as error:
        parser.error(str(error))
    wanted = (m, k, arguments.mask, arguments.dtype)
    rows = [
        row
        for row in best_rows(read_rows(source))
        if (row["M"], row["K"], row["mask"], row["dtype"]) == wanted and row["N"] in TOKENS
    ]
    if not rows:
        parser.error(f"{source} holds no rows of {m}x{k}, {arguments.dtype}, mask {arguments.mask}")
    commits = ", ".join(sorted({str(row["commit"])[:9] for row in rows}))
    what = f"M = {m}, K = {k}, {arguments.dtype}, mask {arguments.mask}"
    title = f"SpMM, {what}, on {arguments.gpu} at {commits}"
    for name, value in (("speedup", speed_up), ("floor", of_floor)):
        path = source.with_name(f"{source.stem}-{name}.png")
        draw(rows, title, path, value)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
