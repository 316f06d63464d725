"""Every documented error: its type, and a message that names operator, argument and values.

The tests look for those names and values, not for the words between them.
"""

import re

import numpy as np
import pytest
import torch
from formats import ALL_FORMATS, FORMATS, blocks_of, each, other_format, plan_names, runs_here
from torch import nn

import flash_llm
from flash_llm import SparseLinear, TiledCSL, _extension, testing
from flash_llm.ops import PackedHeader, PackedWeight, value_type_of


def good(device, format="tiled_csl"):
    """A packed weight, and an input and bias that fit it."""
    w = flash_llm.pack(testing.random_sparse(130, 70, device=device), format)
    x = torch.ones(5, 70, dtype=torch.float16, device=device)
    return w, x, torch.zeros(130, dtype=torch.float16, device=device)


def raises(error, *parts):
    """Expect one exception whose message holds all parts, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


def changed(w, **fields):
    """The weight with fields of its header, or its buffers, replaced."""
    offsets, payload = fields.pop("offsets", w.offsets), fields.pop("payload", w.payload)
    return type(w)(w.header._replace(**fields), offsets, payload)


# ---- spmm ----


@each(
    ("call", "error", "parts"),
    [
        (
            lambda w, x, b: flash_llm.spmm(x[:, 1:], w),
            ValueError,
            ("x.size(-1)", "K=70", "69"),
        ),
        (lambda w, x, b: flash_llm.spmm(x[0, 0], w), ValueError, ("x ",)),
        (
            lambda w, x, b: flash_llm.spmm(x.float(), w),
            TypeError,
            ("x ", "Half", "Float"),
        ),
        (
            lambda w, x, b: flash_llm.spmm(x.bfloat16(), w),
            TypeError,
            ("x ", "Half", "BFloat16"),
        ),
        (lambda w, x, b: flash_llm.spmm(x.int(), w), TypeError, ("x ", "Half", "Int")),
        (
            lambda w, x, b: flash_llm.spmm(x, w, b[1:]),
            ValueError,
            ("bias ", "[M=130]", "129"),
        ),
        (
            lambda w, x, b: flash_llm.spmm(x, w, b.view(1, -1)),
            ValueError,
            ("bias ", "[M=130]", "[1, 130]"),
        ),
        (
            lambda w, x, b: flash_llm.spmm(x, w, b.float()),
            TypeError,
            ("bias ", "Half", "Float"),
        ),
        (
            lambda w, x, b: flash_llm.spmm(x, w, activation="tanh"),
            ValueError,
            ("activation ", "tanh"),
        ),
        (
            lambda w, x, b: flash_llm.spmm(x, w, activation=""),
            ValueError,
            ("activation ",),
        ),
        (
            lambda w, x, b: flash_llm.spmm(x, w, config="fast"),
            ValueError,
            ("config ", "fast"),
        ),
        (lambda w, x, b: flash_llm.spmm(x, w, ctas=-1), ValueError, ("ctas ", "-1")),
        (
            lambda w, x, b: flash_llm.spmm(x, w, ctas=1 << 40),
            ValueError,
            ("ctas ", str(1 << 40)),
        ),
    ],
)
def test_spmm_arguments(call, error, parts, format, device):
    w, x, bias = good(device, format)
    with raises(error, "flash_llm::spmm: ", *parts):
        call(w, x, bias)


@each(
    ("call", "parts"),
    [
        (lambda w, x: flash_llm.spmm(x.tolist(), w), ("spmm: x ", "list")),
        (lambda w, x: flash_llm.spmm(x.numpy(), w), ("spmm: x ", "ndarray")),
        (lambda w, x: flash_llm.spmm(x, w, 0.5), ("spmm: bias ", "float")),
        (lambda w, x: flash_llm.spmm(x, w.to_dense()), ("spmm: w ", "Tensor")),
        (lambda w, x: flash_llm.unpack(x), ("unpack: w ", "Tensor")),
        (lambda w, x: flash_llm.ops.validate(x), ("validate: w ", "Tensor")),
        (lambda w, x: flash_llm.pack([[1.0]]), ("pack: dense ", "list")),
        (lambda w, x: flash_llm.pack(w), ("pack: dense ", "TiledCSL")),
        (lambda w, x: flash_llm.prune_pack(None, 0.5), ("prune_pack: dense ", "NoneType")),
    ],
)
def test_objects_that_are_no_tensors(call, parts):
    w, x, _ = good("cpu")
    with raises(TypeError, "flash_llm::", *parts):
        call(w, x)


@each("left", ["nothing", "all but a byte", "all but a byte of a view"])
@each(
    ("op", "argument"),
    [
        *(("spmm", "x"), ("spmm", "bias"), ("spmm", "offsets"), ("spmm", "payload")),
        *(("unpack", "offsets"), ("unpack", "payload"), ("validate", "payload")),
        *(("pack", "dense"), ("prune_pack", "dense")),
    ],
)
def test_a_storage_smaller_than_its_tensor_is_no_segfault(op, argument, left, format, device):
    w, x, bias = good(device, format)
    packed = {"header": list(w.header), "offsets": w.offsets, "payload": w.payload}
    arguments = {
        "spmm": {"x": x, **packed, "bias": bias},
        "unpack": packed,
        "validate": packed,
        "pack": {"dense": w.to_dense(), "format": format},
        "prune_pack": {"dense": w.to_dense(), "sparsity": 0.5, "format": format},
    }[op]
    tensor = arguments[argument].clone()
    needed = tensor.nbytes
    if left == "all but a byte of a view":
        tensor = torch.stack((tensor, tensor), -1)[..., 0]
        needed += needed - tensor.itemsize
    # What UntypedStorage.resize_ takes away its tensors do not notice.
    tensor.untyped_storage().resize_(0 if left == "nothing" else needed - 1)
    arguments[argument] = tensor
    with raises(ValueError, f"flash_llm::{op}: {argument} ", str(needed)):
        getattr(torch.ops.flash_llm, op)(**arguments)


@each("nbytes", [0, 63])
def test_a_header_beyond_its_storage_is_refused(nbytes):
    w, _, _ = good("cpu")
    header = w.header.to_tensor()
    header.untyped_storage().resize_(nbytes)
    with raises(ValueError, "header ", "64", str(nbytes)):
        TiledCSL.from_tensors(header, w.offsets, w.payload)


def test_a_storage_that_was_given_back_is_used_again(format, device):
    """Sharded training frees weights between their uses; a tensor without elements needs none."""
    w, x, bias = good(device, format)
    expected = flash_llm.spmm(x, w, bias)
    bytes_of_x = x.untyped_storage().nbytes()
    x.untyped_storage().resize_(0)
    assert flash_llm.spmm(x[:0], w, bias).shape == (0, 130)
    x.untyped_storage().resize_(bytes_of_x)
    x.fill_(1)
    assert torch.equal(flash_llm.spmm(x, w, bias), expected)


@each("tokens", [2**31, 2**40])
def test_more_tokens_than_31_bits_count(tokens, format, device):
    w, x, _ = good(device, format)
    with raises(ValueError, "flash_llm::spmm: ", f"N={tokens}"):
        flash_llm.spmm(x[:1].expand(tokens, -1), w)


def test_kernels_of_the_other_device_are_refused(format, device):
    w, x, _ = good(device, format)
    here = "CUDA" if device == "cuda" else "CPU"
    for other in set(plan_names(format, "cpu" if device == "cuda" else "cuda")) - {"dense"}:
        with raises(ValueError, "flash_llm::spmm: config ", here, f'"{other}"'):
            flash_llm.spmm(x, w, config=other)


def test_kernels_of_the_other_format_are_refused_with_the_names_of_this_one(format, device):
    w, x, _ = good(device, format)
    names = plan_names(format, device)
    others = [n for n in plan_names(other_format(format), device) if n not in names]
    assert others or (format != "bitmap" and device == "cpu")  # bitmap has no kernel of its own
    known = [f'"{name}"' for name in names]
    for config in others:
        parts = (*known, f'"{format}"', f'"{config}"')
        with raises(ValueError, "flash_llm::spmm: config ", *parts):
            flash_llm.spmm(x, w, config=config)


@pytest.mark.gpu
def test_bitmap_kernels_of_other_gpus_are_refused():
    w, x, _ = good("cuda", "bitmap")
    for config in plan_names("bitmap", "cuda"):
        if runs_here("bitmap", "cuda", config):
            assert flash_llm.spmm(x, w, config=config).shape == (5, 130)
            continue
        parts = (f'config "{config}"', "needs", "this GPU has")
        with raises(NotImplementedError, "flash_llm::spmm: ", *parts):
            flash_llm.spmm(x, w, config=config)


def test_fp32_message_names_the_cast():
    with raises(TypeError, "flash_llm::pack: dense ", "Float", ".to(torch.bfloat16)"):
        TiledCSL.from_dense(torch.zeros(3, 3))
    with raises(TypeError, "flash_llm::prune_pack: dense ", "Float", ".to(torch.bfloat16)"):
        flash_llm.prune_pack(torch.zeros(3, 3), 0.5)


@pytest.mark.gpu
@each("where", ["x", "weight", "bias", "offsets"])
def test_mixed_devices(where, format):
    w, x, bias = good("cuda", format)
    if where == "x":
        x = x.cpu()
    elif where == "weight":
        w = w.to("cpu")
    elif where == "bias":
        bias = bias.cpu()
    else:
        w = changed(w, offsets=w.offsets.cpu())
    with raises(TypeError, "flash_llm::spmm: ", "cuda:0"):
        flash_llm.spmm(x, w, bias)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_graph_of_one_device_refuses_inputs_on_another(format):
    w, x, bias = good("cuda:1", format)
    flash_llm.spmm(x, w, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda:0")  # torch warns of graphs that are empty
        with raises(ValueError, "x ", "cuda:1", "cuda:0"):
            flash_llm.spmm(x, w, bias)


# ---- the packed weight, at every operator that takes one ----

OPERATORS = {
    "spmm": lambda w, x: flash_llm.spmm(x, w),
    "unpack": lambda w, x: w.to_dense(),
    "validate": lambda w, x: w.validate(),
}

MALFORMED = {
    "magic": (lambda w: changed(w, magic=7), ValueError, ("magic", "7")),
    "newer version": (
        lambda w: changed(w, version=w.header.version + 1),
        NotImplementedError,
        ("version ",),
    ),
    "version zero": (
        lambda w: changed(w, version=0),
        NotImplementedError,
        ("version 0",),
    ),
    "format": (
        lambda w: changed(w, format=9),
        NotImplementedError,
        ("format 9", "1 (tiled_csl)", "2 (bitmap)", "3 (row_bitmap)"),
    ),
    "the other format": (
        lambda w: changed(w, format=1 if w.header.format != 1 else 2, version=1),
        ValueError,
        ("offsets ",),
    ),
    "value type": (lambda w: changed(w, value_type=99), TypeError, ("value type 99",)),
    "negative m": (lambda w: changed(w, m=-1), ValueError, ("m ", "-1")),
    "negative nnz": (lambda w: changed(w, nnz=-1), ValueError, ("nnz ", "-1")),
    "huge k": (lambda w: changed(w, k=1 << 31), ValueError, ("k ", str(1 << 31))),
    "huge m and k": (
        lambda w: changed(w, m=2**31 - 1, k=2**31 - 1),
        ValueError,
        ("offsets ",),
    ),
    "nnz above payload": (
        lambda w: changed(w, nnz=2 * w.header.payload_words + 1),
        ValueError,
        ("nnz = ",),
    ),
    "short offsets": (
        lambda w: changed(w, offsets=w.offsets[:-1]),
        ValueError,
        ("offsets ", "130x70"),
    ),
    "long payload": (
        lambda w: changed(w, payload=torch.cat([w.payload, w.payload[:16]])),
        ValueError,
        ("payload ",),
    ),
    "half a unit": (
        lambda w: changed(
            w, payload=w.payload[:-1], payload_words=w.header.payload_words - 1, nnz=w.nnz - 1
        ),
        ValueError,
        ("payload ",),
    ),
    "int64 offsets": (
        lambda w: changed(w, offsets=w.offsets.long()),
        TypeError,
        ("offsets ", "int32", "Long"),
    ),
    "float payload": (
        lambda w: changed(w, payload=w.payload.float()),
        TypeError,
        ("payload ", "int32", "Float"),
    ),
    "two-dimensional": (
        lambda w: changed(w, payload=w.payload.view(-1, 4)),
        ValueError,
        ("payload ", "2"),
    ),
}


@each("op", OPERATORS)
@each("case", MALFORMED)
def test_malformed_weights_are_refused_by_every_operator(op, case, format, device):
    change, error, parts = MALFORMED[case]
    w, x, _ = good(device, format)
    with raises(error, f"flash_llm::{op}: ", *parts):
        OPERATORS[op](change(w), x)


@each("op", OPERATORS)
@each(
    ("format", "changes", "parts"),
    [
        ("tiled_csl", {"nnz": 0}, ("nnz = 0",)),
        # More chunks' worth of payload than there are chunks; 137 units are a full one.
        ("bitmap", {"payload_words": 16 * (5 * 137 + 2), "nnz": 1}, ("nnz = 1", "5 chunks")),
        ("bitmap", {"payload_words": 16 * 11, "nnz": 11 * 32 + 1}, ("nnz = 353", "176 words")),
        ("row_bitmap", {"payload_words": 400, "nnz": 801}, ("nnz = 801", "400 words", "33 blocks")),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(op, format, changes, parts, device):
    w, x, _ = good(device, format)
    words = changes.get("payload_words", w.header.payload_words)
    broken = changed(w, **changes, payload=w.payload.new_zeros(words))
    with raises(ValueError, f"flash_llm::{op}: header ", *parts):
        OPERATORS[op](broken, x)


def test_offsets_are_counted_in_the_tiles_of_the_format(device):
    for format, count in (("tiled_csl", 5), ("bitmap", 6), ("row_bitmap", 34)):
        w, _, _ = good(device, format)
        with raises(ValueError, "offsets ", str(count), str(count - 1)):
            changed(w, offsets=w.offsets[1:]).validate()


def set_word(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def word(position, value):
    return position << 16 | value


# Contents that only the check in depth reads. The weight is 130 x 70: tile 3 has 2 rows, 6 columns.
CONTENTS = {
    "first offset": (
        lambda w: changed(w, offsets=w.offsets + 1),
        ("offsets[0] ", "1"),
    ),
    "decreasing": (
        lambda w: changed(w, offsets=set_word(w.offsets, 2, 0)),
        ("offsets[2] ",),
    ),
    "overfull tile": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, 2049)),
        ("tile 0 ", "2049"),
    ),
    "past the end": (
        lambda w: changed(w, offsets=set_word(w.offsets, 4, int(w.offsets[4]) + 1)),
        ("offsets ",),
    ),
    "position outside the tile": (
        lambda w: changed(w, payload=set_word(w.payload, 0, word(8192, 1))),
        ("tile 0: ", "8192"),
    ),
    "position outside the matrix": (
        lambda w: changed(w, payload=set_word(w.payload, -1, word(64 * 100, 1))),
        ("tile 3: ", "6400"),
    ),
    "duplicate": (
        lambda w: changed(w, payload=set_word(w.payload, slice(0, 2), word(320, 1))),
        ("tile 0: ", "320"),
    ),
    "negative zero": (
        lambda w: changed(w, payload=set_word(w.payload, 0, int(w.payload[0]) & ~0xFFFF | 0x8000)),
        ("tile 0: ", "-0"),
    ),
    "too much padding": (
        lambda w: changed(w, payload=set_word(w.payload, slice(0, 4), w.payload[:4] & ~0xFFFF)),
        ("tile 0: ", "3"),
    ),
    "wrong count": (lambda w: changed(w, nnz=w.nnz - 1), ("nnz = ",)),
}


def edited(w, chunk, edit):
    """The bitmap weight after edit(values, bits, down_offsets), which may write to one chunk's."""
    payload = w.payload.cpu().clone()
    first, last = (64 * int(offset) for offset in w.offsets[chunk : chunk + 2])
    data = payload.numpy().view(np.uint8)[first:last]
    values = data[: len(data) - 576].view(np.uint16).reshape(-1, 32, 2)
    bits = data[len(data) - 576 : len(data) - 64].view(np.uint32).reshape(32, 2, 2)
    edit(values, bits, data[len(data) - 64 :].reshape(32, 2))
    return changed(w, payload=payload.to(w.device))


def assign(array, index, value):
    array[index] = value


def share_a_column(values, bits, down_offsets):
    """Gives two lanes the same column."""
    down_offsets[0, 0] = down_offsets[1, 0]


def grow_runs(values, bits, down_offsets):
    bits[:] = 0xFFFFFFFF


def move_below_the_matrix(values, bits, down_offsets):
    """Sets bit 8 j + q with j = 2, row 8, instead of j = 0, row 0, of a lane."""
    lane, half, strip = np.argwhere(bits & 1)[0]
    bits[lane, half, strip] += (1 << 16) - 1


def fill_padding(values, bits, down_offsets):
    first = np.argwhere(values == 0)[0]
    values[tuple(first)] = 0x3C00


# The same for a bitmap of one column of 5 chunks, of which the last has 2 rows.
BITMAP_CONTENTS = {
    "first offset": (
        lambda w: changed(w, offsets=w.offsets + 1),
        ("offsets[0] ", "1"),
    ),
    "decreasing": (
        lambda w: changed(w, offsets=set_word(w.offsets, 2, 0)),
        ("offsets[2] = 0",),
    ),
    "a size between two": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, int(w.offsets[1]) + 1)),
        ("chunk 0 ",),
    ),
    "smaller than any": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, 7)),
        ("chunk 0 ", "7"),
    ),
    "larger than any": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, 139)),
        ("chunk 0 ", "139"),
    ),
    "past the end": (
        lambda w: changed(w, offsets=set_word(w.offsets, 5, int(w.offsets[5]) + 2)),
        ("offsets ",),
    ),
    "odd down offset": (
        lambda w: edited(
            w, 0, lambda v, b, down_offsets: assign(down_offsets, (3, 1), down_offsets[3, 1] + 1)
        ),
        ("chunk 0: lane 3 of strip 1: ",),
    ),
    "down offset outside the row": (
        lambda w: edited(w, 2, lambda v, b, down_offsets: assign(down_offsets, (31, 0), 128)),
        ("chunk 2: lane 31 of strip 0: ", "128"),
    ),
    "column taken twice": (
        lambda w: edited(w, 0, share_a_column),
        ("chunk 0: lane 1 of strip 0: ",),
    ),
    "runs that overlap": (
        lambda w: edited(w, 1, grow_runs),
        ("chunk 1: lane 0 of strip 0: ", "32 and 32"),
    ),
    "row outside the matrix": (
        lambda w: edited(w, 4, move_below_the_matrix),
        ("chunk 4: row ",),
    ),
    "stored zero": (
        lambda w: edited(w, 0, lambda values, b, s: assign(values, values != 0, 0)),
        ("chunk 0: ",),
    ),
    "negative zero": (
        lambda w: edited(w, 0, lambda values, b, s: assign(values, values != 0, 0x8000)),
        ("chunk 0: ",),
    ),
    "padding": (
        lambda w: edited(w, 3, fill_padding),
        ("chunk 3: ", "15360"),
    ),
    "no bits": (
        lambda w: edited(w, 1, lambda values, bits, down_offsets: assign(bits, slice(None), 0)),
        ("chunk 1: ",),
    ),
    "wrong count": (lambda w: changed(w, nnz=w.nnz - 1), ("nnz = ",)),
}


def good_two_four(device):
    """A bitmap of 5 chunk rows, the last of 2 rows, and 3 columns: a 2:4 pair and a plain one."""
    w = flash_llm.pack(testing.random_sparse(130, 300, 0.85, device=device), "bitmap")
    assert w.stats().two_four_pairs == 1 and w.stats().empty_chunks == 0
    return w, torch.ones(5, 300, dtype=torch.float16, device=device)


def edited_two_four(w, chunk, edit):
    """As edited, for edit(bits, down_offsets, values, steps of both strips) of a 2:4 chunk."""
    payload = w.payload.cpu().clone()
    first, last = (64 * int(offset) for offset in w.offsets[chunk : chunk + 2])
    data = payload.numpy().view(np.uint8)[first:last]
    rows = int(((data[1024:1040:2] & 1) << np.arange(8)).sum())
    values, steps = np.split(data[1088:].view(np.uint16), [64 * rows])
    edit(
        data[:1024].view(np.uint32).reshape(2, 32, 4),
        data[1024:1088].reshape(32, 2),
        values.reshape(rows, 32, 2),
        steps.reshape(-1, 32),
    )
    return changed(w, payload=payload.to(w.device))


def xor(array, index, value):
    array[index] ^= value


def shift_offsets(w, chunk, units):
    """The weight with the border after a chunk moved."""
    offsets = w.offsets.clone()
    offsets[chunk + 1] += units
    return changed(w, offsets=offsets)


TWO_FOUR_CONTENTS = {
    "rows": (
        lambda w: edited_two_four(w, 1, lambda b, down_offsets, v, s: xor(down_offsets, (0, 0), 1)),
        ("chunk 1: ", "R = "),
    ),
    "steps": (
        lambda w: edited_two_four(
            w, 2, lambda b, down_offsets, v, s: xor(down_offsets, (14, 0), 1)
        ),
        ("chunk 2: ", "R = ", "G0 = ", "G1 = "),
    ),
    "spare bits": (
        lambda w: edited_two_four(
            w, 0, lambda b, down_offsets, v, s: xor(down_offsets, (31, 0), 1)
        ),
        ("chunk 0: ", "R = ", "128"),
    ),
    "odd down offset": (
        lambda w: edited_two_four(w, 0, lambda b, down_offsets, v, s: xor(down_offsets, (7, 1), 1)),
        ("chunk 0: lane 7 of strip 1: ",),
    ),
    "column taken twice": (
        lambda w: edited_two_four(
            w, 0, lambda b, down_offsets, v, s: assign(down_offsets, (1, 1), down_offsets[0, 1])
        ),
        ("chunk 0: lane 1 of strip 1: ",),
    ),
    "runs that overlap": (
        lambda w: edited_two_four(
            w, 1, lambda bits, s, v, r: assign(bits, slice(None), ~0 & 0xFFFFFFFF)
        ),
        ("chunk 1: lane 0 of strip 0: ", "32 and 32"),
    ),
    "no bits": (
        lambda w: edited_two_four(w, 1, lambda bits, s, v, r: assign(bits, slice(None), 0)),
        ("chunk 1: ",),
    ),
    "stored zero": (
        lambda w: edited_two_four(w, 0, lambda b, s, values, r: assign(values, values != 0, 0)),
        ("chunk 0: ",),
    ),
    "zero in the residual": (
        lambda w: edited_two_four(
            w, 3, lambda b, s, v, steps: assign(steps[:, :16], slice(None), 0x8000)
        ),
        ("chunk 3: ",),
    ),
    "residual offset": (
        lambda w: edited_two_four(
            w, 3, lambda b, s, v, steps: assign(steps[:, 16:], slice(None), 0xFFFF)
        ),
        ("chunk 3: step 0 of row ", "65535"),
    ),
    "padding": (
        lambda w: edited_two_four(
            w, 0, lambda b, s, values, r: assign(values, tuple(np.argwhere(values == 0)[0]), 1)
        ),
        ("chunk 0: ", "1 at byte "),
    ),
    "padding in the residual": (
        lambda w: edited_two_four(
            w,
            0,
            lambda b, s, v, steps: assign(steps, tuple(np.argwhere(steps[:, :16] == 0)[-1]), 9),
        ),
        ("chunk 0: ", "9 at byte "),
    ),
    "a size between two": (
        lambda w: shift_offsets(w, 0, 1),
        ("chunk ", "chunk ", "2:4"),
    ),
    "larger than any": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, 148)),
        ("chunk 0 ", "148"),
    ),
    "the second column": (
        # What chunk 4 holds becomes chunk 5's, the first of the second column.
        lambda w: changed(w, offsets=set_word(w.offsets, 5, int(w.offsets[4]))),
        ("chunk 5 ", "2:4"),
    ),
}


@each("case", TWO_FOUR_CONTENTS)
def test_validate_reads_every_invariant_of_two_four_chunks(case, device):
    change, parts = TWO_FOUR_CONTENTS[case]
    w, x = good_two_four(device)
    w.validate()
    broken = change(w)
    with raises(ValueError, "flash_llm::validate: ", *parts):
        broken.validate()
    assert broken.to_dense().shape == (130, 300)
    for config in plan_names("bitmap", device):
        if runs_here("bitmap", device, config):
            assert flash_llm.spmm(x, broken, config=config).shape == (5, 130)
    if device == "cuda":
        torch.cuda.synchronize()


def with_noise_after_the_values(w):
    """A row bitmap whose first block that has room for it ends with a halfword that is not 0."""
    for block, last in zip(blocks_of(w), w.offsets[1:].tolist(), strict=True):
        if block[-1] == 0:
            return changed(w, payload=set_word(w.payload, 4 * last - 1, 1 << 16))
    raise AssertionError("every block of this weight is full")


# The same for a row bitmap of 33 blocks, of which the last has 2 rows, and 3 groups, of which the
# last has 6 columns: 1 + 12 words come before the values of a block.
ROW_BITMAP_CONTENTS = {
    "first offset": (lambda w: changed(w, offsets=w.offsets + 1), ("offsets[0] ",)),
    "decreasing": (
        lambda w: changed(w, offsets=set_word(w.offsets, 2, 0)),
        ("offsets[2] ",),
    ),
    "too short for masks": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, 3)),
        ("block 0 ", "3"),
    ),
    "past the end": (
        lambda w: changed(w, offsets=set_word(w.offsets, -1, int(w.offsets[-1]) + 1)),
        ("offsets ",),
    ),
    "units of another block": (
        lambda w: changed(w, offsets=set_word(w.offsets, 1, int(w.offsets[1]) - 1)),
        ("block 0: ",),
    ),
    "masks of nothing": (
        lambda w: changed(w, payload=set_word(w.payload, slice(1, 13), w.payload[1:13] & 0)),
        ("block 0: ", "0"),
    ),
    "bit beyond the columns": (
        lambda w: changed(w, payload=set_word(w.payload, 9, int(w.payload[9]) | 1 << 6)),
        ("block 0: row 0, group 2: ",),
    ),
    "bit beyond the rows": (
        lambda w: changed(w, payload=set_word(w.payload, 4 * int(w.offsets[-2]) + 1 + 2, 1)),
        ("block 32: row 2, group 0: ",),
    ),
    "stored zero": (
        lambda w: changed(w, payload=set_word(w.payload, 13, int(w.payload[13]) & ~0xFFFF)),
        ("block 0: value 0 ",),
    ),
    "negative zero": (
        lambda w: changed(
            w, payload=set_word(w.payload, 13, int(w.payload[13]) & ~0x7FFF | 0x8000)
        ),
        ("block 0: value 0 ",),
    ),
    "smallest value": (
        lambda w: changed(w, payload=set_word(w.payload, 0, int(w.payload[0]) + 1)),
        ("block 0: ",),
    ),
    "padding": (with_noise_after_the_values, ("block ",)),
    "wrong count": (lambda w: changed(w, nnz=w.nnz - 1), ("nnz = ",)),
}

CONTENTS_OF = {"tiled_csl": CONTENTS, "bitmap": BITMAP_CONTENTS, "row_bitmap": ROW_BITMAP_CONTENTS}


@each(
    ("format", "case"),
    [(format, case) for format, cases in CONTENTS_OF.items() for case in cases],
)
def test_validate_reads_every_invariant(format, case, device):
    change, parts = CONTENTS_OF[format][case]
    w, x, _ = good(device, format)
    broken = change(w)
    with raises(ValueError, "flash_llm::validate: ", *parts):
        broken.validate()
    with raises(ValueError, "flash_llm::validate: ", *parts):
        type(w).from_tensors(broken.header, broken.offsets, broken.payload)
    # The operators do not look, and survive it.
    assert broken.to_dense().shape == (130, 70)
    for config in plan_names(format, device):
        if runs_here(format, device, config):
            assert flash_llm.spmm(x, broken, config=config).shape == (5, 130)
    if device == "cuda":
        torch.cuda.synchronize()


# ---- building one ----


@each(
    ("header", "error", "parts"),
    [
        (torch.zeros(8), TypeError, ("header ", "int64", "float32")),
        (torch.zeros(8, dtype=torch.int32), TypeError, ("header ", "int64", "int32")),
        (torch.zeros(7, dtype=torch.int64), ValueError, ("header ", "[8]", "[7]")),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, ("header ", "[8]", "[2, 4]")),
        (torch.zeros(8, dtype=torch.int64, device="meta"), ValueError, ("header ", "meta")),
    ],
)
def test_header_tensors(header, error, parts):
    w, _, _ = good("cpu")
    with raises(error, "flash_llm: ", *parts):
        TiledCSL.from_tensors(header, w.offsets, w.payload)


def test_header_of_the_wrong_length_at_the_operator():
    w, _, _ = good("cpu")
    with raises(ValueError, "flash_llm::unpack: header ", "8", "3"):
        torch.ops.flash_llm.unpack([1, 2, 3], w.offsets, w.payload)


@each("format", ["auto", *FORMATS])
@each("op", ["pack", "prune_pack"])
@each(
    ("shape", "dtype", "error", "parts"),
    [
        ((3,), torch.float16, ValueError, ("dense ", "1")),
        ((3, 3, 3), torch.float16, ValueError, ("dense ", "3")),
        ((), torch.bfloat16, ValueError, ("dense ", "0")),
        ((3, 3), torch.float32, TypeError, ("dense ", "float16", "bfloat16", "Float")),
        ((3, 3), torch.float64, TypeError, ("dense ", "Double")),
        ((3, 3), torch.int32, TypeError, ("dense ", "Int")),
        ((3, 3), torch.bool, TypeError, ("dense ", "Bool")),
        ((3, 3), torch.complex64, TypeError, ("dense ", "ComplexFloat")),
        ((2**31, 1), torch.float16, ValueError, ("2147483648x1",)),
        ((1, 2**31), torch.float16, ValueError, ("1x2147483648",)),
        ((2**31 - 1,) * 2, torch.float16, ValueError, ("2147483647x2147483647",)),
    ],
)
def test_what_cannot_be_packed(op, shape, dtype, error, parts, format, device):
    dense = torch.zeros((), dtype=dtype, device=device).expand(shape)
    arguments = (dense,) if op == "pack" else (dense, 0.5)
    with raises(error, f"flash_llm::{op}: ", *parts):
        getattr(flash_llm, op)(*arguments, format=format)


@each(
    ("sparsity", "scope", "parts"),
    [
        (-0.1, "row", ("sparsity ", "[0, 1]", "-0.1")),
        (1.01, "layer", ("sparsity ", "[0, 1]", "1.01")),
        (float("nan"), "row", ("sparsity ", "[0, 1]", "nan")),
        (float("inf"), "layer", ("sparsity ", "[0, 1]", "inf")),
        (None, "row", ("sparsity ", '"row"')),
        (None, "layer", ("sparsity ", '"layer"')),
        (0.6, "2:4", ("sparsity ", "0.5", '"2:4"', "0.6")),
        (0.5, "column", ("scope ", "column")),
        *(
            (None, scope, ("scope ", f'"{scope}"'))
            for scope in ("0:4", "5:4", "2:65", "-1:4", "2:", ":4", "2:4:8", "a:b", "2 :4", "")
        ),
    ],
)
def test_pruning_targets(sparsity, scope, parts, device):
    dense = torch.ones(4, 8, dtype=torch.float16, device=device)
    with raises(ValueError, "flash_llm::prune_pack: ", *parts):
        flash_llm.prune_pack(dense, sparsity, scope=scope)


@each(
    "call",
    [
        lambda dense, name: flash_llm.pack(dense, name),
        lambda dense, name: torch.ops.flash_llm.pack(dense, name),
        lambda dense, name: flash_llm.prune_pack(dense, 0.5, format=name),
        lambda dense, name: SparseLinear(8, 4, format=name, device=dense.device),
        lambda dense, name: SparseLinear.from_linear(nn.Linear(8, 4).to(dense), format=name),
        lambda dense, name: flash_llm.sparsify_(nn.Sequential(nn.Linear(8, 4)), format=name),
        lambda dense, name: flash_llm.explain_plan(8, 8, 8, 8, format=name),
    ],
    ids=["pack", "op", "prune_pack", "SparseLinear", "from_linear", "sparsify_", "explain_plan"],
)
def test_formats_that_nobody_knows(call, device):
    dense = torch.ones(4, 8, dtype=torch.float16, device=device)
    for name in ("csr", "", "TILED_CSL", "Auto", "bitmap "):
        with raises(ValueError, "flash_llm", "format ", f'"{name}"') as caught:
            call(dense, name)
        for known in ("auto", *ALL_FORMATS):
            assert f'"{known}"' in str(caught.value)


def test_auto_is_no_format_of_a_weight():
    with raises(ValueError, "format ", '"auto"') as caught:
        PackedWeight.class_for("auto")
    for known in ALL_FORMATS:
        assert f'"{known}"' in str(caught.value)
    with raises(NotImplementedError, "format 9", "1 (tiled_csl)"):
        PackedWeight.class_for(9)
    with raises(NotImplementedError, "format 9", "2 (bitmap)", "3 (row_bitmap)"):
        PackedWeight.class_for(9)


def test_from_tensors_of_the_other_format(format, device):
    w, _, _ = good(device, format)
    other = other_format(format)
    with raises(ValueError, "header ", f'"{other}"', f'"{format}"'):
        PackedWeight.class_for(other).from_tensors(w.header, w.offsets, w.payload)


def test_from_tensors_of_another_class():
    class Other(PackedWeight):
        FORMAT, FORMAT_ID = "other", 1234

        @staticmethod
        def num_offsets(m, k, value_type):
            return 1

    try:
        w, _, _ = good("cpu")
        with raises(ValueError, "header ", '"other"', '"tiled_csl"'):
            Other.from_tensors(w.header, w.offsets, w.payload)
    finally:
        flash_llm.ops._CLASS_OF_FORMAT.pop("other")
        flash_llm.ops._CLASS_OF_ID.pop(1234)


@each(
    ("arguments", "error", "parts"),
    [
        ({"m": -1, "k": 3}, ValueError, ("m and k ", "-1 and 3")),
        ({"m": 3, "k": 3, "dtype": torch.float32}, TypeError, ("float32", ".to(torch.bfloat16)")),
        ({"m": 3, "k": 3, "payload_words": 4}, ValueError, ("payload_words ", "4 on cpu")),
        (
            {"m": 3, "k": 3, "payload_words": -4, "device": "meta"},
            ValueError,
            ("payload_words ", "-4 on meta"),
        ),
    ],
)
def test_empty_weights(arguments, error, parts, format):
    with raises(error, "flash_llm: ", *parts):
        PackedWeight.class_for(format).empty(**arguments)


def test_value_types():
    assert PackedHeader(0, 0, 0, value_type_of(torch.bfloat16), 0, 0, 0, 0).dtype == torch.bfloat16
    with raises(TypeError, "torch.float16", "torch.bfloat16", "torch.int8"):
        value_type_of(torch.int8)


# ---- modules ----


@each(
    ("make", "error", "parts"),
    [
        (lambda: SparseLinear(4, 4, dtype=torch.float32), TypeError, ("float32",)),
        (lambda: SparseLinear(-4, 4), ValueError, ("4 and -4",)),
        (
            lambda: SparseLinear.from_linear(nn.Linear(4, 4)),
            TypeError,
            ("weight ", "Linear", "float32", ".to(torch.bfloat16)"),
        ),
        (
            lambda: SparseLinear.from_linear(nn.Conv2d(4, 4, 1).half()),
            TypeError,
            ("nn.Linear", "Conv1D", "Conv2d"),
        ),
        (
            lambda: SparseLinear.from_linear(nn.Linear(4, 4).half(), sparsity=2.0),
            ValueError,
            ("sparsity ", "[0, 1]"),
        ),
        (
            lambda: SparseLinear.from_linear(nn.Linear(4, 4).half(), scope="col"),
            ValueError,
            ("scope ", "col"),
        ),
        (
            lambda: SparseLinear.from_packed(good("cpu")[0], torch.zeros(7).half()),
            ValueError,
            ("bias ", "[130]", "[7]"),
        ),
        (
            lambda: SparseLinear.from_packed(good("cpu")[0], torch.zeros(130)),
            TypeError,
            ("bias ", "torch.float16", "torch.float32"),
        ),
    ],
)
def test_sparse_linear_construction(make, error, parts):
    with raises(error, "flash_llm", *parts):
        make()


def test_forward_names_what_is_wrong(device):
    layer = SparseLinear(70, 130, device=device)
    with raises(ValueError, "flash_llm::spmm: x.size(-1) ", "K=70", "71"):
        layer(torch.ones(2, 71, dtype=torch.float16, device=device))
    with raises(TypeError, "flash_llm::spmm: x ", "Half", "Float"):
        layer(torch.ones(2, 70, device=device))


# ---- plans and builds ----


@each(
    ("arguments", "error", "parts"),
    [
        ({"compute_capability": 75}, NotImplementedError, ("8.0", "7.5")),
        ({"config": "w9n9", "compute_capability": 90}, ValueError, ("config ", "w9n9")),
        ({"config": "w1n8"}, ValueError, ("config ", "CPU", "w1n8")),
        ({"ctas": -3}, ValueError, ("ctas ", "-3")),
        ({"m": 1 << 31}, ValueError, (str(1 << 31),)),
        ({"value_type": "float32"}, TypeError, ("value_type ", "float32")),
        ({"format": "csr"}, ValueError, ("format ", '"auto"', "csr")),
        (
            {"format": "bitmap", "config": "n8", "compute_capability": 80},
            NotImplementedError,
            ('config "n8"', "9.0", "8.0"),
        ),
        (
            {"format": "bitmap", "config": "w1n8", "compute_capability": 90},
            ValueError,
            ('"n8"', '"dense"', '"bitmap"', "CUDA", '"w1n8"'),
        ),
        (
            {"format": "tiled_csl", "config": "n8", "compute_capability": 90},
            ValueError,
            ('"w1n8"', '"dense"', '"tiled_csl"', "CUDA", '"n8"'),
        ),
        ({"format": "quantized_bitmap"}, TypeError, ('"quantized_bitmap"', "16-bit values")),
        (
            {"format": "bitmap", "value_type": "int8_float16"},
            TypeError,
            ('"bitmap"', "int8 values", '"row_bitmap"', '"quantized_bitmap"'),
        ),
        ({"x_quantization": "static"}, ValueError, ("x_quantization ", '"static"')),
        (
            {"config": "cpu_rows", "x_quantization": "dynamic"},
            ValueError,
            ("x_quantization", '"cpu_rows"'),
        ),
        (
            {"format": "bitmap", "config": "cpu_tiles"},
            ValueError,
            ('"cpu_reference"', '"dense"', '"bitmap"', "CPU", '"cpu_tiles"'),
        ),
    ],
)
def test_explain_plan(arguments, error, parts):
    with raises(error, "flash_llm::explain_plan: ", *parts):
        flash_llm.explain_plan(**{"m": 128, "n": 8, "k": 64, "nnz": 100, **arguments})


@pytest.mark.skipif(_extension.require().build_info()["cuda"], reason="this build has CUDA")
@each("op", ["pack", "prune_pack", "spmm", "unpack", "validate"])
def test_a_build_without_cuda_says_what_to_do(op, format):
    """No GPU is needed to reach the CUDA implementation of an operator."""
    w, x, _ = good("cpu", format)
    header = list(w.header)
    arguments = {
        "pack": (x,),
        "prune_pack": (x, 0.5),
        "spmm": (x, header, w.offsets, w.payload),
        "unpack": (header, w.offsets, w.payload),
        "validate": (header, w.offsets, w.payload),
    }[op]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with raises(NotImplementedError, f"flash_llm::{op}: ", "CUDA", "pip install"):
        getattr(torch.ops.flash_llm, op).default.redispatch(cuda, *arguments)


@each("operand", ["x", "offsets", "payload", "bias"])
def test_one_operand_on_the_meta_device_does_not_answer_with_noise(operand, format):
    """Meta outranks the CPU in dispatch: the fake must refuse, not return fresh memory."""
    w = flash_llm.pack(torch.eye(64).half(), format)
    parts = {
        "x": torch.ones(2, 64).half(),
        "offsets": w.offsets,
        "payload": w.payload,
        "bias": torch.ones(64).half(),
    }
    parts[operand] = parts[operand].to("meta")
    with pytest.raises(TypeError, match="flash_llm::spmm: .*meta"):
        torch.ops.flash_llm.spmm(
            parts["x"], list(w.header), parts["offsets"], parts["payload"], parts["bias"]
        )


def test_a_layer_that_was_never_loaded_does_not_answer():
    with pytest.raises(TypeError, match="x .*meta.*cpu"):
        SparseLinear(16, 16, device="meta")(torch.ones(1, 16).half())


def test_validation_of_meta_buffers_is_refused():
    w = TiledCSL.from_dense(torch.eye(64).half())
    with pytest.raises(TypeError, match="payload .*int32"):
        TiledCSL.from_tensors(w.header, w.offsets, torch.zeros(3, device="meta"))
    with pytest.raises(TypeError, match="offsets .*meta"):
        TiledCSL.from_tensors(w.header, w.offsets, w.payload.to("meta"))
    with pytest.raises(ValueError, match="flash_llm::validate: .*meta"):
        w.to("meta").validate()


@each(
    ("changes", "error", "message"),
    [
        ({"bias": torch.ones(5).half()}, ValueError, "bias "),
        ({"bias": torch.ones(64)}, TypeError, "bias .*torch.float16"),
        ({"activation": "bogus"}, ValueError, "activation .*bogus"),
        ({"offsets": torch.zeros(9, dtype=torch.int32)}, ValueError, "offsets "),
        ({"payload": torch.zeros(4, dtype=torch.int32)}, ValueError, "payload "),
        ({"header": [1, 2, 3]}, ValueError, "header .*8.*3"),
    ],
)
def test_tracing_refuses_what_the_kernel_refuses(changes, error, message, format):
    w = flash_llm.pack(torch.eye(64).half(), format)
    call = {
        "x": torch.ones(2, 64).half(),
        "header": list(w.header),
        "offsets": w.offsets,
        "payload": w.payload,
        "bias": None,
        "activation": "none",
        **changes,
    }
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in call.items()
        }
        with pytest.raises(error, match=message):
            torch.ops.flash_llm.spmm(*fake.values())


def test_a_malformed_weight_is_refused_when_a_layer_is_built_around_it():
    w = TiledCSL.from_dense(torch.eye(64).half())
    payload = w.payload.clone()
    payload[1] = payload[0]
    twice = TiledCSL(w.header, w.offsets, payload)
    with pytest.raises(ValueError, match="flash_llm::validate: .*tile 0: "):
        SparseLinear.from_packed(twice)
    past_the_end = TiledCSL(w.header, torch.tensor([0, 10**6], dtype=torch.int32), w.payload)
    with pytest.raises(ValueError, match="tile 0"):
        past_the_end.stats()


def test_wrong_kinds_of_argument_are_type_errors():
    dense = torch.eye(64).half()
    w = TiledCSL.from_dense(dense)
    with pytest.raises(TypeError, match="header .*PackedHeader.*list"):
        TiledCSL.from_tensors(list(w.header), w.offsets, w.payload)
    with pytest.raises(TypeError, match="w .*Tensor"):
        SparseLinear.from_packed(dense)
    with pytest.raises(TypeError, match="bias .*int"):
        SparseLinear.from_packed(w, 3)
    with pytest.raises(TypeError, match="sparsity .*str"):
        flash_llm.prune_pack(dense, "0.5")
    with pytest.raises(TypeError, match="activation .*int"):
        flash_llm.spmm(dense, w, activation=5)
    with pytest.raises(ValueError, match="flash_llm::pack: dense .*meta"):
        flash_llm.pack(dense.to("meta"))
    with pytest.raises(ValueError, match=r"sparsity .* 1\.0000001$"):
        flash_llm.prune_pack(dense, 1.0000001)
