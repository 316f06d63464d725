"""What the README says is run, or compared with the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash_llm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "examples" / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))

import rows  # noqa: E402


def fences(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readme_is_one_page():
    assert README.count("\n") <= 200
    sentence = README.split("\n\n")[1]
    assert "times as fast as cuBLAS" in sentence and sentence.count(". ") == 0


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


def test_python_snippets_run(tmp_path):
    names = []
    for name, text in {"readme": README, "guide": GUIDE}.items():
        names.append(str(tmp_path / f"{name}.py"))
        Path(names[-1]).write_text(fences("python", text)[0])
    # Both in one process: importing torch takes seconds.
    run_each = "import runpy, sys\nfor name in sys.argv[1:]: runpy.run_path(name)"
    done = subprocess.run(
        [sys.executable, "-c", run_each, *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_api_example_is_ten_lines():
    (example,) = fences("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


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
    listed = set(re.findall(r"^\| `(FLASH_LLM_\w+)` \|", GUIDE, re.MULTILINE))
    assert named == listed


@pytest.mark.parametrize(
    "page", ["README.md", "examples/README.md", "benchmarks/README.md", "csrc/README.md"]
)
def test_links_into_the_repository_lead_somewhere(page):
    def anchors(text):
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
    for link in links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


def test_every_page_of_the_documentation_is_linked():
    for page in ("examples/README.md", "benchmarks/README.md", "benchmarks/RESULTS.md",
                 "csrc/README.md", "csrc/README.md#contributing", "examples/README.md#changelog",
                 "LICENSE"):  # fmt: skip
        assert f"]({page})" in README, page


def test_the_layer_order_is_the_one_that_is_tested():
    from test_layering import PYTHON_RANKS

    architecture = (ROOT / "csrc" / "README.md").read_text()
    line = re.search(r"^`csrc/base → .*`\.$", architecture, re.MULTILINE)[0]
    names = [part.strip(" `./").removesuffix(".py") for part in re.split("[→,]", line)]
    ranks = [PYTHON_RANKS[n.replace("/", ".")] for n in names if not n.startswith("csrc")]
    assert ranks == sorted(ranks)
    assert len(ranks) >= 8


def test_the_guide_has_a_line_for_every_public_name():
    section = GUIDE[GUIDE.index("## Every public name") :].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| .{10,} \|$", section, re.MULTILINE)
    assert sorted(listed) == sorted(flash_llm.__all__)


def measured(gpu, format="bitmap"):
    """Rows of a format with prefetch, zeros at random places, float16."""
    wanted = ("float16", format, "uniform", True)
    return [
        row
        for row in rows.read_rows(rows.RESULTS / f"spmm-{gpu}.jsonl")
        if (row["dtype"], row["format"], row["mask"], row["pdl"]) == wanted
    ]


def speed_up(row):
    return row["cublas_us"] / row["us"]


def spans(text):
    """The ranges "a to b" of a text with two decimals."""
    return re.findall(r"(\d\.\d\d) to (\d\.\d\d)", " ".join(text.split()))


def span(values):
    return tuple(f"{end(values):.2f}" for end in (min, max))


def test_the_first_sentence_is_what_the_rows_say():
    found = [row for row in measured("h200") if (row["M"], row["K"], row["N"]) == (28672, 7168, 8)]
    assert {row["sparsity"] for row in found} == {0.5, 0.6, 0.7, 0.8, 0.9}
    of_dense = [row["packed_bytes"] / (28672 * 7168 * 2) for row in found]
    speed, (least, most) = span([*map(speed_up, found)]), span(of_dense)
    assert spans(README.split("\n\n")[1]) == [speed, (most, least)]
    assert all(f"`{row['commit']}`" in README for row in found)


def test_the_readme_says_where_it_wins_as_the_rows_do():
    def large(gpu, tokens):
        found = [row for row in measured(gpu) if row["M"] * row["K"] >= 7168**2]
        return span([speed_up(row) for row in found if row["N"] in tokens])

    few, many = range(1, 65), range(512, 1 << 20)
    wins, loses = re.findall(r"^- \*\*It .*?(?=^- )", README, re.MULTILINE | re.DOTALL)
    gather = [
        speed_up(row)
        for row in measured("h200", "gather")
        if row["N"] <= 4 and row["sparsity"] == 0.9
    ]
    assert spans(wins) == [large("h200", few), large("h100", few), span(gather)]
    assert spans(loses) == [large("h200", many)]
    for row in measured("h200"):
        large_half = row["sparsity"] == 0.5 and row["M"] * row["K"] >= 7168**2
        if row["fp8_us"] and (large_half or row["N"] >= 64):
            assert row["fp8_us"] < row["us"]


def test_the_readme_says_how_int8_values_compare_with_fp8_as_the_rows_do():
    times = {
        row["N"]: f"{row['fp8_us'] / row['us']:.2f}"
        for row in measured("h200", "quantized_bitmap")
        if (row["M"], row["K"], row["sparsity"]) == (28672, 7168, 0.5)
        and (row["values"], row["x_values"]) == ("int8", "int8")
    }
    said = re.search(
        r"int8 is (\S+) times as fast for one token, (\S+) for 8, (\S+) for 64 ",
        " ".join(README.split()),
    )
    assert said is not None and said.groups() == tuple(times[n] for n in (1, 8, 64))


def test_the_readmes_speed_in_vllm_is_what_the_rows_say():
    step = {
        (row["sparsity"], row["batch"]): row["step_ms"]
        for row in rows.read_rows(rows.RESULTS / "serve-h200.jsonl")
        if (row["bench"], row["model"], row["gpus"], row["mode"], row.get("prompt"))
        == ("serve", "llama-8b", 1, "compiled", 64)
        and row["weights"] != "fp8"
        and row.get("values", "16-bit") == "16-bit"
    }
    said = re.search(
        r"(\S+) times as fast as the dense one at batch 8, (\S+) times at batch 32 and as fast at "
        r"batch 64 \((\S+) times",
        " ".join(README.split()),
    )
    assert said is not None
    assert said.groups() == tuple(f"{step[0, n] / step[0.5, n]:.2f}" for n in (8, 32, 64))


def test_the_readme_says_how_int8_values_compare_with_fp8_in_vllm_as_the_rows_do():
    step = {
        (row["weights"], row["batch"]): row["step_ms"]
        for row in rows.read_rows(rows.RESULTS / "serve-h200.jsonl")
        if (row["bench"], row["model"], row["gpus"], row["mode"], row.get("prompt"))
        == ("serve", "llama-8b", 1, "compiled", 64)
        and (row["values"], row["x_values"]) in {("int8", "int8"), ("fp8_e4m3", "fp8_e4m3")}
    }
    said = re.search(
        r"tokens it is (\S+), (\S+) and (\S+) times as fast as in FP8 at batch 1, 8 and 32 ",
        " ".join(README.split()),
    )
    assert said is not None
    assert said.groups() == tuple(
        f"{step['fp8', n] / step['flash_llm', n]:.2f}" for n in (1, 8, 32)
    )


def test_the_readmes_perplexities_are_what_the_rows_say():
    found = {
        row["sparsity"]: row
        for row in rows.read_rows(rows.RESULTS / "accuracy.jsonl")
        if (row.get("method"), row.get("allocation"), row.get("recover_epochs"), row["values"])
        == ("admm", "uniform", 0, "16-bit")
    }
    said = (
        f"rises from {found[0.5]['dense_perplexity']:.2f} to {found[0.5]['perplexity']:.2f} at "
        f"50 % zeros and to {found[0.7]['perplexity']:.2f} at 70 %"
    )
    assert said in " ".join(README.split()) and f"`{found[0.7]['commit']}`" in README
    rounded = {
        (row["method"], row["sparsity"], row["values"]): row
        for row in rows.read_rows(rows.RESULTS / "accuracy.jsonl")
        if row.get("recover_epochs") == 0 and row.get("rounding") == "sweep"
    }
    three = (("sparsegpt", 0.0, "int4"), ("admm", 0.5, "int4"), ("sparsegpt", 0.0, "int3"))
    for name, digits in zip(three, (1, 2, 2), strict=True):
        row = rounded[name]
        assert f"{row['perplexity']:.2f} at {row['bits']:.{digits}f})" in " ".join(README.split())


def test_the_readmes_six_rows_are_measured():
    by_case = {(r["M"], r["K"], r["N"], round(r["sparsity"] * 100)): r for r in measured("h200")}
    lines = re.findall(r"^\| (\d+)×(\d+) \| (\d+) \| (\d+) % \| (.+) \|$", README, re.MULTILINE)
    assert len(lines) == 6
    for *case, cells in lines:
        m, k, *_ = case = tuple(map(int, case))
        row = by_case[case]
        assert cells.split(" | ") == [
            f"{row['packed_bytes'] / 1e6:.1f} / {m * k * 2 / 1e6:.1f}",
            f"{row['us']:.1f}",
            f"{row['cublas_us']:.1f}",
            f"{speed_up(row):.2f}",
            f"{row['cublas_us'] / row['fp8_us']:.2f}",
        ]


def test_the_readmes_speed_on_a_cpu_is_measured():
    (row,) = (
        row
        for row in rows.read_rows(rows.RESULTS / "cpu.jsonl")
        if (row["bench"], row["cpu"], row.get("dtype"), row["sparsity"])
        == ("cpu", "intel-xeon", "bfloat16", 0.5)
        and (row["M"], row["K"], row["N"]) == (4096, 4096, 1)
        and row.get("values", "16-bit") == "16-bit"
    )
    said = f"{row['dense_us']['bf16'] / row['us']:.2f} times as fast as `F.linear` in bfloat16"
    text = " ".join(README.split())
    assert said in text and f"`{row['commit']}`" in text


def test_the_support_table_is_what_the_planner_says():
    """Which cells say "kernel", and which formats are `auto`."""
    names = ("bitmap", "tiled_csl", "gather", "row_bitmap", "quantized_bitmap")
    lines = re.findall(r"^\| (.*) \| float16, bfloat16 \| (.+) \|$", README, re.MULTILINE)
    assert len(lines) == 4
    for device, cells in lines:
        capabilities = [int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", device)]
        for capability in capabilities or [0]:
            gpu = {"num_sms": 132, "smem_per_sm_bytes": 228 * 1024} if capability else {}
            auto = {
                flash_llm.explain_format(
                    *(8192, 8192, int(density * 8192**2)),
                    compute_capability=capability,
                    expected_tokens=tokens,
                    values=values,
                )[0]
                for density, tokens, values in (
                    *((0.5, None, "16-bit"), (0.04, None, "16-bit"), (0.1, 1, "16-bit")),
                    *([(0.5, None, "int8")] if capability else []),  # CPUs: also the row bitmap
                )
            }
            for name, cell in zip(names, cells.split(" | "), strict=True):
                plan = flash_llm.explain_plan(
                    *(4096, 8, 4096, 2**23),
                    "int8_float16" if name == "quantized_bitmap" else "float16",
                    format=name,
                    compute_capability=capability,
                    **gpu,
                )
                assert cell.startswith("kernel") != plan.startswith("dense"), (capability, name)
                assert ("`auto`" in cell) == (name in auto), (capability, name)
