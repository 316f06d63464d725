"""Folders of compressed-tensors with sparse and 8-bit weights: what is packed, what is refused."""

import json
import re

import pytest
import torch
from compressed_tensors_files import as_sparse_bitmask, as_two_four, quantization_config
from safetensors.torch import load_file, save_file
from test_convert import pruned, save_tensors, zeros_among
from test_hf import sparse_layers

import flash_llm
from flash_llm import SparsifyReport, convert_checkpoint, ops, quantize
from flash_llm.io.checkpoint import Checkpoint, checkpoint_files
from flash_llm.linear import BUFFERS

BITMASK = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}


def converted(folder, **options):
    """Convert ``old`` in a folder; return the report's rows by layer, and the new checkpoint."""
    report = convert_checkpoint(folder / "old", folder / "new", pack_unprofitable=True, **options)
    checkpoint = Checkpoint(checkpoint_files(folder / "new"))
    return {row.name: row for row in report.rows}, checkpoint


# ---- sparse formats ----


@pytest.mark.parametrize("whole_names", [False, True])  # up to 0.8.1; from 0.9 on
@pytest.mark.parametrize("cols", [1, 63, 64, 65, 200])
def test_sparse_bitmask_files_are_read(tmp_path, cols, whole_names):
    weights = {"a": zeros_among(130, cols), "b": zeros_among(64, cols, dtype=torch.bfloat16)}
    norm, suffix = torch.randn(cols).half(), ".weight" if whole_names else ""
    tensors = {**as_sparse_bitmask(f"norm{suffix}", norm), "a.bias": torch.ones(130).half()}
    for name, weight in weights.items():
        tensors |= as_sparse_bitmask(name + suffix, weight)
    if whole_names:  # 0.8.1 stored all parameters so, not only weights
        tensors |= as_sparse_bitmask("a.bias", tensors.pop("a.bias"))
    save_tensors(tmp_path / "old", tensors, {"quantization_config": BITMASK})
    assert {row.name for row in flash_llm.inspect_checkpoint(tmp_path / "old").rows} == {"a", "b"}
    _, checkpoint = converted(tmp_path)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.weight(name).to_dense(), weight)
    assert torch.equal(checkpoint.tensor("norm.weight"), norm)
    assert torch.equal(checkpoint.tensor("a.bias"), torch.ones(130).half())
    assert "b.bias" not in checkpoint.tensors
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "flash_llm", "version": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_two_four_files_are_read(tmp_path, dtype):
    weight = zeros_among(130, 72, sparsity=0.0, dtype=dtype)
    weight.reshape(130, 18, 4)[..., ::2] = 0
    weight[5] = 0
    config = {**BITMASK, "sparsity_config": {"format": "sparse-24-bitmask"}}
    save_tensors(tmp_path / "old", as_two_four("a", weight), {"quantization_config": config})
    rows, checkpoint = converted(tmp_path, dtype=torch.float16)
    assert rows["a"].sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.equal(checkpoint.weight("a").to_dense(), weight.half())


@pytest.mark.parametrize("whole_names", [False, True])
def test_models_of_compressed_tensors_load_packed(tmp_path, whole_names):
    model = pruned("llama", tmp_path).half()
    model.save_pretrained(tmp_path / "half")
    tensors = {}
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        prefix = name if whole_names else name.removesuffix(".weight")
        linear = name.endswith("_proj.weight")
        tensors |= as_sparse_bitmask(prefix, tensor) if whole_names or linear else {name: tensor}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    save_tensors(tmp_path / "old", tensors, {**config, "quantization_config": BITMASK})
    converted(tmp_path)
    assert len(sparse_layers(flash_llm.from_pretrained(tmp_path / "new"))) == 14
    assert flash_llm.verify_checkpoint(tmp_path / "old", tmp_path / "half").max_relative_error == 0


def test_parts_of_a_sparse_bitmask_may_be_in_several_files(tmp_path):
    weight = zeros_among(256, 256)
    folder = tmp_path / "old"
    folder.mkdir()
    places = {}
    for i, (name, tensor) in enumerate(as_sparse_bitmask("a", weight).items()):
        save_file({name: tensor}, folder / f"{i}.safetensors")
        places[name] = f"{i}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    _, checkpoint = converted(tmp_path)
    assert torch.equal(checkpoint.weight("a").to_dense(), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("a.compressed"),
            r"model\.safetensors has a\.bitmask, but a\.compressed is missing",
        ),
        (lambda t: t.pop("a.row_offsets"), r"a\.row_offsets is missing"),
        (lambda t: t.update({"a.shape": torch.tensor([64, 99])}), r"a\.bitmask has shape"),
        (lambda t: t.update({"a.shape": torch.tensor([[64]])}), r"a\.shape must be one-dim"),
        (lambda t: t.update({"a.compressed": torch.ones(3).half()}), r"a\.compressed must have"),
    ],
)
def test_broken_sparse_bitmask_files_are_refused(tmp_path, change, message):
    tensors = as_sparse_bitmask("a", zeros_among(64, 64))
    change(tensors)
    save_tensors(tmp_path / "old", tensors)
    with pytest.raises(ValueError, match=message):
        converted(tmp_path)
    assert not (tmp_path / "new").exists()


# ---- quantised weights ----

M, K, GROUP = 48, 128, 32
PACKED = [f"a.{buffer}" for buffer in BUFFERS]
SPARSE = {
    "dense": lambda values: {"a.weight": values},
    "sparse-bitmask": lambda values: as_sparse_bitmask("a", values),
    "sparse-24-bitmask": lambda values: as_two_four("a", values),
}
SCALES = {"tensor": (1,), "channel": (M, 1), "vector": (M,), "group": (M, K // GROUP)}


def quantised(dtype, scales, scale_dtype=torch.bfloat16):
    """Values with two zeros in every four columns, and their scales; all values of int8 occur."""
    torch.manual_seed(0)
    if dtype == torch.int8:
        values = (torch.arange(M * K) % 255 - 127).to(torch.int8).reshape(M, K)
    else:
        values = torch.randn(M, K).to(dtype)
    values.view(torch.uint8).reshape(M, K // 4, 4)[..., 1:3] = 0
    return values, (torch.rand(SCALES[scales]) / 100 + 0.01).to(scale_dtype)


def save_quantised(folder, values, scales, format, sparse="dense", **beside):
    beside = {f"a.{name}": tensor for name, tensor in beside.items()}
    tensors = {**SPARSE[sparse](values), "a.weight_scale": scales, **beside}
    tensors["norm.weight"] = torch.ones(4).bfloat16()
    config = {"quantization_config": quantization_config(format, sparse), "dtype": "bfloat16"}
    save_tensors(folder / "old", tensors, config)


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("scales", ["tensor", "channel", "vector"])
def test_int8_values_and_scales_are_packed_as_they_are(tmp_path, sparse, scales):
    values, stored = quantised(torch.int8, scales)
    zeros = torch.zeros_like(stored, dtype=torch.int8)
    beside = {"weight_zero_point": zeros, "input_scale": torch.ones(1)}
    save_quantised(tmp_path, values, stored, "int-quantized", sparse, **beside)
    rows, checkpoint = converted(tmp_path)
    assert rows["a"].values == "int8" and "-128" not in rows["a"].reason
    packed = checkpoint.weight("a")
    found, found_scales = packed.to_quantized()
    assert packed.dtype == torch.bfloat16 and torch.equal(found, values)
    assert torch.equal(found_scales, stored.float().flatten().expand(M))
    assert checkpoint.tensors == {*PACKED, "norm.weight"}
    error = flash_llm.verify_checkpoint(tmp_path / "new", tmp_path / "old").max_relative_error
    assert error == 0


def test_the_lowest_int8_value_is_clipped_and_counted(tmp_path):
    values, scales = quantised(torch.int8, "channel")
    values[3, 0] = values[7, 4] = -128
    save_quantised(tmp_path, values, scales, "int-quantized", "sparse-bitmask")
    rows, checkpoint = converted(tmp_path)
    assert "-128 became -127: 2;" in rows["a"].reason
    assert "-128 became -127" in SparsifyReport((rows["a"],)).summary()
    assert torch.equal(checkpoint.weight("a").to_quantized()[0], values.clamp(min=-127))


def expanded(of_groups):
    return of_groups.repeat_interleave(GROUP, 1)


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("scales", ["tensor", "channel", "group"])
def test_float8_values_with_scales_of_rows_stay_as_they_are(tmp_path, sparse, scales):
    values, stored = quantised(torch.float8_e4m3fn, scales)
    save_quantised(tmp_path, values, stored, "float-quantized", sparse)
    rows, checkpoint = converted(tmp_path)
    of_elements = expanded(stored) if scales == "group" else stored
    expected = (values.double() * of_elements.double()).bfloat16()
    assert rows["a"].values == ("16-bit" if scales == "group" else "fp8_e4m3")
    assert torch.equal(checkpoint.weight("a").to_dense(), expected)


@pytest.mark.parametrize("case", ["zero points", "groups", "groups in any order"])
def test_other_int8_weights_are_dequantised(tmp_path, case):
    values, stored = quantised(torch.int8, "channel" if case == "zero points" else "group")
    of_elements, zero_points, beside = stored, torch.zeros(M, 1), {}
    if case == "zero points":
        zero_points = torch.randint(-9, 9, (M, 1))
        beside["weight_zero_point"] = zero_points.to(torch.int8)
    elif case == "groups":
        of_elements = expanded(stored)
        beside["weight_g_idx"] = torch.full((K,), -1)  # never set
    else:
        beside["weight_g_idx"] = torch.randperm(K) // GROUP
        of_elements = stored[:, beside["weight_g_idx"]]
    save_quantised(tmp_path, values, stored, "naive-quantized", **beside)
    rows, checkpoint = converted(tmp_path)
    expected = ((values.double() - zero_points) * of_elements.double()).bfloat16()
    assert rows["a"].values == "16-bit"
    assert torch.equal(checkpoint.weight("a").to_dense(), expected)
    assert checkpoint.tensors == {*PACKED, "norm.weight"}


def test_values_may_be_asked_for_in_another_type(tmp_path):
    values, scales = quantised(torch.int8, "channel")
    save_quantised(tmp_path, values, scales, "int-quantized")
    rows, checkpoint = converted(tmp_path, values="16-bit")
    expected = quantize.dequantize(values, scales.float().flatten(), torch.bfloat16)
    assert rows["a"].values == "16-bit"
    assert torch.equal(checkpoint.weight("a").to_dense(), expected)
    values, scales = quantised(torch.float8_e4m3fn, "channel")
    (tmp_path / "fp8").mkdir()
    save_quantised(tmp_path / "fp8", values, scales, "float-quantized")
    rows, checkpoint = converted(tmp_path / "fp8", values="int8")
    rounded = ops.pack((values.float() * scales.float()).bfloat16(), values="int8")
    assert torch.equal(checkpoint.weight("a").payload, rounded.payload)


def test_float32_scales_need_a_dtype(tmp_path):
    values, scales = quantised(torch.int8, "channel", torch.float32)
    save_quantised(tmp_path, values, scales, "int-quantized")
    (row,) = convert_checkpoint(tmp_path / "old", tmp_path / "same").rows
    assert row.decision == "skipped" and "pass dtype=" in row.reason
    rows, checkpoint = converted(tmp_path, dtype=torch.float16)
    assert rows["a"].values == "int8" and checkpoint.weight("a").dtype == torch.float16
    assert torch.equal(checkpoint.weight("a").to_quantized()[1], scales.flatten())


def test_quantised_layers_that_stay_dense_are_dequantised(tmp_path):
    values, scales = quantised(torch.int8, "channel")
    save_quantised(tmp_path, values, scales, "int-quantized", "sparse-bitmask")
    _, checkpoint = converted(tmp_path, ignore=["a"])
    expected = quantize.dequantize(values, scales.float().flatten(), torch.bfloat16)
    assert torch.equal(checkpoint.tensor("a.weight"), expected)
    assert checkpoint.tensors == {"a.weight", "norm.weight"}


def test_a_quantised_model_loads_packed_and_its_inputs_may_be_rounded(tmp_path):
    model = pruned("llama", tmp_path)
    model.save_pretrained(tmp_path / "half")
    tensors, rounded = {}, {}
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        values, scales = quantize.round_to_int8(tensor)
        scales = scales.bfloat16()[:, None]
        tensors |= as_sparse_bitmask(name.removesuffix(".weight"), values)
        tensors[f"{name}_scale"] = scales
        rounded[name.removesuffix(".weight")] = values, scales.float().flatten()
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    config["quantization_config"] = quantization_config("int-quantized", "sparse-bitmask")
    save_tensors(tmp_path / "old", tensors, config)
    converted(tmp_path, x_quantization="dynamic")
    again = flash_llm.from_pretrained(tmp_path / "new")
    assert sparse_layers(again) == rounded.keys()
    for name, (values, scales) in rounded.items():
        layer = again.get_submodule(name)
        assert layer.x_quantization == "dynamic"
        found, found_scales = layer.packed.to_quantized()
        stored = values.any(1)  # rows without values have no scale of their own
        assert torch.equal(found, values) and torch.equal(found_scales[stored], scales[stored])


# ---- refusals ----


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (BITMASK, None),
        ({"quant_method": "compressed-tensors"}, None),
        ({**BITMASK, "config_groups": {}, "format": "dense"}, None),
        ({**BITMASK, "config_groups": {"group_0": {}}}, "format None"),
        ({**BITMASK, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**BITMASK, "transform_config": {"R1": {}}}, "transform_config"),
        ({**BITMASK, "sparsity_config": {"format": "sparse-1:8"}}, "sparse-1:8"),
        ({**BITMASK, "sparsity_config": "marlin"}, "marlin"),
        (quantization_config("marlin-24"), "marlin-24"),
        (quantization_config("pack-quantized"), "pack-quantized"),
        (quantization_config("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (
            quantization_config(
                "mixed-precision", config_groups={"group_0": {"format": "mxfp4-pack-quantized"}}
            ),
            "mxfp4-pack-quantized",
        ),
        ({**BITMASK, "quant_method": "gptq"}, "gptq"),
        ("gptq", "gptq"),
        ([{"quant_method": "gptq"}], "gptq"),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_is_not_read_is_refused_by_its_name(tmp_path, method, named, key):
    save_tensors(tmp_path / "old", {"a.weight": zeros_among(256, 256)}, {key: method})
    if named is None:
        convert_checkpoint(tmp_path / "old", tmp_path / "new")
    else:
        with pytest.raises(ValueError, match=rf"config\.json.*{named}"):
            convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").exists() == (named is None)


def test_sparsity_configs_of_the_first_versions(tmp_path):
    weight = zeros_among(256, 256)
    for key, found in {  # 0.3; 0.4 to 0.6 without quantisation
        "sparsity_config": {"format": "sparse-bitmask"},
        "compression_config": {"sparsity_config": {"format": "sparse-bitmask"}},
    }.items():
        folder = tmp_path / key
        folder.mkdir()
        save_tensors(folder / "old", as_sparse_bitmask("a.weight", weight), {key: found})
        _, checkpoint = converted(folder)
        assert torch.equal(checkpoint.weight("a").to_dense(), weight)
        assert key not in json.loads((folder / "new" / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a.weight_scale": None}, r"a\.weight in .*model\.safetensors is I8, .*a\.weight_scale"),
        ({"a.weight": torch.ones(M, K).bfloat16()}, r"a\.weight_scale in .*model\.safetensors"),
        ({"a.weight_scale": torch.ones(M // 16, K // 16)}, r"a\.weight_scale in .*\[3, 8\]"),
        ({"a.weight_scale": torch.ones(M, 3)}, r"a\.weight_scale in .*\[48, 3\]"),
        ({"a.weight_scale": torch.ones(M, 1).to(torch.uint8)}, r"a\.weight_scale in .*U8"),
        ({"a.weight_scale": torch.zeros(M, 1)}, r"a\.weight_scale in .*positive"),
        ({"a.weight_scale": -torch.ones(1)}, r"a\.weight_scale in .*positive"),
        ({"a.weight_scale": torch.full((M,), torch.nan)}, r"a\.weight_scale in .*positive"),
        ({"a.weight_zero_point": torch.ones(3)}, r"a\.weight_zero_point in .*\[3\]"),
        ({"a.weight_g_idx": torch.ones(3)}, r"a\.weight_g_idx in .*\[128\]"),
        (
            {"a.weight_scale": torch.ones(M, 2), "a.weight_g_idx": torch.full((K,), 2)},
            r"a\.weight_g_idx in .*group 2",
        ),
        ({"a.weight_scale": torch.full((1,), 1e38)}, r"a: .*row 0 "),
    ],
)
def test_scales_that_are_wrong_name_the_file_and_the_tensor(tmp_path, changes, message):
    values, scales = quantised(torch.int8, "channel", torch.float32)
    tensors = {"a.weight": values, "a.weight_scale": scales} | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    config = {"quantization_config": quantization_config("int-quantized")}
    save_tensors(tmp_path / "old", tensors, config)
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, dtype=torch.float16)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "x_quantization"), [(None, "dynamic"), ("16-bit", "dynamic"), ("int8", "static")]
)
def test_x_quantization_is_for_quantised_values(tmp_path, values, x_quantization):
    save_tensors(tmp_path / "old", {"a.weight": zeros_among(64, 64)})
    with pytest.raises(ValueError, match=f"x_quantization.*{x_quantization}"):
        converted(tmp_path, values=values, x_quantization=x_quantization)


def test_pruning_refuses_quantised_weights(tmp_path):
    values, scales = quantised(torch.int8, "channel")
    save_quantised(tmp_path, values, scales, "int-quantized")
    with pytest.raises(ValueError, match=r"config\.json.*int-quantized"):
        flash_llm.prune_checkpoint(tmp_path / "old", tmp_path / "new", sparsity=0.5)


# ---- the package itself ----


def test_the_package_computes_the_same(tmp_path):
    """Values, scales and dequantised weights of compressed-tensors, where it is installed."""
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is absent")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = zeros_among(M, K, dtype=torch.bfloat16)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    ends = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scales, zero_points = calculate_qparams(*ends, args)
    values = forward.quantize(weight, scales, zero_points, args, dtype=torch.int8)
    save_quantised(tmp_path, values, scales, "int-quantized", "sparse-bitmask")
    converted(tmp_path, values="16-bit")
    expected = forward.dequantize(values, scales, zero_points)
    found = Checkpoint(checkpoint_files(tmp_path / "new")).weight("a").to_dense()
    assert torch.equal(found, expected)
    if re.match(r"0\.(9|1[0-3])\.", package.__version__):  # later ones write no sparse formats
        from compressed_tensors.compressors import BitmaskTensor, Sparse24BitMaskTensor

        # No other zeros, because any of them may be stored.
        half = torch.randn(M, K).masked_fill(torch.arange(K) % 4 > 1, 0)
        for kind, write in (
            (BitmaskTensor, as_sparse_bitmask),
            (Sparse24BitMaskTensor, as_two_four),
        ):
            theirs, ours = kind.from_dense(half).dict("a", "cpu"), write("a", half)
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[name], part) for name, part in ours.items())
