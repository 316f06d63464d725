"""What the README says is run, or compared with the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# What rows of accuracy.jsonl must have in common for their methods to be compared.
SAME_CONDITIONS = (
    *("model", "allocation", "sparsity", "recover_epochs"),
    *("text", "nsamples", "seqlen", "seed"),
)


def fences(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_exactly_two_setup_commands_of_one_line_near_the_top():
    commands = fences("bash")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1, "each is one line to paste"
        assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && ")
        assert "--no-build-isolation" in command
    assert commands[0].endswith("python examples/quickstart.py\n")
    assert commands[1].endswith("python -m pytest\n")
    assert README[: README.index(commands[1])].count("\n") < 40


def test_setup_commands_pin_the_torch_that_setup_names():
    pin = re.search(r'^TORCH_PIN = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    for command in fences("bash"):
        assert f"torch=={pin} " in command


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_python_snippets_run(number, tmp_path):
    script = tmp_path / "snippet.py"
    script.write_text(fences("python")[number])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_api_example_is_about_twenty_lines():
    (example,) = fences("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 20


def test_every_environment_variable_in_the_code_is_listed():
    named = set()
    for path in [ROOT / "setup.py", ROOT / ".ci" / "run", *ROOT.glob("*/**/*")]:
        inside = path.relative_to(ROOT).parts[0]
        if inside in ("csrc", "build", ".venv", ".git") or path.suffix not in (".py", ""):
            continue
        if path.is_file():
            found = re.findall(
                r"""environ(?:\.get\(|\.setdefault\(|\[)\s*["'](FLASH_LLM_\w+)""",
                path.read_text(errors="ignore"),
            )
            named.update(found)
    for path in (ROOT / "csrc").glob("*/*.cpp"):
        named.update(re.findall(r'getenv\("(FLASH_LLM_\w+)"', path.read_text()))
    assert "FLASH_LLM_CPU_ISA" in named
    listed = set(re.findall(r"^\| `(FLASH_LLM_\w+)` \|", README, re.MULTILINE))
    assert named == listed


def test_links_into_the_repository_lead_somewhere():
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert links
    for target in links:
        assert (ROOT / target).exists(), target


def test_the_layer_order_is_the_one_that_is_tested():
    from test_layering import PYTHON_RANKS

    line = re.search(r"^`csrc/base → .*`\.$", README, re.MULTILINE)[0]
    names = [part.strip(" `./").removesuffix(".py") for part in re.split("[→,]", line)]
    ranks = [PYTHON_RANKS[name] for name in names if not name.startswith("csrc")]
    assert ranks == sorted(ranks)
    assert len(ranks) >= 8


def accuracy_rows():
    """Rows of pruned models."""
    lines = (ROOT / "benchmarks/results/accuracy.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["bench"] == "accuracy"]


def test_accuracy_tables_are_what_the_rows_say():
    section = README[README.index("### What it costs") : README.index("## Save and load")]
    commits = re.findall(r"`(\w{7})`", section)
    dense, windows, samples = re.search(
        r"\(dense: ([\d.]+)\).*\((\d+) windows.*calibrated on (\d+) samples", section, re.DOTALL
    ).groups()
    (epochs,) = map(int, re.findall(r"after (\d+) epochs", section))
    rows = {0: {}, epochs: {}}
    for row in accuracy_rows():
        if (row["nsamples"], row["seqlen"]) == (int(samples), 512):
            assert row["text"].endswith(f"{windows}x512") and row["commit"][:7] in commits
            assert f"{row['dense_perplexity']:.2f}" == dense
            case = row["method"], row["allocation"], row["sparsity"]
            rows[row["recover_epochs"]][case] = f"{row['perplexity']:.2f}"

    def shown(pattern, levels):
        lines = re.findall(pattern, section, re.MULTILINE)
        assert {method for method, *_ in lines} == {"magnitude", "wanda", "sparsegpt", "admm"}
        return {
            (method, *(allocation or ["uniform"]), sparsity): cell
            for method, *allocation, cells in lines
            for sparsity, cell in zip(levels, cells.split(" | "), strict=True)
            if cell != "–"
        }

    allocations = "uniform|owl|sensitivity"
    pruned = shown(rf"^\| (\w+) \| ({allocations}) \| (.+) \|$", (0.3, 0.5, 0.55, 0.6, 0.7, 0.8))
    assert pruned == rows[0]  # every row is shown
    recovered = shown(r"^\| ([a-z]+) \| ([\d.–]+ \| .+) \|$", (0.5, 0.6, 0.7, 0.8))
    assert recovered == rows[epochs]


def test_the_perplexity_of_rounding_is_what_the_rows_say():
    lines = (ROOT / "benchmarks/results/accuracy.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["bench"] == "rounding"]
    found = {(row["values"], row["group"]): row["perplexity"] for row in rows}
    (dense,) = {row["dense_perplexity"] for row in rows}
    section = README[README.index("#### Without zeros") :].split("\n#### ")[0]
    said = (
        f"from {dense:.2f} to {found['int8', None]:.2f} in INT8 and {found['int4', 64]:.2f} in INT4"
    )
    assert said in " ".join(section.split())
    assert f"in groups of 32 it is {found['int4', 32]:.2f}" in " ".join(section.split())


def test_the_controls_speeds_are_what_the_rows_say():
    lines = (ROOT / "benchmarks/results/cpu.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["bench"] == "decode"]
    found = {row["sparsity"]: row["tokens_per_s"] for row in rows if row["isa"] == "avx2"}
    without, half = found[0.0], found[0.5]
    said = [
        f"{without['packed']:.1f} tokens per second without zeros and {half['packed']:.1f} at 50 %",
        f"{without['bf16']:.1f} and {half['bf16']:.1f} dense in bfloat16",
        f"{without['int8']:.1f} and {half['int8']:.1f} in torch's INT8",
        f"{without['int4']:.1f} and {half['int4']:.1f} in INT4",
    ]
    text = " ".join(README.split())
    assert all(part in text for part in said), said


def test_accuracy_has_the_published_order():
    rows = accuracy_rows()
    compared = 0
    for row in rows:
        same = [other for other in rows if all(other[f] == row[f] for f in SAME_CONDITIONS)]
        found = {other["method"]: other["perplexity"] for other in same}
        order = [found[m] for m in ("admm", "sparsegpt", "wanda", "magnitude") if m in found]
        if row["sparsity"] >= 0.5:
            assert order == sorted(order), (row["sparsity"], row["allocation"], found)
            compared += len(order) - 1
    assert compared > 0


def test_admm_at_60_percent_is_no_worse_than_sparsegpt_at_55():
    rows = accuracy_rows()
    conditions = [field for field in SAME_CONDITIONS if field != "sparsity"]
    pairs = [
        (admm["perplexity"], other["perplexity"])
        for admm in rows
        for other in rows
        if (admm["method"], admm["sparsity"]) == ("admm", 0.6)
        and (other["method"], other["sparsity"]) == ("sparsegpt", 0.55)
        and all(admm[field] == other[field] for field in conditions)
    ]
    assert pairs and all(admm <= sparsegpt for admm, sparsegpt in pairs)


@pytest.mark.parametrize(
    ("heading", "cpu"),
    [("An Intel Xeon (Emerald Rapids)", "intel-xeon"), ("An AMD EPYC (Zen 4)", "amd-epyc")],
)
def test_cpu_table_is_what_the_rows_say(heading, cpu):
    measured = README[README.index("### On a CPU") : README.index("## Environment variables")]
    section = measured.split(f"#### {heading}")[1].split("####")[0]
    commit = re.search(r"[Cc]ommit\s+`(\w+)`", section)[1]
    rows = {}
    for line in (ROOT / "benchmarks/results/cpu.jsonl").read_text().splitlines():
        row = json.loads(line)
        case = row["bench"], row["cpu"], row.get("dtype"), row["isa"].startswith("avx512")
        if case == ("cpu", cpu, "bfloat16", True):
            rows[row["M"], row["K"], row["N"], row["sparsity"]] = row
    lines = re.findall(r"^\| (\d+)×(\d+) \| (\d+) \| (.+) \|$", section, re.MULTILINE)
    assert len(lines) == 12
    for m, k, n, cells in lines:
        for sparsity, cell in zip((0.5, 0.6, 0.7, 0.8, 0.9), cells.split(" | "), strict=True):
            row = rows[int(m), int(k), int(n), sparsity]
            fastest = min(row["dense_us"].values())
            assert cell == f"{row['dense_us']['bf16'] / row['us']:.2f} / {fastest / row['us']:.2f}"
            assert row["commit"].startswith(commit)


@pytest.mark.parametrize(("gpu", "count"), [("h100", 40), ("h200", 24)])
def test_measured_table_is_what_the_rows_say(gpu, count):
    measured = README[README.index("### Measured") : README.index("### On a CPU")]
    commit = re.search(r"commit\s+`(\w+)`", measured)[1]
    section = measured.split(f"#### One NVIDIA {gpu.upper()}")[1].split("####")[0]
    rows = {}
    for line in (ROOT / f"benchmarks/results/spmm-{gpu}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (row["dtype"], row["format"], row["mask"]) == ("float16", "bitmap", "uniform"):
            rows[row["M"], row["K"], row["N"], row["sparsity"], row["pdl"]] = row
    lines = re.findall(r"^\| (\d+)×(\d+) \| (\d+) \| (.+) \| ([\d.]+) \|$", section, re.MULTILINE)
    assert len(lines) == count
    for m, k, n, cells, fp8 in lines:
        case = int(m), int(k), int(n)
        sparsities = (0.5, 0.6, 0.7, 0.8, 0.9)
        for sparsity, cell in zip(sparsities, cells.split(" | "), strict=True):
            both = [rows[(*case, sparsity, pdl)] for pdl in (True, False)]
            speedups = [f"{row['cublas_us'] / row['us']:.2f}" for row in both]
            assert cell == " / ".join(speedups), (*case, sparsity)
            assert {row["commit"] for row in both} == {commit}
        of_row = [rows[(*case, sparsity, True)] for sparsity in sparsities]
        assert fp8 == f"{sorted(row['cublas_us'] / row['fp8_us'] for row in of_row)[2]:.2f}", case


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_tiled_csl_is_as_fast_as_the_readme_says(gpu):
    rows = {}
    for line in (ROOT / f"benchmarks/results/spmm-{gpu}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (row["format"], row["M"], row["N"], row["pdl"]) == ("tiled_csl", 28672, 8, True):
            rows[row["sparsity"]] = f"{row['cublas_us'] / row['us']:.2f}"
    assert " / ".join(rows[sparsity] for sparsity in sorted(rows)) in README
