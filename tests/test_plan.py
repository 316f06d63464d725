"""Kernel choice as Python sees it: pure, printable, forceable, and tested without a GPU."""

import re

import pytest
import torch
from formats import ALL_FORMATS, FORMATS, each, other_format, plan_names

import flash_llm

H200 = {"compute_capability": 90, "num_sms": 132, "smem_per_sm_bytes": 228 * 1024}
A100 = {"compute_capability": 80, "num_sms": 108, "smem_per_sm_bytes": 164 * 1024}
L40S = {"compute_capability": 89, "num_sms": 142, "smem_per_sm_bytes": 100 * 1024}
BLACKWELL = {"compute_capability": 100, "num_sms": 148, "smem_per_sm_bytes": 228 * 1024}
RTX_5090 = {"compute_capability": 120, "num_sms": 170, "smem_per_sm_bytes": 100 * 1024}
CPU = {}
EACH_DEVICE = each("device", [H200, A100, CPU], ids=["h200", "a100", "cpu"])

M, K = 28672, 7168
NNZ = M * K // 5


def chosen(text):
    """The plan's name: what ``config`` of the operator takes."""
    return text.split()[0]


def names_on(device, format):
    return plan_names(format, "cuda" if "compute_capability" in device else "cpu")


def names_that_run(device, format):
    """Those of `names_on` that the device has the features and the shared memory for."""
    return [name for name in names_on(device, format) if not refusal(device, format, name)]


def refusal(device, format, config):
    """Why a device cannot run a plan, or ""."""
    try:
        flash_llm.explain_plan(M, 8, K, NNZ, format=format, config=config, **device)
    except NotImplementedError as error:
        return str(error)
    return ""


def number(text, name):
    """What the plan's text says that `name` is; 0 when it says nothing."""
    found = re.search(rf"\b{name}=(\d+)", text)
    return int(found[1]) if found else 0


def configs_of(format):
    return {row["name"]: row for row in flash_llm.configs() if row["format"] == format}


def block_m(row):
    """Rows of W that a CTA, or a cluster of them, works on at a time."""
    if row["format"] == "tiled_csl":
        return 128
    return 16 * row["warps"] * row["strips"] * row["cluster"]


def test_configs_describe_each_row():
    rows = flash_llm.configs()
    assert len({row["name"] for row in rows}) == len(rows) > 0
    for row in rows:
        assert set(row) >= {"name", "format", "tile_n", "ctas_per_sm", "smem_bytes"}
        if row["format"] == "tiled_csl":
            assert row["name"].startswith(f"w{row['warps_per_tile']}n{row['tile_n']}")
            assert 0 < row["smem_bytes"] <= 99 * 1024
        elif row["format"] == "quantized_bitmap":
            assert re.fullmatch(
                rf"(sm80_)?quantized{row['tile_n']}(_wgmma)?(_int8x|_fp8x)?", row["name"]
            )
            assert 0 < row["smem_bytes"] <= 227 * 1024
        elif row["format"] == "gather" or row["name"].startswith("rows"):
            assert re.fullmatch(rf"((sm80_)?gather|rows){row['tile_n']}", row["name"])
            assert 0 < row["smem_bytes"] <= 227 * 1024
        else:
            assert re.fullmatch(rf"(sm[89]0_)?n{row['tile_n']}(_99k|_low)?", row["name"])
            assert row["x_stages"] >= 2
            assert block_m(row) % 128 == 0 and row["strips"] in (1, 2)
            assert 0 < row["smem_bytes"] <= 227 * 1024
        assert row["ctas_per_sm"] >= 1
    for format in FORMATS:
        assert names_on(H200, format) == [*configs_of(format), "dense"]
    assert names_on(CPU, "tiled_csl") == ["cpu_tiles", "cpu_reference", "dense"]
    assert names_on(CPU, "bitmap") == names_on(CPU, "gather") == ["cpu_reference", "dense"]
    rows = ["cpu_rows", "cpu_blocks", "cpu_reference", "dense"]
    assert names_on(CPU, "row_bitmap") == rows
    assert plan_names("row_bitmap", "cpu", "int8_float16") == ["cpu_rows_int8x", *rows]


@each(
    ("device", "format"),
    [(H200, "tiled_csl"), (H200, "bitmap"), (A100, "tiled_csl"), (H200, "gather")],
    ids=["h200-tiled_csl", "h200-bitmap", "a100-tiled_csl", "h200-gather"],
)
def test_small_n_takes_the_narrowest_configuration(device, format):
    widths = {name: row["tile_n"] for name, row in configs_of(format).items()}
    for n in range(1, max(widths.values()) + 1):
        name = chosen(flash_llm.explain_plan(M, n, K, NNZ, format=format, **device))
        covering = [width for width in widths.values() if width >= n]
        assert widths[name] == min(covering), n


@each("zeros", [0.5, 0.8])
def test_a_kernel_takes_several_passes_up_to_the_n_that_the_plan_names(gpu_format, zeros):
    nnz = int(M * K * (1 - zeros))
    text = flash_llm.explain_plan(M, 8192, K, nnz, format=gpu_format, **H200)
    limit = int(re.search(r"N > (\d+)", text)[1])
    widest = max(configs_of(gpu_format).values(), key=lambda row: row["tile_n"])
    for n in (limit + 1, 2 * limit, 8192):
        assert chosen(flash_llm.explain_plan(M, n, K, nnz, format=gpu_format, **H200)) == "dense"
    for n in (widest["tile_n"], limit):
        plan = flash_llm.explain_plan(M, n, K, nnz, format=gpu_format, **H200)
        assert chosen(plan) == widest["name"], n


@each(
    ("device", "family", "most"),
    [
        (A100, "sm80_", 256),
        (L40S, "sm80_", 128),
        (BLACKWELL, "sm90_", 256),
        (RTX_5090, "sm90_", 128),
    ],
    ids=["a100", "l40s", "blackwell", "rtx 5090"],
)
def test_a_bitmap_off_hopper_takes_the_family_of_its_gpu_and_says_why(device, family, most):
    for n in (1, 8, 64, most):
        text = flash_llm.explain_plan(M, n, K, NNZ, format="bitmap", **device)
        assert chosen(text).startswith(family) and "mma.sync" in text
    text = flash_llm.explain_plan(M, most + 1, K, NNZ, format="bitmap", **device)
    assert chosen(text) == "dense" and f"N > {most}" in text


def test_a_bitmap_on_a_cpu_takes_the_dense_route_and_says_why():
    text = flash_llm.explain_plan(M, 8, K, NNZ, format="bitmap", **CPU)
    assert chosen(text) == "dense" and "CPU" in text


@each(
    ("capability", "named"), [(80, "8.0"), (86, "8.6"), (89, "8.9"), (100, "10.0"), (120, "12.0")]
)
def test_bitmap_kernels_that_a_gpu_does_not_run_cannot_be_forced(capability, named):
    big, small = (
        {**A100, "compute_capability": capability, "smem_per_sm_bytes": kb * 1024}
        for kb in (228, 100)
    )
    for config, row in configs_of("bitmap").items():
        runs = ("sm80_",) if capability < 90 else ("sm80_", "sm90_", "rows")
        lacks_feature = not config.startswith(runs)
        message = refusal(big, "bitmap", config)
        assert bool(message) == lacks_feature
        if message:
            assert message.startswith(f'flash_llm::explain_plan: config "{config}" ')
            assert "9.0" in message and named in message and '"dense"' in message
        else:
            message = refusal(small, "bitmap", config)
            assert bool(message) == (row["smem_bytes"] > 99 * 1024)
            assert not message or str(row["smem_bytes"]) in message


@each("dtype", ["float16", "bfloat16"])
def test_many_tokens_on_a_cpu(dtype, force_isa):
    # What other instruction sets take: tests/cpp/test_plan.cpp.
    force_isa("portable")
    text = flash_llm.explain_plan(M, 16, K, NNZ, dtype)
    assert chosen(text) == "cpu_rows" and "N <= 16" in text
    text = flash_llm.explain_plan(M, 17, K, NNZ, dtype)
    assert chosen(text) == "cpu_blocks" and "N > 16" in text


# ---- choosing a format ----


@each(
    ("capability", "density", "format", "reason"),
    [
        (0, 0.0, "row_bitmap", "row_bitmap 6 %"),
        (0, 1.0, "row_bitmap", "row_bitmap 106 %"),
        (80, 0.2, "bitmap", "tiled_csl 40 %"),
        (89, 0.5, "bitmap", "tiled_csl 100 %"),
        (100, 0.06, "tiled_csl", "bitmap 13 %"),
        (90, 1.0, "bitmap", "tiled_csl 200 %"),
        (90, 0.08, "bitmap", "tiled_csl 16 %"),
        (90, 0.06, "tiled_csl", "bitmap 13 %"),
        (90, 0.0, "tiled_csl", "bitmap 7 %"),
    ],
)
def test_auto_chooses_a_format_and_says_why(capability, density, format, reason):
    nnz = int(M * K * density)
    name, why = flash_llm.explain_format(M, K, nnz, compute_capability=capability)
    assert name == format and reason in why
    # A plan for "auto", the default, is the plan for that format.
    device = {**H200, "compute_capability": capability} if capability else CPU
    plan = flash_llm.explain_plan(M, 8, K, nnz, **device)
    assert plan == flash_llm.explain_plan(M, 8, K, nnz, format="auto", **device)
    assert plan == flash_llm.explain_plan(M, 8, K, nnz, format=format, **device)
    assert chosen(plan) in names_on(device, format)


@each(
    ("capability", "density", "tokens", "format"),
    [
        (90, 0.1, 1, "gather"),
        (90, 0.1, 8, "gather"),
        (90, 0.1, 9, "bitmap"),
        (90, 0.1, None, "bitmap"),
        (90, 0.2, 4, "gather"),
        (90, 0.2, 8, "bitmap"),
        (90, 0.3, 1, "bitmap"),
        (80, 0.1, 1, "gather"),
        (120, 0.1, 1, "gather"),
        (0, 0.1, 1, "row_bitmap"),
    ],
)
def test_auto_takes_gather_where_few_tokens_are_expected(capability, density, tokens, format):
    name, why = flash_llm.explain_format(
        M, K, int(M * K * density), compute_capability=capability, expected_tokens=tokens
    )
    assert name == format
    assert (format == "gather") == (f"{tokens} tokens" in why)
    small, _ = flash_llm.explain_format(
        *(1024, 1024, int(1024**2 * density)),
        compute_capability=capability,
        expected_tokens=tokens,
    )
    assert small == ("bitmap" if capability else "row_bitmap")


@each("tokens", [0, -1, 1.0, True])
def test_expected_tokens_are_a_positive_integer(tokens):
    error = ValueError if type(tokens) is int else TypeError
    weight = torch.eye(4, dtype=torch.float16)
    for call in (
        lambda: flash_llm.explain_format(4, 4, 4, expected_tokens=tokens),
        lambda: flash_llm.pack(weight, expected_tokens=tokens),
        lambda: flash_llm.prune_pack(weight, 0.5, expected_tokens=tokens),
        lambda: flash_llm.SparseLinear(4, 4, expected_tokens=tokens),
        lambda: flash_llm.sparsify_(torch.nn.Sequential(), expected_tokens=tokens),
    ):
        with pytest.raises(error, match="expected_tokens"):
            call()
    with pytest.raises(ValueError, match="expected_tokens"):
        torch.ops.flash_llm.pack(weight, "auto", -1)


@each(("m", "k"), [(0, 0), (0, 5), (5, 0)])
def test_a_weight_without_elements_has_a_format_too(m, k):
    for capability in (0, 80, 90):
        name, _ = flash_llm.explain_format(m, k, 0, compute_capability=capability)
        assert name in FORMATS


# ---- memory ----


@each("density", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0])
@each("smem_per_sm_bytes", [228 * 1024, 224 * 1024])
def test_a_bitmap_cta_fits_the_shared_memory(density, smem_per_sm_bytes):
    device = {**H200, "smem_per_sm_bytes": smem_per_sm_bytes}
    for m, k in ((1, 1), (512, 512), (M, K), (2**20, 2**14)):
        for name, row in configs_of("bitmap").items():
            text = flash_llm.explain_plan(
                m, 8, k, int(m * k * density), format="bitmap", config=name, **device
            )
            # configs() tells the least: the rings hold every chunk of a column, or each ring of a
            # kernel for other GPUs than Hopper a group of chunks, at 146 units, and two gaps.
            whole_rows = name.startswith("rows")  # without a second kernel
            chunks = 4 if whole_rows else block_m(row) // row["cluster"] // 32
            rings = row.get("rings", max(chunks // 8, 1))
            if "rings" in row:
                chunks = rings * row["group_chunks"]
            least_ring = chunks * 146 * 64 + rings * 2 * 256
            ring_bytes = number(text, "ring_bytes")
            assert ring_bytes >= least_ring and ring_bytes % 64 == 0
            smem_bytes = row["smem_bytes"] + ring_bytes - least_ring
            # The driver takes 1 KiB of each CTA, and there should be room for some of the second
            # kernel.
            assert smem_bytes <= smem_per_sm_bytes - (1 if whole_rows else 4) * 1024, text


@each("n", [1, 8, 33, 64, 129, 1000])
@each("shape", [(1, 1), (500, 70), (4096, 4096), (M, K)])
@each("device", [H200, A100], ids=["h200", "a100"])
def test_workspaces_hold_partial_sums_and_little_else(device, shape, n, format):
    m, k = shape
    for name, row in configs_of(format).items():
        if name in names_that_run(device, format):
            text = flash_llm.explain_plan(m, n, k, m * k // 2, format=format, config=name, **device)
            ctas = number(text, "ctas")
            assert 1 <= ctas <= device["num_sms"] * row["ctas_per_sm"]
            if name.startswith("rows") or format == "gather":  # of up to 8192 columns
                assert number(text, "workspace_bytes") == 0
                continue
            blocks = -(-m // block_m(row)) * -(-n // row["tile_n"])
            packed_x = 2 * (n + row["tile_n"]) * (k + 64) if row.get("packed_x") else 0
            # Never more than the sums of the result itself and of two blocks for each CTA.
            bound = (blocks + 2 * ctas) * block_m(row) * row["tile_n"] * 4 + packed_x
            assert 0 < number(text, "workspace_bytes") <= bound, text
    dense = flash_llm.explain_plan(m, n, k, 0, format=format, config="dense", **device)
    assert number(dense, "workspace_bytes") == 2 * m * k


def test_the_bitmap_workspace_stops_growing_with_the_tokens():
    wide = [name for name, row in configs_of("bitmap").items() if row["tile_n"] > 64]
    assert wide
    for name in wide:
        sizes = {
            number(
                flash_llm.explain_plan(M, n, K, NNZ, format="bitmap", config=name, **H200),
                "workspace_bytes",
            )
            for n in (129, 1024, 2**20)
        }
        assert len(sizes) == 1 and sizes.pop() < 64 * 2**20


# ---- forcing and refusing ----


@EACH_DEVICE
def test_prefill_takes_the_dense_route(device, format):
    text = flash_llm.explain_plan(M, 4096, K, NNZ, format=format, **device)
    if (device, format) == (CPU, "row_bitmap"):
        return  # which has routes of its own; test_many_tokens_on_a_cpu
    assert chosen(text) == "dense"
    assert f"workspace_bytes={M * K * 2}" in text


@each("value_type", ["float16", "bfloat16"])
@each("shape", [(0, 0, 0), (1, 1, 1), (129, 65, 65), (M, 2048, K)])
@EACH_DEVICE
def test_every_plan_can_be_forced_on_every_shape(device, format, shape, value_type):
    m, n, k = shape
    for name in names_that_run(device, format):
        text = flash_llm.explain_plan(
            m, n, k, m * k // 2, value_type, format=format, config=name, **device
        )
        assert chosen(text) == name
        assert "forced" in text


@each(("format", "config"), [("tiled_csl", "w1n8"), ("bitmap", "n8")])
def test_the_grid_can_be_forced(format, config):
    for asked in ({"config": config}, {}):
        text = flash_llm.explain_plan(M, 8, K, NNZ, format=format, ctas=77, **asked, **H200)
        assert "ctas=77 " in text and chosen(text) == config
    # Never more CTAs than units of work.
    text = flash_llm.explain_plan(1, 8, 1, 1, format=format, config=config, ctas=77, **H200)
    assert "ctas=1 " in text


def test_the_same_question_has_the_same_answer():
    first = flash_llm.explain_plan(M, 16, K, NNZ, **H200)
    flash_llm.explain_plan(1, 1, 1, 1, format="bitmap")
    assert flash_llm.explain_plan(M, 16, K, NNZ, **H200) == first


@each("capability", [50, 70, 75])
def test_old_gpus_are_refused_with_their_number(capability, format):
    device = {**A100, "compute_capability": capability}
    with pytest.raises(NotImplementedError, match=rf"8\.0.*{capability // 10}\.") as caught:
        flash_llm.explain_plan(M, 8, K, NNZ, format=format, **device)
    assert str(caught.value).startswith("flash_llm::explain_plan: ")


@each("config", ["fastest", "", "AUTO", "kernel of the other", "other device"])
@EACH_DEVICE
def test_unknown_configurations_are_refused_with_the_known_ones(config, device, format):
    on_cuda = device is not CPU
    config = {
        "kernel of the other": plan_names(other_format(format), "cuda")[0],
        "other device": "cpu_rows" if on_cuda else "n8",
    }.get(config, config)
    with pytest.raises(ValueError) as caught:
        flash_llm.explain_plan(M, 8, K, NNZ, format=format, config=config, **device)
    message = str(caught.value)
    assert f'"{config}"' in message and f'"{format}"' in message
    assert ("CUDA" if on_cuda else "CPU") in message
    for name in names_on(device, format):
        assert f'"{name}"' in message


@each("ctas", [-1, 65536, 2**62])
def test_grids_that_cannot_be_launched_are_refused(ctas, format):
    with pytest.raises(ValueError, match=rf"ctas .*\[0, 65535\].*{ctas}"):
        flash_llm.explain_plan(M, 8, K, NNZ, format=format, ctas=ctas, **H200)


@each("device", [H200, CPU], ids=["h200", "cpu"])
@each("position", [0, 1, 2])
@each("size", [2**31, 2**40, 2**62, -1, -(2**62)])
def test_sizes_that_32_bits_cannot_index_are_refused(device, position, size, format):
    shape = [64, 8, 64]
    shape[position] = size
    with pytest.raises(ValueError):
        flash_llm.explain_plan(*shape, 0, format=format, **device)


def test_tiles_of_work_that_32_bits_cannot_count_are_refused(gpu_format):
    with pytest.raises(ValueError, match="M=2147483647 N=8 K=65536"):
        flash_llm.explain_plan(2**31 - 1, 8, 65536, 0, format=gpu_format, **H200)


@each("format", ["csr", "", "BITMAP", "Auto"])
def test_unknown_formats_are_refused_with_the_known_ones(format):
    known = ".*".join(f'"{name}"' for name in ("auto", *ALL_FORMATS, format))
    with pytest.raises(ValueError, match=f"flash_llm::explain_plan: format .*{known}"):
        flash_llm.explain_plan(M, 8, K, NNZ, format=format, **H200)
    if format != "Auto":
        with pytest.raises(ValueError, match="flash_llm::plan_names: format "):
            plan_names(format, "cpu")


def test_value_types_other_than_16_bit_floats_are_refused():
    with pytest.raises(TypeError, match="float32"):
        flash_llm.explain_plan(M, 8, K, NNZ, "float32", **H200)
