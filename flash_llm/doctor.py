"""``flash-llm doctor``: what is installed and built, and whether all operators work."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from flash_llm import _extension, ops, quantize
from flash_llm.formats.bitmap import Bitmap
from flash_llm.formats.gather import Gather
from flash_llm.formats.quantized_bitmap import QuantizedBitmap
from flash_llm.formats.row_bitmap import RowBitmap
from flash_llm.formats.tiled_csl import TiledCSL
from flash_llm.prune.calibrate import prune_
from flash_llm.prune.methods import METHODS
from flash_llm.report_base import Report


@dataclasses.dataclass(frozen=True)
class Check:
    """One self-test.

    Attributes:
        name: of the operator and the format, or of the pruning method.
        device: where the test ran.
        ok: whether the test passed.
        detail: why it failed; "" if it passed.
    """

    name: str
    device: str
    ok: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Diagnosis(Report):
    """All information that a bug report needs.

    Attributes:
        facts: values by name, in the order to print.
        checks: the self-tests.
    """

    facts: dict[str, str]
    checks: tuple[Check, ...]

    IN_JSON: ClassVar[tuple[str, ...]] = ("ok",)

    @property
    def ok(self) -> bool:
        """Whether every self-test passed."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        lines.append("")
        for check in self.checks:
            line = f"{'ok  ' if check.ok else 'FAIL'}  {check.device:<6}  {check.name}"
            lines.append(line if check.ok else f"{line}: {check.detail}")
        failed = sum(not check.ok for check in self.checks)
        lines.append("")
        lines.append(
            f"All {len(self.checks)} checks passed."
            if self.ok
            else f"{failed} of {len(self.checks)} checks failed."
        )
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Collect facts and run a small self-test of every operator, format and pruning method.

    Returns:
        The diagnosis. No errors are raised: a failing test or a missing extension is a failed
        check. All devices are tested; without a GPU or without a CUDA part of flash_llm, only the
        CPU.
    """
    devices = ["cpu"]
    if _extension.available() and _extension.require().build_info()["cuda"]:
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    checks = [_run("extension loads", "-", _test_extension)]
    if checks[0].ok:
        checks += [_run(name, device, test) for device in devices for name, test in _TESTS.items()]
    return Diagnosis(_facts(), tuple(checks))


def _facts() -> dict[str, str]:
    facts = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} CPU threads",
        "torch's CUDA": torch.version.cuda or "none, this torch is for the CPU",
        "CUDA toolkit": _nvcc_version(),
        "CUDA driver": _driver_version(),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 1e9:.0f} GB"
        )
    if torch.cuda.device_count() == 0:
        facts["GPU"] = "none that torch can see"
    facts["flash_llm"] = str(Path(__file__).parent)
    if _extension.available():
        for key, value in _extension.require().build_info().items():
            if value not in ("", None):
                facts[f"built: {key}"] = str(value)
        facts["CPU kernels"] = _cpu_kernels()
    return facts


def _cpu_kernels() -> str:
    extension = _extension.require()
    known = ", ".join(extension.cpu_isas())
    try:
        return f"{extension.cpu_isa()} (this CPU has {known})"
    except (ValueError, NotImplementedError) as error:
        return f"none: {error} (this CPU has {known})"


def _nvcc_version() -> str:
    """Return the toolkit that a build would use: CUDA_HOME, nvcc on PATH, or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    nvcc = next((path for path in candidates if path), None)
    if nvcc is None:
        return "no nvcc found (CUDA_HOME, PATH, /usr/local/cuda); a build here has no CUDA part"
    release = re.search(r"release ([0-9.]+)", _output_of([nvcc, "--version"]))
    return f"{release[1] if release else 'unknown version'} ({nvcc})"


def _driver_version() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "no nvidia-smi found"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output_of(query).splitlines() or ["nvidia-smi does not answer"])[0]


def _output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _run(name: str, device: str, test: Callable[[str], None]) -> Check:
    try:
        test(device)
    except Exception as error:
        return Check(name, device, False, f"{type(error).__name__}: {error}")
    return Check(name, device, True, "")


def _weight(device: str) -> Tensor:
    """Return a weight of odd sizes with 3 of 4 elements zero; small integers, so sums are exact."""
    row = torch.arange(130)[:, None]
    col = torch.arange(70)[None, :]
    values = (row * 7 + col * 3) % 9 - 4
    return (values * ((row + col) % 4 == 0)).to(torch.bfloat16).to(device)


def _expect(same: bool, what: str) -> None:
    if not same:
        raise AssertionError(what)


def _test_extension(_: str) -> None:
    _extension.require()


def _test_pack(format: str, device: str) -> None:
    weight = _weight(device)
    packed = ops.pack(weight, format)
    _expect(packed.nnz == int((weight != 0).sum()), f"pack stored {packed.nnz} values")
    _expect(packed.shape == weight.shape, f"pack stored a shape of {packed.shape}")


def _test_unpack(format: str, device: str) -> None:
    weight = _weight(device)
    _expect(torch.equal(ops.unpack(ops.pack(weight, format)), weight), "unpack(pack(w)) is not w")


def _test_validate(format: str, device: str) -> None:
    packed = ops.pack(_weight(device), format)
    packed.validate()
    broken = dataclasses.replace(packed, offsets=packed.offsets.flip(0))
    try:
        broken.validate()
    except ValueError:
        return
    raise AssertionError("validate accepted offsets in reverse")


def _test_prune_pack(format: str, device: str) -> None:
    dense = torch.arange(1, 257).reshape(2, 128).to(torch.bfloat16).to(device)
    kept = ops.unpack(ops.prune_pack(dense, 0.75, format=format))
    expected = torch.where(torch.arange(128, device=device) >= 96, dense, torch.zeros_like(dense))
    _expect(torch.equal(kept, expected), "prune_pack kept other values than the largest")


def _test_spmm(format: str, device: str) -> None:
    weight = _weight(device)
    packed = ops.pack(weight, format)
    for num_tokens in (1, 33, 100):
        x = (torch.arange(num_tokens * 70).reshape(num_tokens, 70) % 5 - 2).to(weight)
        bias = (torch.arange(130) % 3).to(weight)
        result = ops.spmm(x, packed, bias, activation="relu")
        exact = (x.double().cpu() @ weight.double().cpu().T + bias.double().cpu()).relu()
        _expect(
            torch.equal(result.cpu(), exact.to(torch.bfloat16)),
            f"spmm of {num_tokens} tokens differs from the exact result",
        )


def _test_prune(method: str, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 16)
    model = nn.Sequential(nn.Embedding(64, 32), linear)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model.to(device)
    prune_(model, method=method, sparsity=0.75, calibration=torch.arange(64).view(4, 16))
    zeros = linear.weight.eq(0).sum(dim=1).tolist()
    _expect(zeros == [24] * 16, f"rows of 32 have {zeros} zeros, not 24 each")


def _test_count_stored(format: str, device: str) -> None:
    packed = ops.pack(_weight(device), format)
    counted = torch.ops.flash_llm.count_stored(list(packed.header), packed.offsets, packed.payload)
    _expect(counted == packed.nnz, f"count_stored found {counted} of {packed.nnz} values")


def _test_slice(format: str, device: str) -> None:
    weight = _weight(device)
    part = ops.pack(weight, format).slice(slice(4, 128), slice(3, 70))
    _expect(torch.equal(part.to_dense(), weight[4:128, 3:70]), "slice gave another part")


def _test_concat(format: str, device: str) -> None:
    weight = _weight(device)
    parts = [ops.pack(part, format) for part in (weight[:128], weight[128:])]
    _expect(torch.equal(ops.PackedWeight.concat(parts).to_dense(), weight), "concat lost rows")


def _quantized(kind: str, device: str) -> tuple[Tensor, Tensor]:
    grid, (rows, columns) = quantize.GRIDS[kind], (40, 300)
    largest = 16 if grid.is_float else int(grid.largest)  # e4m3 has all integers up to 16
    steps = torch.arange(rows * columns).reshape(rows, columns) % (2 * largest + 1) - largest
    shape = quantize.scales_shape(rows, columns, kind)
    scales = 2.0 ** torch.arange(math.prod(shape)).remainder(3).reshape(shape)
    return steps.to(quantize.stored_dtype(kind)).to(device), scales.to(device)


def _test_pack_quantized(kind: str, format: str, device: str) -> None:
    values, scales = _quantized(kind, device)
    packed = ops.pack_quantized(values, scales, torch.bfloat16, format)
    expected = quantize.dequantize(values, scales, torch.bfloat16)
    _expect(torch.equal(ops.unpack(packed), expected), "unpack(pack_quantized(v)) is not v")
    x = (torch.arange(9 * 300).reshape(9, 300) % 5 - 2).to(torch.bfloat16)
    result = ops.spmm(x.to(device), packed).double().cpu()
    exact = x.double() @ expected.double().cpu().T
    _expect(torch.equal(result, exact.bfloat16().double()), "spmm differs from the exact result")


def _test_unpack_quantized(kind: str, format: str, device: str) -> None:
    values, scales = _quantized(kind, device)
    found = ops.unpack_quantized(ops.pack_quantized(values, scales, torch.float16, format))
    same = torch.equal(found[0].float(), values.float()) and torch.equal(found[1], scales)
    _expect(same, "unpack_quantized changed values or scales")


_QUANTIZED_TESTS = {
    "pack_quantized": _test_pack_quantized,
    "unpack_quantized": _test_unpack_quantized,
}
_FORMAT_TESTS = {
    "pack": _test_pack,
    "count_stored": _test_count_stored,
    "slice": _test_slice,
    "concat": _test_concat,
    "unpack": _test_unpack,
    "validate": _test_validate,
    "prune_pack": _test_prune_pack,
    "spmm": _test_spmm,
}
_TESTS: dict[str, Callable[[str], None]] = {
    **{
        f"{cls.FORMAT}: {name}": functools.partial(test, cls.FORMAT)
        for cls in (TiledCSL, Bitmap, RowBitmap, Gather)
        for name, test in _FORMAT_TESTS.items()
    },
    **{
        f"{cls.FORMAT}: {name}, {kind}": functools.partial(test, kind, cls.FORMAT)
        for cls in (RowBitmap, QuantizedBitmap)
        for kind in ops.STORED_VALUES[1:]
        for name, test in _QUANTIZED_TESTS.items()
    },
    **{f"prune_: {method}": functools.partial(_test_prune, method) for method in METHODS},
}
