"""A pruning run that was killed goes on where it was, to the same bits; another run is refused."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["uniform", "owl"])
@pytest.mark.parametrize("done", range(8))
def test_a_run_that_stops_after_any_layer_goes_on_to_the_same_bits(
    method, allocation, done, tmp_path, monkeypatch
):
    options = {
        **{"method": method, "sparsity": 0.5, "allocation": allocation},
        **{"calibration": tokens(), "seqlen": 16, "resume_dir": tmp_path / "resume"},
    }
    expected = model_with_a_layer_outside()
    uninterrupted = prune_(expected, **{**options, "resume_dir": None})
    assert len(uninterrupted.layers) == 7

    keep, left = ResumeFolder.keep, iter(range(done))

    def keep_some(*arguments):
        if next(left, None) is None:
            raise Killed
        keep(*arguments)

    monkeypatch.setattr(ResumeFolder, "keep", keep_some)
    if done < 7:
        with pytest.raises(Killed):
            prune_(model_with_a_layer_outside(), **options)
    else:
        prune_(model_with_a_layer_outside(), **options)
    monkeypatch.setattr(ResumeFolder, "keep", keep)

    pruned = []
    for name, row in METHODS.items():

        def counted(*a, function=row.function, **k):
            pruned.append(1)
            return function(*a, **k)

        monkeypatch.setitem(METHODS, name, dataclasses.replace(row, function=counted))
    model = model_with_a_layer_outside()
    report = prune_(model, **options)
    assert same(model, expected)
    assert report.layers == uninterrupted.layers
    assert len(pruned) == 7 - done  # what was done is not done again


def test_a_killed_process_loses_the_block_in_work_at_most(tmp_path):
    program = """
import os, signal, sys
from test_prune import Stack, tokens
import torch
from flash_llm import prune_

def bar(items, description):
    for number, item in enumerate(items):
        if description == "pruning" and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

torch.manual_seed(3)
prune_(Stack(), method="admm", sparsity=0.5, calibration=tokens(), seqlen=16,
       resume_dir=sys.argv[1], progress=bar)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", ".", *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("layer-*.safetensors"))) == 4
    options = {"method": "admm", "sparsity": 0.5, "calibration": tokens(), "seqlen": 16}
    torch.manual_seed(3)
    model = Stack()
    expected = copy.deepcopy(model)
    prune_(expected, **options)
    prune_(model, **options, resume_dir=str(tmp_path))
    assert same(model, expected)


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
