"""Pruning a saved model into a folder, from the shell; report, eval and what is refused."""

import json
import math
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import no_file_larger_than
from test_cli import SCRIPT, invoke, start
from test_hf import SIZES, dense, output, sparse_layers

import flash_llm
from flash_llm import evaluate, ops
from flash_llm.io.checkpoint import Checkpoint, checkpoint_files
from flash_llm.io.unfinished import NOTE_NAME
from flash_llm.ops import STORED_VALUES
from flash_llm.prune import calibrate, checkpoint
from flash_llm.prune.methods import METHODS, Method
from flash_llm.prune.report import PruneReport

transformers = pytest.importorskip("transformers")
from typer.testing import CliRunner  # noqa: E402

from flash_llm.cli.app import build_app  # noqa: E402

pytestmark = pytest.mark.hf

TEXT = " ".join(f"w{i * i % 90}" for i in range(400))


def save_tokenizer(folder):
    """One token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(SIZES["vocab_size"] - 1)} | {"?": SIZES["vocab_size"] - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    wrapped.save_pretrained(folder)


@pytest.fixture
def source(tmp_path):
    """A dense model with its tokenizer and a model card."""
    folder = tmp_path / "dense"
    dense("llama", folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("# Mine\n")
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def prune(source, target, text, *options):
    return invoke(
        "prune",
        *(source, target, "--calibration", text, "--seqlen", "32", "--nsamples", "4"),
        *("--sparsity", "0.75", "--device", "cpu", *options),
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_what_prune_makes_in_memory(tmp_path, source, text, method):
    result = prune(source, tmp_path / "pruned", text, "--method", method, "--json")
    assert result.exit_code == 0, result.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    expected = flash_llm.from_pretrained(source)
    report = flash_llm.prune_(
        expected,
        method=method,
        sparsity=0.75,
        calibration=text,
        tokenizer=tokenizer,
        seqlen=32,
        nsamples=4,
    )
    flash_llm.sparsify_(expected)
    again = flash_llm.from_pretrained(tmp_path / "pruned")
    assert sparse_layers(again) == sparse_layers(expected) != set()
    assert torch.equal(output(again), output(expected))
    saved = PruneReport.load(tmp_path / "pruned")
    assert (saved.layers, saved.recipe) == (report.layers, report.recipe)
    assert json.loads(result.stdout)["layers"] == json.loads(saved.to_json())["layers"]
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert card.startswith("# Mine\n") and "import flash_llm" in card
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "pruned").get_vocab()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "pruned", "text.txt"}


def test_without_packing_the_zeros_are_dense(tmp_path, source, text):
    assert prune(source, tmp_path / "pruned", text, "--no-pack").exit_code == 0
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    assert weights.keys() == load_file(source / "model.safetensors").keys()
    zeros = (weights["model.layers.0.mlp.up_proj.weight"] == 0).float().mean(dim=1)
    assert torch.equal(zeros, torch.full_like(zeros, 0.75))
    assert "quantization_config" not in json.loads((tmp_path / "pruned/config.json").read_text())
    assert (tmp_path / "pruned" / "README.md").read_text() == "# Mine\n"
    # What convert makes of it is what prune packs.
    assert invoke("convert", tmp_path / "pruned", tmp_path / "converted").exit_code == 0
    assert prune(source, tmp_path / "packed", text).exit_code == 0
    verified = invoke(
        "verify", tmp_path / "packed", "--reference", tmp_path / "pruned", "--max-error", "0"
    )
    assert verified.exit_code == 0
    packed = [Checkpoint(checkpoint_files(tmp_path / n)).packed for n in ("packed", "converted")]
    assert packed[0] == packed[1]


@pytest.mark.parametrize("values", STORED_VALUES[1:])
def test_values_are_rounded_while_pruning_and_packed_as_they_are(values, tmp_path, source, text):
    options = ("--method", "sparsegpt", "--values", values)
    for folder, more in (("packed", ()), ("dense-zeros", ("--no-pack",))):
        result = prune(source, tmp_path / folder, text, *options, *more, "--json")
        assert result.exit_code == 0, result.output
        assert PruneReport.load(tmp_path / folder).recipe.values == values
        if folder == "packed":
            rows = json.loads(result.stdout)["packing"]["rows"]
            assert {row["values"] for row in rows if row["decision"] == "packed"} == {values}
    headers = Checkpoint(checkpoint_files(tmp_path / "packed")).packed.values()
    assert {header.values for header in headers} == {values}
    # Packing has not rounded again.
    verified = invoke(
        *("verify", tmp_path / "packed", "--reference", tmp_path / "dense-zeros"),
        *("--max-error", "0"),
    )
    assert verified.exit_code == 0, verified.output


def test_values_that_packed_weights_do_not_store_are_numbers_of_16_bits(tmp_path, source, text):
    assert prune(source, tmp_path / "int3", text, "--values", "int3").exit_code == 0
    headers = Checkpoint(checkpoint_files(tmp_path / "int3")).packed.values()
    assert {header.values for header in headers} == {"16-bit"}


def test_options_reach_prune(tmp_path, source, text, monkeypatch):
    seen = {}
    original = calibrate.prune_
    monkeypatch.setattr(
        checkpoint, "prune_", lambda model, **o: seen.update(o) or original(model, **o)
    )
    allocation = tmp_path / "allocation.json"
    allocation.write_text('{"up_proj": 0.9, "_default": 0.5}')
    result = invoke(
        "prune",
        *(source, tmp_path / "pruned", "--method", "sparsegpt", "--allocation", allocation),
        *("--calibration", text, "--nsamples", "3", "--seqlen", "16", "--seed", "7"),
        *("--targets", "up_proj", "--targets", "down_proj", "--ignore", "re:.*1.mlp"),
        *("--scope", "layer", "--device", "cpu", "--format", "tiled_csl"),
    )
    assert result.exit_code == 0, result.output
    assert (seen["method"], seen["scope"], seen["sparsity"]) == ("sparsegpt", "layer", None)
    assert seen["allocation"] == {"up_proj": 0.9, "_default": 0.5}
    assert (seen["calibration"], seen["nsamples"], seen["seqlen"]) == (text, 3, 16)
    assert (seen["seed"], str(seen["device"])) == (7, "cpu")
    report = PruneReport.load(tmp_path / "pruned")
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert [layer.name for layer in report.layers] == names
    assert [round(layer.sparsity, 1) for layer in report.layers] == [0.9, 0.5]


def test_a_dry_run_says_what_would_be_pruned(tmp_path, source):
    result = invoke("prune", source, tmp_path / "pruned", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["num_layers"], plan["dtype"]) == (14, "bfloat16")
    assert plan["shapes"]["model.layers.0.mlp.up_proj"] == [128, 64]
    # Per block: q and o 64 x 64, k and v 32 x 64, three of 128 x 64.
    assert plan["layer_bytes"] == 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    tensors = load_file(source / "model.safetensors")
    assert plan["model_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    text = invoke("prune", source, tmp_path / "pruned", "--dry-run", "--targets", "up_proj").stdout
    assert "2 layers would be pruned: 0.033 of" in text
    assert plan["missing"] == ["sparsity", "calibration"]
    assert text.splitlines()[-1] == "Still needed: sparsity, calibration"
    assert list(plan["left_alone"]) == ["lm_head"]
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_conv1d_shapes_are_those_of_the_product(tmp_path):
    dense("gpt2", tmp_path / "dense")
    plan = checkpoint.plan_pruning(tmp_path / "dense")
    assert plan.shapes["transformer.h.0.attn.c_attn"] == (192, 64)


def test_tied_weights_are_left_alone_or_refused(tmp_path):
    dense("qwen2", tmp_path / "dense")
    options = (
        tmp_path / "dense",
        tmp_path / "pruned",
        "--method",
        "magnitude",
        "--sparsity",
        "0.8",
    )
    result = invoke("prune", *options, "--targets", "lm_head")
    assert result.exit_code == 1 and "leaves nothing of targets=['lm_head']" in result.output
    result = invoke("prune", *options, "--ignore", "q_proj")
    assert result.exit_code == 1
    assert "lm_head.weight is tied to model.embed_tokens.weight" in result.output
    assert invoke("prune", *options).exit_code == 0
    again = flash_llm.from_pretrained(tmp_path / "pruned")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


# ---- interruptions ----

SLOW = """
import time
from flash_llm.prune import checkpoint
from flash_llm.prune.methods import METHODS, Method
original = METHODS["magnitude"]
def slow(*arguments):
    print("at work", flush=True)
    time.sleep(0.5)
    return original.function(*arguments)
METHODS["magnitude"] = Method(slow)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, source):
    target, partial = tmp_path / "pruned", tmp_path / "pruned.partial"
    arguments = ["prune", str(source), str(target), "--method", "magnitude", "--sparsity", "0.75"]
    before = {path: path.read_bytes() for path in source.iterdir()}
    with start([sys.executable, "-c", SLOW + SCRIPT[-1], *arguments]) as process:
        for _ in range(3):  # two layers are done
            assert process.stdout.readline() == "at work\n"
        process.kill()
    assert not target.exists() and (partial / NOTE_NAME).is_file()
    done = {p: p.stat().st_mtime_ns for p in (partial / "state").glob("layer-*.safetensors")}
    assert len(done) == 2
    times = {}
    original = checkpoint.prune_

    def watched(*args, **options):
        report = original(*args, **options)
        times.update({path: path.stat().st_mtime_ns for path in done})
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "prune_", watched)
        result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert times == done, "a layer that was done was pruned again"
    assert not partial.exists()
    invoke(*arguments[:2], tmp_path / "whole", *arguments[3:])
    found, whole = (load_file(path / "model.safetensors") for path in (target, tmp_path / "whole"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert before == {path: path.read_bytes() for path in source.iterdir()}


def test_ctrl_c_ends_a_run_at_once_and_keeps_the_layers_that_are_done(
    tmp_path, source, text, monkeypatch
):
    original, begun = METHODS["magnitude"], []

    def interrupted_in_the_third_layer(*arguments):
        begun.append(arguments)
        if len(begun) == 3:
            signal.raise_signal(signal.SIGINT)
        return original.function(*arguments)

    monkeypatch.setitem(METHODS, "magnitude", Method(interrupted_in_the_third_layer))
    result = prune(source, tmp_path / "pruned", text, "--method", "magnitude")
    partial = tmp_path / "pruned.partial"
    assert result.exit_code == 130 and str(partial) in result.output
    assert len(begun) == 3 and not (tmp_path / "pruned").exists()
    assert len(list((partial / "state").glob("layer-*.safetensors"))) == 2


def interrupt(monkeypatch, error):
    """Make the conversion fail when all is pruned."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "sparsify_for_files_", fail)


def test_an_unfinished_run_is_continued_by_the_same_only(tmp_path, source, text):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, OSError("No space left on device"))
        result = prune(source, tmp_path / "pruned", text)
    assert (result.exit_code, result.output) == (1, "flash-llm prune: No space left on device\n")
    other = prune(source, tmp_path / "pruned", text, "--method", "magnitude")
    assert other.exit_code == 1 and "method" in other.output
    # Whether it is packed in the end may change.
    assert prune(source, tmp_path / "pruned", text, "--no-pack").exit_code == 0

    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, KeyboardInterrupt())
        assert prune(source, tmp_path / "again", text).exit_code == 130
    anew = prune(source, tmp_path / "again", text, "--method", "magnitude", "--no-resume")
    assert anew.exit_code == 0, anew.output
    assert PruneReport.load(tmp_path / "again").recipe.method == "magnitude"


def test_a_second_run_is_refused_and_leaves_the_first_alone(tmp_path, source, text, monkeypatch):
    target, refused = tmp_path / "pruned", []
    original = checkpoint.prune_

    def prune_while_another_begins(*arguments, **options):
        for more in ((), ("--method", "magnitude"), ("--no-resume",)):
            refused.append(prune(source, target, text, *more))
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune_", prune_while_another_begins)
        first = prune(source, target, text)
    assert [result.exit_code for result in refused] == [1, 1, 1]
    assert all("another run is working on" in result.output for result in refused)
    assert first.exit_code == 0, first.output
    assert len(PruneReport.load(target).layers) == 14


def test_a_run_that_was_killed_before_its_first_layer_blocks_no_other(
    tmp_path, source, text, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.UnfinishedFolder, "discard", lambda folder: None)
        patch.setattr(calibrate, "find_stacks", lambda *_: 1 / 0)
        prune(source, tmp_path / "pruned", text)
    assert (tmp_path / "pruned.partial" / "state" / "run.json").is_file()
    result = prune(source, tmp_path / "pruned", text, "--method", "magnitude")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("limit", [12_000, 50_000])
def test_a_full_disk_is_one_line(tmp_path, source, text, limit):
    """The files of the layers do not fit, or that of the model does not."""
    with no_file_larger_than(limit):
        result = prune(source, tmp_path / "pruned", text, "--method", "magnitude")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert len(result.output.splitlines()) == 1 and "pruned.partial" in result.output
    assert not (tmp_path / "pruned").exists()
    again = prune(source, tmp_path / "pruned", text, "--method", "magnitude")
    assert again.exit_code == 0, again.output


def test_no_resume_removes_nothing_of_others(tmp_path, source, text):
    theirs = tmp_path / "pruned.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    result = prune(source, tmp_path / "pruned", text, "--no-resume")
    assert result.exit_code == 1 and "pruned.partial belongs to other work" in result.output
    assert (theirs / "thesis.txt").read_text() == "mine"


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "obd"), "method must be one of magnitude, wanda"),
        (("--sparsity", "1.5"), "sparsity"),
        (("--scope", "3:2"), "3:2"),
        (("--allocation", "best"), "allocation must be"),
        (("--allocation", "none.json"), "No such file"),
        (("--calibration", "none.txt"), "none.txt is no file"),
        (("--dtype", "float64"), "dtype must be float16 or bfloat16"),
        (("--format", "csr"), "format must be"),
        (("--format", "bitmap", "--values", "int8"), '"bitmap" cannot hold int8'),
        (("--values", "int5"), "values must be one of int8"),
        (("--targets", "q_prj"), 'target "q_prj" must match a linear layer'),
        (("--ignore", "q_prj"), 'ignore "q_prj" must match a module'),
        (("--device", "cuda:9"), "is not there"),
        (("--seqlen", "1000"), "1000"),  # longer than the text
        (("--scope", "2:4"), "2:4"),  # contradicts the sparsity
        (("--scope", "global"), "is for magnitude"),
    ],
)
def test_bad_options(tmp_path, source, text, options, message):
    # What a run refuses, a dry run refuses.
    for more in ((), ("--dry-run",)):
        result = prune(source, tmp_path / "pruned", text, *options, *more)
        assert result.exit_code == 1, result.output
        assert result.output.startswith("flash-llm prune: ") and message in result.output
        assert not list(tmp_path.glob("pruned*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 column 2"),
        ("[1]", "must hold an object"),
        ('{"a": "b"}', "must hold an object"),
    ],
)
def test_bad_allocation_files(tmp_path, content, message):
    (tmp_path / "allocation.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.parse_allocation(str(tmp_path / "allocation.json"))


def test_sources_that_cannot_be_pruned(tmp_path, source, text):
    def refused(folder, message):
        result = prune(folder, tmp_path / "again", text)
        assert result.exit_code == 1 and message in result.output, result.output
        assert not list(tmp_path.glob("again*"))

    refused(tmp_path, "has neither model.safetensors nor")
    prune(source, tmp_path / "packed", text)
    refused(tmp_path / "packed", "is packed; prune before packing")
    assert "packed exists" in prune(source, tmp_path / "packed", text).output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    refused(source, "calibration text needs the model's tokenizer")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    refused(source, "'NoSuchModel', which transformers")
    quantised = {**config, "quantization_config": {"quant_method": "awq"}}
    (source / "config.json").write_text(json.dumps(quantised))
    refused(source, "stored by quant_method 'awq'")
    (source / "config.json").unlink()
    refused(source, "has no config.json")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(source, "is not a complete safetensors file")


def test_float32_is_cast_or_saved_dense(tmp_path, text):
    dense("llama", tmp_path / "half").float().save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    refused = prune(tmp_path / "dense", tmp_path / "pruned", text)
    assert refused.exit_code == 1 and "are float32, packed ones are float16" in refused.output
    assert not list(tmp_path.glob("pruned*"))
    assert prune(tmp_path / "dense", tmp_path / "plain", text, "--no-pack").exit_code == 0
    cast = prune(tmp_path / "dense", tmp_path / "cast", text, "--dtype", "bfloat16")
    assert cast.exit_code == 0, cast.output
    assert Checkpoint(checkpoint_files(tmp_path / "cast")).packed


@pytest.mark.parametrize("sparsity", ["0.05", "0.75"])
def test_prune_says_how_large_the_result_is_and_whether_anything_is_packed(
    tmp_path, source, sparsity
):
    target = tmp_path / "pruned"
    result = invoke(
        "prune", source, target, "--method", "magnitude", "--sparsity", sparsity, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    before, after = (Checkpoint(checkpoint_files(folder)).nbytes for folder in (source, target))
    sizes = f"The model takes {after / 1e6:.3f} MB, the dense one {before / 1e6:.3f} MB"
    assert sizes in result.stdout
    last = result.stdout.splitlines()[-1]
    if sparsity == "0.05":
        assert last.startswith("Nothing is packed")
        assert "packing would not shrink it (14)" in result.stdout
    else:
        assert last.startswith(sizes)
    assert 'ignored by "lm_head"' in result.stdout and "layers.0" not in result.stdout


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path, source, text):
    marker = tmp_path / "it ran"
    code = f"open({str(marker)!r}, 'w')\n"
    (source / "mine.py").write_text(code + "from transformers import LlamaConfig as C, M, T\n")
    for name, classes in [
        ("config.json", {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["mine.T", "mine.T"]}),
    ]:
        config = json.loads((source / name).read_text())
        config |= {"auto_map": classes, "model_type": "mine"}
        (source / name).write_text(json.dumps(config))

    def run(*command):
        answers = "y\n" * 10
        return CliRunner().invoke(build_app(), [*map(str, command)], input=answers)

    options = ("--sparsity", "0.5", "--calibration", text, "--seqlen", "32")
    for command in [
        ("eval", source, "--text", text),
        ("prune", source, tmp_path / "pruned", *options, "--dry-run"),
        ("prune", source, tmp_path / "pruned", *options),
        ("convert", source, tmp_path / "packed"),
    ]:
        result = run(*command)
        assert not marker.exists(), command
        if command[0] != "convert":  # which needs no model
            assert result.exit_code == 1 and "--trust-remote-code" in result.output, result.output
    run("eval", source, "--text", text, "--trust-remote-code")
    assert marker.exists()


# ---- report and eval ----


def test_files_have_the_format_that_gpus_take_for_few_tokens(tmp_path, source, text, monkeypatch):
    # The rule is for larger weights than those of a toy.
    monkeypatch.setattr(
        ops, "stored_format", lambda _, format, few, values="": "gather" if few else format
    )
    for options, format in (((), "row_bitmap"), (("--expected-tokens", "1"), "gather")):
        folder = tmp_path / format
        result = prune(source, folder, text, *options)
        assert result.exit_code == 0, result.output
        found = json.loads(invoke("report", folder, "--json").stdout)
        assert found["formats"][format] == len(Checkpoint(checkpoint_files(folder)).packed) > 0


def test_report_shows_the_folder_and_how_it_was_pruned(tmp_path, source, text):
    prune(source, tmp_path / "pruned", text)
    found = json.loads(invoke("report", tmp_path / "pruned", "--json").stdout)
    assert found["pruning"]["recipe"]["method"] == "wanda"
    assert len(found["pruning"]["layers"]) == 14
    stored = Checkpoint(checkpoint_files(tmp_path / "pruned"))
    assert found["nbytes"] == stored.nbytes and found["num_files"] == 1
    assert found["formats"]["row_bitmap"] == len(stored.packed)
    rows = {row["name"]: row for row in found["weights"]["rows"]}
    assert all(rows[layer["name"]]["sparsity"] == 0.75 for layer in found["pruning"]["layers"])
    shown = invoke("report", tmp_path / "pruned").stdout
    assert "pruned by wanda" in shown and "row_bitmap" in shown
    assert "There is no report of its pruning." in invoke("report", source).stdout
    (tmp_path / "pruned" / "prune_report.json").write_text("{}")
    broken = invoke("report", tmp_path / "pruned")
    assert broken.exit_code == 1 and "holds no PruneReport" in broken.output


def test_eval_compares_models(tmp_path, source, text):
    prune(source, tmp_path / "pruned", text)
    result = invoke(
        "eval",
        *(source, tmp_path / "pruned", "--text", text, "--window", "64", "--stride", "32"),
        *("--device", "cpu", "--json"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["window"], found["stride"]) == (64, 32)
    ids = transformers.AutoTokenizer.from_pretrained(source)(TEXT)["input_ids"]
    assert len(ids) == 400
    for row, folder in zip(found["models"], (source, tmp_path / "pruned"), strict=True):
        model = flash_llm.from_pretrained(folder)
        expected = flash_llm.perplexity(model, torch.tensor(ids), window=64, stride=32)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert (row["model"], row["num_tokens"]) == (str(folder), 399)  # the first has no context
    table = invoke("eval", source, source, "--text", text, "--max-windows", "1", "--device", "cpu")
    assert table.stdout.count(" 1.0000 ") == 2 and "stride 512" in table.stdout


def test_tokens_after_the_last_window_do_not_count_as_scored(source, text):
    options = ("--text", text, "--window", "64", "--max-windows", "3", "--device", "cpu")
    found = json.loads(invoke("eval", source, *options, "--json").stdout)
    assert found["max_windows"] == 3
    assert found["models"][0]["num_tokens"] == 3 * 63
    table = invoke("eval", source, *options).stdout
    assert "tokens scored" in table and " 189 " in table
    assert "at most the first 3 windows of 64 tokens" in table
    assert "at most" not in str(evaluate.evaluate_checkpoints([source], text))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path, source, text):
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    report = evaluate.evaluate_checkpoints([source], text, window=50)
    assert math.isclose(report.models[0].perplexity, SIZES["vocab_size"], rel_tol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("BertModel", "BertConfig"),
        ("BertForMaskedLM", "BertConfig"),
        ("LlamaForSequenceClassification", "LlamaConfig"),
        ("T5ForConditionalGeneration", "T5Config"),
    ],
)
def test_eval_of_what_is_no_causal_model_is_one_sentence(tmp_path, text, architecture, config):
    sizes = {"d_model": 64, "d_ff": 64, "num_layers": 1} if config == "T5Config" else SIZES
    model = getattr(transformers, architecture)(getattr(transformers, config)(**sizes))
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    result = invoke("eval", tmp_path / "model", "--text", text, "--device", "cpu")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert architecture in result.output and len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere", "--text", "text.txt"), "nowhere is no folder"),
        (("dense", "--text", "nowhere.txt"), "No such file"),
        (("dense", "--text", "bytes.txt"), "bytes.txt is not UTF-8"),
        (("dense", "--text", "one.txt"), "T >= 2"),
        (("dense", "--text", "text.txt", "--stride", "513"), "stride must lie in [1, window=512]"),
    ],
)
def test_eval_refuses(tmp_path, source, text, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "one.txt").write_text("w1")
    result = invoke("eval", *options, "--device", "cpu")
    assert result.exit_code == 1
    assert result.output.startswith("flash-llm eval: ") and message in result.output
