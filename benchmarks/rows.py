"""The JSON rows of ``benchmarks/results``: one line per case, the newest measurement of it."""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import NoneType

RESULTS = Path(__file__).resolve().parent / "results"

# Patterns of zeros, made by weights.py: at random; at random in rows that differ in sparsity; whole
# blocks of 128 x 128; where real weights are small.
MASKS = ("uniform", "rows", "blocks", "real")

# What rows of bench_serve.py begin and end with.
_SERVE_HEAD: dict[str, tuple[type, ...]] = {
    "bench": (str,),
    "engine": (str,),
    "gpu": (str,),  # or the CPU, where there is none
    "gpus": (int,),
    "model": (str,),
    "weights": (str,),  # dense, fp8, flash_llm
    "format": (str, NoneType),  # null: nothing is packed
    "sparsity": (float,),
    "values": (str,),  # 16-bit, int8, fp8_e4m3
    "x_values": (str,),
}
_SERVE_TAIL: dict[str, tuple[type, ...]] = {
    "weights_gb": (float, NoneType),  # of all GPUs; null: on a CPU
    "kv_tokens": (int,),
    "start_s": (float, NoneType),  # null: several engines started at once
    "mode": (str,),
    "torch": (str,),
    "commit": (str,),
}

# The rows of each benchmark: field -> types. Times in microseconds; sparsity a fraction of zeros.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "spmm": {
        "bench": (str,),
        "gpu": (str,),
        "M": (int,),
        "K": (int,),
        "N": (int,),
        "sparsity": (float,),
        "mask": (str,),
        "dtype": (str,),
        "format": (str,),
        "values": (str,),  # 16-bit, int8
        "x_values": (str,),
        "pdl": (bool,),
        "packed_bytes": (int, NoneType),  # null: measured before this was recorded
        "us": (float,),
        "cublas_us": (float,),
        "fp8_us": (float, NoneType),  # null: the GPU or the shape does not support it
        "fp8_rounding_us": (float, NoneType),  # null: not measured
        "stream_floor_us": (float,),
        "rel_err": (float,),
        "plan": (str,),
        "torch": (str,),
        "cuda": (str,),
        "commit": (str,),
    },
    "cpu": {
        "bench": (str,),
        "cpu": (str,),
        "isa": (str,),
        "threads": (int,),
        "M": (int,),
        "K": (int,),
        "N": (int,),
        "sparsity": (float,),
        "mask": (str,),
        "dtype": (str,),
        "format": (str,),
        "values": (str,),  # 16-bit, int8
        "x_values": (str,),
        "us": (float,),
        "dense_us": (dict,),  # fp32, bf16, fp16; null where it was not measured
        "rounded_us": (dict,),  # int8, int4; empty where they were not measured
        "stream_floor_us": (float,),
        "rel_err": (float,),
        "torch": (str,),
        "commit": (str,),
    },
    "decode": {
        "bench": (str,),
        "cpu": (str,),
        "isa": (str,),
        "threads": (int,),
        "model": (str,),
        "sparsity": (float,),
        "tokens_per_s": (dict,),  # packed, bf16, fp32; int8, int4 where they were measured
        "torch": (str,),
        "commit": (str,),
    },
    "pack": {
        "bench": (str,),
        "gpu": (str,),
        "device": (str,),
        "M": (int,),
        "K": (int,),
        "sparsity": (float,),
        "mask": (str,),
        "dtype": (str,),
        "format": (str,),
        "us": (float,),
        "gb_s": (float,),
        "unpack_us": (float,),
        "packed_bytes": (int,),
        "torch": (str,),
        "cuda": (str,),
        "commit": (str,),
    },
    "convert": {
        "bench": (str,),
        "cpu": (str,),
        "bytes": (int,),
        "shards": (int,),
        "M": (int,),
        "K": (int,),
        "sparsity": (float,),
        "mask": (str,),
        "dtype": (str,),
        "format": (str,),
        "workers": (int,),
        "threads": (int,),
        "runs": (int,),
        "seconds": (float,),
        "cpu_seconds": (float,),
        "gb_s": (float,),
        "gb_s_core": (float,),
        "packed_bytes": (int,),
        "peak_bytes": (int,),
        "torch": (str,),
        "commit": (str,),
    },
    "prune": {
        "bench": (str,),
        "cpu": (str,),
        "threads": (int,),
        "model": (str,),
        "method": (str,),
        "sparsity": (float,),
        "nsamples": (int,),
        "seqlen": (int,),
        "seconds": (float,),
        "torch": (str,),
        "commit": (str,),
    },
    "accuracy": {
        "bench": (str,),
        "model": (str,),
        "method": (str,),
        "allocation": (str,),
        "sparsity": (float,),
        "recover_epochs": (int,),
        "values": (str,),
        "rounding": (str, NoneType),  # sweep, nearest; null: 16-bit values
        "bits": (float,),  # per weight
        "perplexity": (float,),
        "dense_perplexity": (float,),
        "text": (str,),
        "nsamples": (int,),
        "seqlen": (int,),
        "seed": (int,),
        "seconds": (float,),
        "commit": (str,),
    },
    "rounding": {
        "bench": (str,),
        "model": (str,),
        "values": (str,),
        "group": (int, NoneType),  # columns that share a scale; null: all
        "perplexity": (float,),
        "dense_perplexity": (float,),
        "text": (str,),
        "commit": (str,),
    },
    "serve": {
        **_SERVE_HEAD,
        "batch": (int,),
        "prompt": (int,),
        "new_tokens": (int,),
        "step_ms": (float,),
        "tok_per_gpu_s": (float,),
        "ttft_ms": (float,),
        **_SERVE_TAIL,
    },
    "step": {
        **_SERVE_HEAD,
        "batch": (int,),
        "prompt": (int,),
        "step_ms": (float,),
        "kinds_ms": (dict,),  # packed, attention, dense, norms, rest
        "gaps_ms": (float,),
        "floor_ms": (float,),
        **_SERVE_TAIL,
    },
    "replay": {
        **_SERVE_HEAD,
        "rate": (float,),
        "requests": (int,),
        "tok_per_gpu_s": (float,),
        "ttft_ms": (dict,),  # p50, p99
        "tpot_ms": (dict,),
        **_SERVE_TAIL,
    },
}
POSITIVE_FIELDS = (
    *("packed_bytes", "us", "gb_s", "unpack_us"),
    *("bytes", "workers", "threads", "cpu_seconds", "gb_s_core", "peak_bytes"),
    *("cublas_us", "fp8_us", "stream_floor_us"),
    *("bits", "perplexity", "dense_perplexity", "nsamples", "seqlen", "seconds", "group"),
    *("gpus", "batch", "prompt", "new_tokens", "step_ms", "tok_per_gpu_s", "weights_gb"),
    *("rate", "requests", "kv_tokens", "start_s", "floor_ms"),
)
# The fields that identify a case; a new row replaces the old row of its case.
CASE_FIELDS = {
    "spmm": (
        *("bench", "gpu", "M", "K", "N", "sparsity", "mask", "dtype", "format"),
        *("values", "x_values", "pdl"),
    ),
    "cpu": (
        *("bench", "cpu", "isa", "threads", "M", "K", "N"),
        *("sparsity", "mask", "dtype", "format", "values", "x_values"),
    ),
    "decode": ("bench", "cpu", "isa", "threads", "model", "sparsity"),
    "pack": ("bench", "gpu", "device", "M", "K", "sparsity", "mask", "dtype", "format"),
    "convert": (
        *("bench", "cpu", "bytes", "shards", "M", "K", "sparsity", "mask", "dtype", "format"),
        *("workers", "threads"),
    ),
    "prune": (
        *("bench", "cpu", "threads", "model", "method"),
        *("sparsity", "nsamples", "seqlen"),
    ),
    "accuracy": (
        *("bench", "model", "method", "allocation", "sparsity", "recover_epochs"),
        *("values", "rounding", "text", "nsamples", "seqlen", "seed"),
    ),
    "rounding": ("bench", "model", "values", "group", "text"),
    "serve": (
        *("bench", "gpu", "gpus", "model", "weights", "sparsity", "values", "x_values"),
        *("batch", "prompt", "new_tokens", "mode"),
    ),
    "step": (
        *("bench", "gpu", "gpus", "model", "weights", "sparsity", "values", "x_values"),
        *("batch", "prompt", "mode"),
    ),
    "replay": (
        *("bench", "gpu", "gpus", "model", "weights", "sparsity", "values", "x_values"),
        *("rate", "requests", "mode"),
    ),
}


def check_row(row: dict[str, object]) -> None:
    """Check one row against the schema of its benchmark.

    Raises:
        ValueError: the benchmark or the mask is unknown; a field is missing, unknown or of the
            wrong type; or a time or size is not positive.
    """
    if row.get("bench") not in FIELDS:
        raise ValueError(f"bench must be one of {', '.join(FIELDS)}, got {row.get('bench')!r}")
    fields = FIELDS[str(row["bench"])]
    if list(row) != list(fields):
        raise ValueError(f"a row must have the fields {list(fields)}, got {list(row)}")
    for field, kinds in fields.items():
        if type(row[field]) not in kinds:  # exactly: True is an int to isinstance
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{field} must be {names}, got {row[field]!r}")
    for field in POSITIVE_FIELDS:
        if row.get(field) is not None and not row[field] > 0:
            raise ValueError(f"{field} must be positive, got {row[field]!r}")
    for field in ("dense_us", "rounded_us"):
        for name, us in row.get(field, {}).items():
            if us is not None and not (type(us) is float and us > 0):
                raise ValueError(f"{field} of {name} must be a positive number or null, got {us!r}")
    for name, speed in row.get("tokens_per_s", {}).items():
        if not (type(speed) is float and speed > 0):
            raise ValueError(f"tokens_per_s of {name} must be a positive number, got {speed!r}")
    if "mask" in fields and row["mask"] not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {row['mask']!r}")


def read_rows(path: Path) -> list[dict[str, object]]:
    """Read a file of rows; a file that does not exist has none.

    Rows that were measured before weights or their inputs could be quantised get the fields
    ``values`` and ``x_values``.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [_with_values(json.loads(line)) for line in lines if line.strip()]


def _with_values(row: dict[str, object]) -> dict[str, object]:
    fields = FIELDS.get(str(row["bench"]), {})
    absent = [field for field in ("values", "x_values") if field in fields and field not in row]
    if not absent:
        return row
    known = {
        **row,
        **dict.fromkeys(absent, "fp8_e4m3" if row.get("weights") == "fp8" else "16-bit"),
    }
    in_order = {field: known[field] for field in fields if field in known}
    return {**in_order, **known}  # with fields that check_row refuses


def case_of(row: dict[str, object]) -> tuple[object, ...]:
    """Return the values that identify the row's case."""
    return tuple(row[field] for field in CASE_FIELDS[str(row["bench"])])


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Check rows and write them to ``path`` in a stable order, keeping the rows of other cases.

    Raises:
        ValueError: a row does not fit the schema; nothing is written.
    """
    for row in rows:
        check_row(row)
    by_case = {case_of(row): row for row in [*read_rows(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(by_case[case]) for case in sorted(by_case)]
    path.write_text("".join(f"{line}\n" for line in lines))


def gpu_name(full: str) -> str:
    """Shorten a device name to a file name: ``NVIDIA H100 80GB HBM3`` is ``h100``."""
    words = [word for word in full.split() if word.lower() not in ("nvidia", "tesla")]
    chip = next((word for word in words if re.fullmatch(r"[A-Z]{1,2}\d{1,3}[A-Z]?", word)), None)
    return (chip or "-".join(words)).lower()


def cpu_name(cpuinfo: str | None = None) -> str:
    """Return the CPU's model as a file name; ``cpuinfo`` is by default ``/proc/cpuinfo``.

    ``AMD EPYC 9654 96-Core Processor`` is ``amd-epyc-9654``; where no model is named, ``cpu``.
    """
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = re.sub(
        r"\((?:R|TM)\)|@.*|\b(?:CPU|Processor|\d+-Core)\b", " ", found[1] if found else ""
    )
    return "-".join(re.findall(r"[\w.+]+", name)).lower() or "cpu"


def print_table(headings: Sequence[str], lines: list[tuple[str, ...]]) -> None:
    """Print aligned columns."""
    table = [tuple(headings), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(headings))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def commit_hash(given: str | None) -> str:
    """Return the commit that is measured: ``given``, FLASH_LLM_COMMIT, or what git says.

    A working tree with changes to tracked files is marked by ``+`` at the end.

    Raises:
        ValueError: none of the three names a commit.
    """
    if named := given or os.environ.get("FLASH_LLM_COMMIT"):
        return named

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        raise ValueError("there is no git checkout here: pass --commit or set FLASH_LLM_COMMIT")
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
