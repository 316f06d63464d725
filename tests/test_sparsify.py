"""sparsify_: which layers it takes, what it reports, and that a failure changes nothing."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import flash_llm
from flash_llm import SparseLinear, SparsifyReport, sparsify_, testing
from flash_llm.select import select_layers
from flash_llm.sparsify import model_bytes


def linear(k=256, m=128, sparsity=0.8, bias=True, dtype=torch.float16, seed=0):
    layer = nn.Linear(k, m, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(testing.random_sparse(m, k, sparsity, dtype=dtype, seed=seed))
    return layer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = linear(128, 128, seed=1)
        self.o_proj = linear(128, 128, bias=False, seed=2)

    def forward(self, x):
        return self.o_proj(self.q_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(linear(128, 256, seed=3), nn.SiLU(), linear(256, 128, seed=4))

    def forward(self, x):
        return x + self.mlp(x + self.attn(x))


class Model(nn.Module):
    """A decoder in outline: blocks, and a head of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 128).half()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = linear(128, 50)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def packed_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


IDS = torch.arange(12).view(3, 4)
ALL = [
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in ("attn.q_proj", "attn.o_proj", "mlp.0", "mlp.2")
]


def test_swaps_in_place_and_the_model_answers_the_same(format, device):
    model = Model().to(device)
    ids = IDS.to(device)
    with torch.no_grad():
        expected = model(ids)
    dense = copy.deepcopy(model)
    report = sparsify_(model, format=format)
    assert packed_names(model) == ALL
    for name in ALL:
        layer = model.get_submodule(name)
        assert layer.format == layer.packed.FORMAT == format
        assert torch.equal(layer.weight, dense.get_submodule(name).weight)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected, rtol=5e-3, atol=5e-3)
    assert [row.name for row in report.rows] == [*ALL, "lm_head"]
    assert type(model.lm_head) is nn.Linear
    assert report.rows[-1].decision == "skipped"
    assert [row.format for row in report.rows] == [format] * len(ALL) + [None]
    assert report.rows[-1].reason == 'ignored by "lm_head"'


def test_the_default_format_is_auto(device):
    model = Model().to(device)
    report = sparsify_(model)
    wanted = "row_bitmap" if device == "cpu" else "bitmap"
    assert {row.format for row in report.packed} == {wanted}
    for name in ALL:
        layer = model.get_submodule(name)
        assert (layer.format, layer.packed.FORMAT) == ("auto", wanted)


def test_formats_may_be_mixed_in_one_model(device):
    model = Model().to(device)
    with torch.no_grad():
        expected = model(IDS.to(device))
    sparsify_(model, ["re:.*attn"], (), format="tiled_csl")
    report = sparsify_(model, format="bitmap")
    assert [row.format for row in report.rows] == [
        "tiled_csl",
        "tiled_csl",
        "bitmap",
        "bitmap",
    ] * 2 + [None]
    assert report.rows[0].reason == "already sparse"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS.to(device)), expected, rtol=5e-3, atol=5e-3)


def test_report_tells_shape_sparsity_and_bytes(format):
    model = Model()
    report = sparsify_(model, format=format)
    row = next(row for row in report.rows if row.name == "layers.0.mlp.0")
    packed = model.layers[0].mlp[0].packed
    assert row.shape == (256, 128) and row.sparsity == packed.sparsity
    assert row.dense_bytes == 256 * 128 * 2 and row.packed_bytes == packed.nbytes
    assert row.decision == "packed" and row.format == format
    assert row.reason == f"{packed.nbytes / row.dense_bytes:.2f}x the dense bytes"
    after = sum(
        packed.nbytes for packed in (m.packed for m in model.modules() if hasattr(m, "packed"))
    )
    assert report.total_bytes == after + model.lm_head.weight.nbytes
    assert report.dense_bytes == sum(row.dense_bytes for row in report.rows)
    data = json.loads(report.to_json())
    assert data["total_bytes"] == report.total_bytes
    assert data["rows"][2]["name"] == "layers.0.mlp.0" and data["rows"][2]["shape"] == [256, 128]
    assert [row["format"] for row in data["rows"]] == [format] * len(ALL) + [None]


def test_report_prints_as_an_aligned_table_and_as_html(format):
    report = sparsify_(Model(), format=format)
    lines = str(report).splitlines()
    assert len(lines) == 2 + 9 + 1
    column = lines[0].index("decision")
    assert all(line[column:].startswith(("packed", "skipped")) for line in lines[2:-1])
    column = lines[0].index("format")
    assert [line[column:].split()[0] for line in lines[2:-1]] == [format] * len(ALL) + ["-"]
    assert lines[-1].startswith("8 of 9 layers packed: ")
    html = report._repr_html_()
    assert html.count("<tr>") == 10 and "ignored by &quot;lm_head&quot;" in html


@pytest.mark.parametrize(
    ("format", "sparsity", "factor"),
    [("tiled_csl", 0.3, "1.4"), ("bitmap", 0.0, "1.0"), ("row_bitmap", 0.0, "1.0")],
)
def test_layer_that_would_not_shrink_stays_dense(format, sparsity, factor):
    model = nn.Sequential(linear(sparsity=0.8), linear(128, 256, sparsity=sparsity), linear(0, 5))
    kept = model[1]
    report = sparsify_(model, format=format)
    assert model[1] is kept
    assert [row.decision for row in report.rows] == ["packed", "dense", "dense"]
    assert report.rows[1].packed_bytes > report.rows[1].dense_bytes
    assert report.rows[1].reason.startswith(f"packing would not shrink it: {factor}")
    assert report.total_bytes == (model[0].packed.nbytes + kept.weight.nbytes)


def test_bitmap_shrinks_layers_that_tiled_csl_does_not():
    model = nn.Sequential(linear(512, 256, sparsity=0.3))
    before = model_bytes(model)
    assert sparsify_(copy.deepcopy(model), format="tiled_csl").rows[0].decision == "dense"
    assert sparsify_(model, format="bitmap").rows[0].decision == "packed"
    assert model_bytes(model) < 0.9 * before


def test_unprofitable_layers_are_packed_when_asked(format):
    model = nn.Sequential(linear(sparsity=0.0))
    report = sparsify_(model, pack_unprofitable=True, format=format)
    assert packed_names(model) == ["0"]
    assert report.rows[0].decision == "packed"
    assert report.rows[0].reason.endswith("as pack_unprofitable asks")
    assert report.total_bytes > report.dense_bytes


@pytest.mark.parametrize(("sparsity", "scope"), [(0.8, "row"), (0.9, "layer"), (None, "1:4")])
def test_prunes_while_packing(sparsity, scope, format):
    dense = linear(sparsity=0.0)
    model = nn.Sequential(copy.deepcopy(dense))
    report = sparsify_(model, sparsity=sparsity, scope=scope, format=format)
    expected = flash_llm.prune_pack(dense.weight, sparsity, scope=scope, format=format)
    assert torch.equal(model[0].weight_payload, expected.payload)
    assert report.rows[0].sparsity == pytest.approx(sparsity or 0.75, abs=0.005)


def test_a_layer_that_stays_dense_is_not_pruned():
    model = nn.Sequential(linear(sparsity=0.0))
    before = model[0].weight.clone()
    assert sparsify_(model, sparsity=0.05).rows[0].decision == "dense"
    assert torch.equal(model[0].weight, before)


# ---- choosing layers ----


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ("Linear", "lm_head", ALL),
        (["Linear"], [], [*ALL, "lm_head"]),
        (["q_proj"], (), ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        (["layers.1.attn.q_proj"], (), ["layers.1.attn.q_proj"]),
        (["1.attn.q_proj", "lm_head"], (), ["layers.1.attn.q_proj", "lm_head"]),
        (["re:.*mlp"], (), [name for name in ALL if "mlp" in name]),
        (["re:layers.0.*_proj$"], (), ["layers.0.attn.q_proj", "layers.0.attn.o_proj"]),
        (["Attention"], (), [name for name in ALL if "attn" in name]),
        (["layers.0"], (), ALL[:4]),
        (["Linear"], ["Attention", "re:lm_"], [name for name in ALL if "mlp" in name]),
        (["Linear"], ["layers", "embed"], ["lm_head"]),
        (["Model"], ["re:.*"], []),
    ],
)  # fmt: skip
def test_targets_and_ignore(targets, ignore, expected):
    model = Model()
    assert list(select_layers(model, targets, ignore)) == expected
    sparsify_(model, targets, ignore)
    assert packed_names(model) == expected


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["q_prj"], (), 'target "q_prj" must match a linear layer, it matches nothing'),
        (["Linear", "re:zzz"], (), 'target "re:zzz" must match a linear layer, it matches nothing'),
        (["proj"], (), 'target "proj" must match'),
        (["embed"], (), 'target "embed" must match a linear layer, it matches Embedding'),
        ([""], (), 'target "" must match'),
        (["Linear"], ["lm_hed"], 'ignore "lm_hed" must match a module, it matches nothing'),
        (["Linear"], ["re:.*zzz"], 'ignore "re:.*zzz" must match a module'),
        (["re:("], (), 'targets "re:\\("'),
    ],
)
def test_patterns_that_match_nothing_are_refused(targets, ignore, message):
    model = Model()
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        sparsify_(model, targets, ignore)
    assert packed_names(model) == []


def test_default_patterns_may_match_nothing():
    model = nn.Sequential(linear())  # neither Conv1D nor lm_head
    assert sparsify_(model).rows[0].decision == "packed"
    with pytest.raises(ValueError, match="the model has no nn.Linear or Conv1D"):
        sparsify_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match='ignore "lm_head" must match a module'):
        sparsify_(nn.Sequential(linear()), ignore=["lm_head"])


def test_conv1d_is_packed_transposed():
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(testing.random_sparse(nx, nf, 0.8))
            self.bias = nn.Parameter(torch.ones(nf).half())

    model = nn.Sequential(Conv1D(256, 128))
    conv = model[0]
    report = sparsify_(model)
    assert report.rows[0].shape == (256, 128)
    assert torch.equal(model[0].weight, conv.weight.t()) and model[0].bias is conv.bias


def test_module_under_two_names_is_packed_once():
    shared = linear(128, 128)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = sparsify_(model)
    assert [row.name for row in report.rows] == ["a"]
    assert isinstance(model["a"], SparseLinear) and model["a"] is model["b"][0]


def test_module_under_two_names_is_ignored_by_either():
    shared = linear(128, 128)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": linear()})
    sparsify_(model, ignore=["b"])
    assert packed_names(model) == ["c"]


# ---- layers that must be left alone ----


def test_tied_weights_are_refused_with_a_sentence():
    model = Model()
    model.lm_head.weight = model.embed.weight
    with pytest.raises(
        ValueError, match=r"lm_head.weight is tied to embed.weight.*\"lm_head\" to i"
    ):
        sparsify_(model, ignore=())
    assert packed_names(model) == []
    assert model.lm_head.weight is model.embed.weight
    sparsify_(model)  # the default leaves the head alone
    assert packed_names(model) == ALL


def test_two_layers_over_the_same_memory_are_tied():
    model = nn.Sequential(linear(128, 128), linear(128, 128))
    model[1].weight.data = model[0].weight.data.t()
    with pytest.raises(ValueError, match="0.weight is tied to 1.weight"):
        sparsify_(model, ignore=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_refused_before_anything_changes(dtype):
    model = Model()
    model.layers[1].mlp[2].to(dtype)
    message = rf"layers.1.mlp.2.weight must be torch.float16 .* got {dtype}.*\.to\(torch.bfloat16\)"
    with pytest.raises(TypeError, match=message):
        sparsify_(model)
    assert packed_names(model) == []
    sparsify_(model, ignore=["layers.1.mlp.2"])
    assert packed_names(model) == [*ALL[:-1], "lm_head"]


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = Model()
    modules, calls = dict(model.named_modules()), []
    real = flash_llm.sparsify.pack_layer

    def fail_late(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr("flash_llm.sparsify.pack_layer", fail_late)
    with pytest.raises(MemoryError):
        sparsify_(model)
    assert dict(model.named_modules()) == modules


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class QuantizedLinear(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(1))


def weight_normed():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(linear())


def with_replaced_forward():
    layer = linear()
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ScaledLinear(256, 128).half(), "ScaledLinear may compute something"),
        (lambda: QuantizedLinear(256, 128).half(), "holds more than a weight and a bias"),
        (
            lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(256, 128).half(),
            "nn.MultiheadAttention reads its weight",
        ),
        (
            lambda: parametrize.register_parametrization(linear(), "weight", nn.Identity()),
            "ParametrizedLinear may compute",
        ),
        (weight_normed, "computed by a hook"),
        (with_replaced_forward, "its forward was replaced"),
        (lambda: nn.Linear(256, 128, device="meta").half(), "meta device"),
        (lambda: SparseLinear.from_linear(linear()), "already sparse"),
    ],
    ids=[
        "forward",
        "buffer",
        "attention",
        "parametrized",
        "weight_norm",
        "replaced",
        "meta",
        "sparse",
    ],
)
def test_special_layers_are_skipped_with_a_reason(make, reason):
    special = make()
    model = nn.Sequential(linear(), special)
    report = sparsify_(model)
    assert model[1] is special and isinstance(model[0], SparseLinear)
    assert report.rows[1].decision == "skipped" and reason in report.rows[1].reason
    assert report.rows[1].shape == (128, 256)
    str(report), report.to_json(), report._repr_html_()


def test_subclasses_of_linear_with_the_same_forward_are_packed():
    class QKVLinear(nn.Linear):
        """A name and a constructor of its own, as many models have them."""

        def __init__(self, size):
            super().__init__(size, 3 * size, bias=False)
            self.num_heads = 4

        def reset_parameters(self):
            nn.init.normal_(self.weight)

    dense = nn.Sequential(QKVLinear(64)).half()
    model = copy.deepcopy(dense)
    assert sparsify_(model, sparsity=0.8).rows[0].decision == "packed"
    kept = model[0].weight != 0
    assert torch.equal(model[0].weight[kept], dense[0].weight[kept])


def test_second_call_finds_everything_sparse_already():
    model = Model()
    first = sparsify_(model)
    again = sparsify_(model)
    assert {row.reason for row in again.rows} == {"already sparse", 'ignored by "lm_head"'}
    assert again.total_bytes == first.total_bytes


def test_fused_experts_are_reported():
    model = nn.Sequential(linear(), nn.Conv1d(8, 8, 3).half())
    model.experts = nn.Module()
    model.experts.gate_up = nn.Parameter(torch.zeros(4, 64, 32).half())
    model.experts.position = nn.Parameter(torch.zeros(1, 64, 32).half())
    report = sparsify_(model)
    assert [row.name for row in report.rows] == ["0", "experts.gate_up"]
    assert report.rows[1].shape == (4, 64, 32) and report.rows[1].decision == "skipped"
    assert "3-D" in report.rows[1].reason
    assert len(sparsify_(Model(), ["q_proj"], ()).rows) == 2


def test_model_that_is_the_layer_itself_is_refused():
    with pytest.raises(ValueError, match="use SparseLinear.from_linear"):
        sparsify_(linear())
    with pytest.raises(TypeError, match="model must be a module, got dict"):
        sparsify_({})


# ---- what moves to the new layer ----


@pytest.mark.parametrize("target", ["weight", "weight-and-conv"])
def test_masks_of_torch_prune_are_folded(target):
    if target == "weight":
        layer = linear(sparsity=0.0)
    else:

        class Conv1D(nn.Module):
            def __init__(self):
                super().__init__()
                self.nf, self.nx = 128, 256
                self.weight = nn.Parameter(testing.random_sparse(256, 128, 0.0))
                self.bias = nn.Parameter(torch.zeros(128).half())

        layer = Conv1D()
    prune.l1_unstructured(layer, "weight", amount=0.8)
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # an optimizer step; layer.weight is stale now
    expected = layer.weight_orig * layer.weight_mask
    model = nn.Sequential(layer)
    report = sparsify_(model)
    assert report.rows[0].decision == "packed"
    weight = model[0].weight
    assert torch.equal(weight, expected if target == "weight" else expected.t())
    assert not model[0]._forward_pre_hooks
    model(torch.ones(1, 256, dtype=torch.float16))


def test_hooks_move_along_and_their_handles_still_work():
    model = nn.Sequential(linear())
    seen = []
    before = model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    after = model[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(type(module).__name__), with_kwargs=True
    )
    sparsify_(model)
    x = torch.ones(1, 256, dtype=torch.float16)
    model(x)
    assert seen == ["before", "SparseLinear"]
    before.remove()
    after.remove()
    model(x)
    assert len(seen) == 2


def test_bias_and_mode_move_along():
    model = nn.Sequential(linear(), linear(128, 256)).eval()
    biases = [layer.bias for layer in model]
    model[1].train()
    sparsify_(model)
    assert [layer.bias for layer in model] == biases
    assert [layer.training for layer in model] == [False, True]


def test_progress_bar_goes_to_stderr_only_when_asked(capsys):
    sparsify_(Model())
    assert capsys.readouterr() == ("", "")
    sparsify_(Model(), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "sparsify" in err


def test_empty_report_prints():
    report = SparsifyReport(())
    assert "0 of 0 layers packed" in str(report) and report.total_bytes == 0


# ---- model_bytes ----


def test_model_bytes_counts_shared_storage_once():
    model = Model()
    expected = sum(p.nbytes for p in model.parameters())
    assert model_bytes(model) == expected
    model.lm_head.weight = model.embed.weight
    assert model_bytes(model) == sum(p.nbytes for p in model.parameters())
    report = sparsify_(model)
    saved = sum(row.dense_bytes - row.packed_bytes for row in report.packed)
    assert model_bytes(model) == expected - saved - 50 * 128 * 2
    assert model_bytes(nn.Linear(10, 10, device="meta")) == 440


# ---- transformers ----


def tiny_model(name, dtype):
    transformers = pytest.importorskip("transformers")
    configs = {
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=99, tie_word_embeddings=True,
        ),
        "qwen2": lambda: transformers.Qwen2Config(
            hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=99,
        ),
        "gpt2": lambda: transformers.GPT2Config(n_embd=96, n_layer=2, n_head=4, vocab_size=99),
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[name](), dtype=dtype).eval()


@pytest.mark.hf
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_transformers_models_answer_like_their_dense_selves(name, format, device, dtype):
    dense = tiny_model(name, dtype).to(device)
    for layer in select_layers(dense).values():
        packed = flash_llm.prune_pack(layer.weight, 0.8)
        with torch.no_grad():
            layer.weight.copy_(packed.to_dense())
    model = copy.deepcopy(dense)
    report = sparsify_(model, format=format)
    assert {row.decision for row in report.rows if "lm_head" not in row.name} == {"packed"}
    assert len(report.packed) == {"llama": 14, "qwen2": 14, "gpt2": 8}[name]
    ids = torch.arange(40, device=device).view(2, 20)
    with torch.no_grad():
        expected, actual = dense(ids).logits, model(ids).logits
    rtol = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
    tokens = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 9)


@pytest.mark.hf
def test_transformers_embeddings_tied_to_the_head_are_protected():
    model = tiny_model("llama", torch.bfloat16)
    with pytest.raises(ValueError, match="lm_head.weight is tied to model.embed_tokens.weight"):
        sparsify_(model, ignore=())
    assert packed_names(model) == []


def left_alone(model):
    """The layers that a default call leaves alone, and why; it packs all others."""
    chosen = select_layers(model)
    report = sparsify_(model.half(), sparsity=0.8, pack_unprofitable=True)
    assert [row.name for row in report.packed] == list(chosen) == packed_names(model)
    rows = [row for row in report.rows if row.decision == "skipped"]
    return {row.name: row.reason for row in rows if "3-D" not in row.reason}


def reached(model, name):
    """Whether a target that names a layer reaches it."""
    return name in select_layers(model, [name])


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "num_labels": 3,
}  # fmt: skip


def from_config(architecture, config, **sizes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, architecture)(getattr(transformers, config)(**sizes))


def t5(architecture):
    return from_config(
        architecture, "T5Config", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        vocab_size=99, num_labels=3,
    )  # fmt: skip


def whisper():
    return from_config(
        "WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=99, num_mel_bins=8, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip


@pytest.mark.hf
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: from_config("LlamaForSequenceClassification", "LlamaConfig", **SMALL), ["score"]),
        (lambda: from_config("BertForTokenClassification", "BertConfig", **SMALL), ["classifier"]),
        (
            lambda: from_config("RobertaForSequenceClassification", "RobertaConfig", **SMALL),
            ["classifier.dense", "classifier.out_proj"],
        ),
        # The output layer is tied to the embedding, and is called something else than lm_head.
        (
            lambda: from_config("BertForMaskedLM", "BertConfig", **SMALL),
            ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        ),
        (whisper, ["proj_out"]),
        # A model without a base model.
        (lambda: t5("T5ForQuestionAnswering"), ["qa_outputs"]),
        (lambda: t5("T5ForTokenClassification"), ["classifier"]),
    ],
    ids=["llama", "bert", "roberta", "bert-lm", "whisper", "t5-qa", "t5-token"],
)
def test_heads_are_not_pruned_without_a_word(make, names):
    model = make()
    assert list(left_alone(model)) == names
    tied = names[-1] in ("proj_out", "cls.predictions.decoder")
    assert reached(model, names[-1])
    if tied:
        with pytest.raises(ValueError, match=f"{names[-1]}.weight is tied to "):
            sparsify_(model, names[-1:])
    nested = nn.ModuleDict({"model": make(), "head": linear(32, 3)})
    assert list(left_alone(nested)) == [f"model.{name}" for name in names]


class Experts(nn.Module):
    """A mixture of experts as it is often written."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList([nn.Sequential(linear(32, 64), linear(64, 32))] * 4)
        self.attention = nn.ModuleDict({name: linear(32, 4) for name in ("k_proj", "v_proj")})


class FusedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 32, 64).half())
        self.choose = linear(32, 4)


def moe(architecture, config, **sizes):
    return from_config(architecture, config, **{**SMALL, "pad_token_id": 0, **sizes})


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Experts(linear(32, 4)), ["gate"]),
        (lambda: Experts(nn.ModuleDict({"wg": linear(32, 4)})), ["gate.wg"]),
        (lambda: nn.ModuleDict({"mlp": FusedExperts(), "up": linear()}), ["mlp.choose"]),
        pytest.param(
            lambda: moe("Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=4),
            [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)],
            marks=pytest.mark.hf,
        ),
        pytest.param(
            lambda: moe(
                "JambaForCausalLM", "JambaConfig", num_experts=4, attn_layer_period=1,
                attn_layer_offset=0, expert_layer_period=2, expert_layer_offset=1,
            ),
            ["model.layers.1.feed_forward.router"],
            marks=pytest.mark.hf,
        ),
    ],
    ids=["list", "wrapped", "fused", "qwen2-moe", "jamba"],
)  # fmt: skip
def test_routers_are_not_pruned_without_a_word(make, names):
    model = make()
    found = left_alone(model)
    found.pop("lm_head", None)
    assert list(found) == names
    assert all(reason.startswith("router") for reason in found.values())
    # Leaving another layer alone does not mean to prune the router.
    assert names[0] not in select_layers(make(), ignore=list(select_layers(make()))[:1])
    assert reached(make(), names[0])


@pytest.mark.hf
@pytest.mark.parametrize("method", ["LoraConfig", "LoKrConfig", "PromptEncoderConfig"])
def test_adapters_are_not_pruned_without_a_word(method):
    peft = pytest.importorskip("peft")
    base = moe("LlamaForCausalLM", "LlamaConfig")
    if method == "PromptEncoderConfig":
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=16
        )
    else:
        options = {"modules_to_save": ["lm_head"]} if method == "LoraConfig" else {}
        config = getattr(peft, method)(target_modules=["q_proj"], **options)
    model = peft.get_peft_model(base, config)
    names = select_layers(model)
    assert len(names) == 14 and not any("lora" in n or "prompt" in n for n in names)
    found = left_alone(model)
    others = {name for name in found if "adapter" in found[name]}
    assert bool(others) == (method != "LoKrConfig")
    assert all("lora_" in n or "modules_to_save" in n or "prompt_encoder" in n for n in others)


def test_layers_that_are_tied_to_one_another_are_left_alone():
    model = Model()
    model.layers[1].mlp[0].weight = model.layers[0].mlp[0].weight
    found = left_alone(model)
    assert found["layers.0.mlp.0"] == "tied to layers.1.mlp.0.weight: left alone"
    assert list(found) == ["layers.0.mlp.0", "layers.1.mlp.0", "lm_head"]
    assert model.layers[1].mlp[0].weight is model.layers[0].mlp[0].weight


@pytest.mark.parametrize("rows", [slice(0, 32), slice(32, 64)])
def test_a_weight_that_is_a_slice_of_another_is_tied(rows):
    qkv, k = torch.nn.Linear(64, 96).half(), torch.nn.Linear(64, 32).half()
    k.weight = torch.nn.Parameter(qkv.weight.data[rows])
    model = torch.nn.Sequential(qkv, k)
    with pytest.raises(ValueError, match="0.weight is tied to 1.weight"):
        flash_llm.sparsify_(model, "re:.*", sparsity=0.8)
    assert type(model[0]) is torch.nn.Linear


def test_slices_of_one_storage_that_do_not_overlap_are_not_tied():
    storage = torch.randn(512, 256).half()
    layers = [torch.nn.Linear(256, 256).half() for _ in range(2)]
    layers[0].weight = torch.nn.Parameter(storage[:256])
    layers[1].weight = torch.nn.Parameter(storage[256:])
    report = flash_llm.sparsify_(torch.nn.Sequential(*layers), sparsity=0.8)
    assert [row.decision for row in report.rows] == ["packed", "packed"]
