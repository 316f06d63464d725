"""torch's weight-only products, the control of the demo and the benchmarks."""

import pytest
import torch

from flash_llm import weight_only


@pytest.mark.parametrize("values", weight_only.WEIGHT_ONLY_VALUES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_weight(values, bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 48, bias=bias)).bfloat16()
    with torch.no_grad():
        model[0].weight[3] = 0  # a row without a largest value
    x = torch.randn(2, 3, 128).bfloat16()
    rounded = weight_only.round_to_nearest(model[0].weight, values)
    expected = torch.nn.functional.linear(
        x.double(), rounded.double(), model[0].bias.double() if bias else None
    )
    weight_only.quantize_(model, ["0"], values)
    torch.testing.assert_close(model(x).double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("values", "steps"), [("int8", 127), ("int4", 7.5)])
def test_rounding_moves_a_weight_by_half_a_step_at_most(values, steps):
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16, bias=False))
    model[0].weight.data = weight.clone()
    weight_only.round_(model, ["0"], values)
    moved = (model[0].weight - weight).abs().amax(dim=1)
    assert bool((moved > 0).all())
    assert bool((moved <= 0.51 * weight.abs().amax(dim=1) / steps).all())


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="int8, int4"):
        weight_only.round_to_nearest(torch.ones(2, 32), "int2")
    with pytest.raises(ValueError, match="multiple of 64"):
        weight_only.round_to_nearest(torch.ones(2, 96), "int4")
