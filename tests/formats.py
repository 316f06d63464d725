"""What tests know of packed formats: names, plans, and a reading of their bytes of our own.

The readers and the writer follow the comments in csrc/core/tiled_csl.h and csrc/core/bitmap.h
alone, and call nothing of flash_llm.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from flash_llm import _extension

FORMATS = ("tiled_csl", "bitmap")

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
    return FORMATS[1 - FORMATS.index(format)]


# ---- plans ----


def has_hopper():
    """Whether code for sm_90a, which the bitmap kernel is, can run here."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and "9.0a" in _extension.require().build_info()["cuda_archs"]
    )


def plan_names(format, device):
    """What ``config`` of the operator takes, "auto" excepted."""
    return _extension.require().plan_names(format, device == "cuda")


def runs_here(format, device, config):
    """Whether a plan of ``plan_names`` can run on this machine's ``device``."""
    return has_hopper() if needs_hopper(format, device, config) else True


def needs_hopper(format, device, config):
    return device == "cuda" and format == "bitmap" and config not in ("auto", "dense")


def every_plan(*devices, auto=False):
    """Parameters (device, format, config): each kernel on its device."""
    params = []
    for device, format in itertools.product(devices, FORMATS):
        for config in ["auto"] * auto + plan_names(format, device):
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if needs_hopper(format, device, config):
                marks.append(pytest.mark.hopper)
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
    m, k = draw(st.integers(0, max_size)), draw(st.integers(0, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    densities = draw(st.lists(st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]), min_size=1, max_size=6))
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
        places, values = words[first:last] >> 16, words[first:last] & 0xFFFF
        rows, swizzled = places // 64, places % 64
        chunk = (swizzled // 8) ^ (rows % 8)
        cols = chunk // 4 * 32 + swizzled % 8 // 2 * 8 + chunk % 4 * 2 + swizzled % 2
        rows, cols = rows + tile // tile_cols * 128, cols + tile % tile_cols * 64
        stored = values != 0
        dense[rows[stored], cols[stored]] = values[stored]
    return dense


# ---- Bitmap ----

# Axes: lane 4 g + t, half h, strip i, and the place in a run: quad after quad, each as 0, 1, 3, 2.
_LANE, _HALF, _STRIP, _NTH = np.ogrid[:32, :2, :2, :32]
_QUAD, _ELEM = _NTH // 4, np.array([0, 1, 3, 2])[_NTH % 4]
CHUNK_ROW = 16 * _STRIP + _LANE // 4 + 8 * (_ELEM // 2) + 0 * _HALF
CHUNK_COL = 64 * _HALF + 16 * (_QUAD // 2) + 8 * (_QUAD % 2) + 2 * (_LANE % 4) + _ELEM % 2
CHUNK_COL = CHUNK_COL + 0 * _STRIP
CHUNK_BIT = 8 * _ELEM + _QUAD


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


def split_chunk(chunk):
    """Values [R, column, slot], bits [lane, half, strip] and sigma [lane, strip] of a chunk."""
    rows, odd = divmod(len(chunk) - 512 - 64, 128)
    assert odd == 0 and 1 <= rows <= 64, f"a chunk of {len(chunk)} bytes"
    values, bits, sigma = np.split(chunk, [128 * rows, 128 * rows + 512])
    return (
        values.view("<u2").reshape(rows, 32, 2),
        bits.view("<u4").reshape(32, 2, 2),
        sigma.reshape(32, 2).astype(int),
    )


def read_chunk(chunk):
    """The 32 x 128 elements of a chunk."""
    values, bits, sigma = split_chunk(chunk)
    stored = (bits[..., None] >> CHUNK_BIT.astype(np.uint32) & 1).astype(bool)
    nth = stored.cumsum(axis=-1) - 1
    row = np.where(_HALF == 0, nth, len(values) - 1 - nth)
    sigma = sigma[:, None, :, None]
    column = np.where(_HALF == 0, _LANE, sigma // 4)
    slot = np.where(_HALF == 0, _STRIP, sigma % 4 // 2)
    found = values[np.where(stored, row, 0), column, slot]
    dense = np.zeros((32, 128), np.uint16)
    dense[CHUNK_ROW, CHUNK_COL] = np.where(stored, found, 0)
    return dense


def read_bitmap(packed):
    m, k = packed.shape
    dense = np.zeros((-(-m // 32) * 32, -(-k // 128) * 128), np.uint16)
    for (row, col), chunk in zip(chunk_places(m, k), chunks_of(packed), strict=True):
        if len(chunk):
            dense[32 * row : 32 * row + 32, 128 * col : 128 * col + 128] = read_chunk(chunk)
    assert not dense[m:].any() and not dense[:, k:].any()
    return dense[:m, :k]


def _pairing(up, down, pattern):
    """Sigma of one swap pattern, and the rows that it needs; run lengths [lane, strip] in."""
    sigma, rows = np.zeros((32, 2), int), 0
    for strip in range(2):
        slot_of = [strip ^ ((column & pattern).bit_count() & 1) for column in range(32)]
        shortest_up = sorted(range(32), key=lambda c: (up[c, slot_of[c]], c))
        longest_down = sorted(range(32), key=lambda lane: (down[lane, strip], lane))[::-1]
        for column, lane in zip(shortest_up, longest_down, strict=True):
            sigma[lane, strip] = 4 * column + 2 * slot_of[column]
            rows = max(rows, int(up[column, slot_of[column]] + down[lane, strip]))
    return sigma, rows


def write_chunk(dense):
    """The bytes of a chunk of 32 x 128 bit patterns, packed as the format prescribes."""
    runs = without_negative_zero(dense)[CHUNK_ROW, CHUNK_COL]
    stored = runs != 0
    if not stored.any():
        return np.zeros(0, np.uint8)
    up, down = stored.sum(axis=-1).transpose(1, 0, 2)
    # min() keeps the first of equals.
    sigma, rows = min((_pairing(up, down, p) for p in range(8)), key=lambda found: found[1])
    values = np.zeros((rows, 32, 2), "<u2")
    for lane, strip in itertools.product(range(32), range(2)):
        run = runs[lane, 0, strip][stored[lane, 0, strip]]
        values[: len(run), lane, strip] = run
        run = runs[lane, 1, strip][stored[lane, 1, strip]]
        column, slot = sigma[lane, strip] // 4, sigma[lane, strip] % 4 // 2
        values[rows - len(run) :, column, slot] += run[::-1]
    bits = (stored.astype("<u4") << CHUNK_BIT.astype(np.uint32)).sum(axis=-1, dtype="<u4")
    parts = (values, bits, sigma.astype(np.uint8))
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


READERS = {"tiled_csl": read_tiled_csl, "bitmap": read_bitmap}


def read(packed):
    """Dense bits of a valid weight, read from its format's description alone."""
    return READERS[packed.FORMAT](packed)
