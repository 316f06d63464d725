"""Write ``benchmarks/RESULTS.md``: every table and picture of ``benchmarks/results``.

    python benchmarks/results_page.py

The numbers on the page come from the rows. ``tests/test_results.py`` compares the committed page
with what this script makes.
"""

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

from bench_cpu import NAME_OF
from bench_serve import FEWEST_TOKENS, WEIGHTS
from plot_accuracy import ALLOCATIONS, METHODS, conditions, measured_on
from plot_cpu import over_fastest, over_own
from plot_spmm import of_floor, speed_up
from rows import RESULTS, read_rows

from flash_llm.quantize import GRIDS

PAGE = RESULTS.parent / "RESULTS.md"
VALUES = ("16-bit", *GRIDS)  # in the order of the tables of accuracy
LARGE = 7168 * 7168  # least number of weights of a layer that counts as large
GPUS = {"h100": "One NVIDIA H100", "h200": "One NVIDIA H200"}
CPUS = {
    ("intel-xeon", "avx512"): "Intel Xeon (Emerald Rapids), AVX-512",
    ("amd-epyc", "avx512_bf16"): "AMD EPYC (Zen 4), AVX-512 with BF16",
    ("amd-epyc", "avx2"): "AMD EPYC without AVX-512, AVX2",
}
# Observations that the rows do not contain.
NOTES = {
    ("intel-xeon", "avx512"): (
        "The CPU has VBMI2, BF16 and FP16; the virtual machine hides AMX. The kernels "
        "multiply in float32, which is twice as fast on this CPU as its BF16 instruction. "
        "Two cores read 33 GB/s. From 80 % zeros on, decoding limits N = 1: 32 weights take "
        "4 cycles, and one execution port is busy for 3 of them. With more tokens arithmetic "
        "is the limit: 1.1 cycles for 32 weights and a token."
    ),
    ("amd-epyc", "avx512_bf16"): (
        "The kernels for several tokens have been rewritten since; the new ones have not "
        "been measured here. At 4096×4096, 50 % zeros, N = 1 the AVX2 kernel took 1.35 ms, "
        "AVX-512 0.73 ms and portable C++ 11 ms. From 80 % zeros on, decoding limits N = 1."
    ),
}


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(headings)
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *lines))


def grid(
    first: Sequence[str],
    rows: list[dict],
    cell: Callable[[list[dict]], str],
    line_of: Callable[[dict], tuple[str, ...]],
) -> str:
    """Return a table with a column for each sparsity.

    Args:
        first: headings of the columns before the sparsities.
        rows: the rows, in the order of the lines.
        cell: the text of a cell, from all rows of its line and sparsity.
        line_of: a row's entries under ``first``.
    """
    levels = sorted({row["sparsity"] for row in rows})
    headings = [*first, f"{levels[0]:.0%} zeros".replace("%", " %")]
    headings += [f"{level:.0%}".replace("%", " %") for level in levels[1:]]
    cells: dict[tuple[str, ...], dict[float, list[dict]]] = {}
    for row in rows:
        cells.setdefault(line_of(row), {}).setdefault(row["sparsity"], []).append(row)
    lines = [
        [*line, *(cell(of_line[level]) if level in of_line else "–" for level in levels)]
        for line, of_line in cells.items()
    ]
    return table(headings, lines)


def commits(rows: list[dict]) -> str:
    """Return the commits of the rows; "+" marks a changed working tree."""
    named = {row["commit"][:7] + "+" * row["commit"].endswith("+") for row in rows}
    return ", ".join(f"`{commit}`" for commit in sorted(named))


def span(values: Iterable[float]) -> str:
    """Return the least and the greatest value, or the one value they share."""
    found = sorted(values)
    ends = dict.fromkeys(f"{end:.2f}" for end in (found[0], found[-1]))
    return " … ".join(ends)


def shape(row: dict) -> str:
    """Return M×K."""
    return f"{row['M']}×{row['K']}"


def by_shape(row: dict) -> tuple:
    """Order rows from large layers to small ones, then by tokens."""
    return -row["M"] * row["K"], -row["M"], row["N"], row["sparsity"]


def prose(part: str) -> str:
    """Wrap a paragraph; headings, tables, pictures and comments stay as they are."""
    if part.startswith(("#", "|", "!", "<")):
        return part
    return textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)


def picture(path: Path, what: str) -> str:
    """Return the picture in Markdown, or "" if its file does not exist."""
    return f"![{what}](results/{path.name})" if path.exists() else ""


def uniform_rows(rows: list[dict]) -> list[dict]:
    """Return the float16 rows of the bitmap format with zeros at random places, ordered."""
    wanted = ("float16", "bitmap", "uniform")
    found = [row for row in rows if (row["dtype"], row["format"], row["mask"]) == wanted]
    return sorted(found, key=by_shape)


def gpu_section(results: Path, gpu: str) -> list[str]:
    """Return the section of one GPU; empty if it has no rows."""
    rows = read_rows(results / f"spmm-{gpu}.jsonl")
    uniform = uniform_rows(rows)
    if not uniform:
        return []
    default = [row for row in uniform if row["pdl"]]

    fp8: dict[tuple, list[float]] = {}
    for row in default:
        if row["fp8_us"]:
            fp8.setdefault((row["M"], row["K"], row["N"]), []).append(
                row["cublas_us"] / row["fp8_us"]
            )

    def line_of(row: dict) -> tuple[str, ...]:
        of_row = fp8.get((row["M"], row["K"], row["N"]))
        return shape(row), str(row["N"]), f"{median(of_row):.2f}" if of_row else "–"

    def both(of_cell: list[dict]) -> str:
        ordered = sorted(of_cell, key=lambda row: not row["pdl"])
        return " / ".join(f"{speed_up(row):.2f}" for row in ordered)

    def by_size(n: int, large: bool) -> str:
        found = [
            speed_up(row)
            for row in default
            if row["N"] == n and (row["M"] * row["K"] >= LARGE) == large
        ]
        return span(found) if found else "–"

    tokens = sorted({row["N"] for row in default})
    parts = [
        f"### {GPUS.get(gpu, gpu)}",
        f"Commit {commits(rows)}. Least and greatest speed-up over all measured shapes and "
        "sparsities:",
        table(
            ["N", "layers from 7168×7168 up", "smaller layers"],
            [[str(n), by_size(n, True), by_size(n, False)] for n in tokens],
        ),
    ]
    near = [of_floor(row) for row in default if row["M"] * row["K"] > 2e8 and row["N"] <= 8]
    if near:
        parts.append(
            "For layers of more than 200 million weights and up to 8 tokens, a plain read of "
            f"the packed bytes takes {span(near)} of the kernel's time."
        )
    parts += [
        picture(results / f"spmm-{gpu}-speedup.png", "Speed-up over cuBLAS against sparsity"),
        picture(results / f"spmm-{gpu}-floor.png", "Fraction of the stream floor against sparsity"),
        grid(["M×K", "N", "FP8"], uniform, both, line_of),
    ]
    base = {(row["M"], row["K"], row["N"], row["sparsity"]): row["us"] for row in default}
    other = sorted(
        (
            row
            for row in rows
            if row["format"] == "bitmap"
            and (row["mask"], row["dtype"]) != ("uniform", "float16")
            and (row["M"], row["K"], row["N"], row["sparsity"]) in base
        ),
        key=lambda row: (row["dtype"] != "float16", row["mask"], *by_shape(row)),
    )
    if other:

        def relative(of_cell: list[dict]) -> str:
            (row,) = of_cell
            return f"{row['us'] / base[row['M'], row['K'], row['N'], row['sparsity']]:.2f}"

        parts += [
            "Time with other patterns of zeros (`mask`) and in bfloat16, relative to zeros "
            "at random places in float16:",
            grid(
                ["M×K", "N", "mask", "dtype"],
                other,
                relative,
                lambda row: (shape(row), str(row["N"]), row["mask"], row["dtype"]),
            ),
        ]
    for fmt, chosen in (
        ("tiled_csl", "which `auto` takes above 93 % zeros"),
        ("gather", "which `auto` takes where the caller expects few tokens"),
    ):
        of_format = sorted(
            (row for row in rows if row["format"] == fmt and row["pdl"]), key=by_shape
        )
        if of_format:
            parts += [
                f"Speed-up over cuBLAS of the format `{fmt}`, {chosen}:",
                grid(
                    ["M×K", "N"],
                    of_format,
                    lambda of_cell: f"{speed_up(of_cell[0]):.2f}",
                    lambda row: (shape(row), str(row["N"])),
                ),
            ]
    packing = sorted(
        read_rows(results / f"pack-{gpu}.jsonl"),
        key=lambda row: (row["format"], -row["M"] * row["K"], row["sparsity"]),
    )
    if packing:
        parts += [
            f"Packing and unpacking on the GPU, commit {commits(packing)}:",
            table(
                ["format", "M×K", "zeros", "packed MB", "pack µs", "unpack µs"],
                [
                    [
                        f"`{row['format']}`",
                        shape(row),
                        f"{row['sparsity'] * 100:.0f} %",
                        f"{row['packed_bytes'] / 1e6:.1f}",
                        f"{row['us']:.0f}",
                        f"{row['unpack_us']:.0f}",
                    ]
                    for row in packing
                ],
            ),
        ]
    return parts


def gpu_sections(results: Path) -> list[str]:
    """Return the sections of all GPUs."""
    gpus = sorted(path.stem.removeprefix("spmm-") for path in results.glob("spmm-*.jsonl"))
    parts = [part for gpu in gpus for part in gpu_section(results, gpu)]
    if not parts:
        return []
    return [
        "## On a GPU",
        "Float16, random weights with zeros at random places, format `bitmap` "
        '(`format="auto"` chooses it up to 93 % zeros). A cell is the speed-up over cuBLAS '
        "(`F.linear` on the dense weight) in the same run. The first number is with prefetch, "
        "the default: the kernel begins to read its weight while the previous kernel ends. The "
        "second is with `prefetch=False`. The column FP8 is the speed-up of dense FP8 weights "
        "(`torch._scaled_mm`, x already quantised), the median over the sparsities of the "
        "line. From 256 tokens on the tensor cores are the limit; above 1024 tokens the weight "
        "is unpacked and cuBLAS multiplies. Other GPUs have not been measured.",
        *parts,
    ]


def cpu_title(cpu: str, isa: str) -> str:
    """Return the name of a CPU for readers."""
    return CPUS.get((cpu, isa), f"{cpu}, {isa}")


def cpu_sections(results: Path) -> list[str]:
    """Return the sections of all CPUs."""
    found = [row for row in read_rows(results / "cpu.jsonl") if row["bench"] == "cpu"]
    if not found:
        return []
    parts = [
        "## On a CPU",
        "Format `row_bitmap`. The first number of a cell is the speed-up over `F.linear` in "
        "the weight's dtype; the second is the speed-up over the fastest measured of "
        "`F.linear` in bfloat16, float16 and float32. Both come from the same run. The "
        "machines are shared: runs differ by a tenth, on the EPYC with AVX-512 by a fifth. "
        "Other CPUs have not been measured.",
    ]

    def cell(of_cell: list[dict]) -> str:
        (row,) = of_cell
        own = row["dense_us"][NAME_OF[row["dtype"]]]
        return f"{over_own(row):.2f} / {over_fastest(row):.2f}" if own else "–"

    def machine(row: dict) -> tuple[str, str]:
        return row["cpu"], row["isa"]

    found.sort(
        key=lambda row: (
            *(*machine(row), row["dtype"], row["values"], row["x_values"]),
            *by_shape(row),
        )
    )
    for key, of_machine in groupby(found, machine):
        of_values = list(of_machine)
        rows = [row for row in of_values if row["values"] == "16-bit"]
        threads = ", ".join(str(n) for n in sorted({row["threads"] for row in of_values}))
        parts += [
            f"### {cpu_title(*key)}",
            f"{threads} threads; commits {commits(of_values)}.",
            NOTES.get(key, ""),
        ]
        few = [
            of_floor(row)
            for row in rows
            if row["M"] * row["K"] >= 4096**2 and row["N"] == 1 and row["sparsity"] in (0.5, 0.6)
        ]
        if few:
            parts.append(
                "For layers from 4096×4096 up, one token and 50 to 60 % zeros, a plain read of the "
                f"packed bytes takes {span(few)} of the kernel's time."
            )
        if key[1].startswith("avx512"):  # what plot_cpu.py draws of these CPUs
            drawn = results / f"cpu-{key[0]}-speedup.png"
            parts.append(picture(drawn, "Speed-up over torch against sparsity"))
        parts.append(
            grid(
                ["dtype", "M×K", "N"],
                rows,
                cell,
                lambda row: (row["dtype"], shape(row), str(row["N"])),
            )
        )
        rounded = [row for row in of_values if row["rounded_us"]]
        if rounded:
            parts += [
                "Speed-up over torch's weight-only products in INT8 / INT4:",
                grid(
                    ["dtype", "values × X", "M×K", "N"],
                    rounded,
                    lambda of_cell: " / ".join(
                        f"{of_cell[0]['rounded_us'][name] / of_cell[0]['us']:.2f}"
                        for name in ("int8", "int4")
                    ),
                    lambda row: (
                        *(row["dtype"], f"{row['values']} × {row['x_values']}"),
                        *(shape(row), str(row["N"])),
                    ),
                ),
            ]
    return parts


def weights_name(row: dict) -> str:
    """Return what an engine multiplied by."""
    if row["weights"] == "flash_llm":
        values = "" if row["values"] == "16-bit" else f", {row['values']}"
        values += "" if row["x_values"] == "16-bit" else f" × {row['x_values']}"
        return f"{row['sparsity'] * 100:.0f} % zeros{values}"
    return {"dense": "dense float16", "fp8": "dense FP8"}[row["weights"]]


def weights_order(row: dict) -> tuple[int, float, int, int]:
    """Sort rows of serving: dense first, then FP8, then by the share of zeros and the values."""
    values = VALUES.index(row["values"]), VALUES.index(row["x_values"])
    return list(WEIGHTS).index(row["weights"]), row["sparsity"], *values


def serve_table(rows: list[dict]) -> str:
    """Return a table of steps or prompts, a column for each size, with the ratio to dense."""
    size, value = (
        ("prompt", "ttft_ms") if rows[0]["new_tokens"] == FEWEST_TOKENS else ("batch", "step_ms")
    )
    sizes = sorted({row[size] for row in rows})
    dense = {row[size]: row[value] for row in rows if row["weights"] == "dense"}
    lines: dict[str, dict[int, dict]] = {}
    for row in rows:
        lines.setdefault(weights_name(row), {})[row[size]] = row

    def cell(row: dict | None) -> str:
        if row is None:
            return "–"
        ratio = f" ({dense[row[size]] / row[value]:.2f})" if row[size] in dense else ""
        return f"{row[value]:.2f}{ratio}"

    def line(name: str, of_line: dict[int, dict]) -> list[str]:
        weights_gb = next(iter(of_line.values()))["weights_gb"]
        return [name, f"{weights_gb:.1f}", *(cell(of_line.get(n)) for n in sizes)]

    return table(
        ["weights", "GB", *(f"{size} {n}" for n in sizes)],
        [line(name, of_line) for name, of_line in lines.items()],
    )


def measures_steps(row: dict) -> bool:
    """Return whether a row is of decode steps, not of the time to a first token."""
    return row["bench"] == "serve" and row["new_tokens"] > FEWEST_TOKENS


def per_gpu_table(rows: list[dict]) -> str:
    """Return the tokens per second and GPU of one model on different numbers of GPUs."""
    sizes = sorted({row["batch"] for row in rows})
    lines: dict[tuple[str, int], dict[int, dict]] = {}
    for row in sorted(rows, key=weights_order):
        lines.setdefault((weights_name(row), row["gpus"]), {})[row["batch"]] = row
    return table(
        ["weights", "GPUs", *(f"batch {n}" for n in sizes)],
        [
            [
                name,
                str(gpus),
                *(f"{of_line[n]['tok_per_gpu_s']:.1f}" if n in of_line else "–" for n in sizes),
            ]
            for (name, gpus), of_line in lines.items()
        ],
    )


def account_table(rows: list[dict]) -> str:
    """Return where the time of decode steps goes."""
    kinds = list(rows[0]["kinds_ms"])
    return table(
        ["weights", "batch", "step", *kinds, "gaps", "floor"],
        [
            [
                weights_name(row),
                str(row["batch"]),
                f"{row['step_ms']:.2f}",
                *(f"{row['kinds_ms'][kind]:.2f}" for kind in kinds),
                f"{row['gaps_ms']:.2f}",
                f"{row['floor_ms']:.2f}",
            ]
            for row in rows
        ],
    )


def replay_table(rows: list[dict]) -> str:
    """Return speed and delays of requests that arrive at random."""
    return table(
        ["weights", "requests per s", "tokens per s", "first token", "per token"],
        [
            [
                weights_name(row),
                f"{row['rate']:g}",
                f"{row['tok_per_gpu_s'] * row['gpus']:.0f}",
                *(
                    f"{row[key]['p50']:.1f} / {row[key]['p99']:.1f}"
                    for key in ("ttft_ms", "tpot_ms")
                ),
            ]
            for row in rows
        ],
    )


def model_section(title: str, rows: list[dict]) -> list[str]:
    """Return the section of one model in one mode of the engine."""
    rows.sort(key=weights_order)
    steps = [row for row in rows if measures_steps(row)]
    prompts = [row for row in rows if row["bench"] == "serve" and row not in steps]
    account = [row for row in rows if row["bench"] == "step"]
    replay = [row for row in rows if row["bench"] == "replay"]
    parts = [f"### {title}", f"{rows[0]['engine']}, commits {commits(rows)}."]
    if steps:
        lengths = " or ".join(str(n) for n in sorted({row["prompt"] for row in steps}))
        parts += [
            "Milliseconds per decode step, and in brackets how many times as fast as the dense "
            f"model; prompts of {lengths} tokens:",
            serve_table(steps),
        ]
    if prompts:
        parts += ["Milliseconds to the first token of one prompt:", serve_table(prompts)]
    if account:
        parts += [
            "Where the time of a step goes, in milliseconds: kernels of packed layers, attention, "
            "other products (the head among them), norms, other kernels, and gaps in which the GPU "
            "waits; the floor is a plain read of the weights.",
            account_table(account),
        ]
    if replay:
        parts += [
            "Requests of spread lengths that arrive at random (prompts of 64 to 2048 tokens, 32 to "
            "512 new ones); times in milliseconds, median / 99th percentile:",
            replay_table(replay),
        ]
    return parts


def serve_sections(results: Path) -> list[str]:
    """Return the sections of whole models in vLLM."""
    parts: list[str] = []
    for path in sorted(results.glob("serve-*.jsonl")):
        gpu = path.stem.removeprefix("serve-")

        def case(row: dict) -> tuple[str, str, int]:
            return row["model"], row["mode"], row["gpus"]

        rows = sorted(read_rows(path), key=case)
        for (model, mode, gpus), group in groupby(rows, case):
            where = GPUS.get(gpu, gpu) if gpus == 1 else f"{gpus} × {gpu}"
            parts += model_section(f"{model}, {where}, {mode}", list(group))
            if gpus > 1:
                steps = [
                    row for row in rows if measures_steps(row) and case(row)[:2] == (model, mode)
                ]
                parts += ["Tokens per second and GPU:", per_gpu_table(steps)]
        parts.append(picture(path.with_suffix(".png"), "Tokens per second against the batch"))
    if not parts:
        return []
    return [
        "## Serving whole models",
        "Models in vLLM (`benchmarks/bench_serve.py`). All weights are random, and the packed ones "
        "were pruned by magnitude; only times are compared. The mode `compiled` is vLLM's default, "
        "`graphs` uses CUDA graphs for decoding and no compiler.",
        *parts,
    ]


def decode_section(results: Path) -> list[str]:
    """Return the decoding speeds of a whole model."""
    rows = [row for row in read_rows(results / "cpu.jsonl") if row["bench"] == "decode"]
    if not rows:
        return []
    columns = ("packed", "bf16", "fp32", "int8", "int4")
    return [
        "## Decoding a whole model on a CPU",
        "Tokens per second at batch 1, greedy, with the packed model and with the dense "
        "model in bfloat16, in float32 and with torch's weight-only products "
        "(`benchmarks/bench_decode.py`). The layers of SmolLM2-135M are so small that a "
        "third of their 20 to 50 µs is the call, the start of the threads and the last "
        "additions. The layers together take 40 % of a step, and the output layer, which "
        "stays dense, 20 %. On this small model torch's INT8 product is the better choice "
        "today.",
        table(
            ["model", "CPU", "zeros", *columns, "commit"],
            [
                [
                    row["model"],
                    f"{cpu_title(row['cpu'], row['isa'])}, {row['threads']} threads",
                    f"{row['sparsity'] * 100:.0f} %",
                    *(
                        f"{row['tokens_per_s'][name]:.1f}" if name in row["tokens_per_s"] else "–"
                        for name in columns
                    ),
                    commits([row]),
                ]
                for row in rows
            ],
        ),
    ]


def accuracy_section(results: Path) -> list[str]:
    """Return what pruning and rounding cost in perplexity."""
    rows = read_rows(results / "accuracy.jsonl")
    pruned = [row for row in rows if row["bench"] == "accuracy"]
    rounded = [row for row in rows if row["bench"] == "rounding"]
    parts = ["## Accuracy"] if rows else []

    def order(row: dict) -> tuple:
        method, allocation = [*METHODS].index(row["method"]), ALLOCATIONS.index(row["allocation"])
        values = VALUES.index(row["values"]), row["rounding"] or ""
        of_line = row["recover_epochs"], method, allocation, row["sparsity"]
        return measured_on(row), values, of_line

    def perplexity(of_cell: list[dict]) -> str:
        return f"{of_cell[0]['perplexity']:.2f}"

    pruned.sort(key=order)
    unrounded = [row for row in pruned if row["values"] == "16-bit"]
    for key, group in groupby(unrounded, conditions):
        of_group = list(group)
        model, text, nsamples, seqlen, _, epochs, *_ = key
        dense = of_group[0]["dense_perplexity"]
        recovered = f", after {epochs} epochs of `recover_`" if epochs else ""
        parts += [
            f"Perplexity of {model} (dense: {dense:.2f}) in float32{recovered}, calibrated on "
            f"{nsamples} samples of {seqlen} tokens. Text: {text}. One NVIDIA H100, commits "
            f"{commits(of_group)}.",
            grid(
                ["method", "allocation"],
                of_group,
                perplexity,
                lambda row: (row["method"], row["allocation"]),
            ),
        ]
    if pruned:
        parts.append(picture(results / "accuracy.png", "Perplexity against sparsity"))
    swept = [row for row in pruned if row["values"] != "16-bit"]
    for key, group in groupby(swept, measured_on):
        of_group = list(group)
        model, text, nsamples, seqlen, _ = key
        parts += [
            f"Perplexity of {model} (dense: {of_group[0]['dense_perplexity']:.2f}) with the values "
            "that stay rounded, by the sweep that lets later columns compensate or to nearest, and "
            "0 % zeros meaning that nothing is pruned (the method is then GPTQ, or rounding to "
            f"nearest). The model's own weights have 4 bits and 32 share a scale, which flatters "
            f"4-bit values. {nsamples} samples of {seqlen} tokens. Text: {text}. Commits "
            f"{commits(of_group)}.",
            grid(
                ["values", "method", "rounding", "epochs of `recover_`"],
                of_group,
                perplexity,
                lambda row: (
                    *(row["values"], row["method"], row["rounding"]),
                    str(row["recover_epochs"]),
                ),
            ),
            "Bits per weight: a bitmap where there are zeros, the values that are not zero, and "
            "scales.",
            grid(
                ["values"],
                of_group,
                lambda of_cell: f"{median(row['bits'] for row in of_cell):.2f}",
                lambda row: (row["values"],),
            ),
            picture(results / "accuracy-bits.png", "Perplexity against bits per weight"),
        ]
    if rounded:
        parts += [
            "Perplexity over the given text with the layers rounded to nearest instead of pruned. "
            "The weights were dequantised from a Q4_1 file with groups of 32 columns, so INT4 in "
            "groups of 32 loses nothing here.",
            table(
                ["model", "text", "values", "columns per scale", "perplexity", "dense", "commit"],
                [
                    [
                        row["model"],
                        row["text"],
                        row["values"],
                        str(row["group"] or "a whole row"),
                        f"{row['perplexity']:.2f}",
                        f"{row['dense_perplexity']:.2f}",
                        commits([row]),
                    ]
                    for row in rounded
                ],
            ),
        ]
    return parts


def cost_section(results: Path) -> list[str]:
    """Return how long pruning and converting take."""
    rows = read_rows(results / "pack.jsonl")
    pruning = sorted(
        (row for row in rows if row["bench"] == "prune"),
        key=lambda row: [*METHODS].index(row["method"]),
    )
    converting = [row for row in rows if row["bench"] == "convert"]
    parts = ["## What pruning and converting take"] if rows else []
    if pruning:
        parts += [
            "`prune_` on a CPU, calibration included, in float32:",
            table(
                ["model", "CPU", "method", "zeros", "samples × tokens", "seconds", "commit"],
                [
                    [
                        row["model"],
                        f"{row['cpu']}, {row['threads']} threads",
                        row["method"],
                        f"{row['sparsity'] * 100:.0f} %",
                        f"{row['nsamples']} × {row['seqlen']}",
                        f"{row['seconds']:.0f}",
                        commits([row]),
                    ]
                    for row in pruning
                ],
            ),
        ]
    if converting:
        parts += [
            "`flash-llm convert` on a synthetic checkpoint whose files are in the page "
            "cache. GB/s is dense input per second of wall-clock time and, per core, of "
            "processor time; memory is the peak of the process, most of it page cache.",
            table(
                [
                    "CPU",
                    "dense GB",
                    "zeros",
                    "format",
                    "workers",
                    "GB/s",
                    "per core",
                    "peak GB",
                    "commit",
                ],
                [
                    [
                        row["cpu"],
                        f"{row['bytes'] / 1e9:.1f}",
                        f"{row['sparsity'] * 100:.0f} %",
                        f"`{row['format']}`",
                        str(row["workers"]),
                        f"{row['gb_s']:.2f}",
                        f"{row['gb_s_core']:.2f}",
                        f"{row['peak_bytes'] / 1e9:.2f}",
                        commits([row]),
                    ]
                    for row in converting
                ],
            ),
        ]
    return parts


def page(results: Path = RESULTS) -> str:
    """Return the page in Markdown.

    Args:
        results: folder of the rows and pictures.
    """
    parts = [
        "# Results",
        "<!-- Written by benchmarks/results_page.py from benchmarks/results. Do not edit. -->",
        "All measurements of this repository. [README.md](README.md) has the method and the "
        "fields of the rows. A weight has M rows (out_features) and K columns (in_features), "
        'and N is the number of tokens per call. "–" means not measured.',
        *gpu_sections(results),
        *serve_sections(results),
        *cpu_sections(results),
        *decode_section(results),
        *accuracy_section(results),
        *cost_section(results),
    ]
    return "\n\n".join(prose(part) for part in parts if part) + "\n"


def main() -> int:
    """Write the page; returns the exit status."""
    PAGE.write_text(page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
