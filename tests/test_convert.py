"""Dense checkpoints packed file by file: what comes out loads, and nothing is lost on the way."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import no_file_larger_than
from test_hf import IDS, auto_class, dense, output, sparse_layers
from torch import nn

import flash_llm
from flash_llm import convert_checkpoint
from flash_llm.io import convert
from flash_llm.io.checkpoint import Checkpoint, checkpoint_files
from flash_llm.io.unfinished import NOTE_NAME, UnfinishedFolder

FAMILIES = ("llama", "qwen2", "opt", "gpt2", "bert")


def pruned(family, folder, max_shard_size="5GB"):
    """A dense model with zeros, saved, as pruners leave it."""
    model = dense(family, folder / "before")
    for layer in model.modules():
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            # Not the head, which may be the embedding.
            if layer is not model.get_output_embeddings():
                layer.weight.data.masked_fill_(torch.rand(layer.weight.shape) < 0.8, 0)
    model.save_pretrained(folder / "dense", max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize(("max_shard_size", "workers"), [("5GB", 1), ("30KB", 1), ("30KB", 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_loads_and_computes_the_same(tmp_path, family, max_shard_size, workers):
    model = pruned(family, tmp_path, max_shard_size)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    report = convert_checkpoint(
        tmp_path / "dense", tmp_path / "packed", workers=workers, pack_unprofitable=True
    )
    again = auto_class(family).from_pretrained(tmp_path / "packed")
    assert sparse_layers(again) == {row.name for row in report.packed} or family == "bert"
    # As the same model packed in memory: sums in another order than a dense product's.
    flash_llm.sparsify_(model, pack_unprofitable=True)
    assert sparse_layers(again) == sparse_layers(model)
    assert torch.equal(output(again), output(model))
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"
    names = {path.name for path in (tmp_path / "dense").iterdir()} | {"README.md"}
    assert {path.name for path in (tmp_path / "packed").iterdir()} == names
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_the_model_card_says_how_to_load(tmp_path):
    pruned("llama", tmp_path)
    (tmp_path / "dense" / "README.md").write_text("# Mine\n")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert (tmp_path / "packed" / "README.md").read_text() == "# Mine\n" + convert.CARD_NOTE


def test_an_index_names_every_tensor_and_the_bytes(tmp_path):
    pruned("llama", tmp_path, "30KB")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed", pack_unprofitable=True)
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())
    checkpoint = Checkpoint(checkpoint_files(tmp_path / "packed"))
    assert set(index["weight_map"]) == checkpoint.tensors
    size = sum(checkpoint.tensor(name).nbytes for name in checkpoint.tensors)
    assert index["metadata"]["total_size"] == checkpoint.nbytes == size


def save_tensors(folder, tensors, config=None):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def zeros_among(*shape, dtype=torch.float16, sparsity=0.8):
    tensor = torch.randn(shape).to(dtype)
    return tensor.masked_fill_(torch.rand(shape) < sparsity, 0)


def test_what_is_no_pruned_weight_is_copied_bit_for_bit(tmp_path):
    tensors = {
        "a.weight": zeros_among(256, 256),
        "b.weight": torch.randn(256, 256).bfloat16(),
        "norm.weight": torch.randn(256),
        "experts.weight": zeros_among(2, 64, 64),
        "embed_tokens.weight": zeros_among(256, 256),
        "ids": torch.arange(7),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "small": torch.ones(3, 2, dtype=torch.float8_e4m3fn),
    }
    save_tensors(tmp_path / "dense", tensors)
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    rows = {row.name: row.decision for row in report.rows}
    assert rows == {"a": "packed", "b": "dense"}
    found = load_file(tmp_path / "packed" / "model.safetensors")
    assert found.keys() == (tensors.keys() - {"a.weight"}) | {
        "a.weight_header",
        "a.weight_offsets",
        "a.weight_payload",
    }
    for name in tensors.keys() & found.keys():
        assert found[name].dtype == tensors[name].dtype, name
        assert torch.equal(found[name].float(), tensors[name].float()), name
    packed = Checkpoint(checkpoint_files(tmp_path / "packed")).weight("a")
    assert torch.equal(packed.to_dense(), tensors["a.weight"])
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"flash_llm": "1", "format": "pt"}


def test_float32_is_cast_only_when_asked_for(tmp_path):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(256, 256, dtype=torch.float32)})
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "same")
    assert report.rows[0].decision == "skipped" and "pass dtype=" in report.rows[0].reason
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "half", dtype=torch.bfloat16)
    assert report.rows[0].decision == "packed"
    packed = Checkpoint(checkpoint_files(tmp_path / "half")).weight("a")
    dense = load_file(tmp_path / "dense" / "model.safetensors")["a.weight"]
    assert torch.equal(packed.to_dense(), dense.bfloat16())


def test_patterns(tmp_path):
    save_tensors(tmp_path / "dense", {f"l.{n}.weight": zeros_among(256, 256) for n in "abc"})
    for arguments, names in [
        ({"targets": "a"}, {"l.a"}),
        ({"targets": ["l.a", "re:.*b$"]}, {"l.a", "l.b"}),
        ({"ignore": "c"}, {"l.a", "l.b"}),
        ({"ignore": ()}, {"l.a", "l.b", "l.c"}),
    ]:
        report = convert_checkpoint(tmp_path / "dense", tmp_path / "p", dry_run=True, **arguments)
        assert {row.name for row in report.rows} == names
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_dry_run_reports_what_a_run_does(tmp_path):
    pruned("llama", tmp_path)
    dry = convert_checkpoint(tmp_path / "dense", tmp_path / "packed", dry_run=True)
    assert not (tmp_path / "packed").exists()
    assert dry == convert_checkpoint(tmp_path / "dense", tmp_path / "packed")


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bool])
def test_masks_of_torch_prune_are_applied(tmp_path, mask_dtype):
    layer = nn.Linear(256, 256).half()
    nn.utils.prune.random_unstructured(layer, "weight", 0.8)
    nn.utils.prune.random_unstructured(layer, "bias", 0.5)
    layer.weight_orig.data[0] = -torch.inf  # where the mask is 0 a product would be NaN
    layer.weight_mask[0] = 0
    state = {f"a.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}
    assert state.keys() == {
        f"a.{n}_{part}" for n in ("weight", "bias") for part in ("orig", "mask")
    }
    expected = torch.where(layer.weight_mask == 0, 0, layer.weight_orig)
    for name in ("a.weight_mask", "a.bias_mask"):
        state[name] = state[name].to(mask_dtype)
    save_tensors(tmp_path / "pruned", state)
    (row,) = convert_checkpoint(tmp_path / "pruned", tmp_path / "packed").rows
    assert row.decision == "packed" and row.sparsity > 0.75
    again = flash_llm.load(nn.ModuleDict({"a": nn.Linear(256, 256).half()}), tmp_path / "packed")
    assert torch.equal(again.a.weight, expected) and torch.equal(again.a.bias, layer.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"a.weight_mask": torch.ones(64, 63)}), r"a\.weight_mask must have sh"),
        (
            lambda t: t.update({"a.weight": torch.ones(64, 64)}),
            r"both a\.weight and a\.weight_orig",
        ),
    ],
)
def test_masks_that_contradict_are_refused(tmp_path, change, message):
    tensors = {f"a.weight_{part}": torch.ones(64, 64).half() for part in ("orig", "mask")}
    change(tensors)
    save_tensors(tmp_path / "pruned", tensors)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "pruned", tmp_path / "packed")


# ---- interruptions ----


def interrupt(monkeypatch, after, error):
    """Make the conversion of a weight fail after so many."""
    count, original = [0], convert._convert_tensor

    def fail(*arguments):
        count[0] += 1
        if count[0] > after:
            raise error
        return original(*arguments)

    monkeypatch.setattr(convert, "_convert_tensor", fail)


@pytest.mark.parametrize("after", [0, 3, 9])
def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path, monkeypatch, after):
    pruned("llama", tmp_path, "30KB")
    source = {p: p.read_bytes() for p in (tmp_path / "dense").iterdir()}
    with monkeypatch.context() as patch:
        interrupt(patch, after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(tmp_path / "dense", tmp_path / "packed", pack_unprofitable=True)
    partial = tmp_path / "packed.partial"
    done = {p: p.stat().st_mtime_ns for p in partial.glob("model/*.safetensors")}
    assert not (tmp_path / "packed").exists() and not list(partial.rglob("*.tmp"))
    assert len(done) < len(checkpoint_files(tmp_path / "dense"))
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "packed", pack_unprofitable=True)
    for path, time in done.items():
        assert (tmp_path / "packed" / path.name).stat().st_mtime_ns == time
    whole = convert_checkpoint(tmp_path / "dense", tmp_path / "whole", pack_unprofitable=True)
    assert report == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "packed" / path.name).read_bytes()
    assert source == {p: p.read_bytes() for p in (tmp_path / "dense").iterdir()}


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    pruned("llama", tmp_path)

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert.TensorWriter, "add", no_space)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    partial = tmp_path / "packed.partial"
    assert {p.name for p in partial.rglob("*")} == {"unfinished.json", "model"}


# Converts in children that kill themselves, each at a later line of the modules that write; after
# each kill another child goes on. Forked, because importing torch takes seconds. Says how many
# were killed, and stops where the conversion ends before the line.
KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch
from flash_llm import convert_checkpoint
from flash_llm.io import convert, files, unfinished
torch.set_num_threads(1)
source, folder, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def run(target, moment=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        modules = (convert, files, unfinished)
        if frame.f_code.co_filename not in {module.__file__ for module in modules}:
            return None
        lines += event == "line"
        if lines == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    if moment is not None:
        threading.settrace(trace)
        sys.settrace(trace)
    convert_checkpoint(source, target)
    os._exit(0)

def content(target):
    return {path.name: path.read_bytes() for path in target.iterdir()}

assert run(folder / "whole") == 0
whole = content(folder / "whole")
moment = 1
while True:
    target = folder / "packed"
    status = run(target, moment)
    assert status in (0, signal.SIGKILL), (moment, status)
    if target.exists():
        assert content(target) == whole, moment
    else:
        assert run(target) == 0, moment
        assert content(target) == whole, moment
    if status == 0:
        break
    convert.shutil.rmtree(target)
    convert.shutil.rmtree(unfinished.partial_path(target), ignore_errors=True)
    moment += step
print(moment // step)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_half(tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    places = {}
    for shard in range(2):
        names = [f"l{shard}.weight", f"l{shard}.bias"]
        tensors = dict(zip(names, (zeros_among(64, 64), torch.ones(64)), strict=True))
        save_file(tensors, dense / f"{shard}.safetensors")
        places.update(dict.fromkeys(names, f"{shard}.safetensors"))
    (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (dense / "config.json").write_text("{}")
    source = {path: path.read_bytes() for path in dense.iterdir()}
    command = [sys.executable, "-c", KILLED, str(dense), str(tmp_path), "29"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
    assert source == {path: path.read_bytes() for path in dense.iterdir()}


@pytest.mark.parametrize("limit", [100, 20_000])  # no room for the note; for a part of the file
def test_a_write_that_fails_leaves_no_half_file(tmp_path, limit):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(256, 256)})
    before = (tmp_path / "dense" / "model.safetensors").read_bytes()
    there = f"'{tmp_path}/packed[.]partial/"
    with no_file_larger_than(limit), pytest.raises(OSError, match=there) as caught:
        convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert caught.value.errno == errno.EFBIG
    kept = {"unfinished.json"} if limit > 100 else set()
    found = {path.name for path in tmp_path.glob("packed*/**/*") if path.is_file()}
    assert not (tmp_path / "packed").exists() and found == kept
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == before
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")  # there is room again


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(256, 256)})
    # Not even root makes folders there.
    with pytest.raises(OSError, match="/sys/packed.partial"):
        convert_checkpoint(tmp_path / "dense", "/sys/packed")


def test_an_unfinished_folder_of_another_conversion_is_left_alone(tmp_path, monkeypatch):
    pruned("llama", tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(FileExistsError, match=r"packed\.partial .*/dense "):
        convert_checkpoint(tmp_path / "dense", tmp_path / "packed", ignore=())
    file = tmp_path / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(FileExistsError, match="has changed since"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "packed")


# ---- other runs, and what is not of this one ----


def two_shards(folder):
    folder.mkdir()
    places = {}
    for name in "ab":
        save_file({f"{name}.weight": zeros_among(256, 256)}, folder / f"{name}.safetensors")
        places[f"{name}.weight"] = f"{name}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text("{}")
    return folder


def half_done(tmp_path, monkeypatch):
    """A conversion of two files that was interrupted after the first."""
    dense = two_shards(tmp_path / "dense")
    with monkeypatch.context() as patch:
        interrupt(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(dense, tmp_path / "packed")
    return dense, tmp_path / "packed.partial"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_into_one_destination_is_refused_and_harms_nothing(tmp_path, monkeypatch):
    dense, original, refused = two_shards(tmp_path / "dense"), convert._convert_tensor, []

    def again(*arguments):  # while the first run is at work, in this process or in another one
        with pytest.raises(FileExistsError, match=r"another run is working on .*packed\.partial"):
            convert_checkpoint(dense, tmp_path / "packed")
        with pytest.raises(FileExistsError, match="another run is working on"):
            options = {"targets": ()}
            UnfinishedFolder(tmp_path / "packed", dense, options, "x", resume=False)
        refused.append(arguments[0])
        return original(*arguments)

    monkeypatch.setattr(convert, "_convert_tensor", again)
    convert_checkpoint(dense, tmp_path / "packed")
    monkeypatch.undo()
    assert refused == ["a", "b"]
    convert_checkpoint(dense, tmp_path / "whole")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_run_that_begins_anew_removes_what_is_of_its_kind_only(tmp_path, monkeypatch):
    dense, partial = half_done(tmp_path, monkeypatch)
    by = "flash_llm.convert_checkpoint"
    with pytest.raises(FileExistsError, match=r"packed\.partial .*/dense "):
        UnfinishedFolder(tmp_path / "packed", dense, {"other": 1}, by)
    with pytest.raises(FileExistsError, match=r"packed\.partial .*/dense "):
        UnfinishedFolder(tmp_path / "packed", dense, {}, "other", resume=False)
    assert (partial / "a.safetensors.done").is_file()
    with UnfinishedFolder(tmp_path / "packed", dense, {"other": 1}, by, resume=False):
        assert {path.name for path in partial.iterdir()} == {NOTE_NAME, "model"}
        assert list((partial / "model").iterdir()) == []


PLANTED = {
    "a link instead of the folder": lambda p, victim: (shutil.rmtree(p), p.symlink_to(victim)),
    "a link that leads nowhere": lambda p, victim: (shutil.rmtree(p), p.symlink_to("nowhere")),
    "a file instead of the folder": lambda p, victim: (shutil.rmtree(p), p.write_text("mine")),
    "a link instead of the result": lambda p, victim: (
        shutil.rmtree(p / "model"),
        (p / "model").symlink_to(victim),
    ),
    "a link to be written through": lambda p, victim: (p / "model" / "b.safetensors").symlink_to(
        victim / "keep"
    ),
    "a link deep inside": lambda p, victim: (
        (p / "state").mkdir() or (p / "state" / "run.json").symlink_to(victim / "keep")
    ),
    "a link instead of the note": lambda p, victim: (
        shutil.move(p / NOTE_NAME, victim / NOTE_NAME),
        (p / NOTE_NAME).symlink_to(victim / NOTE_NAME),
    ),
    "a pipe": lambda p, victim: os.mkfifo(p / "model" / "b.safetensors"),
    "a folder without a note": lambda p, victim: (p / NOTE_NAME).unlink(),
    "a note that is empty": lambda p, victim: (p / NOTE_NAME).write_text(""),
    "a note that is no JSON": lambda p, victim: (p / NOTE_NAME).write_text("[" * 100_000),
    "another user's file": lambda p, victim: os.chown(p / "model", 12345, -1),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_partial_folder_is_neither_followed_nor_adopted(tmp_path, monkeypatch, case):
    dense, partial = half_done(tmp_path, monkeypatch)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "keep").write_text("kept")
    if case == "another user's file" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    PLANTED[case](partial, victim)
    kept = contents(victim)
    with pytest.raises(FileExistsError, match=r"packed\.partial"):
        convert_checkpoint(dense, tmp_path / "packed")
    assert contents(victim) == kept and not (tmp_path / "packed").exists()


def test_results_that_the_run_did_not_write_are_made_again(tmp_path, monkeypatch):
    dense, partial = half_done(tmp_path, monkeypatch)
    convert_checkpoint(dense, tmp_path / "whole")
    theirs = tmp_path / "theirs.safetensors"
    save_file({"a.weight": torch.ones(256, 256).half()}, theirs)
    shutil.copyfile(theirs, partial / "model" / "a.safetensors")  # marked as finished
    shutil.copyfile(theirs, partial / "model" / "b.safetensors")
    (partial / "b.safetensors.done").write_text('{"file": null, "rows": []}')
    (partial / "model" / "1_Pooling").mkdir()
    (partial / "model" / "modeling.py").write_text("print('theirs')")
    convert_checkpoint(dense, tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_folders_with_names_like_ours_are_left_alone(tmp_path):
    dense = two_shards(tmp_path / "dense")
    for name in ("packed.partial.new", "packed.new", "packed.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    convert_checkpoint(dense, tmp_path / "packed")
    for name in ("packed.partial.new", "packed.new", "packed.tmp"):
        assert (tmp_path / name / "mine").read_text() == "mine"


@pytest.mark.parametrize("dst", ["file/packed", "nowhere", "nowhere/packed", "n" * 250])
def test_a_destination_that_cannot_be_made_fails_before_the_work(tmp_path, monkeypatch, dst):
    dense = two_shards(tmp_path / "dense")
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to("missing")
    interrupt(monkeypatch, 0, AssertionError("worked"))
    with pytest.raises(OSError, match=dst):
        convert_checkpoint(dense, tmp_path / dst)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "file", "nowhere"}


@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_a_source_that_changes_during_the_work_is_refused(tmp_path, monkeypatch, name, how):
    dense, original = two_shards(tmp_path / "dense"), convert._convert_tensor

    def change(layer, *arguments):
        file = dense / name
        if layer == "b" and how == "written":
            file.write_bytes(file.read_bytes())
        elif layer == "b" and how == "replaced":  # as `cp -p` and `mv` do
            shutil.copy2(file, tmp_path / "copy")
            (tmp_path / "copy").rename(file)
        elif layer == "b":
            file.unlink()
        return original(layer, *arguments)

    monkeypatch.setattr(convert, "_convert_tensor", change)
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        convert_checkpoint(dense, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


# ---- memory ----

# Not ru_maxrss, which begins with that of the process that started this one.
PEAK = """
import re, sys
from flash_llm import convert_checkpoint
def peak():
    return int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
convert_checkpoint(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path):
    weight = zeros_among(2048, 2048)  # 8 MiB
    save_tensors(tmp_path / "dense", {f"l{i}.weight": weight.clone() for i in range(12)})
    command = [sys.executable, "-c", PEAK, str(tmp_path / "dense"), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert weight.nbytes < int(done.stdout) < 4 * weight.nbytes, done.stdout


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"src": "nowhere"}, FileNotFoundError, "has neither model.safetensors nor"),
        ({"dst": "dense"}, FileExistsError, "dense exists"),
        ({"format": "csr"}, ValueError, "format"),
        ({"expected_tokens": 0}, ValueError, "expected_tokens must be positive, got 0"),
        ({"dtype": torch.float64}, ValueError, "dtype must be torch.float16 or torch.bfloat16"),
        ({"workers": 0}, ValueError, "workers must be positive, got 0"),
        ({"targets": "q_prj"}, ValueError, 'target "q_prj" matches no two-dimensional weight'),
        ({"targets": "re:("}, ValueError, r"re:\("),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(64, 64)})
    arguments = {"src": "dense", "dst": "packed", **arguments}
    src, dst = (tmp_path / arguments.pop(name) for name in ("src", "dst"))
    with pytest.raises(error, match=message):
        convert_checkpoint(src, dst, **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_few_expected_tokens_are_written_as_gather(tmp_path):
    tensors = {"large.weight": zeros_among(4096, 8192, sparsity=0.95)}
    tensors["small.weight"] = zeros_among(256, 512, sparsity=0.95)
    save_tensors(tmp_path / "dense", tensors)
    for tokens, format in ((1, "gather"), (16, "row_bitmap")):
        folder = tmp_path / f"packed{tokens}"
        report = convert_checkpoint(tmp_path / "dense", folder, expected_tokens=tokens)
        assert [row.format for row in report.rows] == [format, "row_bitmap"], tokens
        for name, weight in tensors.items():
            packed = Checkpoint(checkpoint_files(folder)).weight(name.removesuffix(".weight"))
            assert torch.equal(packed.to_dense(), weight)
    report = convert_checkpoint(
        tmp_path / "dense", tmp_path / "named", format="bitmap", expected_tokens=1
    )
    assert {row.format for row in report.rows} == {"bitmap"}


def test_sources_that_are_no_dense_checkpoint(tmp_path):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(256, 256)})
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(ValueError, match="a in .* is packed already"):
        convert_checkpoint(tmp_path / "packed", tmp_path / "again")
    config = {"quantization_config": {"quant_method": "awq"}}
    save_tensors(tmp_path / "awq", {"a.weight": zeros_among(64, 64)}, config)
    with pytest.raises(ValueError, match=r"awq.config\.json .*'awq'"):
        convert_checkpoint(tmp_path / "awq", tmp_path / "again")
    (tmp_path / "awq" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        convert_checkpoint(tmp_path / "awq", tmp_path / "again")
    file = tmp_path / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "again")
    assert not Path(tmp_path, "again").exists()


def with_header(folder, header, size):
    """A file by hand: safetensors would not write what is wrong with it."""
    folder.mkdir()
    encoded = json.dumps(header).encode()
    data = struct.pack("<Q", len(encoded)) + encoded + bytes(size)
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Two names for the same bytes, as in a pickled file with tied weights.
        ({"b.weight": {"data_offsets": [0, 8]}}, "is not a complete safetensors file"),
        # More than there is, before memory is asked for.
        ({"b.weight": {"shape": [2**40, 2**20], "data_offsets": [8, 16]}}, "is not a complete"),
        ({"b.weight": {"data_offsets": [8, 2**50]}}, "is not a complete safetensors file"),
        ({"b.weight": {"dtype": "F12"}}, "is not a complete safetensors file"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, change, message):
    entry = {"dtype": "F16", "shape": [2, 2]}
    header = {
        "a.weight": {**entry, "data_offsets": [0, 8]},
        "b.weight": {**entry, "data_offsets": [8, 16]},
    }
    convert_checkpoint(with_header(tmp_path / "right", header, 16), tmp_path / "packed")
    for name, changes in change.items():
        header[name] |= changes
    source = with_header(tmp_path / "wrong", header, 16)
    with pytest.raises(ValueError, match=f"{source}/model.safetensors {message}"):
        convert_checkpoint(source, tmp_path / "again")
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()


def test_a_newer_version_is_refused(tmp_path):
    (tmp_path / "new").mkdir()
    tensors = {"a.weight": zeros_among(64, 64)}
    save_file(tensors, tmp_path / "new" / "model.safetensors", {"flash_llm": "2"})
    with pytest.raises(NotImplementedError, match="version '2', this flash_llm reads up to 1"):
        convert_checkpoint(tmp_path / "new", tmp_path / "packed")


def test_a_file_that_is_cut_short_meanwhile_is_noticed(tmp_path):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(256, 256)})
    file = tmp_path / "dense" / "model.safetensors"
    checkpoint = Checkpoint([file])
    buffer = torch.empty(checkpoint.nbytes_of("a.weight"), dtype=torch.uint8)
    assert torch.equal(checkpoint.tensor("a.weight", buffer), checkpoint.tensor("a.weight"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors ends within a\.weight"):
        checkpoint.tensor("a.weight", buffer)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/tmp/a.safetensors", "a/../../b"])
def test_an_index_that_leads_out_of_its_folder_is_refused_by_all(tmp_path, name):
    save_tensors(tmp_path / "other", {"a.weight": zeros_among(64, 64)})
    (tmp_path / "dense").mkdir()
    index = {"weight_map": {"a.weight": name}}
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (
        lambda: convert_checkpoint(tmp_path / "dense", tmp_path / "packed"),
        lambda: flash_llm.load(nn.Linear(64, 64), tmp_path / "dense"),
        lambda: flash_llm.verify_checkpoint(tmp_path / "other", tmp_path / "dense"),
        lambda: flash_llm.inspect_checkpoint(tmp_path / "dense"),
    ):
        with pytest.raises(ValueError, match=f"index.json names '{name}'"):
            read()


def test_a_folder_with_an_index_and_a_single_file_is_what_transformers_loads(tmp_path):
    model = pruned("llama", tmp_path, "30KB")
    other = dense("llama", tmp_path / "other")
    nn.init.ones_(other.lm_head.weight)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "dense")
    loaded = auto_class("llama").from_pretrained(tmp_path / "dense")
    assert torch.equal(loaded.lm_head.weight, other.lm_head.weight)
    report = flash_llm.verify_checkpoint(tmp_path / "dense", tmp_path / "other")
    assert report.max_relative_error == 0
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.index.json"))
    report = flash_llm.verify_checkpoint(tmp_path / "packed", tmp_path / "other")
    assert report.max_relative_error == 0 and model is not other


def test_weights_in_other_forms_are_left_behind(tmp_path):
    save_tensors(tmp_path / "dense", {"a.weight": zeros_among(256, 256)})
    for name in ("pytorch_model.bin", "old.safetensors", "pytorch_model.bin.index.json", "merges"):
        (tmp_path / "dense" / name).write_text("x")
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed")
    found = {path.name for path in (tmp_path / "packed").iterdir()}
    assert found == {"model.safetensors", "README.md", "merges"}


def test_all_that_is_no_weight_of_the_model_comes_along(tmp_path):
    dense = two_shards(tmp_path / "dense")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "a/b/c", ".git/config"):
        (dense / name).parent.mkdir(parents=True)
        (dense / name).write_text(name)
    (dense / "modules.json").symlink_to("1_Pooling/config.json")  # as in a cache of the hub
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (dense / "link").symlink_to(tmp_path / "outside")
    convert_checkpoint(dense, dense / "packed")  # in the source itself
    found = {str(p.relative_to(dense / "packed")) for p in (dense / "packed").rglob("*.*")}
    expected = {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json", "config.json"}
    shards = {"a.safetensors", "b.safetensors", "model.safetensors.index.json", "README.md"}
    assert found == expected | shards and (dense / "packed" / "a" / "b" / "c").is_file()
    assert not (dense / "packed" / "modules.json").is_symlink()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_config_names_the_dtype_that_weights_were_cast_to(tmp_path, key):
    pruned("llama", tmp_path)
    file = tmp_path / "dense" / "config.json"
    config = json.loads(file.read_text())
    config.pop("dtype")
    config["inner_config"] = {"dtype": "float32", "inner": {"torch_dtype": "float32"}}
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    file.write_text(json.dumps(config | ({key: "float32"} if key else {})))
    options = {"pack_unprofitable": True}
    convert_checkpoint(tmp_path / "dense", tmp_path / "cast", dtype=torch.bfloat16, **options)
    found = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert found["dtype"] == "bfloat16" and "float32" not in json.dumps(found)
    assert flash_llm.from_pretrained(tmp_path / "cast").dtype == torch.bfloat16


def test_the_config_names_no_dtype_that_nothing_was_cast_to(tmp_path):
    tensors = {"a.weight": zeros_among(256, 256)}
    save_tensors(tmp_path / "dense", tensors, {"dtype": "float16"})
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "float16"


def test_a_tied_head_stays_with_its_embedding(tmp_path):
    """A file holds tied weights once, under the embedding's name, which is left alone."""
    model = pruned("qwen2", tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    report = convert_checkpoint(tmp_path / "dense", tmp_path / "packed", pack_unprofitable=True)
    assert not any("embed" in row.name or "lm_head" in row.name for row in report.rows)
    again = flash_llm.from_pretrained(tmp_path / "packed")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    # An embedding cannot be packed, whatever the patterns say.
    report = convert_checkpoint(
        tmp_path / "dense", tmp_path / "all", ignore=(), pack_unprofitable=True
    )
    (row,) = (row for row in report.rows if "embed" in row.name)
    assert row.decision == "skipped" and "is of class Embedding" in row.reason
    assert torch.equal(output(flash_llm.from_pretrained(tmp_path / "all")), output(again))


def test_generation_after_a_conversion(tmp_path):
    model = pruned("llama", tmp_path)
    convert_checkpoint(tmp_path / "dense", tmp_path / "packed", pack_unprofitable=True)
    again = flash_llm.from_pretrained(tmp_path / "packed")
    flash_llm.sparsify_(model, pack_unprofitable=True)
    expected = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(again.generate(IDS, max_new_tokens=3, do_sample=False), expected)
