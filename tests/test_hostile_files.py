"""Kills and malformed files in bounded numbers: nothing is lost, and errors are typed and cheap."""

import json
import os
import subprocess
import sys

import pytest
import torch
from formats import each
from safetensors.torch import save_file
from torch import nn

import flash_llm
from flash_llm.io.report import report_checkpoint
from flash_llm.prune.report import PruneReport

# Saves over an earlier checkpoint in children that kill themselves, each at a later line of the
# modules that write; forked, because importing torch takes seconds. Says how many were killed, and
# how many left the earlier and the new checkpoint.
KILLED_SAVES = """
import os, shutil, signal, sys
from pathlib import Path
import torch
import flash_llm
from flash_llm.io import checkpoint, files
torch.set_num_threads(1)
folder, moments = Path(sys.argv[1]), int(sys.argv[2])
build = lambda: torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))).half()
old, new = build(), build()
flash_llm.sparsify_(new, sparsity=0.8, pack_unprofitable=True)
same = lambda a, b: all(torch.equal(a[i].weight, b[i].weight) for i in range(3))
SIZES = ("5GB", 10_000)

def save(size, moment=None):
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        status, said = os.waitpid(child, 0)[1], os.fdopen(read).read()
        return status, int(said or 0)
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename not in (checkpoint.__file__, files.__file__):
            return None
        lines += event == "line"
        if lines == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    flash_llm.save(new, folder, max_shard_size=size)
    sys.settrace(None)
    os.write(write, str(lines).encode())
    os._exit(0)

kills, found = 0, {"old": 0, "new": 0}
for before in SIZES:
    earlier = folder.with_name(f"before-{before}")
    flash_llm.save(old, earlier, max_shard_size=before)
    for after in SIZES:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(earlier, folder)
        status, lines = save(after)
        assert status == 0 and lines > 20
        for moment in range(1, lines, max(lines // moments, 1)):
            shutil.rmtree(folder)
            shutil.copytree(earlier, folder)
            assert save(after, moment)[0] == signal.SIGKILL
            again = flash_llm.load(build(), folder)
            whole = "new" if isinstance(again[0], flash_llm.SparseLinear) else "old"
            assert same(again, new if whole == "new" else old), (before, after, moment)
            found[whole] += 1
            kills += 1
        flash_llm.save(new, folder, max_shard_size=after)
        assert not list(folder.glob(".*")), "what kills left behind stays"
print(kills, found["old"], found["new"])
"""


@pytest.mark.slow
def test_a_kill_during_save_leaves_the_earlier_checkpoint_or_the_new_one(tmp_path):
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path / "saved"), "13"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, old, new = map(int, done.stdout.split())
    print(f"{kills} kills during save: {old} left the earlier checkpoint, {new} the new one")
    assert kills > 50 and old and new


# Reads mutated checkpoints with every reader, in little memory.
MALFORMED = """
import json, random, resource, shutil, struct, sys
from collections import Counter
from pathlib import Path
import torch
import flash_llm.bench
from flash_llm.bench import bench_checkpoint
from flash_llm.io.report import report_checkpoint
flash_llm.bench._time_products = lambda *_: ()  # takes seconds
torch.set_num_threads(1)
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
base = folder / "base"
files = ("model.safetensors.index.json", "config.json", "prune_report.json")
shards = sorted(path.name for path in base.glob("*.safetensors"))
VALUES = (-1, 0, 1, 7, 2**31, 2**40, 2**62, 2**63, 2**64, 1e400, -0.5, None, True, "F16", "", [],
          {}, [2**62, 4], [[[]]], "../base/" + shards[0], "/etc/passwd")
random = random.Random(0)

def places(found, at=()):
    yield at
    inner = found.items() if isinstance(found, dict) else enumerate(found)
    for key, value in inner:
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))
        else:
            yield (*at, key)

def change(found):
    at = random.choice([place for place in places(found) if place])
    for key in at[:-1]:
        found = found[key]
    if random.random() < 0.2:
        del found[at[-1]]
    else:
        found[at[-1]] = random.choice(VALUES)

def mutate(path):
    data = bytearray(path.read_bytes())
    if path.suffix != ".safetensors":
        how = random.randrange(4)
        if how == 0:
            texts = (b"[" * 100_000, b"", b"\\xff\\xfe", b"[]", b"null", b'{"a":' * 900)
            return random.choice(texts)
        if how == 1:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            return bytes(data)
        found = json.loads(data)
        change(found)
        return json.dumps(found).encode()
    (length,) = struct.unpack("<Q", data[:8])
    how = random.randrange(5)
    if how == 0:
        data[random.randrange(8 + length)] ^= 1 << random.randrange(8)
    elif how == 1:
        del data[random.randrange(len(data)):]
    elif how == 2:  # the integers of a packed header
        header = json.loads(data[8 : 8 + length])
        begins = [e["data_offsets"][0] for name, e in header.items() if name.endswith("_header")]
        at = 8 + length + (begins or [0])[0] + 8 * random.randrange(8)
        value = random.choice((-1, 0, 3, 2**31, 2**31 - 1, 2**40, 2**62))
        data[at : at + 8] = struct.pack("<q", value)
    else:
        header = json.loads(data[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        data = struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]
    return bytes(data)

build = lambda: torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 64)).half()
target = folder / "mutated"
READERS = {
    "load": lambda: flash_llm.load(build(), target),
    "inspect": lambda: flash_llm.inspect_checkpoint(target),
    "convert": lambda: flash_llm.convert_checkpoint(target, folder / "out"),
    "verify": lambda: flash_llm.verify_checkpoint(target, folder / "dense"),
    "bench": lambda: bench_checkpoint(target, tokens=(1,)),
    "report": lambda: str(report_checkpoint(target)),
}
for read in READERS.values():  # what is allocated once
    shutil.copytree(base, target, dirs_exist_ok=True)
    try:
        read()
    except ValueError:
        pass
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
found = Counter()
for number in range(rounds):
    shutil.rmtree(target)
    shutil.copytree(base, target)
    path = target / random.choice((*files, *shards, *shards))
    path.write_bytes(mutate(path))
    for name, read in READERS.items():
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.rmtree(folder / "out.partial", ignore_errors=True)
        try:
            read()
            found["nothing"] += 1
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            found[type(error).__name__] += 1
            assert str(error), number
        except BaseException as error:
            shutil.copytree(target, folder / "kept")
            raise AssertionError(f"{name} of mutation {number}, {path.name}: {error!r}") from error
print(json.dumps(found))
"""


def a_report():
    layers = [{"name": "0", "shape": [2, 3], "sparsity": 0.5, "num_tokens": 4, "sequential": True}]
    recipe = {"method": "wanda", "sparsity": 0.5, "scope": "row", "allocation": "uniform"}
    recipe |= {"nsamples": None, "seqlen": 8, "seed": 0, "damping": 0.01, "preserve_mask": False}
    recipe |= {"targets": ["Linear"], "ignore": []}
    sizes = {"num_samples": 2, "num_tokens": 4, "seconds": 1.5}
    return {"recipe": recipe, "layers": [{**layers[0], "error": None}], **sizes, "sparsity": 0.5}


@pytest.mark.slow
def test_malformed_files_give_typed_errors_in_little_memory(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64)).half()
    flash_llm.sparsify_(model, sparsity=0.8, pack_unprofitable=True)
    flash_llm.save(model, tmp_path / "base", max_shard_size=5_000)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x", "inner": {"dtype": [1]}}')
    (tmp_path / "base" / PruneReport.FILE_NAME).write_text(json.dumps(a_report()))
    dense = {f"{i}.weight": layer.weight for i, layer in enumerate(model)}
    dense |= {f"{i}.bias": layer.bias.detach() for i, layer in enumerate(model)}
    (tmp_path / "dense").mkdir()
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    command = [sys.executable, "-c", MALFORMED, str(tmp_path), "125"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    print(f"125 mutations and 6 readers: {counts}")
    assert sum(counts.values()) == 750 and counts["ValueError"] > 200


@each(
    "change",
    [
        lambda r: r["layers"][0].update(shape=[float("inf"), 3]),
        lambda r: r["layers"][0].update(shape=[1, 2, 3]),
        lambda r: r["layers"][0].update(error="none"),
        lambda r: r["layers"][0].pop("num_tokens"),
        lambda r: r.update(layers={"0": 1}),
        lambda r: r.update(recipe=[]),
        lambda r: r["recipe"].update(targets=[1]),
        lambda r: r["recipe"].update(strange=1),
        lambda r: r.update(seconds=None),
    ],
)
def test_damaged_reports_are_refused_by_name(tmp_path, change):
    found = a_report()
    (tmp_path / PruneReport.FILE_NAME).write_text(json.dumps(found))
    assert PruneReport.load(tmp_path).layers[0].shape == (2, 3)
    change(found)
    (tmp_path / PruneReport.FILE_NAME).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=PruneReport.FILE_NAME):
        PruneReport.load(tmp_path)


@each("text", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "", "[]", "\xff"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", PruneReport.FILE_NAME]
)
def test_json_that_is_no_object_is_refused_by_name(tmp_path, name, text):
    save_file({"a.weight": torch.zeros(8, 8)}, tmp_path / "a.safetensors")
    index = {"weight_map": {"a.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=name):
        if name == PruneReport.FILE_NAME:
            report_checkpoint(tmp_path)
        else:
            flash_llm.convert_checkpoint(tmp_path, tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()


def test_what_a_small_file_claims_is_compared_before_memory_is_asked_for(tmp_path, monkeypatch):
    """336 bytes made `verify` allocate 6.1 GB and `bench` 12.3 GB."""
    from flash_llm import bench, ops

    packed = ops.pack(torch.zeros(4, 64).half(), "row_bitmap")
    header = packed.header._replace(k=2**31 - 8)
    parts = {"header": header.to_tensor(), "offsets": packed.offsets, "payload": packed.payload}
    for name, tensors in {
        "small": {f"a.weight_{part}": tensor for part, tensor in parts.items()},
        "dense": {"a.weight": torch.zeros(4, 64).half()},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.setattr(ops.PackedWeight, "to_dense", None)
    with pytest.raises(ValueError, match=r"a\.weight .*\[4, 64\]"):
        flash_llm.verify_checkpoint(tmp_path / "small", tmp_path / "dense")
    with pytest.raises(ValueError, match=r"\ba .*\[4, 2147483640\]"):
        bench.bench_checkpoint(tmp_path / "small")
    assert flash_llm.inspect_checkpoint(tmp_path / "small").rows[0].shape == (4, 2**31 - 8)
