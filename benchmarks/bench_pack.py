"""Packing and unpacking, one JSON row per case. See README.md here.

    python benchmarks/bench_pack.py --shapes opt-30b.fc1 7168x7168 --sparsity 0.6 --format bitmap

Rows go to ``benchmarks/results/pack-<gpu>.jsonl`` unless ``--out`` says otherwise; a new row
replaces the old row of its case. With ``--device cpu`` the file has the name of the CPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from options import add_device_option, add_row_options, require_device, rows_file
from rows import commit_hash, cpu_name, gpu_name, print_table, write_rows
from torch import Tensor
from weights import (
    DTYPES,
    Weight,
    add_weight_options,
    make_weight,
    parse_with_weights,
    rotated,
    weights_of,
)

import flash_llm
from flash_llm.timing import REPLAYS, Timing, copies_to_rotate, time_cpu, time_cuda


@dataclass(frozen=True)
class Case:
    """One weight in one format."""

    weight: Weight
    format: str

    @property
    def dense_bytes(self) -> int:
        """Bytes that packing reads and unpacking writes."""
        return self.weight.m * self.weight.k * DTYPES[self.weight.dtype].itemsize


@dataclass(frozen=True)
class Measurement:
    """What was measured of a case.

    Attributes:
        pack: time of ``flash_llm.pack``, with its allocations and its wait for the device.
        unpack: time of ``flash_llm.unpack``.
        packed_bytes: bytes of the packed weight, header and offsets included.
    """

    pack: Timing
    unpack: Timing
    packed_bytes: int


def gigabytes_per_second(case: Case, timing: Timing) -> float:
    """Return dense bytes over time."""
    return case.dense_bytes / timing.us / 1e3


def pack_calls(dense: Sequence[Tensor], fmt: str) -> list[Callable[[], object]]:
    """Return calls that pack each copy and wait until the device is done."""

    def pack(weight: Tensor) -> None:
        flash_llm.pack(weight, fmt)
        if weight.is_cuda:
            torch.cuda.synchronize()

    return [lambda w=w: pack(w) for w in dense]


def measure(
    weight: Weight,
    formats: Sequence[str],
    device: str,
    replays: int = REPLAYS,
    real: Path | None = None,
) -> Iterator[tuple[Case, Measurement]]:
    """Check and time packing and unpacking a weight in each format.

    Args:
        weight: which weight.
        formats: names of the packed formats.
        device: ``"cuda"`` or ``"cpu"``.
        replays: timed turns; see :mod:`flash_llm.timing`.
        real: see :func:`weights.make_weight`.

    Raises:
        RuntimeError: unpacking does not give back what was packed.
    """
    dense = make_weight(
        weight.m, weight.k, weight.sparsity, weight.mask, DTYPES[weight.dtype], device, real
    )
    packed = {fmt: flash_llm.pack(dense, fmt) for fmt in formats}
    for fmt, w in packed.items():
        if not torch.equal(w.to_dense(), dense):
            raise RuntimeError(f"{weight} as {fmt}: unpacking does not give back what was packed")
    copies = [dense.clone() for _ in range(copies_to_rotate(dense.nbytes))]
    # Wall-clock time: packing waits for the device, so it cannot be captured in a graph.
    packing = time_cpu({fmt: pack_calls(copies, fmt) for fmt in formats}, replays=replays)
    time_calls = time_cuda if device == "cuda" else time_cpu
    unpacking = time_calls(
        {fmt: [lambda w=w: flash_llm.unpack(w) for w in rotated(packed[fmt])] for fmt in formats},
        replays=replays,
    )
    for fmt in formats:
        yield (
            Case(weight, fmt),
            Measurement(packing[fmt], unpacking[fmt], packed[fmt].nbytes),
        )


def make_row(
    case: Case, found: Measurement, gpu: str, device: str, commit: str
) -> dict[str, object]:
    """Return the JSON row of a measurement."""
    return {
        "bench": "pack",
        "gpu": gpu,
        "device": device,
        "M": case.weight.m,
        "K": case.weight.k,
        "sparsity": case.weight.sparsity,
        "mask": case.weight.mask,
        "dtype": case.weight.dtype,
        "format": case.format,
        "us": round(found.pack.us, 2),
        "gb_s": float(f"{gigabytes_per_second(case, found.pack):.4g}"),
        "unpack_us": round(found.unpack.us, 2),
        "packed_bytes": found.packed_bytes,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "commit": commit,
    }


HEADINGS = (
    *("M", "K", "sparsity", "mask", "dtype", "format", "us", "±%", "GB/s"),
    *("unpack us", "±%", "unpack GB/s", "of dense"),
)


def table_line(case: Case, found: Measurement) -> tuple[str, ...]:
    """Return the cells under :data:`HEADINGS`; ± is the spread of the turns."""
    weight = case.weight
    return (
        str(weight.m),
        str(weight.k),
        f"{weight.sparsity:g}",
        weight.mask,
        weight.dtype,
        case.format,
        f"{found.pack.us:.1f}",
        f"{50 * found.pack.spread:.1f}",
        f"{gigabytes_per_second(case, found.pack):.4g}",
        f"{found.unpack.us:.1f}",
        f"{50 * found.unpack.spread:.1f}",
        f"{gigabytes_per_second(case, found.unpack):.4g}",
        f"{found.packed_bytes / case.dense_bytes:.3f}",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_weight_options(parser)
    parser.add_argument("--format", nargs="+", default=["tiled_csl", "bitmap"], help="formats")
    add_device_option(parser)
    parser.add_argument("--replays", type=int, default=REPLAYS)
    add_row_options(parser, "pack-<gpu>.jsonl")
    arguments = parse_with_weights(parser, argv)
    require_device(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = parse_arguments(argv)
    device = arguments.device
    commit = commit_hash(arguments.commit)
    gpu = gpu_name(torch.cuda.get_device_name()) if device == "cuda" else cpu_name()
    lines = []
    with torch.inference_mode():
        for weight in weights_of(arguments):
            rows = []
            for case, found in measure(
                weight, arguments.format, device, arguments.replays, arguments.real
            ):
                lines.append(table_line(case, found))
                print(f"{case}: {found.pack.us:.1f} us", file=sys.stderr, flush=True)
                rows.append(make_row(case, found, gpu, device, commit))
            write_rows(rows_file(arguments.out, gpu), rows)  # an interrupted run keeps its rows
    print_table(HEADINGS, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
