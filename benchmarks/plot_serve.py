"""Draw the rows of ``benchmarks/results/serve-<gpu>.jsonl``: tokens a second against the batch.

    python benchmarks/plot_serve.py h200

``serve-<gpu>.png`` has a panel for each model, number of GPUs and mode of the engine, and a line
for each kind of weights. Needs matplotlib (extra ``plot``).
"""

import argparse
import sys
from pathlib import Path

from rows import RESULTS, read_rows

PANELS_PER_LINE = 4


def label(row: dict) -> str:
    """What a line is of."""
    if row["weights"] != "flash_llm":
        return row["weights"]
    values = "" if row["values"] == "16-bit" else f", {row['values']}"
    values += "" if row["x_values"] == "16-bit" else f" × {row['x_values']}"
    return f"{row['sparsity']:.0%} zeros{values}"


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Write the figure.

    Args:
        rows: at least one.
        title: of the figure.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    def panel(row: dict) -> tuple[str, str, int]:
        return row["model"], row["mode"], row["gpus"]

    cases = sorted({panel(row) for row in rows})
    lines = -(-len(cases) // PANELS_PER_LINE)
    columns = min(len(cases), PANELS_PER_LINE)
    size = (4.2 * columns, 4.4 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for unused in axes.flat[len(cases) :]:
        unused.set_axis_off()
    for axis, case in zip(axes.flat, cases, strict=False):
        of_model = [row for row in rows if panel(row) == case]
        for name in sorted({label(row) for row in of_model}):
            line = sorted(
                (row["batch"], row["tok_per_gpu_s"]) for row in of_model if label(row) == name
            )
            axis.plot(*zip(*line, strict=True), marker="o", label=name)
        model, mode, gpus = case
        where = "" if gpus == 1 else f", {gpus} GPUs"
        axis.set_title(f"{model}, {mode}{where}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for numbers in (axis.xaxis, axis.yaxis):
            numbers.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_xlabel("batch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for first in axes[:, 0]:
        first.set_ylabel("tokens per second and GPU")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw the figure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gpu", help="as in the name of the file, such as h200")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    source = arguments.results / f"serve-{arguments.gpu}.jsonl"
    rows = [
        row
        for row in read_rows(source)
        if row["bench"] == "serve" and row["prompt"] == arguments.prompt
    ]
    if not rows:
        parser.error(f"{source} holds no rows of prompts of {arguments.prompt} tokens")
    commits = ", ".join(sorted({str(row["commit"])[:9] for row in rows}))
    engines = ", ".join(sorted({row["engine"] for row in rows}))
    path = source.with_suffix(".png")
    draw(rows, f"{engines} on {arguments.gpu} at {commits}", path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
