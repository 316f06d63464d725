"""Tiled-CSL: packing, unpacking and validation, against an independent reading of the format."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash_llm
from flash_llm import TiledCSL, _extension, ops, testing
from flash_llm.ops import PackedHeader

SIZES = (0, 1, 7, 8, 63, 64, 65, 127, 129, 200, 576)
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


def from_bits(bits, dtype, device="cpu"):
    """A tensor of 16-bit patterns, uint16 array in."""
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(dtype).to(device)


def bits_of(tensor):
    return tensor.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def without_negative_zero(bits):
    return np.where(bits == 0x8000, 0, bits)


def decode(packed):
    """Dense bits of a valid weight, read from the format's description alone."""
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


def assert_same_weight(a, b):
    assert a.header == b.header
    assert torch.equal(a.offsets.cpu(), b.offsets.cpu())
    assert torch.equal(a.payload.cpu(), b.payload.cpu())


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("k", SIZES)
def test_round_trip_of_every_size_and_pattern(m, k, dtype, device):
    for pattern, sparsity in (("tiles", 0.0), ("uniform", 0.9), ("rows", 0.5), ("columns", 0.5)):
        dense = testing.random_sparse(m, k, sparsity, pattern=pattern, dtype=dtype, device=device)
        packed = TiledCSL.from_dense(dense)
        packed.validate()
        assert packed.shape == (m, k) and packed.dtype == dtype
        assert packed.nnz == int((dense != 0).sum())
        assert torch.equal(packed.to_dense(), dense), pattern
        assert packed.to_dense().device == dense.device
        np.testing.assert_array_equal(decode(packed), bits_of(dense), err_msg=pattern)


@pytest.mark.parametrize("sparsity", [0.0, 0.49, 0.5, 0.51, 1.0])
def test_any_density_survives_past_the_published_limit_of_half(sparsity, dtype, device):
    dense = testing.random_sparse(300, 200, sparsity, dtype=dtype, device=device)
    assert torch.equal(TiledCSL.from_dense(dense).to_dense(), dense)


def test_every_bit_pattern_survives(dtype, device):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(128, 512)
    packed = TiledCSL.from_dense(from_bits(bits, dtype, device))
    packed.validate()
    np.testing.assert_array_equal(bits_of(packed.to_dense()), without_negative_zero(bits))
    # Both zeros are dropped, and come back as +0.
    assert packed.nnz == (1 << 16) - 2


def test_full_tile_is_stored_without_bank_conflicts():
    packed = TiledCSL.from_dense(torch.ones(128, 64, dtype=torch.float16))
    # One store instruction of a warp writes entry e of the vectors of its 32 lanes.
    places = (packed.payload.view(-1, 32, 4) >> 16) & 0xFFFF
    banks = (places // 2 % 32).transpose(1, 2).reshape(-1, 32)
    assert torch.equal(banks.sort(dim=1).values, torch.arange(32).expand(256, 32).int())


def test_place_functions_agree_with_each_other_and_with_the_description():
    extension = _extension.require()
    places = set()
    for row, col in itertools.product(range(extension.TILE_M), range(extension.TILE_K)):
        place = extension.place_of(row, col)
        thread, chunk, half = col // 8 % 4, col // 32 * 4 + col // 2 % 4, col % 2
        assert place == 64 * row + 8 * (chunk ^ (row % 8)) + 2 * thread + half
        assert (extension.row_of_place(place), extension.col_of_place(place)) == (row, col)
        places.add(place)
    assert places == set(range(8192))


@pytest.mark.parametrize(
    "view",
    [
        lambda big: big[3:100, 5:77],
        lambda big: big.t()[2:60, 1:130],
        lambda big: big[::2, ::3],
        lambda big: big[:1].expand(70, -1),
        lambda big: big[:, :1].expand(-1, 70),
        lambda big: big.flip(0)[1:, 1:],
    ],
    ids=["sliced", "transposed", "strided", "expanded-rows", "expanded-columns", "flipped"],
)
def test_views_pack_like_their_contiguous_copy(view, dtype, device):
    big = testing.random_sparse(140, 150, 0.6, dtype=dtype, device=device)
    seen = view(big)
    assert_same_weight(TiledCSL.from_dense(seen), TiledCSL.from_dense(seen.contiguous()))
    assert_same_weight(
        flash_llm.prune_pack(seen, 0.7), flash_llm.prune_pack(seen.contiguous(), 0.7)
    )


def test_thread_count_does_not_change_the_bytes():
    dense = testing.random_sparse(1000, 300, pattern="tiles")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = TiledCSL.from_dense(dense)
        torch.set_num_threads(4)
        assert_same_weight(TiledCSL.from_dense(dense), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k"), [(0, 5), (1, 1), (129, 65), (576, 200), (1024, 4096)])
def test_cpu_and_cuda_pack_the_same_bytes(m, k, dtype):
    for pattern in testing.PATTERNS:
        dense = testing.random_sparse(m, k, 0.7, pattern=pattern, dtype=dtype)
        assert_same_weight(TiledCSL.from_dense(dense), TiledCSL.from_dense(dense.cuda()))
        for sparsity, scope in ((0.5, "row"), (0.63, "layer"), (None, "2:4"), (None, "3:7")):
            assert_same_weight(
                flash_llm.prune_pack(dense, sparsity, scope=scope),
                flash_llm.prune_pack(dense.cuda(), sparsity, scope=scope),
            )


# ---- prune_pack ----


def magnitude_pruned(bits, scope, sparsity):
    """Brute force: drop the smallest magnitudes of each group, of equals the first."""

    def prune(group, count):
        order = np.argsort(group & 0x7FFF, kind="stable")
        out = group.copy()
        out[order[:count]] = 0
        return out

    def count(size):
        return min(size, int(np.floor(sparsity * size + 0.5)))

    m, k = bits.shape
    if scope == "layer":
        return prune(bits.reshape(-1), count(m * k)).reshape(m, k)
    if scope == "row":
        return np.stack([prune(row, count(k)) for row in bits]) if m else bits
    keep, group = map(int, scope.split(":"))
    out = bits.copy()
    for row, first in itertools.product(range(m), range(0, k, group)):
        part = bits[row, first : first + group]
        out[row, first : first + group] = prune(part, len(part) - min(keep, len(part)))
    return out


@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 9), (65, 64), (33, 130), (0, 4), (4, 0)])
@pytest.mark.parametrize(
    ("scope", "sparsity"),
    [
        *itertools.product(("row", "layer"), (0.0, 0.3, 0.5, 0.999, 1.0)),
        *((scope, None) for scope in ("1:1", "1:2", "2:4", "3:7", "8:64")),
    ],
)
def test_prune_pack_drops_the_smallest_magnitudes(m, k, scope, sparsity, dtype, device):
    rng = np.random.default_rng(0)
    # Few distinct magnitudes, so that ties decide, and some specials among them.
    choices = np.array([*SPECIAL[dtype], *range(0x3000, 0x3010), *range(0xB000, 0xB010)])
    bits = rng.choice(choices, (m, k)).astype(np.uint16)
    dense = from_bits(bits, dtype, device)
    packed = flash_llm.prune_pack(dense, sparsity, scope=scope)
    packed.validate()
    expected = without_negative_zero(magnitude_pruned(bits, scope, sparsity))
    np.testing.assert_array_equal(bits_of(packed.to_dense()), expected)
    np.testing.assert_array_equal(bits_of(dense), bits)  # the input is left alone


# ---- the object ----


def test_stats_count_what_a_dense_count_counts(dtype, device):
    dense = testing.random_sparse(300, 200, pattern="tiles", dtype=dtype, device=device)
    packed = TiledCSL.from_dense(dense)
    stats = packed.stats()
    padded = torch.nn.functional.pad(dense.float(), (0, 256 - 200, 0, 384 - 300)).cpu()
    tile_nnz = (padded.view(3, 128, 4, 64) != 0).sum(dim=(1, 3))
    assert stats.nnz == packed.nnz == int(tile_nnz.sum())
    assert stats.tile_nnz_min == int(tile_nnz.min())
    assert stats.tile_nnz_max == int(tile_nnz.max())
    assert stats.tile_nnz_mean == pytest.approx(float(tile_nnz.float().mean()))
    assert stats.padding_entries == int((-tile_nnz % 4).sum())
    assert stats.sparsity == pytest.approx(float((dense == 0).float().mean()))
    assert stats.dense_bytes == dense.nbytes
    assert stats.packed_bytes == 8 * 8 + 13 * 4 + 4 * (stats.nnz + stats.padding_entries)
    assert stats.bytes_per_element == pytest.approx(stats.packed_bytes / dense.numel())


@pytest.mark.parametrize(("m", "k"), [(0, 0), (0, 5), (5, 0)])
def test_stats_of_nothing(m, k):
    stats = TiledCSL.from_dense(torch.zeros(m, k, dtype=torch.float16)).stats()
    assert (stats.nnz, stats.tile_nnz_max, stats.bytes_per_element) == (0, 0, 0.0)
    assert stats.sparsity == 1.0


@pytest.mark.parametrize(("m", "k"), [(0, 0), (1, 1), (129, 65), (576, 200)])
def test_empty_is_what_packing_zeros_gives(m, k, dtype, device):
    empty = TiledCSL.empty(m, k, dtype=dtype, device=device)
    empty.validate()
    assert_same_weight(empty, TiledCSL.from_dense(torch.zeros(m, k, dtype=dtype, device=device)))


def test_from_tensors_takes_what_the_buffers_hold(device):
    packed = TiledCSL.from_dense(testing.random_sparse(130, 70, device=device))
    again = TiledCSL.from_tensors(packed.header.to_tensor(), packed.offsets, packed.payload)
    assert_same_weight(again, packed)
    assert type(ops.PackedWeight.from_tensors(packed.header, *again_buffers(packed))) is TiledCSL


def again_buffers(packed):
    return packed.offsets.clone(), packed.payload.clone()


def test_buffers_may_be_views_into_larger_ones(device):
    dense = testing.random_sparse(130, 70, device=device)
    packed = TiledCSL.from_dense(dense)
    # Starts at an odd word: not aligned to the 16 bytes that kernels load.
    offsets = torch.cat([packed.offsets[:1], packed.offsets])[1:]
    payload = torch.cat([packed.payload[:1], packed.payload])[1:]
    assert payload.data_ptr() % 16 != 0
    moved = TiledCSL.from_tensors(packed.header, offsets, payload)
    assert torch.equal(moved.to_dense(), dense)
    x = testing.small_integers(3, 70, device=device)
    assert torch.equal(flash_llm.spmm(x, moved), flash_llm.spmm(x, packed))
    strided = TiledCSL.from_tensors(
        packed.header,
        torch.stack([packed.offsets, -packed.offsets], dim=1)[:, 0],
        torch.stack([packed.payload, ~packed.payload], dim=1)[:, 0],
    )
    assert torch.equal(strided.to_dense(), dense)


@pytest.mark.gpu
def test_to_moves_the_buffers():
    packed = TiledCSL.from_dense(testing.random_sparse(130, 70))
    moved = packed.to("cuda")
    assert moved.device.type == "cuda" and type(moved) is TiledCSL
    assert_same_weight(moved.to("cpu"), packed)


def test_repr_says_what_it_is():
    text = repr(TiledCSL.from_dense(torch.eye(64, dtype=torch.bfloat16)))
    assert text.startswith("TiledCSL(shape=[64, 64], dtype=torch.bfloat16, device=cpu, nnz=64")


# ---- properties ----


@st.composite
def weights(draw, max_size=200):
    """Bit patterns of a weight of any size and density, uneven from tile to tile, with specials."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    m, k = draw(st.integers(0, max_size)), draw(st.integers(0, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    densities = draw(st.lists(st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]), min_size=1, max_size=6))
    bits = rng.integers(0, 1 << 16, (m, k), dtype=np.uint16)
    special = rng.random((m, k)) < 0.1
    bits[special] = rng.choice(SPECIAL[dtype], special.sum())
    tile = np.arange(m)[:, None] // 128 + np.arange(k)[None, :] // 64
    bits[rng.random((m, k)) >= np.array(densities)[tile % len(densities)]] = 0
    return bits, dtype


@given(weights())
def test_property_pack_then_unpack_keeps_every_bit(weight):
    bits, dtype = weight
    packed = TiledCSL.from_dense(from_bits(bits, dtype))
    packed.validate()
    expected = without_negative_zero(bits)
    np.testing.assert_array_equal(bits_of(packed.to_dense()), expected)
    np.testing.assert_array_equal(decode(packed), expected)
    assert packed.nnz == np.count_nonzero(expected)
    assert 0 <= packed.header.payload_words - packed.nnz <= 3 * (packed.offsets.numel() - 1)


@given(weights(), st.data())
def test_property_order_of_entries_in_a_tile_does_not_matter(weight, data):
    bits, dtype = weight
    packed = TiledCSL.from_dense(from_bits(bits, dtype))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    payload = packed.payload.clone().numpy()
    for first, last in itertools.pairwise(packed.offsets.tolist()):
        rng.shuffle(payload[4 * first : 4 * last])
    shuffled = TiledCSL.from_tensors(packed.header, packed.offsets, torch.from_numpy(payload))
    np.testing.assert_array_equal(bits_of(shuffled.to_dense()), without_negative_zero(bits))


def mutate(data, packed):
    """Change header, offsets or payload in one or several random places."""
    header = list(packed.header)
    offsets, payload = packed.offsets.clone(), packed.payload.clone()
    word = st.one_of(
        st.integers(-(2**31), 2**31 - 1), st.integers(-5, 5), st.sampled_from([2**31 - 1, -(2**31)])
    )
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["header", "offsets", "payload", "bit", "swap", "length"]))
        if what == "header":
            field = data.draw(st.integers(0, 7))
            change = st.one_of(word, st.integers(-(2**63), 2**63 - 1), st.just(header[field] + 1))
            header[field] = max(-(2**63), min(2**63 - 1, data.draw(change)))
        elif what == "offsets":
            index = data.draw(st.integers(0, offsets.numel() - 1)) if offsets.numel() else None
            if index is not None:
                offsets[index] = data.draw(word)
        elif what == "length":
            cut = data.draw(st.integers(0, 8))
            payload = payload[: max(0, payload.numel() - cut)]
            if data.draw(st.booleans()):
                header[7] = payload.numel()
        elif payload.numel():
            index = data.draw(st.integers(0, payload.numel() - 1))
            if what == "payload":
                payload[index] = data.draw(word)
            elif what == "bit":
                payload[index] ^= torch.tensor(1, dtype=torch.int32) << data.draw(
                    st.integers(0, 31)
                )
            else:
                other = data.draw(st.integers(0, payload.numel() - 1))
                payload[[index, other]] = payload[[other, index]]
    return PackedHeader(*header), offsets, payload


@given(weights(max_size=150), st.data())
def test_property_corruption_is_refused_or_harmless(weight, data):
    """validate refuses, or the buffers mean exactly what unpack makes of them; nothing crashes."""
    bits, dtype = weight
    header, offsets, payload = mutate(data, TiledCSL.from_dense(from_bits(bits, dtype)))
    refused = (ValueError, TypeError, NotImplementedError)
    try:
        packed = TiledCSL.from_tensors(header, offsets, payload)
    except refused:
        # The operators check sizes only; whatever they make of the rest, they must survive it.
        small = max(header.m, header.k) <= 1 << 12 and min(header.m, header.k) >= 0
        if small and header.value_type in ops.VALUE_DTYPES:
            broken = TiledCSL(header, offsets, payload)
            try:
                broken.to_dense()
                x = torch.ones(9, header.k, dtype=broken.dtype)
                for config in ("cpu_tiles", "cpu_reference", "dense"):
                    flash_llm.spmm(x, broken, config=config)
            except refused:
                pass
        return
    np.testing.assert_array_equal(bits_of(packed.to_dense()), decode(packed))
    assert packed.nnz == np.count_nonzero(decode(packed))


def test_operators_survive_garbage_buffers(device):
    """Sizes right, content random: any answer, but no crash and no foreign memory."""
    generator = torch.Generator().manual_seed(0)
    packed = TiledCSL.from_dense(testing.random_sparse(300, 200, pattern="tiles"))
    for bound in (8, 1 << 12, 2**31 - 1):
        offsets = torch.randint(-bound, bound, packed.offsets.shape, generator=generator)
        payload = torch.randint(-(2**31), 2**31 - 1, packed.payload.shape, generator=generator)
        broken = TiledCSL(packed.header, offsets.int().to(device), payload.int().to(device))
        with pytest.raises(ValueError, match="flash_llm::validate"):
            broken.validate()
        assert broken.to_dense().shape == (300, 200)
        x = torch.ones(33, 200, dtype=torch.float16, device=device)
        for config in _extension.require().plan_names(device == "cuda"):
            assert flash_llm.spmm(x, broken, config=config).shape == (33, 300)
        if device == "cuda":
            torch.cuda.synchronize()
