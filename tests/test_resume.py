"""A pruning run that was killed goes on where it was, to the same bits; another run is refused."""

import contextlib
import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from test_prune import Stack, linear_layers, tokens

from flash_llm import PruneReport, prune_
from flash_llm.prune.methods import METHODS
from flash_llm.prune.resume import ResumeFolder


class Killed(BaseException):
    """Like a KeyboardInterrupt: nothing catches it."""


def model_with_a_layer_outside():
    torch.manual_seed(3)
    model = Stack(between=lambda x: x)
    model.between = lambda x: x
    model.lone = torch.nn.Linear(8, 8)
    embed = model.embed.forward
    model.embed.forward = lambda ids: model.lone(embed(ids))
    return model


def same(one, other):
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def prune_some(model, options, done):
    """Prune, but die when more than ``done`` layers are to be kept."""
    keep, left = ResumeFolder.keep, iter(range(done))

    def keep_some(*arguments):
        if next(left, None) is None:
            raise Killed
        keep(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumeFolder, "keep", keep_some)
        prune_(model, **options)


@pytest.fixture
def pruned(monkeypatch):
    """A list that gets an element for each matrix that is pruned."""
    calls = []

    def counted(function):
        return lambda *a, **k: (calls.append(1), function(*a, **k))[1]

    for name, row in METHODS.items():
        counting = dataclasses.replace(row, function=counted(row.function))
        monkeypatch.setitem(METHODS, name, counting)
    return calls


@pytest.mark.parametrize(
    ("method", "allocation"),
    [(method, "owl") for method in METHODS] + [("magnitude", "uniform")],
)
def test_a_run_that_stops_after_any_layer_goes_on_to_the_same_bits(
    method, allocation, tmp_path, pruned
):
    options = {
        **{"method": method, "sparsity": 0.5, "allocation": allocation},
        **{"calibration": tokens(), "seqlen": 16},
    }
    expected = model_with_a_layer_outside()
    uninterrupted = prune_(expected, **options)
    assert len(uninterrupted.layers) == len(pruned) == 7
    for done in range(8):
        options["resume_dir"] = tmp_path / f"after {done}"
        with pytest.raises(Killed) if done < 7 else contextlib.nullcontext():
            prune_some(model_with_a_layer_outside(), options, done)
        pruned.clear()
        model = model_with_a_layer_outside()
        report = prune_(model, **options)
        assert same(model, expected)
        assert report.layers == uninterrupted.layers
        assert len(pruned) == 7 - done  # what was done is not done again


@pytest.mark.hf
def test_conv1d_and_bfloat16_are_resumed(tmp_path):
    from test_prune import tiny

    model = tiny("gpt2")[0].bfloat16()
    expected, again = copy.deepcopy(model), copy.deepcopy(model)
    options = {"method": "sparsegpt", "sparsity": 0.5, "calibration": tokens(), "seqlen": 16}
    report = prune_(expected, **options)
    prune_(model, **options, resume_dir=tmp_path)
    (tmp_path / "layer-00003.safetensors").unlink()
    resumed = prune_(again, **options, resume_dir=tmp_path)
    assert same(model, expected) and same(again, expected)
    assert resumed.layers == report.layers


def test_a_scope_over_all_layers_begins_anew(tmp_path):
    model, again = Stack(), Stack()
    again.load_state_dict(model.state_dict())
    options = {"method": "magnitude", "scope": "global", "sparsity": 0.5, "resume_dir": tmp_path}
    prune_(model, **options)
    prune_(again, **options)
    assert same(model, again)


def changed_model(model):
    model.embed.weight.data[3, 4] += 1.0


def more_layers(model):
    model.another = torch.nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ({"sparsity": 0.6}, None, "sparsity was 0.5 and is 0.6 now"),
        ({"method": "sparsegpt"}, None, "method was 'wanda' and is 'sparsegpt' now"),
        ({"scope": "layer"}, None, "scope was 'row' and is 'layer' now"),
        ({"allocation": "owl"}, None, "allocation was 'uniform' and is 'owl' now"),
        ({"allocation": {"up": 0.5}}, None, "allocation was 'uniform' and is {'up': 0.5} now"),
        ({"seed": 1}, None, "seed was None and is 1 now"),
        ({"ignore": ["blocks.0.up"]}, None, "ignore was .* and is .'blocks.0.up'. now"),
        ({"calibration": tokens(5)}, None, "the calibration samples differ"),
        ({}, changed_model, "embed.weight of the model has changed"),
        ({}, more_layers, "its layers are not these 7"),
    ],
)
def test_another_run_is_refused_before_anything_changes(arguments, change, message, tmp_path):
    options = {"sparsity": 0.5, "calibration": tokens(), "seqlen": 16, "resume_dir": tmp_path}
    torch.manual_seed(3)
    model = Stack()
    prune_(copy.deepcopy(model), **options)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if change is not None:
        change(model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        prune_(model, **{**options, **arguments})
    assert same(model, before)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_partly_pruned_model_is_refused_with_the_remedy(tmp_path):
    options = {"sparsity": 0.5, "calibration": tokens(), "seqlen": 16, "resume_dir": tmp_path}
    model = Stack()
    prune_(model, **options)
    with pytest.raises(ValueError, match="blocks.0.up.weight .* must be loaded again first"):
        prune_(model, **options)


def test_broken_files_are_named(tmp_path):
    options = {"sparsity": 0.5, "calibration": tokens(), "seqlen": 16, "resume_dir": tmp_path}
    torch.manual_seed(3)
    model = Stack()
    prune_(copy.deepcopy(model), **options)
    path = tmp_path / "layer-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="layer-00002.* is broken .* to prune blocks.1.up again"):
        prune_(copy.deepcopy(model), **options)
    path.unlink()
    prune_(copy.deepcopy(model), **options)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json cannot be read"):
        prune_(copy.deepcopy(model), **options)


def test_a_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    model = Stack()
    before = copy.deepcopy(model)
    (tmp_path / "file").write_text("")
    options = {"sparsity": 0.5, "calibration": tokens(), "seqlen": 16}
    with pytest.raises(OSError, match="file"):
        prune_(model, **options, resume_dir=tmp_path / "file")
    assert same(model, before)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prune_(model, **options, resume_dir=tmp_path / "resume")
    assert same(model, before)
    assert list((tmp_path / "resume").iterdir()) == []  # no half file stays


def test_report_and_recipe_are_kept_beside_the_model(tmp_path):
    model = Stack()
    report = prune_(
        model,
        method="sparsegpt",
        allocation={"blocks.1": 0.75, "_default": 0.5},
        calibration=tokens(),
        seqlen=16,
        seed=4,
        nsamples=3,
    )
    path = report.save(tmp_path / "model")
    assert path == tmp_path / "model" / "prune_report.json"
    assert PruneReport.load(path.parent) == report
    stored = json.loads(path.read_text())
    assert list(stored) == ["recipe", "layers", "num_samples", "num_tokens", "seconds", "sparsity"]
    assert (stored["num_samples"], stored["num_tokens"]) == (3, 48)
    # The recipe is the arguments: with them, and the text, the run can be repeated.
    recipe = stored["recipe"]
    assert (recipe["method"], recipe["seed"], recipe["nsamples"]) == ("sparsegpt", 4, 3)
    assert len(stored["layers"]) == len(linear_layers(model))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sparsity": 1, "recipe": {}}'])
def test_what_is_no_report_is_refused(text, tmp_path):
    with pytest.raises(FileNotFoundError):
        PruneReport.load(tmp_path)
    (tmp_path / PruneReport.FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match="prune_report.json holds no PruneReport"):
        PruneReport.load(tmp_path)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    report = prune_(Stack(), method="magnitude", sparsity=0.5)
    path = report.save(tmp_path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_recipe_names_the_calibration_file_and_a_resumed_run_may_find_it_elsewhere(tmp_path):
    text = "".join(map(chr, tokens(8, 16).flatten().tolist()))
    options = {"sparsity": 0.5, "seqlen": 16, "resume_dir": tmp_path / "resume"}
    options["tokenizer"] = lambda text: {"input_ids": list(map(ord, text))}
    names = [tmp_path / "one.txt", str(tmp_path / "other.txt")]
    torch.manual_seed(3)
    model = Stack()
    for name in names:
        Path(name).write_text(text, encoding="utf-8", newline="")
        report = prune_(copy.deepcopy(model), calibration=name, **options)
        assert report.recipe.calibration == str(name)
        report.save(tmp_path)
        assert PruneReport.load(tmp_path) == report
    for arguments in ({"method": "magnitude", "calibration": names[0]}, {"calibration": tokens()}):
        report = prune_(copy.deepcopy(model), **{**options, "resume_dir": None, **arguments})
        assert report.recipe.calibration is None
    # Reports of before the recipe had it can still be read.
    old = json.loads((tmp_path / PruneReport.FILE_NAME).read_text())
    del old["recipe"]["calibration"]
    (tmp_path / PruneReport.FILE_NAME).write_text(json.dumps(old))
    assert PruneReport.load(tmp_path).recipe.calibration is None


@pytest.mark.parametrize("text", ["[]", "{}", '{"0": "x"}', '{"0": [1]}', "[" * 100_000, "null"])
@pytest.mark.parametrize("name", ["run.json", "allocation.json"])
def test_damaged_files_of_a_run_are_refused_by_name(tmp_path, name, text):
    options = {"sparsity": 0.5, "calibration": tokens(), "seqlen": 16, "allocation": "owl"}
    model = Stack()
    prune_(copy.deepcopy(model), **options, resume_dir=tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        prune_(model, **options, resume_dir=tmp_path)
