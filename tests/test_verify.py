"""Comparing checkpoints: nothing differs after a conversion, and what differs is found."""

import json
import math
import re
import sys

import pytest
import torch
from compressed_tensors_files import as_sparse_bitmask
from safetensors.torch import load_file, save_file
from test_cli import invoke
from test_convert import save_tensors, zeros_among

import flash_llm
from flash_llm import convert_checkpoint, verify_checkpoint
from flash_llm.io import verify


def dense(folder, **changes):
    torch.manual_seed(0)
    tensors = {
        "a.weight": zeros_among(256, 256),
        "b.weight": torch.randn(64, 64).bfloat16(),
        "b.bias": torch.ones(64),
        "none": torch.zeros(0),
        **changes,
    }
    save_tensors(folder, tensors)
    return tensors


def test_a_conversion_changes_nothing(tmp_path):
    dense(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    report = verify_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert [row.name for row in report.rows] == ["a.weight", "b.bias", "b.weight", "none"]
    assert report.max_relative_error == 0
    (packed,) = [row for row in report.rows if row.packed]
    assert packed.name == "a.weight" and packed.sparsity == packed.reference_sparsity > 0.7
    assert "4 of 4 tensors are equal" in str(report) and "b.bias" not in str(report)


def test_errors_are_those_of_the_definition(tmp_path):
    before = dense(tmp_path / "dense", zero=torch.zeros(3))
    weight = before["b.weight"].clone()
    weight[0] = 0
    changed = {"b.weight": weight, "zero": torch.tensor([0.0, 2.0, 0.0])}
    dense(tmp_path / "pruned", **changed)
    rows = {r.name: r for r in verify_checkpoint(tmp_path / "pruned", tmp_path / "dense").rows}
    lost = before["b.weight"].double()[0]
    expected = float(lost.norm() / before["b.weight"].double().norm())
    assert rows["b.weight"].relative_error == pytest.approx(expected)
    assert rows["b.weight"].max_abs_error == float(lost.abs().max())
    assert rows["b.weight"].sparsity == 1 / 64
    assert math.isinf(rows["zero"].relative_error) and rows["zero"].max_abs_error == 2
    assert rows["a.weight"].relative_error == 0


def test_the_table_aligns_its_numbers(tmp_path):
    before = dense(tmp_path / "dense")
    weights = {"a.weight": before["a.weight"] * 1.5, "b.weight": before["b.weight"] * 1.01}
    dense(tmp_path / "changed", **weights, **{"b.bias": torch.zeros(64)})
    lines = str(verify_checkpoint(tmp_path / "changed", tmp_path / "dense")).splitlines()[:-1]
    assert [line.split()[0] for line in lines] == ["tensor", "a.weight", "b.bias", "b.weight"]
    assert len({len(line) for line in lines}) == 1
    for row in lines[1:]:
        assert re.search(r" [01]\.\d{4} +[01]\.\d{4} +\d\.\d\de[+-]\d\d +\d\.\d\de[+-]\d\d$", row)


NAN, INF = float("nan"), float("inf")


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN]), INF),  # as a norm of NaN
        (torch.tensor([1.0, NAN]), torch.tensor([101.0, NAN]), 100),  # nor does NaN hide the rest
        (torch.tensor([NAN, 0.0]), torch.tensor([0.0, NAN]), INF),
        (torch.tensor([INF, 4.0]), torch.tensor([INF, 5.0]), 0.25),
        (torch.tensor([INF, 4.0]), torch.tensor([-INF, 4.0]), INF),
        (torch.tensor([INF, 4.0]), torch.tensor([0.0, 4.0]), INF),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 0.5**0.5),
        (torch.tensor([2**53]), torch.tensor([2**53 + 1]), 2.0**-53),
        (torch.tensor([-1, 2**62]), torch.tensor([-1, 2**62 + 1]), 2.0**-62),
        (torch.tensor([7], dtype=torch.uint64), torch.tensor([7], dtype=torch.uint64), 0),
        (torch.tensor([True]), torch.tensor([False]), 1),
        (wide(1e-300), wide(3e-300), 2),
        (wide(1e300, 1e300), wide(3e300, 3e300), 2),
        (wide(1e308, 1e-308), wide(1e308, 0), sys.float_info.min),
        # Dtypes: only a cast of floats to fewer bits is a matter of values.
        (torch.tensor([0.0]).bfloat16(), torch.tensor([0.0]).half(), INF),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).float(), INF),
        (torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), INF),
        (torch.tensor([1]), torch.tensor([1], dtype=torch.int32), INF),
        (torch.tensor([1.0, 1 + 2**-20]), torch.tensor([1.0, 1]).bfloat16(), 2**-20 / 2**0.5),
    ],
)
def test_values_that_floats_cannot_tell_apart_and_dtypes_are_compared(
    tmp_path, before, after, error
):
    save_tensors(tmp_path / "dense", {"a": before})
    save_tensors(tmp_path / "other", {"a": after})
    report = verify_checkpoint(tmp_path / "other", tmp_path / "dense")
    assert report.max_relative_error == pytest.approx(error, rel=1e-3, abs=0)
    assert report.rows[0].equal == (error == 0)


def test_differences_are_found_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "_CHUNK", 10)
    before = torch.randn(7, 9)
    after = before.clone()
    after[6, 8] += 1
    save_tensors(tmp_path / "dense", {"a": before})
    save_tensors(tmp_path / "other", {"a": after})
    (row,) = verify_checkpoint(tmp_path / "other", tmp_path / "dense").rows
    assert row.relative_error == pytest.approx(float((after - before).norm() / before.norm()))
    assert row.max_abs_error == pytest.approx(1)


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, None])
def test_conv1d_layers_are_compared_as_they_lie_in_the_reference(tmp_path, config):
    """GPT-2: packed layers are [M, K], the dense file has [K, M]; a square one shows it not."""
    tensors = {"h.c_proj.weight": zeros_among(256, 256), "h.c_fc.weight": zeros_among(128, 512)}
    save_tensors(tmp_path / "dense", tensors, config)
    model = torch.nn.Module()
    model.h = torch.nn.Module()
    for name, (k, m) in (("c_proj", (256, 256)), ("c_fc", (128, 512))):
        layer = torch.nn.Linear(k, m, bias=False).half()
        layer.weight.data = tensors[f"h.{name}.weight"].t().contiguous()
        setattr(model.h, name, layer)
    flash_llm.sparsify_(model)
    flash_llm.save(model, tmp_path / "packed")
    if config:
        (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    report = verify_checkpoint(tmp_path / "packed", tmp_path / "dense")
    assert report.max_relative_error == 0 and all(row.packed for row in report.rows)


def test_a_weight_of_another_orientation_is_no_conv1d_layer(tmp_path):
    save_tensors(tmp_path / "dense", {"q.weight": zeros_among(128, 512)}, {"model_type": "llama"})
    save_tensors(tmp_path / "other", {"q.weight": zeros_among(512, 128)})
    convert_checkpoint(tmp_path / "other", tmp_path / "packed")
    with pytest.raises(ValueError, match=r"q\.weight must have shape \[128, 512\], got \[512, 128"):
        verify_checkpoint(tmp_path / "packed", tmp_path / "dense")


def test_sparse_bitmask_folders_can_be_verified(tmp_path):
    weight = zeros_among(64, 70)
    save_tensors(tmp_path / "dense", {"a.weight": weight})
    save_tensors(tmp_path / "old", as_sparse_bitmask("a", weight))
    assert verify_checkpoint(tmp_path / "old", tmp_path / "dense").max_relative_error == 0


def test_folders_that_cannot_be_compared(tmp_path):
    dense(tmp_path / "dense")
    dense(tmp_path / "more", c=torch.ones(1))
    with pytest.raises(ValueError, match="more has c, .*dense has not"):
        verify_checkpoint(tmp_path / "more", tmp_path / "dense")
    with pytest.raises(ValueError, match="more has c, .*dense has not"):
        verify_checkpoint(tmp_path / "dense", tmp_path / "more")
    dense(tmp_path / "other", **{"b.bias": torch.ones(65)})
    with pytest.raises(ValueError, match=r"b\.bias must have shape \[64\], got \[65\]"):
        verify_checkpoint(tmp_path / "other", tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(ValueError, match="packed is packed; it must be dense"):
        verify_checkpoint(tmp_path / "dense", tmp_path / "packed")


def test_inspect_says_how_much_all_tensors_take(tmp_path):
    tensors = dense(tmp_path / "dense")
    total = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    first = invoke("inspect", str(tmp_path / "dense")).stdout.splitlines()[0]
    assert first == f"{tmp_path / 'dense'}: 4 tensors, {total:.3f} MB in 1 files"


@pytest.mark.parametrize("given", ["model.gguf", "org/name", "gguf", "empty"])
def test_what_is_no_folder_of_safetensors_is_told_so(tmp_path, given):
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_text("")
    (tmp_path / "empty").mkdir()
    dense(tmp_path / "dense")
    with pytest.raises(FileNotFoundError) as error:
        verify_checkpoint(tmp_path / given, tmp_path / "dense")
    hints = {"model.gguf": "is a file", "org/name": "no such folder", "gguf": "a.gguf"}
    assert hints.get(given, "model.safetensors") in str(error.value)


def test_the_command(tmp_path):
    dense(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    arguments = ["verify", str(tmp_path / "packed"), "--reference", str(tmp_path / "dense")]
    assert invoke(*arguments, "--max-error", "0").exit_code == 0
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["b.weight"][3, 4] += 1
    save_file(tensors, file)
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["max_relative_error"] > 0
    assert invoke(*arguments, "--max-error", "1e-6").exit_code == 1
    assert "b.weight" in invoke(*arguments).stdout
