"""Kernel choice as Python sees it: pure, printable, forceable, and tested without a GPU."""

import subprocess
import sys

import pytest

import flash_llm
from flash_llm import _extension

H200 = {"compute_capability": 90, "num_sms": 132, "smem_per_sm_bytes": 228 * 1024}
A100 = {"compute_capability": 80, "num_sms": 108, "smem_per_sm_bytes": 164 * 1024}
CPU = {}

M, K = 28672, 7168
NNZ = M * K // 5


def chosen(text):
    """The plan's name: what ``config`` of the operator takes."""
    return text.split()[0]


def plan_names(device):
    return _extension.require().plan_names("compute_capability" in device)


def test_configs_describe_each_row():
    rows = flash_llm.configs()
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) > 0
    for row in rows:
        assert set(row) >= {"name", "warps_per_tile", "tile_n", "ctas_per_sm", "smem_bytes"}
        assert row["name"].startswith(f"w{row['warps_per_tile']}n{row['tile_n']}")
        assert 0 < row["smem_bytes"] <= 99 * 1024
        assert row["ctas_per_sm"] >= 1
    assert plan_names(H200) == [*names, "dense"]
    assert plan_names(CPU) == ["cpu_tiles", "cpu_reference", "dense"]


@pytest.mark.parametrize("device", [H200, A100], ids=["h200", "a100"])
def test_small_n_takes_the_narrowest_configuration(device):
    widths = {row["name"]: row["tile_n"] for row in flash_llm.configs()}
    for n in range(1, max(widths.values()) + 1):
        name = chosen(flash_llm.explain_plan(M, n, K, NNZ, **device))
        covering = [width for width in widths.values() if width >= n]
        assert widths[name] == min(covering), n


@pytest.mark.parametrize("device", [H200, A100, CPU], ids=["h200", "a100", "cpu"])
def test_prefill_takes_the_dense_route(device):
    text = flash_llm.explain_plan(M, 4096, K, NNZ, **device)
    assert chosen(text) == "dense"
    assert f"workspace_bytes={M * K * 2}" in text


@pytest.mark.parametrize("value_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(0, 0, 0), (1, 1, 1), (129, 65, 65), (M, 2048, K)], ids=str)
@pytest.mark.parametrize("device", [H200, A100, CPU], ids=["h200", "a100", "cpu"])
def test_every_plan_can_be_forced_on_every_shape(device, shape, value_type):
    m, n, k = shape
    for name in plan_names(device):
        text = flash_llm.explain_plan(m, n, k, m * k // 2, value_type, config=name, **device)
        assert chosen(text) == name
        assert "forced" in text


def test_the_grid_can_be_forced():
    text = flash_llm.explain_plan(M, 8, K, NNZ, config="w1n8", ctas=77, **H200)
    assert "ctas=77 " in text


def test_the_same_question_has_the_same_answer():
    first = flash_llm.explain_plan(M, 16, K, NNZ, **H200)
    flash_llm.explain_plan(1, 1, 1, 1)
    assert flash_llm.explain_plan(M, 16, K, NNZ, **H200) == first


@pytest.mark.parametrize("capability", [50, 70, 75])
def test_old_gpus_are_refused_with_their_number(capability):
    device = {**A100, "compute_capability": capability}
    with pytest.raises(
        NotImplementedError, match=rf"8\.0 or newer.*{capability // 10}\."
    ) as caught:
        flash_llm.explain_plan(M, 8, K, NNZ, **device)
    assert str(caught.value).startswith("flash_llm::explain_plan: ")


@pytest.mark.parametrize(
    ("config", "device"),
    [("w1n8", CPU), ("cpu_tiles", H200), ("fastest", H200), ("", CPU), ("AUTO", CPU)],
)
def test_unknown_configurations_are_refused_with_the_known_ones(config, device):
    with pytest.raises(ValueError) as caught:
        flash_llm.explain_plan(M, 8, K, NNZ, config=config, **device)
    message = str(caught.value)
    assert f'got "{config}"' in message
    for name in plan_names(device):
        assert f'"{name}"' in message


@pytest.mark.parametrize("ctas", [-1, 65536, 2**62])
def test_grids_that_cannot_be_launched_are_refused(ctas):
    with pytest.raises(ValueError, match=rf"ctas must lie in \[0, 65535\], got {ctas}"):
        flash_llm.explain_plan(M, 8, K, NNZ, config="w1n8", ctas=ctas, **H200)


@pytest.mark.parametrize("device", [H200, CPU], ids=["h200", "cpu"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("size", [2**31, 2**40, 2**62, -1, -(2**62)])
def test_sizes_that_32_bits_cannot_index_are_refused(device, position, size):
    shape = [64, 8, 64]
    shape[position] = size
    with pytest.raises(ValueError):
        flash_llm.explain_plan(*shape, 0, **device)


def test_tiles_of_work_that_32_bits_cannot_count_are_refused():
    with pytest.raises(ValueError, match=r"M=2147483647 N=8 K=65536.*32-bit"):
        flash_llm.explain_plan(2**31 - 1, 8, 65536, 0, **H200)


def test_value_types_other_than_16_bit_floats_are_refused():
    with pytest.raises(TypeError, match="float32"):
        flash_llm.explain_plan(M, 8, K, NNZ, "float32", **H200)


def test_explaining_a_plan_for_a_gpu_creates_no_cuda_context():
    code = (
        "import flash_llm, torch\n"
        "flash_llm.explain_plan(64, 8, 64, 9, compute_capability=90, num_sms=132,"
        " smem_per_sm_bytes=233472)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
