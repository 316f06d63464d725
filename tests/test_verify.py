"""Comparing checkpoints: nothing differs after a conversion, and what differs is found."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import invoke
from test_convert import as_sparse_bitmask, save_tensors, zeros_among

from flash_llm import convert_checkpoint, verify_checkpoint


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
