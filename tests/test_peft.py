"""Adapters of PEFT over packed layers: training, merging, and back."""

import copy

import pytest
import torch
from test_hf import LOAD
from test_import import outputs_of

import flash_llm
from flash_llm import SparseLinear, ops

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.hf

IDS = torch.arange(24).view(2, 12)


def packed_model(values="16-bit"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16).eval()
    assert len(flash_llm.sparsify_(model, sparsity=0.8, values=values).packed) == 14
    return model


def with_adapter(model, **options):
    """Give q_proj and down_proj adapters whose second factor is not zero, as after training."""
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def expected_weights(adapted):
    """By layer: packed weight plus ``alpha / r * B @ A`` in float64, and its rounding error."""
    weights = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = (layer.scaling["default"] * (b.double() @ a.double())).detach()
            merged = layer.base_layer.weight.double() + delta
            # The product is rounded to bfloat16 at most once, and so is the sum.
            weights[name] = merged, 2**-8 * (1.01 * delta.abs() + merged.abs())
    assert len(weights) == 4
    return weights


def test_an_adapter_trains_while_the_base_stays():
    model = packed_model()
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), expected)  # B starts as zero
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(12):
        loss = adapted(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_gives_dense_layers_with_the_sum(safe_merge):
    adapted = with_adapter(packed_model())
    expected, before = expected_weights(adapted), logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=safe_merge)
    for name, layer in merged.named_modules():
        if name in expected:
            assert type(layer) is torch.nn.Linear
            weight, bound = expected[name]
            assert ((layer.weight.double() - weight).abs() <= bound).all()
    sparse = [m for m in merged.modules() if isinstance(m, SparseLinear)]
    assert len(sparse) == 10  # those without an adapter
    assert (logits(merged) - before).abs().max() < 0.05 * before.abs().max()


def test_integers_merge_exactly():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32, dtype=torch.float16)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-3, 4, (32, 64)) * (torch.rand(32, 64) < 0.3))
    model = torch.nn.Sequential(torch.nn.Identity(), SparseLinear.from_linear(linear))
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["1"]),
        autocast_adapter_dtype=False,
    )
    layer = adapted.base_model.model[1]
    a, b = torch.randint(-2, 3, (2, 64)).half(), torch.randint(-2, 3, (32, 2)).half()
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    merged = adapted.merge_and_unload()
    assert torch.equal(merged[1].weight, linear.weight + 2 * (b @ a))
    assert merged[1].bias is linear.bias


@pytest.mark.parametrize("values", ops.STORED_VALUES)
def test_unmerging_brings_the_packed_layer_back_bit_for_bit(values):
    model = packed_model(values)
    before = copy.deepcopy(model.state_dict())
    adapted = with_adapter(model)
    expected = logits(adapted)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    for _ in range(2):
        adapted.merge_adapter()
        assert type(layer.base_layer) is torch.nn.Linear
        assert not any("_packed" in name for name, _ in adapted.named_modules())
        adapted.unmerge_adapter()
        assert isinstance(layer.base_layer, SparseLinear)
        assert torch.equal(logits(adapted), expected)
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_whose_norms_peft_casts_to_float32_is_trained_under_autocast():
    model = peft.prepare_model_for_kbit_training(packed_model("int4"))
    adapted = with_adapter(model)
    with pytest.raises(TypeError, match="x must be BFloat16 .*Float"):
        logits(adapted)
    with torch.autocast("cpu", torch.bfloat16):
        adapted(IDS).logits.float().square().sum().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(gradients) == 8 and all(bool(gradient.any()) for gradient in gradients)


def test_two_adapters_are_merged_into_the_same_dense_layer():
    adapted = with_adapter(packed_model())
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    packed = layer.base_layer.weight
    expected = packed + layer.get_delta_weight("default")
    expected = (expected.to(packed.dtype) + layer.get_delta_weight("second")).to(packed.dtype)
    adapted.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        adapted.merge_adapter(["second"])
    assert torch.equal(layer.base_layer.weight, expected)
    adapted.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, packed)


def test_a_broken_adapter_is_refused_and_the_base_stays_packed():
    adapted = with_adapter(packed_model())
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge_adapter(safe_merge=True)
    assert isinstance(layer.base_layer, SparseLinear) and not layer.merged


def test_an_adapter_is_saved_and_loaded_over_a_packed_checkpoint(tmp_path):
    model = packed_model()
    model.save_pretrained(tmp_path / "base")
    adapted = with_adapter(model)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        flash_llm.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(flash_llm.from_pretrained(tmp_path / "merged")), logits(merged))


# ---- every kind of adapter ----

ADAPTERS = {
    "LoRA with ranks stabilised": (peft.LoraConfig, {"use_rslora": True}),
    "LoRA with a bias": (peft.LoraConfig, {"lora_bias": True}),
    "DoRA": (peft.LoraConfig, {"use_dora": True}),
    "PiSSA": (peft.LoraConfig, {"init_lora_weights": "pissa"}),  # changes the base when it begins
    "AdaLoRA": (peft.AdaLoraConfig, {"total_step": 10}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 8}),
    "LoHa": (peft.LoHaConfig, {}),
    "LoKr": (peft.LoKrConfig, {}),
    "HRA": (peft.HRAConfig, {}),
    "VeRA": (peft.VeraConfig, {}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 50}),
}


def packed_layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(2))).bfloat16().eval()
    flash_llm.sparsify_(model, sparsity=0.8)
    return torch.nn.ModuleDict({"net": model})


def randomize(adapted):
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter.float()).to(parameter.dtype)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_adapter_is_lost_when_it_is_merged(kind, safe_merge):
    config, options = ADAPTERS[kind]
    model, x = packed_layers(), torch.randn(5, 64).bfloat16()
    adapted = peft.get_peft_model(model, config(target_modules=["net.0", "net.1"], **options))
    randomize(adapted.eval())
    layers = adapted.base_model.model.net
    before = copy.deepcopy(layers[0].base_layer.state_dict())
    with torch.no_grad():
        expected, base = layers(x), layers[0].base_layer(x)
        assert not torch.allclose(layers[0](x), base, rtol=0.1)
        for _ in range(2):
            adapted.merge_adapter(safe_merge=safe_merge)
            assert type(layers[0].base_layer) is torch.nn.Linear
            torch.testing.assert_close(layers(x), expected, rtol=0.02, atol=0.02)
            adapted.unmerge_adapter()
            assert isinstance(layers[0].base_layer, SparseLinear)
            assert torch.equal(layers(x), expected)
        after = layers[0].base_layer.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        merged = adapted.merge_and_unload(safe_merge=safe_merge)["net"]
        assert [type(layer) for layer in merged] == [torch.nn.Linear] * 2
        torch.testing.assert_close(merged(x), expected, rtol=0.02, atol=0.02)


def test_adapters_around_adapters_are_merged_into_one_dense_layer():
    config = {"target_modules": ["net.0"]}
    adapted = peft.get_peft_model(packed_layers(), peft.LoHaConfig(**config), "a", mixed=True)
    adapted.add_adapter("b", peft.LoKrConfig(**config))
    adapted.set_adapter(["a", "b"])
    randomize(adapted.eval())
    outer, x = adapted.base_model.model.net[0], torch.randn(5, 64).bfloat16()
    inner = outer.base_layer
    packed, expected = inner.base_layer, outer(x)
    for first, second in ((inner, outer), (outer, inner)):
        first.merge()
        second.merge()
        assert type(inner.base_layer) is torch.nn.Linear
        torch.testing.assert_close(outer(x), expected, rtol=0.02, atol=0.02)
        first.unmerge()
        assert type(inner.base_layer) is torch.nn.Linear  # the other one is still in it
        torch.testing.assert_close(outer(x), expected, rtol=0.02, atol=0.02)
        second.unmerge()
        assert inner.base_layer is packed and torch.equal(outer(x), expected)


def test_an_adapter_of_another_package_is_merged_too():
    class Doubled(torch.nn.Module, peft.tuners.tuners_utils.BaseTunerLayer):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.merged_adapters = base_layer, []

        def merge(self, safe_merge=False, adapter_names=None):
            self.base_layer.weight.data.mul_(2)
            self.merged_adapters = ["default"]

        def unmerge(self):
            self.merged_adapters = []

    packed = packed_layers()["net"][0]
    layer = Doubled(packed)
    layer.merge()
    assert torch.equal(layer.base_layer.weight, 2 * packed.weight)
    layer.unmerge()
    assert layer.base_layer is packed


@pytest.mark.slow
def test_a_model_prepared_for_kbit_training_trains_under_autocast(tmp_path):
    model = peft.prepare_model_for_kbit_training(packed_model())
    before = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        bf16=True,
        use_cpu=True,
        max_steps=12,
        learning_rate=5e-2,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
    )
    trainer = transformers.Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_either_package_may_be_imported_first(tmp_path):
    """Of PEFT and flash_llm, and of transformers, which PEFT imports, and flash_llm."""
    wrapped = "hasattr(peft.tuners.ia3.Linear.merge, '__wrapped__')"
    assert eval(wrapped)  # here flash_llm came first
    packed_model().save_pretrained(tmp_path)
    code = (
        f"import peft, flash_llm; print({wrapped})\nfrom transformers import AutoModelForCausalLM"
    )
    (printed,), errors = outputs_of([code + LOAD.format(folder=str(tmp_path))])
    assert printed.startswith("True\n") and "SparseLinear" in printed, errors
