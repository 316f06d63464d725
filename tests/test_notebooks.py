"""The notebooks run from top to bottom, with smaller parameters, and are committed without outputs.

The first one runs in a kernel of Jupyter. The other two run in this process on a tiny random model:
their code is plain Python, and what real weights add is tested in test_demo.py.

Outputs are cleared because numbers and figures that nobody reproduces grow stale, and because they
would make every diff unreadable; measured figures are in benchmarks/results.
"""

import ast
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pyplot = pytest.importorskip("matplotlib.pyplot")
transformers = pytest.importorskip("transformers")

from test_demo import tiny_model  # noqa: E402

from flash_llm import demo  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

# Instead of the cell that is tagged "parameters", as papermill does.
SMALL = {
    "01_one_layer": "M, K = 512, 256\nSPARSITIES = (0.5, 0.9)\nTOKENS = (1, 8)\nSECONDS = 0.02",
    "02_prune_and_convert": (
        'METHODS = ("magnitude", "wanda", "sparsegpt", "admm")\n'
        'SPARSITIES = (0.6,)\nSAMPLES, SEQLEN, WINDOWS, FINAL = 4, 64, 1, ("sparsegpt", 0.7)'
    ),
    "03_load_and_generate": 'QUESTION = "What is the capital of France?"\nNEW_TOKENS = 8',
}


def read(name):
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def assigned_names(source):
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def smaller(name):
    """The notebook with the parameters of ``SMALL``."""
    notebook = read(name)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert assigned_names(parameters.source) == assigned_names(SMALL[name])
    parameters.source = SMALL[name]
    return notebook


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a notebook here, in ``tmp_path``; gives what it printed and how many figures it drew."""
    figures = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyplot, "show", lambda: (figures.append(1), pyplot.close()))
    monkeypatch.setattr(demo, "load_smollm2", lambda device: (tiny_model(device), tokenizer()))

    def execute(name):
        figures.clear()
        namespace = {}
        for source in code_of(smaller(name)):
            exec(source, namespace)
        return capsys.readouterr().out, len(figures)

    return execute


def tokenizer():
    """One token for each printable byte of ASCII and the newline, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # As ByteLevel writes them: a space and a newline are letters of their own.
    vocabulary = [*map(chr, range(33, 127)), "\u0120", "\u010a", "<unk>"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def test_every_notebook_has_small_parameters_and_no_outputs():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)
    for name in SMALL:
        for cell in read(name).cells:
            if cell.cell_type == "code":
                assert cell.outputs == [] and cell.execution_count is None, name


def test_one_layer_in_a_kernel_of_jupyter(tmp_path):
    notebook = smaller("01_one_layer")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources=resources
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "see flash_llm.explain_format" in printed
    assert "cpu_rows (" in printed  # what explain_plan chooses for one token, on any CPU


def test_plots_hold_what_was_measured_alike_in_the_same_colours(monkeypatch):
    lines = []
    monkeypatch.setattr(
        pyplot, "plot", lambda x, y, **style: lines.append((style["label"], style["color"], x))
    )
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    measured = {"wanda": [(0.3, 9.0), (0.5, 10.0)], "admm": [(0.3, 8.0)]}
    namespace = {"measured": measured, "dense_perplexity": 7.0}
    source = code_of(read("02_prune_and_convert"))
    for cell in (cell for i, cell in enumerate(source) if i == 0 or "plot(" in cell):
        exec(cell, namespace)
    assert {label for label, *_ in lines} == {"magnitude", "wanda", "sparsegpt", "admm"}
    assert len(lines) > 4 and len({(label, colour) for label, colour, _ in lines}) == 4
    for label, _, sparsities in lines:
        assert len(set(sparsities)) == len(sparsities), label  # one perplexity at each


def test_prune_convert_load_and_generate(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="02_prune_and_convert"):
        run("03_load_and_generate")

    printed, figures = run("02_prune_and_convert")
    committed = ROOT / "benchmarks" / "results" / "accuracy.jsonl"
    assert figures >= 1 + committed.exists()
    assert "Dense perplexity: " in printed and "14 of 14" in printed
    for method in ("magnitude", "wanda", "sparsegpt", "admm"):  # the long cell tells how far it is
        assert f"{method} at 60%: " in printed
    dense, packed = ((tmp_path / name / "model.safetensors") for name in ("pruned", "packed"))
    assert packed.stat().st_size < dense.stat().st_size

    printed, _ = run("03_load_and_generate")
    assert "SparseLinear(" in printed and printed.count("tokens per second") == 2
