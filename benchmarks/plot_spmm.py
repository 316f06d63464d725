"""Draw the rows of ``benchmarks/results/spmm-<gpu>.jsonl`` into ``spmm-<gpu>.png``.

    python benchmarks/plot_spmm.py h200

One panel per shape and dtype: speed-up over cuBLAS against N, a line per sparsity; dotted, in the
same colour, what the stream floor would give. Needs matplotlib (extra ``plot``).
"""

import argparse
import sys
from pathlib import Path

from rows import RESULTS, read_rows


def panels(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Group rows by (M, K, dtype, format), largest weights first."""
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["M"], row["K"], row["dtype"], row["format"]), []).append(row)
    return dict(sorted(grouped.items(), key=lambda item: -item[0][0] * item[0][1]))


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = panels(rows)
    num_cols = min(2, len(grouped))
    num_rows = -(-len(grouped) // num_cols)
    figure, axes = pyplot.subplots(
        num_rows, num_cols, figsize=(6.4 * num_cols, 4.2 * num_rows), squeeze=False
    )
    tokens = sorted({row["N"] for row in rows})
    sparsities = sorted({row["sparsity"] for row in rows})
    colours = pyplot.get_cmap("viridis")
    for axis, ((m, k, dtype, fmt), members) in zip(axes.flat, grouped.items(), strict=False):
        for i, sparsity in enumerate(sparsities):
            line = sorted((r for r in members if r["sparsity"] == sparsity), key=lambda r: r["N"])
            if not line:
                continue
            places = [tokens.index(row["N"]) for row in line]
            colour = colours(0.9 * i / max(1, len(sparsities) - 1))
            axis.plot(
                places,
                [row["cublas_us"] / row["us"] for row in line],
                marker="o",
                color=colour,
                label=f"{sparsity:.0%} zeros",
            )
            floor = [row["cublas_us"] / row["stream_floor_us"] for row in line]
            axis.plot(places, floor, linestyle=":", marker="_", color=colour)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(tokens)), [str(n) for n in tokens])
        axis.set_xlabel("N (tokens)")
        axis.set_ylabel("speed-up over cuBLAS")
        axis.set_ylim(bottom=0)
        axis.set_title(f"M={m} K={k}, {dtype}, {fmt}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(grouped) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw the picture of one GPU; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gpu", help="such as h200")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    source = arguments.results / f"spmm-{arguments.gpu}.jsonl"
    rows = read_rows(source)
    if not rows:
        parser.error(f"{source} holds no rows")
    commits = sorted({str(row["commit"])[:9] for row in rows})
    title = f"SpMM on {arguments.gpu} at {', '.join(commits)}; dotted: stream floor"
    path = source.with_suffix(".png")
    draw(rows, title, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
