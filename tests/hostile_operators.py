"""hostile_operators.py SECONDS [SEED]: throws hostile arguments at the operators on the CPU.

Each call begins with arguments that fit each other and damages up to three of them: dtypes, shapes,
strides, devices, headers, names, storages that are too small, noise in the buffers. Tensors end, or
begin, at a page that may not be touched, so that an access outside of them ends the process. A call
must return a result of the right shape, or raise one of ERRORS. The number of the call in work
stands in the file that HOSTILE_CALL names; `seed` and that number reproduce it.
"""

import collections
import contextlib
import ctypes
import mmap
import os
import random
import resource
import sys
import time

import torch

import flash_llm
from flash_llm import quantize, testing
from flash_llm.ops import ACTIVATIONS, STORED_VALUES

ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)
FORMATS = ("tiled_csl", "bitmap", "row_bitmap", "gather")  # that hold 16-bit values
ALL_FORMATS = (*FORMATS, "quantized_bitmap")
KINDS = STORED_VALUES[1:]  # of quantised values
CONFIGS = (
    *("auto", "auto", "dense", "cpu_reference", "cpu_tiles"),
    *("cpu_rows", "cpu_rows_int8x", "cpu_blocks"),
)
OPS = torch.ops.flash_llm
OTHER_OPS = (
    *("pack", "pack_quantized", "prune_pack"),
    *("slice", "unpack", "unpack_quantized", "validate"),
)
EXTREMES = (0, 1, -1, 2, 3, 7, 16, 127, 8192, 2**16, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1)
TEXTS = ("", "auto ", "AUTO", "relu\0", "é" * 100, "x" * 100_000, "dense", "bitmap", "2:4", "none")
SIZES = (0, 1, 2, 3, 5, 31, 32, 33, 64, 65, 127, 128, 129, 200, 260)

libc = ctypes.CDLL(None, use_errno=True)


def guarded(rng, tensor):
    """A copy of a contiguous tensor whose memory ends, or begins, at a page without access."""
    page, size = mmap.PAGESIZE, max(tensor.nbytes, 1)
    inner = -(-size // page) * page
    region = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for edge in (address, address + page + inner):
        assert libc.mprotect(ctypes.c_void_p(edge), page, mmap.PROT_READ & 0) == 0
    if tensor.numel() == 0:
        return tensor.clone()
    offset = page + (inner - size if rng.random() < 0.7 else 0)
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


def too_small(rng, tensor):
    tensor = tensor.clone()
    if tensor.is_sparse or tensor.is_meta:
        return tensor
    storage = tensor.untyped_storage()
    storage.resize_(rng.choice((0, storage.nbytes() // 2, max(storage.nbytes() - 1, 0))))
    return tensor


def noise(rng, tensor):
    """The tensor with random bits in some of its places."""
    flat = tensor.contiguous().view(-1).clone()
    for _ in range(rng.choice((1, 3, 50)) if flat.numel() else 0):
        value = rng.choice((*EXTREMES, rng.getrandbits(31))) & 0x7FFFFFFF
        flat.view(torch.uint8)[rng.randrange(flat.nbytes)] = value & 0xFF
        if flat.dtype == torch.int32:
            flat[rng.randrange(flat.numel())] = rng.choice((value, -value))
    return guarded(rng, flat.view(tensor.shape))


def overlapping(rng, tensor):
    if tensor.numel() < 2:
        return tensor
    return tensor.as_strided(tensor.shape, tuple(rng.choice((0, 1)) for _ in tensor.shape))


DAMAGES = {
    "dtype": lambda r, t: t.to(
        r.choice((torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64))
    ),
    "half of the other kind": lambda r, t: t.to(
        torch.float16 if t.dtype == torch.bfloat16 else torch.bfloat16
    ),
    "int16": lambda r, t: t.to(torch.int16),
    "scalar": lambda r, t: t.new_zeros(()),
    "empty": lambda r, t: t.new_empty(0),
    "one more dimension": lambda r, t: t.unsqueeze(r.choice((0, -1))),
    "flat": lambda r, t: t.reshape(-1),
    "shorter": lambda r, t: t[..., 1:] if t.dim() else t,
    "longer": lambda r, t: torch.cat((t, t), -1) if t.dim() else t,
    "every second": lambda r, t: torch.stack((t, t), -1)[..., 0],
    "transposed": lambda r, t: t.t().contiguous().t() if t.dim() == 2 else t,
    "expanded": lambda r, t: t[:1].expand(max(len(t), 3), *t.shape[1:]) if t.dim() else t,
    "many": lambda r, t: t[:1].expand(r.choice((2**31, 2**40)), *t.shape[1:]) if t.dim() else t,
    "overlapping": overlapping,
    "shifted": lambda r, t: (
        torch.cat((t.reshape(-1)[:1], t.reshape(-1)))[1:].view(t.shape) if t.numel() else t
    ),
    "storage too small": too_small,
    "noise": noise,
    "NaN": lambda r, t: t.new_full(t.shape, float("nan")) if t.is_floating_point() else t,
    "infinite": lambda r, t: t.new_full(t.shape, float("-inf")) if t.is_floating_point() else t,
    "negative view": lambda r, t: torch._neg_view(t),
    "meta": lambda r, t: t.to("meta"),
    "sparse": lambda r, t: t.to_sparse(),
    "parameter": lambda r, t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "efficient zero": lambda r, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "another": lambda r, t: torch.zeros(r.choice(SIZES), r.choice(SIZES), dtype=t.dtype),
}

# torch itself would crash, or copy for hours, if it were to damage these once more.
LAST_DAMAGES = ("storage too small", "many")


class Caller:
    """Makes one call of each number."""

    def __init__(self, seed):
        self.seed = seed
        self.weights = [
            (flash_llm.pack(dense, name), dense)
            for name in FORMATS
            for dtype in (torch.float16, torch.bfloat16)
            for m, k in ((1, 1), (5, 33), (37, 200), (130, 70), (66, 260), (0, 5), (5, 0))
            for dense in (testing.random_sparse(m, k, 0.6, dtype=dtype),)
        ]
        self.weights += [
            (flash_llm.pack(dense, name, values=values), dense)
            for w, dense in self.weights
            if w.FORMAT == "row_bitmap"
            for name in ("row_bitmap", "quantized_bitmap")
            for values in KINDS
        ]
        self.outcomes = collections.Counter()
        self.damages = collections.Counter()

    def call(self, number):
        rng = random.Random(self.seed * 1_000_003 + number)
        name = rng.choice(("spmm", "spmm", "spmm", *OTHER_OPS))
        w, dense = rng.choice(self.weights)
        arguments = self.arguments(rng, name, w, dense)
        self.spoiled = set()
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            self.damage(rng, arguments)
        try:
            result = self.run(rng, name, arguments)
        except ERRORS as error:
            assert "INTERNAL ASSERT" not in str(error), error
            self.outcomes[f"{name}: {type(error).__name__}"] += 1
        else:
            self.check(name, arguments, result)
            self.outcomes[f"{name}: result"] += 1

    @staticmethod
    def arguments(rng, name, w, dense):
        packed = {
            "header": list(w.header),
            "offsets": guarded(rng, w.offsets),
            "payload": guarded(rng, w.payload),
        }
        if name in ("unpack", "unpack_quantized", "validate"):
            return packed
        if name == "slice":
            bounds = {}
            for edge, size, begins in (("row", w.header.m, SIZES), ("col", w.header.k, (0, 128))):
                first = min(rng.choice(begins), size)
                bounds[f"first_{edge}"] = first
                bounds[f"last_{edge}"] = rng.randint(first, size)
            return packed | bounds
        if name == "pack_quantized":
            values, scales = quantize.round_to_values(dense, rng.choice(KINDS))
            return {
                "values": guarded(rng, values),
                "scales": guarded(rng, scales),
                "dtype": w.dtype,
                "format": rng.choice(("auto", *ALL_FORMATS)),
            }
        if name == "pack":
            return {"dense": guarded(rng, dense), "format": rng.choice(("auto", *ALL_FORMATS))}
        if name == "prune_pack":
            return {
                "dense": guarded(rng, dense),
                "sparsity": rng.choice((0.0, 0.5, 1.0)),
                "scope": rng.choice(("row", "layer")),
                "format": rng.choice(("auto", *ALL_FORMATS)),
            }
        x = testing.small_integers(rng.choice((0, 1, 2, 9, 17)), w.header.k, dtype=w.dtype)
        bias = testing.small_integers(w.header.m, dtype=w.dtype)
        return {
            "x": guarded(rng, x),
            **packed,
            "bias": guarded(rng, bias) if rng.random() < 0.5 else None,
            "activation": rng.choice(ACTIVATIONS),
            "config": rng.choice(CONFIGS),
            "ctas": 0,
            "prefetch": True,
            "x_quantization": rng.choice(("none", "none", "dynamic")),
        }

    def damage(self, rng, arguments):
        name = rng.choice(list(arguments))
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            if name in self.spoiled:
                return
            kind = rng.choice(list(DAMAGES))
            try:
                arguments[name] = DAMAGES[kind](rng, value)
            except (RuntimeError, NotImplementedError, TypeError):
                return  # one that an earlier damage rules out
            self.damages[f"tensor: {kind}"] += 1
            if kind in LAST_DAMAGES:
                self.spoiled.add(name)
            return
        if isinstance(value, list):
            field = rng.randrange(len(value))
            near = (value[field] + 1, value[field] - 1)
            value[field] = rng.choice((*EXTREMES, *near))
            if rng.random() < 0.05:
                del value[field]
        elif isinstance(value, str):
            arguments[name] = rng.choice(TEXTS)
        elif isinstance(value, torch.dtype):  # torch itself crashes at an integer that is none
            arguments[name] = rng.choice((torch.float32, torch.int8, torch.bool, 0.5, "text", None))
        elif isinstance(value, float):
            arguments[name] = rng.choice((float("nan"), float("inf"), -0.1, 1.1, 1e-300, None))
        else:
            arguments[name] = rng.choice((*EXTREMES, 0.5, "text", None))
        self.damages[f"argument: {type(value).__name__}"] += 1

    @staticmethod
    def run(rng, name, arguments):
        with torch.set_grad_enabled(rng.random() < 0.3):
            result = getattr(OPS, name)(**arguments)
            if isinstance(result, torch.Tensor) and result.requires_grad:
                result.sum().backward()
        return result

    @staticmethod
    def check(name, arguments, result):
        if name in ("pack", "pack_quantized", "prune_pack"):
            header, offsets, payload = result
            if not payload.is_meta:
                OPS.validate(header.tolist(), offsets, payload)
        elif name == "slice":
            header, offsets, payload = result
            edges = ("row", "col")
            sizes = [arguments[f"last_{edge}"] - arguments[f"first_{edge}"] for edge in edges]
            assert header.tolist()[4:6] == sizes, (header, sizes)
        elif name == "unpack":
            assert list(result.shape) == arguments["header"][4:6], result.shape
        elif name == "unpack_quantized":
            values, scales = result
            m, k = arguments["header"][4:6]
            assert values.shape == (m, k) and scales.shape in ((m,), (m, -(-k // quantize.GROUP)))
        elif name == "spmm":
            expected = (*arguments["x"].shape[:-1], arguments["header"][4])
            assert tuple(result.shape) == expected, (result.shape, expected)


def main():
    """Call until the time is over, then print how often each damage and each outcome came."""
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    # An argument that asks for more, such as an expanded one, gets an error of torch.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # on a busy machine two wait for each other
    caller, number = Caller(seed), 0
    for device in ("meta", "cpu"):  # loads torch's tracing, which takes seconds
        with contextlib.suppress(TypeError):
            w = caller.weights[0][0]
            OPS.unpack(list(w.header), w.offsets.to(device), w.payload.to("meta"))
    start = time.monotonic()
    record = os.open(os.environ["HOSTILE_CALL"], os.O_WRONLY | os.O_CREAT)
    while time.monotonic() - start < seconds:
        os.pwrite(record, f"seed {seed} call {number:10d}\n".encode(), 0)
        caller.call(number)
        number += 1
    for counts in (caller.damages, caller.outcomes):
        for what, count in sorted(counts.items()):
            print(f"{count:8d} {what}")
    print(f"hostile_operators: seed {seed}, {number} calls in {seconds:.0f} s, no crash")


if __name__ == "__main__":
    main()
