"""Convert a synthetic checkpoint of any size; one JSON row per number of workers.

    python benchmarks/bench_convert.py --gigabytes 8 --workers 1 2

Random weights with zeros are written to a folder inside ``--folder`` (which needs room for them and
for the result), read once so that they are in the page cache, and converted several times, each
time by a new process. Rows go to ``benchmarks/results/pack.jsonl``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from options import add_row_options, require_positive
from rows import commit_hash, cpu_name, print_table, write_rows
from safetensors.torch import save_file
from weights import DTYPES, make_weight

# Prints what one conversion took. VmHWM is the peak of its memory alone; ru_maxrss would start from
# the peak of this process.
CHILD = """
import json, re, sys, time
import torch
from flash_llm import convert_checkpoint
torch.set_num_threads(int(sys.argv[4]))
wall, cpu = time.perf_counter(), time.process_time()
report = convert_checkpoint(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
packed = len(report.packed) == len(report.rows)
print(json.dumps([wall, cpu, int(peak) * 1024, report.total_bytes, packed]))
"""


@dataclass(frozen=True)
class Source:
    """A checkpoint to make.

    Attributes:
        nbytes: greatest size of its weights.
        shards: number of files.
        m: rows of each weight.
        k: columns of each weight.
        sparsity: fraction of zeros.
        dtype: dtype of the weights.
    """

    nbytes: int
    shards: int
    m: int
    k: int
    sparsity: float
    dtype: str

    @property
    def layers_of_shard(self) -> int:
        """Number of weights in one file."""
        return self.nbytes // (self.m * self.k * DTYPES[self.dtype].itemsize * self.shards)


@dataclass(frozen=True)
class Conversion:
    """What one conversion took.

    Attributes:
        seconds: wall-clock time.
        cpu_seconds: user and system time of all threads.
        peak_bytes: peak of resident memory, including torch's libraries.
        packed_bytes: size of the packed weights.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    packed_bytes: int


def make_source(source: Source, folder: Path) -> int:
    """Write the checkpoint; its weights are one random weight with its rows rotated.

    Returns:
        Bytes of all weights.
    """
    weight = make_weight(
        source.m, source.k, source.sparsity, "uniform", DTYPES[source.dtype], "cpu"
    )
    file_of = {}
    for shard in range(source.shards):
        first = shard * source.layers_of_shard
        names = {f"layers.{first + i}.weight": first + i for i in range(source.layers_of_shard)}
        file = f"model-{shard + 1:05}-of-{source.shards:05}.safetensors"
        save_file({name: weight.roll(i, 0) for name, i in names.items()}, folder / file)
        file_of.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return len(file_of) * weight.nbytes


def convert(source: Path, target: Path, workers: int, threads: int) -> Conversion:
    """Convert in a new process.

    Raises:
        RuntimeError: it failed, or did not pack every weight.
    """
    command = [sys.executable, "-c", CHILD, *map(str, (source, target, workers, threads))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the conversion failed: {done.stderr}")
    *numbers, packed = json.loads(done.stdout)
    if not packed:
        raise RuntimeError("a weight was not packed")
    return Conversion(*numbers)


def measure(source: Path, target: Path, workers: int, threads: int, runs: int) -> Conversion:
    """Convert several times; the run that took the least processor time counts."""
    found = []
    for _ in range(runs):
        for file in source.glob("*.safetensors"):
            read_once(file)
        found.append(convert(source, target, workers, threads))
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
    return min(found, key=lambda conversion: conversion.cpu_seconds)


def read_once(file: Path) -> None:
    """Read a file, so that it is in the page cache."""
    with file.open("rb", buffering=0) as opened:
        while opened.read(2**24):
            pass


def make_row(
    source: Source,
    nbytes: int,
    found: Conversion,
    workers: int,
    threads: int,
    runs: int,
    cpu: str,
    commit: str,
) -> dict[str, object]:
    """Return the JSON row of a measurement."""
    return {
        "bench": "convert",
        "cpu": cpu,
        "bytes": nbytes,
        "shards": source.shards,
        "M": source.m,
        "K": source.k,
        "sparsity": source.sparsity,
        "mask": "uniform",
        "dtype": source.dtype,
        "format": "row_bitmap",
        "workers": workers,
        "threads": threads,
        "runs": runs,
        "seconds": round(found.seconds, 3),
        "cpu_seconds": round(found.cpu_seconds, 3),
        "gb_s": float(f"{nbytes / found.seconds / 1e9:.4g}"),
        "gb_s_core": float(f"{nbytes / found.cpu_seconds / 1e9:.4g}"),
        "packed_bytes": found.packed_bytes,
        "peak_bytes": found.peak_bytes,
        "torch": str(torch.__version__),
        "commit": commit,
    }


HEADINGS = ("GB", "workers", "threads", "seconds", "GB/s", "GB/s per core", "peak GB", "of dense")


def table_line(row: dict[str, object]) -> tuple[str, ...]:
    """Return the cells of a row under :data:`HEADINGS`."""
    return (
        f"{row['bytes'] / 1e9:.2f}",
        str(row["workers"]),
        str(row["threads"]),
        f"{row['seconds']:.2f}",
        f"{row['gb_s']:.3g}",
        f"{row['gb_s_core']:.3g}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['packed_bytes'] / row['bytes']:.3f}",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of dense weights, 10^9 bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shape", nargs=2, type=int, default=[14336, 4096], metavar=("M", "K"))
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch per worker")
    parser.add_argument("--runs", type=int, default=3, help="the least CPU time counts")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    add_row_options(parser, "pack.jsonl")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "shards", "threads", "runs", "workers")
    if source_of(arguments).layers_of_shard < 1:
        parser.error("--gigabytes must be enough for a weight in each shard")
    return arguments


def source_of(arguments: argparse.Namespace) -> Source:
    """Return the checkpoint that a command line asks for."""
    return Source(
        int(arguments.gigabytes * 1e9),
        arguments.shards,
        *arguments.shape,
        arguments.sparsity,
        arguments.dtype,
    )


def rows_of(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Make the checkpoint and yield the row of each number of workers."""
    commit = commit_hash(arguments.commit)
    cpu = cpu_name()
    source = source_of(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder, target = Path(temporary, "dense"), Path(temporary, "packed")
        folder.mkdir()
        nbytes = make_source(source, folder)
        for workers in arguments.workers:
            found = measure(folder, target, workers, arguments.threads, arguments.runs)
            yield make_row(
                source, nbytes, found, workers, arguments.threads, arguments.runs, cpu, commit
            )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    lines = []
    for row in rows_of(arguments):
        lines.append(table_line(row))
        print(" ".join(lines[-1]), file=sys.stderr, flush=True)
        write_rows(arguments.out, [row])
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
