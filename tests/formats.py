"""What tests know of packed formats: names, plans, and a reading of their bytes of our own.

Here is also :func:`each`, which runs many combinations of arguments in one case.

The readers and the writers follow the comments in the headers of csrc/format alone (tiled_csl.h,
bitmap.h, row_bitmap.h, gather.h, quantized_bitmap.h), and call nothing of flash_llm.
"""

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import flash_llm
from flash_llm import _extension

FORMATS = ("tiled_csl", "bitmap", "row_bitmap", "gather")  # that hold 16-bit values
QUANTIZED_FORMATS = ("row_bitmap", "quantized_bitmap")  # that hold values with scales
ALL_FORMATS = (*FORMATS, "quantized_bitmap")
# Those that a GPU has kernels for. The host packs and unpacks the others, which cannot be captured.
GPU_FORMATS = ("tiled_csl", "bitmap", "gather")
DTYPES = (torch.float16, torch.bfloat16)

SPECIAL = {
    # zero, -0, smallest and largest subnormal, smallest normal, 1, largest finite, Inf, NaNs
    torch.float16: (
        *(0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00),
        *(0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0xFFFF),
    ),
    torch.bfloat16: (
        *(0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80),
        *(0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0xFFFF),
    ),
}


def other_format(format):
    return "tiled_csl" if format == "bitmap" else "bitmap"


# ---- many combinations in one case ----


def each(names, values, ids=None):
    """As pytest.mark.parametrize, but within one case: runs the test for each of the values.

    For combinations that are too many, or take too little time, to be cases of their own. Several
    of these on a test make a product. Each combination begins from the same seed. All of them run,
    unless the case's time limit is exceeded; the case fails with the names of those that fail and
    their errors. A combination must not skip, because that would hide the failures of the others.
    """
    names = [names] if isinstance(names, str) else names
    values = [(value,) if len(names) == 1 else value for value in values]
    if ids is None:  # functions have no name that tells them apart, so they get their index
        ids = [
            ", ".join(
                f"{name}{index}" if inspect.isfunction(part) else f"{name}={part}"
                for name, part in zip(names, value, strict=True)
            )
            for index, value in enumerate(values)
        ]
    loop = [
        (label, dict(zip(names, value, strict=True)))
        for label, value in zip(ids, values, strict=True)
    ]

    def decorate(test):
        body, loops = getattr(test, "looped", (test, []))
        loops = [loop, *loops]

        @functools.wraps(test)
        def run(**case):
            _run_each(body, case, loops)

        run.looped = body, loops
        signature = inspect.signature(test)
        kept = [p for name, p in signature.parameters.items() if name not in names]
        run.__signature__ = signature.replace(parameters=kept)
        return run

    return decorate


def _run_each(body, case, loops):
    first, failed = None, []
    combinations = list(itertools.product(*loops))
    assert combinations, "there is nothing to run"
    for number, combination in enumerate(combinations, start=1):
        arguments = {name: value for _, part in combination for name, value in part.items()}
        torch.manual_seed(0)
        try:
            body(**case, **arguments)
        except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
            first = first or error
            label = ", ".join(label for label, _ in combination)
            failed.append(f"{label}: {type(error).__name__}: {error}")
            # pytest-timeout's timer fires once, so nothing would limit the other combinations.
            if isinstance(error, pytest.fail.Exception) and str(error).startswith("Timeout"):
                failed[-1] += f" ({len(combinations) - number} combinations were not run)"
                break
    if failed:
        head = f"{len(failed)} of {len(combinations)} combinations fail:"
        raise AssertionError("\n".join([head, *failed])) from first


# ---- plans ----


def has_hopper():
    """Whether code for sm_90a can run here, and so every kernel."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and "9.0a" in _extension.require().build_info()["cuda_archs"]
    )


def plan_names(format, device, value_type=""):
    """What ``config`` of the operator takes, "auto" excepted; 16-bit values, if it holds them."""
    return _extension.require().plan_names(format, device == "cuda", value_type)


def runs_here(format, device, config, value_type="float16"):
    """Whether a plan of ``plan_names`` can run on this machine's ``device``."""
    if device == "cpu":
        return True
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        flash_llm.explain_plan(
            *(16, 1, 16, 1, value_type),
            format=format,
            config=config,
            compute_capability=10 * gpu.major + gpu.minor,
            num_sms=gpu.multi_processor_count,
            smem_per_sm_bytes=gpu.shared_memory_per_multiprocessor,
        )
    except NotImplementedError:  # it has no such kernel, or too little shared memory for it
        return False
    return True


def every_plan(*devices, auto=False):
    """Parameters (device, format, config): each kernel on its device."""
    params = []
    for device, format in itertools.product(devices, FORMATS):
        if device == "cuda" and format not in GPU_FORMATS:
            continue
        for config in ["auto"] * auto + plan_names(format, device):
            marks = []
            if device == "cuda":
                marks = [pytest.mark.gpu, pytest.mark.runs_here(format, device, config)]
            name = f"{device}-{format}-{config}"
            params.append(pytest.param(device, format, config, marks=marks, id=name))
    return params


# ---- bits ----


def from_bits(bits, dtype, device="cpu"):
    """A tensor of 16-bit patterns, uint16 array in."""
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype).to(device)


def bits_of(tensor):
    return tensor.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def without_negative_zero(bits):
    return np.where(bits == 0x8000, 0, bits)


def assert_same_weight(a, b):
    assert type(a) is type(b) and a.header == b.header
    assert torch.equal(a.offsets.cpu(), b.offsets.cpu())
    assert torch.equal(a.payload.cpu(), b.payload.cpu())


@st.composite
def weights(draw, max_size=200):
    """Bit patterns of a weight of any size, with specials and a density that changes by block."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    m, k = draw(st.integers(0, max_size)), draw(st.integers(0, 2 * max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    some = st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.97, 1.0])
    densities = draw(st.lists(some, min_size=1, max_size=6))
    bits = rng.integers(0, 1 << 16, (m, k), dtype=np.uint16)
    special = rng.random((m, k)) < 0.1
    bits[special] = rng.choice(SPECIAL[dtype], special.sum())
    block = np.arange(m)[:, None] // 32 + np.arange(k)[None, :] // 64
    bits[rng.random((m, k)) >= np.array(densities)[block % len(densities)]] = 0
    return bits, dtype


# ---- Tiled-CSL ----


def read_tiled_csl(packed):
    m, k = packed.shape
    dense = np.zeros((m, k), np.uint16)
    offsets = packed.offsets.cpu().numpy().astype(np.int64) * 4
    words = packed.payload.cpu().numpy().view(np.uint32)
    tile_cols = -(-k // 64)
    for tile, (first, last) in enumerate(itertools.pairwise(offsets)):
        positions, values = words[first:last] >> 16, words[first:last] & 0xFFFF
        rows, swizzled = positions // 64, positions % 64
        chunk = (swizzled // 8) ^ (rows % 8)
        cols = chunk // 4 * 32 + swizzled % 8 // 2 * 8 + chunk % 4 * 2 + swizzled % 2
        rows, cols = rows + tile // tile_cols * 128, cols + tile % tile_cols * 64
        stored = values != 0
        dense[rows[stored], cols[stored]] = values[stored]
    return dense


# ---- Bitmap ----

# Axes: lane 4 g + t, half h, strip i, and the index in a run: quad after quad, each as 0, 1, 3, 2.
_LANE, _HALF, _STRIP, _NTH = np.ogrid[:32, :2, :2, :32]
_ELEM = np.array([0, 1, 3, 2])[_NTH % 4]
RUN_ROW = 16 * _STRIP + _LANE // 4 + 8 * (_ELEM // 2) + 0 * _HALF
# The elements of a plain chunk.
_QUAD = _NTH // 4
PLAIN_COL = 64 * _HALF + 16 * (_QUAD // 2) + 8 * (_QUAD % 2) + 2 * (_LANE % 4) + _ELEM % 2
PLAIN_COL = PLAIN_COL + 0 * _STRIP
PLAIN_BIT = 8 * _ELEM + _QUAD
# The slots of a 2:4 chunk, by the first columns of their groups.
_QUAD = np.array([0, 4, 1, 5, 2, 6, 3, 7])[_NTH // 4]
GROUP_COL = 64 * (_QUAD % 4) + 32 * _HALF + 16 * (_QUAD // 4) + 4 * (_LANE % 4) + 0 * _STRIP
SLOT = _ELEM % 2 + 0 * GROUP_COL
# A 2:4 chunk's bits. Axes: strip i, lane 4 g + 2 h + u, word k, bit 4 n + p.
_STRIP_OF, _LANE_OF, _WORD, _BIT = np.ogrid[:2, :32, :4, :32]
BIT_ROW = 16 * _STRIP_OF + _LANE_OF // 4 + 8 * (_BIT // 16) + 0 * _WORD
BIT_COL = 64 * (_BIT % 4) + 32 * (_LANE_OF // 2 % 2) + 16 * (_LANE_OF % 2) + 4 * (_BIT // 4 % 4)
BIT_COL = BIT_COL + _WORD + 0 * _STRIP_OF


def chunk_places(m, k):
    """(row, column) of the chunks of a weight, counted in chunks, in the order of their storage."""
    rows, cols = -(-m // 32), -(-k // 128)
    return [
        (row, col)
        for band in range(0, rows, 16)
        for col in range(cols)
        for row in range(band, min(band + 16, rows))
    ]


def chunks_of(packed):
    """The bytes of each chunk of a bitmap weight."""
    data = packed.payload.cpu().numpy().view(np.uint8)
    offsets = packed.offsets.cpu().numpy().astype(np.int64) * 64
    assert offsets[0] == 0 and offsets[-1] == len(data)
    return [data[first:last] for first, last in itertools.pairwise(offsets)]


def is_two_four(chunk):
    """Whether a chunk's size, in bytes, makes it 2:4."""
    return len(chunk) > 0 and len(chunk) // 64 % 2 == 0


def split_chunk(chunk):
    """Values [R, column, slot], bits [lane, half, strip] and down offsets [lane, strip] (plain)."""
    rows, odd = divmod(len(chunk) - 512 - 64, 128)
    assert odd == 0 and 1 <= rows <= 64, f"a chunk of {len(chunk)} bytes"
    values, bits, down_offsets = np.split(chunk, [128 * rows, 128 * rows + 512])
    return (
        values.view("<u2").reshape(rows, 32, 2),
        bits.view("<u4").reshape(32, 2, 2),
        down_offsets.reshape(32, 2).astype(int),
    )


def split_two_four(chunk):
    """Bits [strip, lane, word], down offsets [lane, strip], values, residual steps of both strips.

    Steps are pairs of values [step, g, upper] and residual offsets [step, row of the strip].
    """
    bits, down_offsets, rest = np.split(chunk, [1024, 1088])
    down_offsets = down_offsets.reshape(32, 2).astype(int)
    sizes = int(((down_offsets[:, 0] & 1) << np.arange(32)).sum())
    down_offsets[:, 0] &= ~1
    rows, *steps = sizes & 0xFF, sizes >> 8 & 0xFF, sizes >> 16
    assert 1 <= rows <= 64 and len(chunk) <= 64 * 146
    assert len(rest) == 128 * rows + 64 * (sum(steps) | 1)
    values, residual = np.split(rest, [128 * rows])
    residual = residual.view("<u2").reshape(-1, 32)
    assert not residual[sum(steps) :].any()
    strips = np.split(residual[: sum(steps)], [steps[0]])
    return (
        bits.view("<u4").reshape(2, 32, 4),
        down_offsets,
        values.view("<u2").reshape(rows, 32, 2),
        [(strip[:, :16].reshape(-1, 8, 2), strip[:, 16:]) for strip in strips],
    )


def slot_columns(stored):
    """The columns of the slots of a 2:4 chunk [lane, half, strip, index in the run]."""
    b0, b1, b2, _ = np.moveaxis(stored.reshape(32, 64, 4), -1, 0)
    i0 = np.where(b0, 0, np.where(b1, 1, 2))
    i1 = np.where(b0 & b1, 1, np.where(b2 & (b0 | b1), 2, 3))
    return GROUP_COL + np.where(SLOT == 0, i0[RUN_ROW, GROUP_COL // 4], i1[RUN_ROW, GROUP_COL // 4])


def residual_of(stored):
    """Which elements of a 2:4 chunk have no slot: those beyond the second of their group."""
    groups = stored.reshape(32, 64, 4)
    return (groups & (groups.cumsum(axis=-1) > 2)).reshape(32, 256)


def residual_offset(col):
    """The residual offset of a column of a 2:4 chunk: its byte offset in the transposed X."""
    return 16 * (col ^ (col // 8 % 8))


def class_of(col):
    return residual_offset(col) // 16 % 8


def steps_of(residual):
    """Columns [step, row] of a strip's steps, and which entries are stored; ``residual`` [16, 256].

    Columns of other entries are those of the first row of the same eight, or 0.
    """
    cols = np.full((residual.sum(axis=1).max(), 16), -1)
    for rows in (range(8), range(8, 16)):
        for row in rows:
            for col in np.flatnonzero(residual[row]):
                free = np.flatnonzero(cols[:, row] < 0)
                others = cols[free, rows.start : row]
                alone = free[~((others >= 0) & (class_of(others) == class_of(col))).any(axis=1)]
                cols[(alone if len(alone) else free)[0], row] = col
    stored = cols >= 0
    for step in cols.reshape(-1, 8):
        step[step < 0] = next((col for col in step if col >= 0), 0)
    return cols, stored


def read_runs(values, down_offsets, stored):
    """What the runs hold for each of ``stored`` [lane, half, strip, index in the run]."""
    nth = stored.cumsum(axis=-1) - 1
    row = np.where(_HALF == 0, nth, len(values) - 1 - nth)
    down_offsets = down_offsets[:, None, :, None]
    column = np.where(_HALF == 0, _LANE, down_offsets // 4)
    slot = np.where(_HALF == 0, _STRIP, down_offsets % 4 // 2)
    return np.where(stored, values[np.where(stored, row, 0), column, slot], 0)


def read_plain(chunk):
    """The 32 x 128 elements of a plain chunk."""
    values, bits, down_offsets = split_chunk(chunk)
    stored = (bits[..., None] >> PLAIN_BIT.astype(np.uint32) & 1).astype(bool)
    dense = np.zeros((32, 128), np.uint16)
    dense[RUN_ROW, PLAIN_COL] = read_runs(values, down_offsets, stored)
    return dense


def read_two_four(chunk):
    """The 32 x 256 elements of a 2:4 chunk."""
    bits, down_offsets, values, steps = split_two_four(chunk)
    stored = np.zeros((32, 256), bool)
    stored[BIT_ROW, BIT_COL] = bits[..., None] >> _BIT.astype(np.uint32) & 1
    slots = slot_columns(stored)
    dense = np.zeros((32, 256), np.uint16)
    np.add.at(dense, (RUN_ROW, slots), read_runs(values, down_offsets, stored[RUN_ROW, slots]))
    residual = residual_of(stored)
    for strip, (found, offsets) in enumerate(steps):
        cols, held = steps_of(residual[16 * strip : 16 * strip + 16])
        found = found.transpose(0, 2, 1).reshape(-1, 16)
        np.testing.assert_array_equal(offsets, residual_offset(cols))
        np.testing.assert_array_equal(found != 0, held)
        step, row = np.nonzero(held)
        dense[16 * strip + row, cols[step, row]] = found[step, row]
    return dense


def read_bitmap(packed):
    m, k = packed.shape
    dense = np.zeros((-(-m // 32) * 32, -(-k // 128) * 128), np.uint16)
    kinds = {}
    for (row, col), chunk in zip(chunk_places(m, k), chunks_of(packed), strict=True):
        if not len(chunk):
            continue
        two_four = is_two_four(chunk)
        assert kinds.setdefault((row // 16, col // 2), two_four) == two_four
        assert not two_four or (col % 2 == 0 and 128 * col + 256 <= dense.shape[1])
        part = read_two_four(chunk) if two_four else read_plain(chunk)
        dense[32 * row : 32 * row + 32, 128 * col : 128 * col + part.shape[1]] = part
    assert not dense[m:].any() and not dense[:, k:].any()
    return dense[:m, :k]


def _pairing(up, down, pattern):
    """Down offsets and rows that one swap pattern needs, from run lengths [lane, strip]."""
    down_offsets, rows = np.zeros((32, 2), int), 0
    for strip in range(2):
        slot_of = [strip ^ ((column & pattern).bit_count() & 1) for column in range(32)]
        shortest_up = sorted(range(32), key=lambda c: (up[c, slot_of[c]], c))
        longest_down = sorted(range(32), key=lambda lane: (down[lane, strip], lane))[::-1]
        for column, lane in zip(shortest_up, longest_down, strict=True):
            down_offsets[lane, strip] = 4 * column + 2 * slot_of[column]
            rows = max(rows, int(up[column, slot_of[column]] + down[lane, strip]))
    return down_offsets, rows


def best_pairing(stored):
    """Down offsets and the number of rows for the runs [lane, half, strip, index in the run]."""
    up, down = stored.sum(axis=-1).transpose(1, 0, 2)
    # min() keeps the first of equals.
    return min((_pairing(up, down, p) for p in range(8)), key=lambda found: found[1])


def write_runs(runs, stored):
    """Values and down offsets for the runs [lane, half, strip, index in the run]."""
    down_offsets, rows = best_pairing(stored)
    values = np.zeros((rows, 32, 2), "<u2")
    for lane, strip in itertools.product(range(32), range(2)):
        run = runs[lane, 0, strip][stored[lane, 0, strip]]
        values[: len(run), lane, strip] = run
        run = runs[lane, 1, strip][stored[lane, 1, strip]]
        column, slot = down_offsets[lane, strip] // 4, down_offsets[lane, strip] % 4 // 2
        values[rows - len(run) :, column, slot] += run[::-1]
    return values, down_offsets.astype(np.uint8)


def _joined(*parts):
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


def write_plain(dense):
    """The bytes of a plain chunk of 32 x 128 bit patterns, packed as the format prescribes."""
    runs = without_negative_zero(dense)[RUN_ROW, PLAIN_COL]
    stored = runs != 0
    if not stored.any():
        return np.zeros(0, np.uint8)
    values, down_offsets = write_runs(runs, stored)
    bits = (stored.astype("<u4") << PLAIN_BIT.astype(np.uint32)).sum(axis=-1, dtype="<u4")
    return _joined(values, bits, down_offsets)


def two_four_size(dense):
    """How many bytes a 2:4 chunk of 32 x 256 bit patterns takes; may be too many."""
    stored = without_negative_zero(dense) != 0
    if not stored.any():
        return 0
    _, rows = best_pairing(stored[RUN_ROW, slot_columns(stored)])
    steps = residual_of(stored).reshape(2, 16, 256).sum(axis=2).max(axis=1).sum()
    return int(1024 + 64 + 128 * rows + 64 * (steps | 1))


def write_two_four(dense):
    """The bytes of a 2:4 chunk of 32 x 256 bit patterns."""
    dense = without_negative_zero(dense)
    stored = dense != 0
    if not stored.any():
        return np.zeros(0, np.uint8)
    bits = (stored[BIT_ROW, BIT_COL].astype("<u4") << _BIT.astype(np.uint32)).sum(-1, dtype="<u4")
    slots = slot_columns(stored)
    values, down_offsets = write_runs(dense[RUN_ROW, slots], stored[RUN_ROW, slots])
    residual, sizes, steps = residual_of(stored), len(values), []
    for strip in range(2):
        rows = slice(16 * strip, 16 * strip + 16)
        cols, held = steps_of(residual[rows])
        found = np.where(held, dense[rows][np.arange(16), cols], 0)
        found = found.reshape(-1, 2, 8).transpose(0, 2, 1).reshape(-1, 16)
        steps.append(np.concatenate([found, residual_offset(cols)], axis=1).astype("<u2"))
        sizes |= len(cols) << (8 + 8 * strip)
    padding = np.zeros((1 - sum(map(len, steps)) % 2, 32), "<u2")
    down_offsets[:, 0] |= (sizes >> np.arange(32) & 1).astype(np.uint8)
    return _joined(bits, down_offsets, values, *steps, padding)


def write_bitmap(bits):
    """The bytes of every chunk of a matrix of bit patterns, in the order of their storage."""
    m, k = bits.shape
    rows, cols = -(-m // 32), -(-k // 128)
    padded = np.pad(bits, [(0, 32 * rows - m), (0, 128 * (cols + 1) - k)])
    chunks = {}
    for band, col in itertools.product(range(0, rows, 16), range(0, cols, 2)):
        in_band = range(band, min(band + 16, rows))
        pairs = [padded[32 * r : 32 * r + 32, 128 * col : 128 * col + 256] for r in in_band]
        plain = [(write_plain(pair[:, :128]), write_plain(pair[:, 128:])) for pair in pairs]
        plain_bytes = sum(len(a) + len(b) for a, b in plain)
        sizes = [two_four_size(pair) for pair in pairs]
        wins = 0 < 64 * sum(sizes) <= 65 * plain_bytes and max(sizes) <= 64 * 146
        if wins and col + 1 < cols:
            written = [(write_two_four(pair), np.zeros(0, np.uint8)) for pair in pairs]
            assert [len(first) for first, _ in written] == sizes
        else:
            written = plain
        for row, (first, second) in zip(in_band, written, strict=True):
            chunks[row, col], chunks[row, col + 1] = first, second
    return [chunks[place] for place in chunk_places(m, k)]


# ---- Row bitmap ----


def blocks_of(packed):
    """The halfwords of each block of a row bitmap."""
    halves = packed.payload.cpu().numpy().view("<u2")
    offsets = packed.offsets.cpu().numpy().astype(np.int64) * 8
    assert offsets[0] == 0 and offsets[-1] == len(halves)
    return [halves[first:last] for first, last in itertools.pairwise(offsets)]


def read_row_bitmap(packed):
    m, k = packed.shape
    groups = -(-k // 32)
    dense = np.zeros((-(-m // 4) * 4, groups * 32), np.uint16)
    for row, block in zip(range(0, m, 4), blocks_of(packed), strict=bool(k)):
        if not len(block):
            continue
        smallest, masks, values = np.split(block, [2, 2 + 8 * groups])
        # Axes: group, row of the block, column of the group; the order of the values.
        bits = masks.view("<u4").reshape(groups, 4, 1) >> np.arange(32, dtype=np.uint32) & 1
        stored = bits.astype(bool)
        elements = np.zeros(stored.shape, np.uint16)
        elements[stored] = values[: stored.sum()]
        assert not values[stored.sum() :].any() and len(values) - stored.sum() < 8
        assert smallest.view("<u4")[0] == (elements[stored] & 0x7FFF).min()
        dense[row : row + 4] = elements.transpose(1, 0, 2).reshape(4, -1)
    assert not dense[m:].any() and not dense[:, k:].any()
    return dense[:m, :k]


def write_row_bitmap(bits):
    """The halfwords of every block of a matrix of bit patterns."""
    m, k = bits.shape
    padded = np.pad(without_negative_zero(bits), [(0, -m % 4), (0, -k % 32)])
    blocks = []
    for row in range(0, m, 4) if k else ():
        elements = padded[row : row + 4].reshape(4, -1, 32).transpose(1, 0, 2)
        stored = elements != 0
        values = elements[stored]
        if not len(values):
            blocks.append(values)
            continue
        masks = (stored.astype("<u4") << np.arange(32, dtype="<u4")).sum(axis=-1, dtype="<u4")
        smallest = np.array([(values & 0x7FFF).min()], "<u4")
        halves = np.concatenate([smallest.view("<u2"), masks.reshape(-1).view("<u2"), values])
        blocks.append(np.pad(halves, (0, -len(halves) % 8)))
    return blocks


# For each kind of values: the dtypes of raw values and of scales, columns that share a scale (None:
# all of a row), and planes of a chunk.
QUANTIZED = {
    "int8": (np.int8, "<f4", None, 1),
    "fp8_e4m3": (np.uint8, "<f4", None, 1),
    "int4": (np.int8, "<f2", 128, 2),
}


def _scales_of_groups(stored, scales, kind):
    """Scales [M, groups] with 1 where no value is stored; ``stored`` [M, K]."""
    (m, k), (_, dtype, size, _) = stored.shape, QUANTIZED[kind]
    groups, size = (-(-k // size), size) if size else (1, max(k, 1))
    padded = np.pad(stored, [(0, 0), (0, groups * size - k)])
    any_stored = padded.reshape(m, groups, size).any(axis=2)
    return np.where(any_stored, scales.reshape(m, groups), 1).astype(dtype)


def _padded(values, rows, cols):
    m, k = values.shape
    return np.pad(values, [(0, -m % rows), (0, -k % cols)])


def read_quantized_row_bitmap(packed):
    """The raw values and the scales [M, groups] of a row bitmap."""
    (m, k), (dtype, scale, size, _) = packed.shape, QUANTIZED[packed.values]
    groups, of_row = -(-k // 32), -(-k // size) if size else 1
    dense = np.zeros((-(-m // 4) * 4, groups * 32), dtype)
    scales = np.ones((len(dense), of_row), scale)
    for row, block in zip(range(0, m, 4), blocks_of(packed), strict=bool(k)):
        if not len(block):
            continue
        block = block.view(np.uint8)
        scale_bytes = 4 * of_row * scales.itemsize
        head, masks, values = np.split(block, [4 + scale_bytes, 4 + scale_bytes + 16 * groups])
        assert not head[:4].any()
        scales[row : row + 4] = head[4:].view(scale).reshape(of_row, 4).T
        bits = masks.view("<u4").reshape(groups, 4, 1) >> np.arange(32, dtype=np.uint32) & 1
        for (group, of_block), count in np.ndenumerate(bits.sum(axis=2)):
            if packed.values == "int4":
                nibbles = np.stack([values & 15, values >> 4], axis=1).reshape(-1)
                found = nibbles[:count].astype(np.int8) - 8
                taken = (count + 1) // 2
                assert not nibbles[count : 2 * taken].any()
            else:
                found, taken = values.view(dtype)[:count], count
            columns = 32 * group + np.flatnonzero(bits[group, of_block])
            dense[row + of_block, columns] = found
            values = values[taken:]
        assert not values.any()
    assert not dense[m:].any() and not dense[:, k:].any()
    return dense[:m, :k], scales[:m]


def write_quantized_row_bitmap(values, scales, kind):
    """The bytes of every block of a matrix of raw values."""
    m, k = values.shape
    padded = _padded(values, 4, 32)
    scales = np.pad(_scales_of_groups(values != 0, scales, kind), [(0, -m % 4), (0, 0)])
    scales[m:] = 1
    blocks = []
    for row in range(0, m, 4) if k else ():
        elements = padded[row : row + 4].reshape(4, -1, 32).transpose(1, 0, 2)
        stored = elements != 0
        if not stored.any():
            continue
        masks = (stored.astype("<u4") << np.arange(32, dtype="<u4")).sum(axis=-1, dtype="<u4")
        kept = [elements[at][stored[at]] for at in np.ndindex(stored.shape[:2])]
        if kind == "int4":
            nibbles = [np.pad((part + 8).astype(np.uint8), (0, len(part) % 2)) for part in kept]
            kept = [part[::2] | part[1::2] << 4 for part in nibbles]
        block = _joined(np.zeros(1, "<u4"), scales[row : row + 4].T, masks, *kept)
        blocks.append(np.pad(block, (0, -len(block) % 16)))
    return blocks


def _places_of_values(bits, columns, rows):
    """Row, column and byte of each value of a plane of a quantised bitmap."""
    for lane, word in itertools.product(range(32), (0, 2)):
        place = 0
        for q, j in itertools.product((word, word + 1), range(4)):
            low = [(lane // 4, e, 4 * e + j) for e in range(4)]
            high = [(lane // 4 + 8, e, 16 + 4 * e + j) for e in (3, 2, 1, 0)]
            for row, e, bit in low + high:
                if bits[q][lane] >> bit & 1:
                    at, column = (
                        (place, 4 * lane)
                        if word == 0
                        else (4 * rows - 1 - place, int(columns[lane]))
                    )
                    col = 64 * q + 16 * j + 4 * (lane % 4) + e
                    yield row, col, at // 4 * 128 + column + at % 4
                    place += 1


def _codes(values, kind):
    """The stored forms of raw values in a quantised bitmap, as uint8."""
    return {
        "int8": lambda: (values.astype(np.int16) + 128).astype(np.uint8),
        "fp8_e4m3": lambda: values,
        "int4": lambda: (values + 8).astype(np.uint8),
    }[kind]()


def _plane(tile):
    """The bits [4, 32], the columns and the rows of a plane of 16 x 256 values."""
    stored = (tile != 0).reshape(2, 8, 4, 4, 4, 4)  # high, g, q, j, t, e
    weights = 1 << (16 * np.arange(2)[:, None, None] + 4 * np.arange(4) + np.arange(4)[:, None])
    bits = np.einsum("hgqjte,hje->qgt", stored, weights).reshape(4, 32).astype("<u4")
    counts = stored.sum(axis=(0, 3, 5)).transpose(1, 0, 2).reshape(4, 32)
    up, down = counts[0] + counts[1], counts[2] + counts[3]
    rising_up, rising_down = np.argsort(up, kind="stable"), np.argsort(down, kind="stable")
    columns = np.zeros(32, np.uint8)
    columns[rising_down[::-1]] = 4 * rising_up
    return bits, columns, -(-int((up[rising_up] + down[rising_down[::-1]]).max()) // 4)


def read_quantized_bitmap(packed):
    """The raw values and the scales [M, groups] of a quantised bitmap."""
    (m, k), (dtype, scale, size, planes) = packed.shape, QUANTIZED[packed.values]
    width, of_row = 256 * planes, -(-k // size) if size else 1
    strips, chunks = -(-m // 16), -(-k // width)
    dense, scales = np.zeros((strips * 16, chunks * width), dtype), np.ones((strips * 16, of_row))
    payload, offsets = packed.payload.cpu().numpy().view(np.uint8), packed.offsets.tolist()
    for strip, chunk in itertools.product(range(strips), range(chunks)):
        index = strip * chunks + chunk
        stored = payload[32 * offsets[index] : 32 * offsets[index + 1]]
        if chunk == 0 and offsets[index] < offsets[(strip + 1) * chunks]:
            head, stored = np.split(stored, [16 * of_row * np.dtype(scale).itemsize])
            scales[16 * strip : 16 * strip + 16] = head.view(scale).reshape(of_row, 16).T
        if not len(stored):
            continue
        values, bits, columns = np.split(stored, [len(stored) - 544 * planes, -32 * planes])
        left = values.copy()
        for plane in range(planes):
            mask = 0xFF if planes == 1 else 0x0F << 4 * plane
            of_plane = bits.view("<u4").reshape(planes, 4, 32)[plane]
            down = columns[32 * plane :]
            for row, col, byte in _places_of_values(of_plane, down, len(values) // 128):
                code = (int(values[byte]) & mask) >> 4 * plane
                at = 16 * strip + row, width * chunk + 256 * plane + col
                dense[at] = code - {"int8": 128, "fp8_e4m3": 0, "int4": 8}[packed.values]
                left[byte] &= 0xFF ^ mask
        assert not left.any()
    assert not dense[m:].any() and not dense[:, k:].any()
    return dense[:m, :k], scales[:m]


def write_quantized_bitmap(values, scales, kind):
    """The bytes of every chunk of a matrix of raw values."""
    m, k = values.shape
    planes = QUANTIZED[kind][3]
    padded, codes = _padded(values, 16, 256 * planes), _codes(values, kind)
    codes = _padded(codes, 16, 256 * planes)
    scales = np.pad(_scales_of_groups(values != 0, scales, kind), [(0, -m % 16), (0, 0)])
    scales[m:] = 1
    written = []
    for row, col in itertools.product(range(0, m, 16), range(0, k, 256 * planes)):
        head = scales[row : row + 16].T if col == 0 and padded[row : row + 16].any() else ()
        places = [slice(col + 256 * plane, col + 256 * plane + 256) for plane in range(planes)]
        found = [_plane(padded[row : row + 16, place]) for place in places]
        rows = max(of_plane for _, _, of_plane in found)
        if not rows:
            written.append(_joined(np.array(head)))
            continue
        chunk = np.zeros(128 * rows, np.uint8)
        for plane, (place, (bits, columns, _)) in enumerate(zip(places, found, strict=True)):
            tile = codes[row : row + 16, place]
            for r, c, byte in _places_of_values(bits, columns, rows):
                chunk[byte] |= tile[r, c] << 4 * plane
        parts = [bits for bits, _, _ in found] + [columns for _, columns, _ in found]
        written.append(_joined(np.array(head), chunk, *parts))
    return written


def read_gather(packed):
    m, k = packed.shape
    dense = np.zeros((m, k), np.uint16)
    offsets = packed.offsets.cpu().numpy().astype(np.int64) * 16
    payload = packed.payload.cpu().numpy().view(np.uint8)
    assert offsets[0] == 0 and offsets[-1] == len(payload)
    tiles = [(row, col) for row in range(0, m, 512) for col in range(0, k, 8192)]
    for (row0, col0), (first, last) in zip(tiles, itertools.pairwise(offsets), strict=True):
        tile = payload[first:last]
        if not len(tile):
            continue
        slices = -(-min(512, m - row0) // 8)
        rows, tile = tile[: 16 * slices].view("<u2"), tile[16 * slices :]
        assert sorted(rows) == list(range(8 * slices))
        head = -(-slices // 8) * 16
        quads, tile = tile[:head].view("<u2"), tile[head:]
        assert not quads[slices:].any()
        for i in range(slices):
            left = int(quads[i])
            while left:
                size = min(left, 8)
                left -= size
                columns, tile = tile[:64].view("<u2").astype(np.int64), tile[64:]
                steps, tile = tile[: 384 * size].reshape(size, 384), tile[384 * size :]
                # Axes: quad, lane, step of the quad. Then steps of the segment by lane.
                moves = steps[:, :128].reshape(-1, 32, 4).view(np.int8).transpose(0, 2, 1)
                values = np.ascontiguousarray(steps[:, 128:]).view("<u2").reshape(-1, 32, 4)
                values = values.transpose(0, 2, 1).reshape(-1, 32)
                columns = columns + moves.reshape(-1, 32).astype(np.int64).cumsum(axis=0)
                row = np.broadcast_to(rows[8 * i + np.arange(32) // 4], columns.shape)
                stored = values != 0
                dense[row0 + row[stored], col0 + columns[stored]] = values[stored]
        assert not len(tile)
    return dense


READERS = {
    "tiled_csl": read_tiled_csl,
    "bitmap": read_bitmap,
    "row_bitmap": read_row_bitmap,
    "gather": read_gather,
}


def read(packed):
    """Dense bits of a valid weight, read from its format's description alone."""
    return READERS[packed.FORMAT](packed)
