"""What holds for every packed format: packing, unpacking, validation, and the object."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from formats import (
    DTYPES,
    FORMATS,
    SPECIAL,
    assert_same_weight,
    bits_of,
    each,
    from_bits,
    plan_names,
    read,
    runs_here,
    weights,
    without_negative_zero,
)
from hypothesis import given
from hypothesis import strategies as st

import flash_llm
from flash_llm import Bitmap, Gather, RowBitmap, TiledCSL, ops, testing
from flash_llm.ops import PackedHeader, PackedWeight

SIZES = (0, 1, 8, 63, 65, 129, 576)


@each("m", SIZES)
@each("k", SIZES)
def test_round_trip_of_every_size_and_pattern(m, k, format, dtype, device):
    for pattern, sparsity in (("tiles", 0.0), ("uniform", 0.9), ("rows", 0.5), ("columns", 0.5)):
        dense = testing.random_sparse(m, k, sparsity, pattern=pattern, dtype=dtype, device=device)
        packed = flash_llm.pack(dense, format)
        packed.validate()
        assert packed.FORMAT == format and packed.shape == (m, k) and packed.dtype == dtype
        assert packed.nnz == int((dense != 0).sum())
        assert torch.equal(packed.to_dense(), dense), pattern
        assert packed.to_dense().device == dense.device
        np.testing.assert_array_equal(read(packed), bits_of(dense), err_msg=pattern)


@each("sparsity", [0.0, 0.49, 0.5, 0.51, 1.0])
@each("dtype", DTYPES)
def test_any_density_survives_past_the_published_limit_of_half(sparsity, format, dtype, device):
    dense = testing.random_sparse(300, 200, sparsity, dtype=dtype, device=device)
    assert torch.equal(flash_llm.pack(dense, format).to_dense(), dense)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_random_weights_do_not_depend_on_the_default_dtype(default):
    def draw():
        return [
            make(130, 300, sparsity=0.9) for make in (testing.random_sparse, testing.small_integers)
        ]

    expected = draw()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # as vLLM does
    try:
        found = draw()
    finally:
        torch.set_default_dtype(before)
    assert all(map(torch.equal, found, expected))


@each("dtype", DTYPES)
def test_every_bit_pattern_survives(format, dtype, device):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(128, 512)
    packed = flash_llm.pack(from_bits(bits, dtype, device), format)
    packed.validate()
    np.testing.assert_array_equal(bits_of(packed.to_dense()), without_negative_zero(bits))
    np.testing.assert_array_equal(read(packed), without_negative_zero(bits))
    # Both zeros are dropped, and come back as +0.
    assert packed.nnz == (1 << 16) - 2


@pytest.mark.gpu
def test_packing_a_weight_that_another_stream_changes_corrupts_nothing(gpu_format):
    weight = testing.random_sparse(1024, 2048, 0.0, device="cuda")
    others = [weight * (torch.rand_like(weight) < density) for density in (0.1, 1.0)]
    stream, changes = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(changes, stream=stream):
        for other in others * 20:
            weight.copy_(other)
    # Whether a round changes the weight between two reads depends on what else the GPU does, and on
    # how long the format takes to pack.
    refused, rounds, replays = 0, 0, 1
    while rounds < 20 or (not refused and rounds < 100):
        rounds += 1
        with torch.cuda.stream(stream):
            for _ in range(replays):
                changes.replay()
        try:
            flash_llm.pack(weight, gpu_format).validate()
        except RuntimeError as error:
            assert "flash_llm::pack: dense" in str(error)
            refused += 1
        stream.synchronize()
        if not refused:
            replays = min(2 * replays, 4096)
    assert refused > 0
    for other in others:
        assert torch.equal(flash_llm.pack(other, gpu_format).to_dense(), other)


@each("dtype", DTYPES)
def test_a_negative_zero_is_a_zero(format, dtype, device):
    """Pruning by ``weight * mask`` leaves -0 where a weight was negative: it must cost nothing."""
    weight = testing.random_sparse(130, 300, 0.0, dtype=dtype, device=device)
    masked = weight * (torch.rand(130, 300, device=device) < 0.4)
    plain = masked + 0.0  # -0 + 0 is +0
    assert bool((masked.signbit() & (masked == 0)).any()) and not plain[plain == 0].signbit().any()
    for pack in (flash_llm.pack, lambda w, f: flash_llm.prune_pack(w, 0.0, format=f)):
        for name in (format, "auto"):
            assert_same_weight(pack(masked, name), pack(plain, name))
    packed = flash_llm.pack(masked, format)
    assert packed.nnz == int(masked.count_nonzero()) == packed.stats().nnz
    np.testing.assert_array_equal(bits_of(packed.to_dense()), bits_of(plain))
    x = testing.small_integers(3, 300, dtype=dtype, device=device)
    assert torch.equal(flash_llm.spmm(x, packed), flash_llm.spmm(x, flash_llm.pack(plain, format)))


@each(
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
@each("dtype", DTYPES)
def test_views_pack_like_their_contiguous_copy(view, format, dtype, device):
    big = testing.random_sparse(140, 150, 0.6, dtype=dtype, device=device)
    seen = view(big)
    packed = flash_llm.pack(seen, format)
    assert_same_weight(packed, flash_llm.pack(seen.contiguous(), format))
    assert torch.equal(packed.to_dense(), seen)
    assert_same_weight(
        flash_llm.prune_pack(seen, 0.7, format=format),
        flash_llm.prune_pack(seen.contiguous(), 0.7, format=format),
    )


def test_thread_count_does_not_change_the_bytes(format):
    dense = testing.random_sparse(1000, 300, pattern="tiles")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = flash_llm.pack(dense, format)
        torch.set_num_threads(4)
        assert_same_weight(flash_llm.pack(dense, format), one)
        assert torch.equal(one.to_dense(), dense)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@each(("m", "k"), [(0, 5), (1, 1), (129, 65), (576, 200), (576, 2100), (9, 8200)])
@each("dtype", DTYPES)
def test_cpu_and_cuda_pack_the_same_bytes(m, k, format, dtype):
    for pattern in testing.PATTERNS:
        dense = testing.random_sparse(m, k, 0.7, pattern=pattern, dtype=dtype)
        there = flash_llm.pack(dense.cuda(), format)
        assert there.device.type == "cuda"
        assert_same_weight(flash_llm.pack(dense, format), there)
        for sparsity, scope in ((0.5, "row"), (0.63, "layer"), (None, "2:4"), (None, "3:7")):
            assert_same_weight(
                flash_llm.prune_pack(dense, sparsity, scope=scope, format=format),
                flash_llm.prune_pack(dense.cuda(), sparsity, scope=scope, format=format),
            )


@pytest.mark.gpu
@each("sparsity", [0.0, 0.05, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99, 1.0])
@each("pattern", testing.PATTERNS)
def test_cpu_and_cuda_pack_the_same_bytes_at_any_density(sparsity, pattern, format):
    for m, k in ((1030, 700), (40, 1280)):
        dense = testing.random_sparse(m, k, sparsity, pattern=pattern)
        there = flash_llm.pack(dense.cuda(), format)
        assert_same_weight(flash_llm.pack(dense, format), there)
        assert torch.equal(there.to_dense().cpu(), dense)


@pytest.mark.gpu
@each("dtype", DTYPES)
def test_cpu_and_cuda_pack_the_same_specials(format, dtype):
    rng = np.random.default_rng(0)
    for density in (0.05, 0.2, 0.9):
        bits = rng.choice(np.array(SPECIAL[dtype], np.uint16), (600, 640))
        bits[rng.random(bits.shape) >= density] = 0
        dense = from_bits(bits, dtype)
        there = flash_llm.pack(dense.cuda(), format)
        assert_same_weight(flash_llm.pack(dense, format), there)
        np.testing.assert_array_equal(bits_of(there.to_dense()), without_negative_zero(bits))


# ---- format="auto" ----


def test_auto_takes_the_format_of_a_cpu():
    dense = testing.random_sparse(130, 70)
    assert type(flash_llm.pack(dense)) is type(flash_llm.prune_pack(dense, 0.5)) is RowBitmap
    assert_same_weight(flash_llm.pack(dense), flash_llm.pack(dense, "auto"))
    assert_same_weight(flash_llm.pack(dense), RowBitmap.from_dense(dense))


@pytest.mark.gpu
@each("sparsity", [0.0, 0.5, 0.9, 0.96, 1.0])
@each("dtype", DTYPES)
def test_auto_on_a_gpu_takes_what_explain_format_says(sparsity, dtype):
    dense = testing.random_sparse(600, 520, sparsity, dtype=dtype, device="cuda")
    nnz = int((dense != 0).sum())
    major, minor = torch.cuda.get_device_capability()
    name, _ = flash_llm.explain_format(600, 520, nnz, compute_capability=10 * major + minor)
    assert name == ("bitmap" if sparsity < 0.93 else "tiled_csl")
    packed = flash_llm.pack(dense)
    assert packed.FORMAT == name and torch.equal(packed.to_dense(), dense)
    # What counts is the density after pruning.
    for pruned_to in (0.5, 0.99):
        packed = flash_llm.prune_pack(dense, pruned_to)
        kept = int((packed.to_dense() != 0).sum())
        wants_bitmap = kept >= 0.07 * dense.numel()
        assert type(packed) is (Bitmap if wants_bitmap else TiledCSL)


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


@each(("m", "k"), [(1, 1), (7, 9), (65, 64), (33, 130), (0, 4), (4, 0)])
@each(
    ("scope", "sparsity"),
    [
        *itertools.product(("row", "layer"), (0.0, 0.3, 0.5, 0.999, 1.0)),
        *((scope, None) for scope in ("1:1", "1:2", "2:4", "3:7", "8:64")),
    ],
)
def test_prune_pack_drops_the_smallest_magnitudes(m, k, scope, sparsity, format, dtype, device):
    rng = np.random.default_rng(0)
    # Few distinct magnitudes, so that ties decide, and some specials among them.
    choices = np.array([*SPECIAL[dtype], *range(0x3000, 0x3010), *range(0xB000, 0xB010)])
    bits = rng.choice(choices, (m, k)).astype(np.uint16)
    dense = from_bits(bits, dtype, device)
    packed = flash_llm.prune_pack(dense, sparsity, scope=scope, format=format)
    packed.validate()
    expected = without_negative_zero(magnitude_pruned(bits, scope, sparsity))
    np.testing.assert_array_equal(bits_of(packed.to_dense()), expected)
    np.testing.assert_array_equal(bits_of(dense), bits)  # the input is left alone


# ---- the object ----


@each(("m", "k"), [(0, 0), (1, 1), (129, 65), (576, 200)])
@each("dtype", DTYPES)
def test_empty_is_what_packing_zeros_gives(m, k, format, dtype, device):
    empty = PackedWeight.class_for(format).empty(m, k, dtype=dtype, device=device)
    empty.validate()
    zeros = torch.zeros(m, k, dtype=dtype, device=device)
    assert_same_weight(empty, flash_llm.pack(zeros, format))
    assert_same_weight(empty, flash_llm.pack(-zeros, format))


@each(("m", "k"), [(0, 0), (0, 5), (5, 0)])
def test_stats_of_nothing(m, k, format):
    stats = flash_llm.pack(torch.zeros(m, k, dtype=torch.float16), format).stats()
    assert (stats.nnz, stats.dense_bytes, stats.bytes_per_element) == (0, 0, 0.0)
    assert stats.sparsity == 1.0


def test_from_tensors_takes_what_the_buffers_hold(format, device):
    packed = flash_llm.pack(testing.random_sparse(130, 70, device=device), format)
    again = type(packed).from_tensors(packed.header.to_tensor(), packed.offsets, packed.payload)
    assert_same_weight(again, packed)
    offsets, payload = packed.offsets.clone(), packed.payload.clone()
    assert type(PackedWeight.from_tensors(packed.header, offsets, payload)) is type(packed)


def test_classes_pack_into_their_own_format(device):
    dense = testing.random_sparse(130, 70, device=device)
    for cls in (TiledCSL, Bitmap, RowBitmap, Gather):
        assert PackedWeight.class_for(cls.FORMAT) is PackedWeight.class_for(cls.FORMAT_ID) is cls
        assert type(cls.from_dense(dense)) is cls
        assert_same_weight(cls.from_dense(dense), flash_llm.pack(dense, cls.FORMAT))
    classes = [PackedWeight.class_for(format) for format in FORMATS]
    assert classes == [TiledCSL, Bitmap, RowBitmap, Gather]


def test_buffers_may_be_views_into_larger_ones(format, device):
    dense = testing.random_sparse(130, 70, device=device)
    packed = flash_llm.pack(dense, format)
    # Starts at an odd word: not aligned to the 16 bytes that kernels load.
    offsets = torch.cat([packed.offsets[:1], packed.offsets])[1:]
    payload = torch.cat([packed.payload[:1], packed.payload])[1:]
    assert payload.data_ptr() % 16 != 0
    moved = PackedWeight.from_tensors(packed.header, offsets, payload)
    assert torch.equal(moved.to_dense(), dense)
    x = testing.small_integers(3, 70, device=device)
    assert torch.equal(flash_llm.spmm(x, moved), flash_llm.spmm(x, packed))
    strided = PackedWeight.from_tensors(
        packed.header,
        torch.stack([packed.offsets, -packed.offsets], dim=1)[:, 0],
        torch.stack([packed.payload, ~packed.payload], dim=1)[:, 0],
    )
    assert torch.equal(strided.to_dense(), dense)
    assert torch.equal(flash_llm.spmm(x, strided), flash_llm.spmm(x, packed))


@pytest.mark.gpu
def test_to_moves_the_buffers(format):
    packed = flash_llm.pack(testing.random_sparse(130, 70), format)
    moved = packed.to("cuda")
    assert moved.device.type == "cuda" and type(moved) is type(packed)
    assert_same_weight(moved.to("cpu"), packed)


def test_repr_says_what_it_is(format):
    packed = flash_llm.pack(torch.eye(64, dtype=torch.bfloat16), format)
    text = repr(packed)
    assert text.startswith(
        f"{type(packed).__name__}(shape=[64, 64], dtype=torch.bfloat16, device=cpu, nnz=64"
    )


# ---- properties ----


@given(weights(), st.sampled_from(FORMATS))
def test_property_pack_then_unpack_keeps_every_bit(weight, format):
    bits, dtype = weight
    packed = flash_llm.pack(from_bits(bits, dtype), format)
    packed.validate()
    expected = without_negative_zero(bits)
    np.testing.assert_array_equal(bits_of(packed.to_dense()), expected)
    np.testing.assert_array_equal(read(packed), expected)
    assert packed.nnz == np.count_nonzero(expected)


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
            # Often near an end, where a bitmap has its bits and down offsets.
            last = payload.numel() - 1
            place = st.one_of(
                st.integers(0, last),
                st.integers(max(0, last - 160), last),
                st.integers(0, min(last, 272)),
            )
            index = data.draw(place)
            if what == "payload":
                payload[index] = data.draw(word)
            elif what == "bit":
                payload[index] ^= torch.tensor(1, dtype=torch.int32) << data.draw(
                    st.integers(0, 31)
                )
            else:
                other = data.draw(place)
                payload[[index, other]] = payload[[other, index]]
    return PackedHeader(*header), offsets, payload


@given(weights(max_size=150), st.sampled_from(FORMATS), st.data())
def test_property_corruption_is_refused_or_harmless(weight, format, data):
    """validate refuses, or the buffers mean exactly what unpack makes of them; nothing crashes."""
    bits, dtype = weight
    header, offsets, payload = mutate(data, flash_llm.pack(from_bits(bits, dtype), format))
    refused = (ValueError, TypeError, NotImplementedError)
    try:
        packed = PackedWeight.from_tensors(header, offsets, payload)
    except refused:
        # The operators check sizes only; whatever they make of the rest, they must survive it.
        small = max(header.m, header.k) <= 1 << 12 and min(header.m, header.k) >= 0
        if small and header.value_type in ops.VALUE_DTYPES:
            broken = PackedWeight.class_for(format)(header, offsets, payload)
            with contextlib.suppress(*refused):
                broken.to_dense()
            x = torch.ones(9, header.k, dtype=broken.dtype)
            for config in plan_names(format, "cpu"):
                with contextlib.suppress(*refused):
                    flash_llm.spmm(x, broken, config=config)
        return
    np.testing.assert_array_equal(bits_of(packed.to_dense()), read(packed))
    assert packed.nnz == np.count_nonzero(read(packed))


@each("garbage", ["offsets", "payload", "both"])
def test_operators_survive_garbage_buffers(garbage, format, device):
    """Sizes right, content random: any answer, but no crash and no foreign memory."""
    generator = torch.Generator().manual_seed(0)
    packed = flash_llm.pack(testing.random_sparse(600, 400, pattern="tiles"), format)
    x = torch.ones(33, 400, dtype=torch.float16, device=device)
    for bound in (8, 1 << 12, 2**31 - 1):
        offsets, payload = packed.offsets, packed.payload
        if garbage != "payload":
            offsets = torch.randint(-bound, bound, offsets.shape, generator=generator).int()
        if garbage != "offsets":
            payload = torch.randint(-(2**31), 2**31, payload.shape, generator=generator).int()
        broken = type(packed)(packed.header, offsets.to(device), payload.to(device))
        with pytest.raises(ValueError, match="flash_llm::validate"):
            broken.validate()
        assert broken.to_dense().shape == (600, 400)
        for config in plan_names(format, device):
            if runs_here(format, device, config):
                assert flash_llm.spmm(x, broken, config=config).shape == (33, 600)
        if device == "cuda":
            torch.cuda.synchronize()


def test_slices_have_the_bytes_of_packing_the_slice(format, device):
    weight = testing.random_sparse(1100, 300, 0.85, dtype=torch.bfloat16, device=device, seed=3)
    packed = flash_llm.pack(weight, format)
    natural = {"tiled_csl": 128, "bitmap": 512, "row_bitmap": 4, "gather": 512}[format]
    rows = [(0, natural), (natural, 2 * natural), (natural, 1100), (0, 1100), (3, 700), (7, 7)]
    columns = [(0, 300), (0, 128), (5, 299), (300, 300)]
    for (first, last), (left, right) in itertools.product(rows, columns):
        part = packed.slice(slice(first, last), slice(left, right))
        expected = flash_llm.pack(weight[first:last, left:right], format)
        assert part.header == expected.header, (first, last, left, right)
        assert torch.equal(part.offsets, expected.offsets)
        assert torch.equal(part.payload, expected.payload)
        part.validate()


def test_concatenations_have_the_bytes_of_packing_the_concatenation(format, device):
    weight = testing.random_sparse(1200, 200, 0.6, dtype=torch.bfloat16, device=device, seed=4)
    for cuts in ([512, 1024], [128, 640], [4, 516], [1, 700], [0, 512], [], [1200]):
        bounds = [0, *cuts, 1200]
        parts = [weight[a:b] for a, b in itertools.pairwise(bounds)]
        joined = flash_llm.PackedWeight.concat([flash_llm.pack(part, format) for part in parts])
        expected = flash_llm.pack(weight, format)
        assert joined.header == expected.header, cuts
        assert torch.equal(joined.offsets, expected.offsets)
        assert torch.equal(joined.payload, expected.payload)


def test_slice_and_concat_refuse_what_does_not_fit(device):
    packed = flash_llm.pack(
        testing.random_sparse(64, 96, 0.5, dtype=torch.bfloat16, device=device, seed=5),
        "row_bitmap",
    )
    with pytest.raises(ValueError, match=r"rows .*slice\(0, 64, 2\)"):
        packed.slice(slice(0, 64, 2))
    with pytest.raises(ValueError, match="concat: .*weight"):
        flash_llm.PackedWeight.concat([])
    narrow = flash_llm.pack(
        testing.random_sparse(64, 95, 0.5, dtype=torch.bfloat16, device=device, seed=5),
        "row_bitmap",
    )
    with pytest.raises(ValueError, match="K=96 .*weight 1 .*95"):
        flash_llm.PackedWeight.concat([packed, narrow])
    for other, named in (
        (flash_llm.pack(packed.to_dense(), "tiled_csl"), "tiled_csl"),
        (flash_llm.pack(packed.to_dense().half(), "row_bitmap"), "float16"),
    ):
        with pytest.raises(TypeError, match=f"row_bitmap.* bfloat16.*weight 1 .*{named}"):
            flash_llm.PackedWeight.concat([packed, other])
    broken = dataclasses.replace(packed, offsets=packed.offsets.flip(0))
    with pytest.raises(ValueError, match="flash_llm::slice: offsets .*rows 4 to 8"):
        broken.slice(slice(4, 8))
