"""Packed layers in safetensors files: what is saved comes back, what is broken is refused."""

import contextlib
import errno
import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flash_llm
from flash_llm import SparseLinear
from flash_llm.io import checkpoint
from flash_llm.io.checkpoint import CHECKPOINT_VERSION, Checkpoint, checkpoint_files


def build(dtype=torch.float16, device=None):
    torch.manual_seed(1)
    with torch.device(device or "cpu"):
        model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 90, bias=False))
        model.add_module("norm", nn.LayerNorm(90))
        model.register_buffer("steps", torch.arange(5))
    return model.to(dtype)


def packed(format="auto", dtype=torch.float16):
    model = build(dtype)
    flash_llm.sparsify_(model, sparsity=0.8, format=format, pack_unprofitable=True)
    nn.init.normal_(model[0].bias)
    nn.init.normal_(model.norm.weight)
    return model


def same(model, other):
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[k], others[k]) for k in state)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, format, dtype, max_shard_size, device):
    model = packed(format, dtype)
    flash_llm.save(model, tmp_path, max_shard_size=max_shard_size)
    files = checkpoint_files(tmp_path)
    assert (len(files) > 1) == (max_shard_size != "5GB")
    empty = build(dtype, device)
    empty.eval()
    again = flash_llm.load(empty, tmp_path)
    assert again is empty and isinstance(again[2], SparseLinear) and not again[2].training
    for name in ("0", "2"):
        loaded, saved = again.get_submodule(name), model.get_submodule(name)
        assert loaded.format == "auto" and torch.equal(loaded.weight, saved.weight)
    x = torch.randn(3, 200, dtype=dtype)
    assert torch.equal(again[0].bias, model[0].bias) and torch.equal(again.steps, model.steps)
    torch.testing.assert_close(again(x), model(x))
    assert same(again, model) or again[0].packed.FORMAT != model[0].packed.FORMAT


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files_may_change_after_loading(tmp_path, device):
    model = packed()
    flash_llm.save(model, tmp_path)
    again = flash_llm.load(build(device=device), tmp_path)
    weight = again[0].weight
    (file,) = checkpoint_files(tmp_path)
    with file.open("r+b") as opened:  # in place: what is mapped would change
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(again[0].weight, weight) and torch.equal(
        again.norm.weight, model.norm.weight
    )


def test_models_without_packed_layers_and_with_tied_ones(tmp_path):
    def tied():
        model = nn.Sequential(
            nn.Embedding(70, 64), nn.Linear(64, 64), nn.Linear(64, 70, bias=False)
        )
        model = model.half()
        model[2].weight = model[0].weight
        return model

    for sparse in (False, True):
        model, folder = tied(), tmp_path / str(sparse)
        if sparse:
            flash_llm.sparsify_(model, ["1"], sparsity=0.9, pack_unprofitable=True)
        flash_llm.save(model, folder)
        again = flash_llm.load(tied(), folder)
        assert again[2].weight is again[0].weight and same(again, model)


def shared(dtype=torch.float16):
    """One layer under three names, one of them within a block that has two names itself."""
    torch.manual_seed(2)
    block = nn.Sequential(nn.Linear(128, 128), nn.ReLU()).to(dtype)
    return nn.ModuleDict({"a": block, "b": block, "c": block[0], "d": nn.Linear(128, 8).to(dtype)})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_module_under_several_names_is_saved_once_and_loaded_under_all(tmp_path, sparse, device):
    model = shared()
    if sparse:
        flash_llm.sparsify_(model, sparsity=0.8, pack_unprofitable=True)
    flash_llm.save(model, tmp_path)
    names = Checkpoint(checkpoint_files(tmp_path)).tensors
    assert len({name for name in names if name.endswith((".weight", ".weight_payload"))}) == 2
    empty = shared() if device == "cpu" else shared().to("meta")
    again = flash_llm.load(empty, tmp_path)
    assert again.c is again.a[0] is again.b[0] and isinstance(again.c, SparseLinear) == sparse
    assert same(again, model)


def test_a_packed_head_does_not_stand_for_the_embedding_that_is_tied_to_it(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "head": nn.Linear(64, 64, bias=False)})
    flash_llm.sparsify_(model.half(), sparsity=0.8, pack_unprofitable=True)
    state = {n: t for n, t in model.state_dict().items() if n != "embed.weight"}
    save_file(state, tmp_path / "model.safetensors")
    tied = nn.ModuleDict({"embed": nn.Embedding(64, 64), "head": nn.Linear(64, 64, bias=False)})
    tied.half().head.weight = tied.embed.weight
    with pytest.raises(ValueError, match=r"the model has embed\.weight, the checkpoint has not"):
        flash_llm.load(tied, tmp_path)


def test_views_of_one_storage_are_all_saved(tmp_path):
    base = torch.arange(12.0)
    model = nn.Module()
    for name, view in {"all": base, "part": base[:4], "turned": base.view(3, 4).t()}.items():
        model.register_buffer(name, view)
    flash_llm.save(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.named_buffers())


class Noted(nn.Module):
    def get_extra_state(self):
        return {"no": "tensor"}


def test_what_safetensors_cannot_hold_is_named_and_nothing_lost(tmp_path):
    flash_llm.save(packed(), tmp_path)
    strange, noted = build(), build()
    strange.register_buffer("strange", torch.zeros(2, dtype=torch.complex128))
    noted.add_module("noted", Noted())
    for model, name in ((strange, "strange is torch.complex128"), (noted, "noted._extra_state")):
        with pytest.raises(TypeError, match=name):
            flash_llm.save(model, tmp_path)
    assert same(flash_llm.load(build(), tmp_path), packed()) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("after", ["5GB", 20_000])
@pytest.mark.parametrize("before", ["5GB", 20_000])
def test_an_earlier_checkpoint_is_replaced_and_nothing_else(tmp_path, before, after):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.bak").write_text("mine")
    first, second = packed(), packed()
    nn.init.normal_(second[0].bias)
    for _ in range(2):
        flash_llm.save(first, tmp_path, max_shard_size=before)
        flash_llm.save(second, tmp_path, max_shard_size=after)
        assert same(flash_llm.load(build(), tmp_path), second)
    files = {path.name for path in checkpoint_files(tmp_path)}
    index = {"model.safetensors.index.json"} if after != "5GB" else set()
    others = {"config.json", "model.safetensors.bak"}
    assert {path.name for path in tmp_path.iterdir()} == files | index | others


@contextlib.contextmanager
def no_file_larger_than(limit):
    """What a full disk looks like, without having one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10**9, 10_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, size):
    flash_llm.save(packed(), tmp_path, max_shard_size=size)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64))  # only one has room
    with no_file_larger_than(20_000), pytest.raises(OSError, match=f"'{tmp_path}/model") as caught:
        flash_llm.save(model, tmp_path, max_shard_size=size)
    assert caught.value.errno == errno.EFBIG
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["norm.bias", "0.bias", "steps"])
def test_dtypes_of_plain_tensors_are_compared(tmp_path, name):
    """The tag BF16 of a file changed to F16 turns 1.0 into 1.875."""
    flash_llm.save(packed(dtype=torch.bfloat16), tmp_path)
    dtype = torch.float16 if name != "steps" else torch.float64
    edit(tmp_path, lambda t: t.update({name: t[name].view(dtype)}))
    with pytest.raises(TypeError, match=f"{name} must be torch"):
        flash_llm.load(build(torch.bfloat16), tmp_path)


def test_no_file_is_opened_for_each_layer(tmp_path, monkeypatch):
    """2,000 layers took 10 s and 4,000 took 41 s: each reopened and reparsed its file."""
    layer = packed()[2].state_dict()
    state = {f"{i}.{name}": tensor for i in range(300) for name, tensor in layer.items()}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "m.safetensors")
    opened, safe_open, opens = [], checkpoint.safe_open, checkpoint.Path.open
    monkeypatch.setattr(
        checkpoint, "safe_open", lambda *a, **k: opened.append(a) or safe_open(*a, **k)
    )
    monkeypatch.setattr(checkpoint.Path, "open", lambda *a, **k: opened.append(a) or opens(*a, **k))
    assert len(Checkpoint([tmp_path / "m.safetensors"]).packed) == 300
    assert len(opened) <= 3


@pytest.mark.parametrize("how", ["written", "replaced", "cut"])
def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path, how):
    flash_llm.save(packed(), tmp_path)
    file = tmp_path / "model.safetensors"
    opened = Checkpoint([file])
    weight = opened.weight("0").to_dense()
    if how == "replaced":
        shutil.copy2(file, tmp_path / "copy")
        (tmp_path / "copy").rename(file)
    else:
        file.write_bytes(file.read_bytes()[: None if how == "written" else -1])
    with pytest.raises(ValueError, match=r"model\.safetensors (has been changed|ends within)"):
        [opened.tensor(name) for name in sorted(opened.tensors)]
    assert torch.equal(weight, packed()[0].weight)  # in memory of its own


def test_the_files_say_what_is_packed(tmp_path, format):
    model = packed(format)
    flash_llm.save(model, tmp_path)
    checkpoint = Checkpoint(checkpoint_files(tmp_path))
    assert set(checkpoint.packed) == {"0", "2"} and "0.bias" in checkpoint.tensors
    assert checkpoint.packed["0"] == model[0].packed.header
    assert checkpoint.weight("0").to_dense().equal(model[0].weight)
    placeholder = checkpoint.placeholder("2")
    assert placeholder.device.type == "meta" and placeholder.nbytes == model[2].packed.nbytes


def edit(folder, change, metadata=None):
    """Rewrite the only file of a checkpoint with its tensors changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


BROKEN = {
    "missing part": (
        lambda t: t.pop("2.weight_offsets"),
        ValueError,
        r"2\.weight_offsets is missing",
    ),
    "two weights": (
        lambda t: t.update({"2.weight": torch.zeros(90, 300).half()}),
        ValueError,
        r"2 is packed in .*model\.safetensors, but 2\.weight is in",
    ),
    "header dtype": (
        lambda t: t.update({"0.weight_header": t["0.weight_header"].int()}),
        TypeError,
        r"0\.weight_header in .* must be I64, got I32",
    ),
    "header shape": (
        lambda t: t.update({"0.weight_header": torch.zeros(9, dtype=torch.int64)}),
        ValueError,
        r"0\.weight_header in .* must have shape \[8\], got \[9\]",
    ),
    "magic": (
        lambda t: t["0.weight_header"].__setitem__(0, 5),
        ValueError,
        r"0 in .*model\.safetensors: .*magic number .*, got 5",
    ),
    "newer format": (
        lambda t: t["0.weight_header"].__setitem__(1, 99),
        NotImplementedError,
        r"0 in .*model\.safetensors: .*version 99",
    ),
    "unknown format": (
        lambda t: t["0.weight_header"].__setitem__(2, 77),
        NotImplementedError,
        r"0 in .*model\.safetensors: .*format 77",
    ),
    "unknown dtype": (
        lambda t: t["0.weight_header"].__setitem__(3, 77),
        TypeError,
        r"0 in .*model\.safetensors: .*value type 77",
    ),
    "negative size": (
        lambda t: t["0.weight_header"].__setitem__(4, -1),
        ValueError,
        r"0 in .*model\.safetensors: .*field m .*negative, got -1",
    ),
    "huge claim": (
        lambda t: t["0.weight_header"].__setitem__(7, 1 << 40),
        ValueError,
        r"0 in .*model\.safetensors: payload .*1099511627776",
    ),
    "payload too short": (
        lambda t: t.update({"0.weight_payload": t["0.weight_payload"][:-1].clone()}),
        ValueError,
        r"0 in .*model\.safetensors: payload",
    ),
    "payload of two dimensions": (
        lambda t: t.update({"0.weight_payload": t["0.weight_payload"][None].clone()}),
        ValueError,
        r"0\.weight_payload in .*model\.safetensors .*dimension",
    ),
    "malformed offsets": (
        lambda t: t["0.weight_offsets"].__setitem__(1, -7),
        ValueError,
        r"0 in .*model\.safetensors is malformed",
    ),
    "tensor that the model lacks": (
        lambda t: t.update({"more": torch.zeros(1)}),
        ValueError,
        r"the checkpoint has more, the model has not",
    ),
    "tensor that the file lacks": (
        lambda t: t.pop("norm.bias"),
        ValueError,
        r"the model has norm\.bias, the checkpoint has not",
    ),
    "bias that the file lacks": (
        lambda t: t.pop("0.bias"),
        ValueError,
        r"the model has 0\.bias, the checkpoint has not",
    ),
    "another shape": (
        lambda t: t.update({"norm.bias": torch.zeros(91).half()}),
        ValueError,
        r"norm\.bias must have shape \[90\], the checkpoint has \[91\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_and_change_nothing(tmp_path, format, case):
    change, error, message = BROKEN[case]
    flash_llm.save(packed(format), tmp_path)
    edit(tmp_path, change)
    model = build()
    with pytest.raises(error, match=message):
        flash_llm.load(model, tmp_path)
    assert same(model, build()) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_files_that_are_cut_short_are_refused_by_name(tmp_path, size):
    flash_llm.save(packed(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        flash_llm.load(build(), tmp_path)


def test_newer_files_are_refused(tmp_path):
    flash_llm.save(packed(), tmp_path)
    edit(tmp_path, lambda t: None, metadata={"flash_llm": str(CHECKPOINT_VERSION + 1)})
    with pytest.raises(NotImplementedError, match="has packed layers in version '2'"):
        flash_llm.load(build(), tmp_path)


def test_folders_without_a_whole_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        flash_llm.load(build(), tmp_path)
    flash_llm.save(packed(), tmp_path, max_shard_size=20_000)
    first, *_ = checkpoint_files(tmp_path)
    shutil.move(first, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"index.json names {first.name}, which is missing"):
        flash_llm.load(build(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(ValueError, match="is not an index of safetensors files"):
        flash_llm.load(build(), tmp_path)


def test_models_of_another_architecture(tmp_path):
    flash_llm.save(packed(), tmp_path)
    for change, error, message in [
        (lambda m: setattr(m, "0", nn.Linear(201, 300).half()), ValueError, r"\[300, 201\]"),
        (lambda m: setattr(m, "0", nn.Identity()), TypeError, "neither nn.Linear nor Conv1D"),
        (lambda m: m.__delattr__("0"), ValueError, "the model has no layer 0"),
        (lambda m: m.bfloat16(), TypeError, "0 is torch.bfloat16, but packed as torch.float16"),
    ]:
        model = build()
        change(model)
        with pytest.raises(error, match=message):
            flash_llm.load(model, tmp_path)


def test_meta_tensors_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        flash_llm.save(build(device="meta"), tmp_path)
