"""SparseLinear: what users do to modules (move, cast, copy, save, load, compile, train)."""

import copy
import io
import pickle

import pytest
import torch
from formats import DTYPES, FORMATS, each, other_format
from torch import Tensor, nn

import flash_llm
from flash_llm import SparseLinear, ops, testing
from flash_llm.linear import BUFFERS
from flash_llm.ops import PackedHeader

KEYS = ["bias", "weight_header", "weight_offsets", "weight_payload"]


def sparse_linear_and_dense(
    k=70, m=130, bias=True, dtype=torch.float16, device="cpu", seed=0, format="auto"
):
    linear = nn.Linear(k, m, bias=bias, dtype=dtype, device=device)
    with torch.no_grad():
        linear.weight.copy_(testing.random_sparse(m, k, 0.7, dtype=dtype, device=device, seed=seed))
    return SparseLinear.from_linear(linear, format=format), linear


def assert_same_layer(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for (key, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert left.dtype == right.dtype and torch.equal(left.cpu(), right.cpu()), key
    assert a.packed.header == b.packed.header and type(a.packed) is type(b.packed)


# ---- construction and forward ----


@each("bias", [True, False])
@each("dtype", DTYPES)
def test_forward_equals_the_dense_layer(bias, format, device, dtype):
    layer, linear = sparse_linear_and_dense(bias=bias, format=format, dtype=dtype, device=device)
    x = torch.randn(2, 5, 70).to(device, dtype)
    testing.assert_spmm_close(layer(x), x, linear.weight, linear.bias)
    assert torch.equal(layer(input=x), layer(x))
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == (KEYS if bias else KEYS[1:])
    assert [name for name, _ in layer.named_parameters()] == (["bias"] if bias else [])


@each("dtype", DTYPES)
def test_new_layer_is_all_zero_and_valid(format, device, dtype):
    layer = SparseLinear(70, 130, device=device, dtype=dtype, format=format)
    layer.packed.validate()
    assert layer.packed.FORMAT == format
    assert layer.sparsity == 1.0
    x = torch.randn(3, 70).to(device, dtype)
    assert torch.equal(layer(x), torch.zeros(3, 130, dtype=dtype, device=device))
    assert torch.equal(layer.weight, torch.zeros(130, 70, dtype=dtype, device=device))


def test_construction_allocates_nothing_dense():
    # 2 TB as a dense matrix.
    layer = SparseLinear(1_000_000, 1_000_000, dtype=torch.bfloat16, device="meta")
    assert layer.weight_header.is_meta and layer.bias.is_meta
    layer = SparseLinear(100_000, 100_000, dtype=torch.bfloat16)
    assert sum(b.nbytes for b in layer.buffers()) < 10_000_000


@each(("k", "m"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_sizes_without_elements(k, m, format, device):
    layer = SparseLinear(k, m, device=device, format=format)
    assert layer(torch.ones(3, k, dtype=torch.float16, device=device)).shape == (3, m)
    assert_same_layer(copy.deepcopy(layer), layer)


def test_conv1d_is_packed_transposed(format, device):
    class Conv1D(nn.Module):  # as in transformers' GPT-2
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.empty(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))

    conv = Conv1D(130, 70).to(device, torch.float16)
    with torch.no_grad():
        conv.weight.copy_(testing.random_sparse(70, 130, 0.7, device=device))
    layer = SparseLinear.from_linear(conv, format=format)
    assert (layer.in_features, layer.out_features) == (70, 130)
    x = torch.randn(4, 70, device=device).half()
    testing.assert_spmm_close(layer(x), x, conv.weight.t(), conv.bias)


def test_from_linear_shares_the_bias_and_keeps_the_mode():
    linear = nn.Linear(70, 130).half().eval()
    layer = SparseLinear.from_linear(linear)
    assert layer.bias is linear.bias and not layer.training


def test_from_linear_prunes_when_asked(format, device):
    linear = nn.Linear(64, 32, device=device).half()
    layer = SparseLinear.from_linear(linear, sparsity=0.75, format=format)
    expected = flash_llm.prune_pack(linear.weight, 0.75, format=format)
    assert torch.equal(layer.weight_payload, expected.payload) and layer.sparsity == 0.75
    assert SparseLinear.from_linear(linear, scope="2:4", format=format).sparsity == 0.5


@each("dtype", DTYPES)
def test_from_packed_and_back(format, device, dtype):
    dense = testing.random_sparse(130, 70, dtype=dtype, device=device)
    bias = torch.randn(130).to(device, dtype)
    packed = flash_llm.pack(dense, format)
    layer = SparseLinear.from_packed(packed, bias)
    assert layer.weight_payload is packed.payload and torch.equal(layer.bias, bias)
    linear = layer.eval().to_linear()
    assert type(linear) is nn.Linear and not linear.training
    assert torch.equal(linear.weight, dense) and linear.bias is layer.bias


# ---- weight ----


def test_weight_reads_dense_and_assignment_packs(format, device):
    layer, linear = sparse_linear_and_dense(device=device, format=format)
    assert torch.equal(layer.weight, linear.weight)
    other = testing.random_sparse(130, 70, 0.5, device=device, seed=9)
    layer.weight = other
    assert torch.equal(layer.weight, other)
    layer.weight = nn.Parameter(other * 2)
    assert torch.equal(layer.weight, other * 2)
    layer.register_parameter("weight", nn.Parameter(other * 4))
    assert torch.equal(layer.weight, other * 4)
    assert list(layer.state_dict()) == KEYS
    layer.packed.validate()
    assert layer.packed.FORMAT == format


def test_refused_weights_change_nothing():
    layer, linear = sparse_linear_and_dense()
    for wrong, error in (
        (torch.zeros(70, 130, dtype=torch.float16), ValueError),
        (torch.zeros(130 * 70, dtype=torch.float16), ValueError),
        (torch.zeros(130, 70), TypeError),
        (torch.zeros(130, 70, dtype=torch.bfloat16), TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match="flash_llm.SparseLinear: weight "):
            layer.weight = wrong
    assert torch.equal(layer.weight, linear.weight)


def test_reading_metadata_of_the_weight_does_not_unpack(monkeypatch):
    """T5 reads ``self.wo.weight.dtype`` in each forward."""
    layer, linear = sparse_linear_and_dense()
    calls = []
    unpack = ops.unpack
    monkeypatch.setattr(ops, "unpack", lambda packed: calls.append(packed) or unpack(packed))
    weight = layer.weight
    for read in (
        *(lambda w: w.dtype, lambda w: w.device, lambda w: w.shape, lambda w: w.size(1), len),
        *(lambda w: w.numel(), lambda w: w.stride(), lambda w: w.is_meta, lambda w: w.is_cuda),
        *(lambda w: w.requires_grad, lambda w: w.ndim, lambda w: w.nbytes, lambda w: w.layout),
        *(lambda w: w.is_contiguous(), lambda w: w.is_floating_point(), lambda w: w.grad),
        *(lambda w: w.data.dtype, lambda w: w.detach().dtype, lambda w: w.to(w.dtype).dtype),
    ):
        expected, found = read(linear.weight.detach()), read(weight)
        assert found == expected and type(found) is type(expected)
    assert isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
    assert not calls
    assert torch.equal(weight, linear.weight) and torch.equal(weight.t(), linear.weight.t())
    assert len(calls) == 1


def write_through_iadd(weight):
    weight += 1


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "data": lambda w: w.data.mul_(2),
    "detach": lambda w: w.detach().zero_(),
    "+=": write_through_iadd,
    "row": lambda w: w[3].zero_(),
    "item": lambda w: w.__setitem__((0, 0), 1),
    "mask": lambda w: w.__setitem__(w == 0, 1),
    "transposed": lambda w: w.t().add_(1),
    "flat": lambda w: w.data.view(-1)[5:].fill_(1),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "out": lambda w: torch.mul(w, 2, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "init": nn.init.normal_,
    "apply_": lambda w: w.apply_(lambda value: value),
}


@each("inference", [False, True])
@each("write", WRITES)
def test_writing_into_the_weight_is_refused_instead_of_lost(write, inference):
    layer, linear = sparse_linear_and_dense()
    with (
        torch.inference_mode(inference),
        pytest.raises(NotImplementedError, match="SparseLinear: weight"),
    ):
        WRITES[write](layer.weight)
    assert torch.equal(layer.weight, linear.weight)


def test_a_whole_new_weight_is_packed_however_it_is_assigned():
    layer, linear = sparse_linear_and_dense()
    layer.weight.data = linear.weight.data * 2
    assert torch.equal(layer.weight, linear.weight * 2)
    changed = layer.weight.clone()
    changed[0] = 0
    layer.weight = changed
    assert torch.equal(layer.weight, changed)
    with pytest.raises(ValueError, match=r"weight .*\[130, 70\].*\[70, 130\]"):
        layer.weight.data = changed.t()


def test_code_around_the_forward_gets_the_dense_weight():
    layer, linear = sparse_linear_and_dense()
    dense, x = linear.weight.detach(), torch.randn(3, 70).half()
    weight = layer.weight
    for compute in (
        lambda w: nn.functional.linear(x, w),
        lambda w: x @ w.T,
        lambda w: torch.vmap(lambda row: w @ row)(x),
        lambda w: torch.cat([w, w]),
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.from_dlpack(w),
        lambda w: nn.Parameter(w).half().detach() + 0,
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
        lambda w: w.float(),
        lambda w: w.clone().mul_(2),
    ):
        found = compute(weight)
        assert type(found) is Tensor and torch.equal(found, compute(dense))
    with torch.inference_mode():
        inside = layer.weight
        assert torch.equal(weight.t(), dense.t())
    assert torch.equal(inside.t(), dense.t())
    assert repr(weight) == repr(dense) and f"{weight}" == f"{dense}"
    assert weight.data_ptr() == weight.dense().data_ptr()


def test_compiled_code_reads_the_weight_without_a_graph_break():
    layer, _ = sparse_linear_and_dense()
    x = torch.randn(3, 70).half()

    def forward(x):
        return nn.functional.linear(layer(x).to(layer.weight.dtype), layer.weight.t())

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), forward(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("ignore", [(), ("layers.0",)], ids=["all", "first-dense"])
def test_the_fast_path_of_a_transformer_encoder_makes_way(ignore, monkeypatch):
    """In eval mode torch's encoder takes weights around the layers' forward, if it can."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 256, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).half().eval()
    flash_llm.sparsify_(encoder, ["linear1", "linear2"], ignore, sparsity=0.6)
    dense = copy.deepcopy(encoder)
    for block in dense.layers:
        for name in ("linear1", "linear2"):
            if isinstance(getattr(block, name), SparseLinear):
                setattr(block, name, getattr(block, name).to_linear())
    x = torch.randn(2, 7, 64).half()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    with torch.no_grad():
        expected = [dense(x), dense(x, src_key_padding_mask=padding)]
        monkeypatch.setattr(ops, "unpack", None)  # would be called for the fast path
        found = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y[~padding], z[~padding], rtol=0.01, atol=0.01)


def test_reset_parameters_gives_zeros(format):
    layer, _ = sparse_linear_and_dense(format=format)
    layer.reset_parameters()
    layer.packed.validate()
    assert layer.packed.FORMAT == format
    assert layer.sparsity == 1.0 and not layer.bias.any()


def test_repr_tells_format_and_sparsity(format):
    layer, _ = sparse_linear_and_dense(format=format)
    text = repr(layer)
    assert "in_features=70, out_features=130, bias=True, dtype=torch.float16" in text
    assert f"format={format}" in text and f"sparsity={layer.sparsity:.4f}" in text


# ---- formats ----


def format_of_auto(device):
    """What "auto" takes for the weights of these tests."""
    if torch.device(device).type == "cpu":
        return "row_bitmap"
    return "bitmap"


def test_the_default_is_auto(device):
    layer, _ = sparse_linear_and_dense(device=device)
    assert layer.format == SparseLinear(70, 130).format == "auto"
    assert layer.packed.FORMAT == format_of_auto(device)


@pytest.mark.parametrize("choice", ["auto", *FORMATS])
def test_dense_weights_are_packed_in_the_format_of_the_layer(choice, device):
    layer, linear = sparse_linear_and_dense(device=device, format=choice)
    wanted = format_of_auto(device) if choice == "auto" else choice
    new = SparseLinear(70, 130, device=device, format=choice)
    new.weight = linear.weight
    loaded = SparseLinear(70, 130, device=device, format=choice)
    loaded.load_state_dict(linear.state_dict())
    cast = copy.deepcopy(layer).bfloat16()
    for other in (layer, new, loaded, cast, copy.deepcopy(layer)):
        assert other.format == choice and other.packed.FORMAT == wanted
        other.packed.validate()
    assert torch.equal(new.weight, linear.weight) and torch.equal(loaded.weight, linear.weight)


def test_a_layer_around_a_packed_weight_has_its_format(format, device):
    packed = flash_llm.pack(testing.random_sparse(130, 70, device=device), format)
    layer = SparseLinear.from_packed(packed)
    assert layer.format == format
    layer.weight = torch.zeros(130, 70, dtype=torch.float16, device=device)
    assert layer.packed.FORMAT == format


@each("assign", [False, True])
def test_an_auto_layer_loads_either_format(assign, format, device):
    source, linear = sparse_linear_and_dense(device=device, format=format)
    for before in ("auto", other_format(format)):
        layer, _ = sparse_linear_and_dense(device=device, format=before, seed=5)
        layer.format = "auto"
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert_same_layer(layer, source)
        assert layer.format == "auto" and layer.packed.FORMAT == format
        x = torch.randn(3, 70, device=device).half()
        assert torch.equal(layer(x), source(x))
        assert f"format={format}" in repr(layer)


@each("strict", [True, False])
def test_a_named_format_refuses_the_other_and_names_both(strict, format, device):
    other = other_format(format)
    source, _ = sparse_linear_and_dense(device=device, format=other, seed=5)
    model = nn.ModuleDict({"mlp": sparse_linear_and_dense(device=device, format=format)[0]})
    before = copy.deepcopy(model["mlp"])
    state = nn.ModuleDict({"mlp": source}).state_dict()
    message = f'SparseLinear "mlp" .*{format}.*{other}'
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        model.load_state_dict(state, strict=strict)
    assert_same_layer(model["mlp"], before)


@pytest.mark.gpu
@each("dtype", DTYPES)
def test_an_auto_layer_is_repacked_where_it_moves(dtype):
    layer, linear = sparse_linear_and_dense(dtype=dtype)
    before = copy.deepcopy(layer)
    x = torch.randn(3, 70).to("cuda", dtype)
    for _ in range(2):
        layer.cuda()
        assert layer.format == "auto" and layer.packed.FORMAT == format_of_auto("cuda")
        assert all(t.is_cuda for t in (*layer.parameters(), *layer.buffers()))
        layer.packed.validate()
        assert torch.equal(layer.weight.cpu(), linear.weight)
        testing.assert_spmm_close(layer(x), x, linear.weight.cuda(), linear.bias.cuda())
        assert_same_layer(SparseLinear.from_linear(copy.deepcopy(linear).cuda()), layer)
        assert_same_layer(layer.cpu(), before)
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}[dtype]
    layer.to("cuda", other)
    assert layer.packed.FORMAT == format_of_auto("cuda") and layer.dtype == other
    assert torch.equal(layer.weight.cpu(), linear.weight.to(other))


@pytest.mark.gpu
def test_a_moved_layer_that_was_named_keeps_its_format_and_bytes(format):
    layer, _ = sparse_linear_and_dense(format=format)
    before = copy.deepcopy(layer)
    around = SparseLinear.from_packed(copy.deepcopy(layer.packed))
    for moved in (layer.cuda(), around.cuda()):
        assert moved.format == moved.packed.FORMAT == format
    assert_same_layer(layer, before)
    assert_same_layer(layer.cpu(), before)


@pytest.mark.gpu
def test_an_auto_layer_loads_on_the_gpu_and_follows_its_next_move(format):
    source, linear = sparse_linear_and_dense(format=format)
    layer = SparseLinear(70, 130, device="cuda")
    layer.load_state_dict(source.state_dict())
    assert layer.packed.FORMAT == format and layer.weight_payload.is_cuda
    assert layer.cpu().packed.FORMAT == "row_bitmap"
    # Nobody has gather who does not expect few tokens.
    wanted = "gather" if format == "gather" else format_of_auto("cuda")
    assert layer.cuda().packed.FORMAT == wanted
    assert torch.equal(layer.weight.cpu(), linear.weight)


@pytest.mark.gpu
def test_a_layer_for_few_tokens_is_gather_on_every_gpu():
    # A layer shares its bias with the dense one, which would move to the GPU with it.
    linear = nn.Linear(8192, 4096, bias=False).half()
    layer = SparseLinear.from_linear(linear, sparsity=0.9, expected_tokens=4)
    weight = layer.weight
    for _ in range(2):
        assert layer.cpu().packed.FORMAT == "row_bitmap"
        assert copy.deepcopy(layer).cuda().packed.FORMAT == "gather"
        assert layer.cuda().packed.FORMAT == "gather"
    layer.weight = weight.cuda()
    assert layer.packed.FORMAT == "gather" and torch.equal(layer.weight.cpu(), weight)
    layer.expected_tokens = 64
    assert layer.bfloat16().packed.FORMAT == "gather"  # it had it
    layer.half().load_state_dict(SparseLinear.from_linear(linear, format="bitmap").state_dict())
    assert layer.cpu().cuda().packed.FORMAT == "bitmap"


@pytest.mark.gpu
def test_an_auto_layer_that_is_almost_empty_becomes_tiled_csl():
    linear = nn.Linear(700, 300).half()
    layer = SparseLinear.from_linear(linear, sparsity=0.96)
    weight = layer.weight
    assert layer.cuda().packed.FORMAT == "tiled_csl"
    assert torch.equal(layer.weight.cpu(), weight)


# ---- copies, moves and casts ----


def test_deepcopy_and_pickle(format, device):
    layer, _ = sparse_linear_and_dense(device=device, format=format)
    x = torch.randn(3, 70, device=device).half()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_layer(other, layer)
        assert other.format == format
        assert torch.equal(other(x), expected)
        other.reset_parameters()
    assert torch.equal(layer(x), expected)  # nothing is shared


def test_torch_save_and_load(format):
    layer, _ = sparse_linear_and_dense(format=format)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = SparseLinear(70, 130)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_layer(other, layer)


def test_casts_between_fp16_and_bf16_re_encode_the_values(format, device):
    layer, linear = sparse_linear_and_dense(device=device, format=format)
    x = torch.randn(3, 70, device=device)
    for cast in (
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to(device=device, dtype=torch.bfloat16),
        lambda module: module.type(torch.bfloat16),
    ):
        there = cast(copy.deepcopy(layer))
        there.packed.validate()
        assert there.packed.FORMAT == format
        assert there.dtype == there.bias.dtype == there(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(there.weight, linear.weight.bfloat16())
        assert there.weight_header.dtype == torch.int64
        assert torch.equal(there.half().weight, linear.weight.bfloat16().half())
    assert_same_layer(copy.deepcopy(layer).half(), layer)


def test_a_cast_that_rounds_to_zero_drops_the_entry(format):
    layer = SparseLinear.from_packed(
        flash_llm.pack(torch.full((8, 8), 2.0**-30, dtype=torch.bfloat16), format)
    )
    layer.half()
    layer.packed.validate()
    assert layer.packed.nnz == 0


@each(
    ("cast", "wide"),
    [
        (lambda module: module.float(), torch.float32),
        (lambda module: module.double(), torch.float64),
        (lambda module: module.to("cpu", torch.float32).to("cpu"), torch.float32),
        (lambda module: module.type(torch.float64), torch.float64),
    ],
    ids=["float", "double", "to-float32", "type-float64"],
)
def test_a_model_cast_to_a_wide_type_is_not_left_half_cast(cast, wide):
    layer, linear = sparse_linear_and_dense()
    model = nn.Sequential(nn.Linear(70, 70), layer, nn.Linear(130, 3)).half()
    before, x = copy.deepcopy(layer), torch.randn(5, 70)
    with pytest.warns(UserWarning, match="torch.float16"):
        cast(model)
    assert {p.dtype for p in model.parameters()} == {model(x.to(wide)).dtype} == {wide}
    inputs = x.half().to(wide)
    testing.assert_spmm_close(layer(inputs).half(), inputs.half(), linear.weight, linear.bias)
    with pytest.raises(TypeError, match="x .*Half"):
        layer(x.bfloat16())
    assert_same_layer(copy.deepcopy(layer).half(), before)
    with pytest.raises(TypeError, match="x .*Half"):
        model.half()[1](x)


def test_a_cast_to_a_type_that_is_no_float_leaves_the_weight(recwarn):
    layer, _ = sparse_linear_and_dense(bias=False)
    before = copy.deepcopy(layer)
    layer.to(torch.complex64)
    with pytest.raises(TypeError, match="x .*Half"):
        layer(torch.ones(1, 70, dtype=torch.complex64))
    assert_same_layer(layer, before)


@pytest.mark.gpu
def test_to_device_and_back():
    layer, linear = sparse_linear_and_dense()
    before = copy.deepcopy(layer)
    x = torch.randn(3, 70).half().cuda()
    layer.cuda()
    assert all(t.is_cuda for t in (*layer.parameters(), *layer.buffers()))
    testing.assert_spmm_close(layer(x), x, linear.weight.cuda(), linear.bias.cuda())
    assert_same_layer(layer.cpu(), before)
    layer.to("cuda", torch.bfloat16)
    assert layer.weight.is_cuda and layer.dtype == torch.bfloat16


def test_to_empty_from_meta_gives_a_valid_layer(format, device):
    layer = SparseLinear(70, 130, device="meta", payload_words=400, format=format)
    assert layer.weight_payload.shape == (400,)
    layer.to_empty(device=device)
    layer.packed.validate()
    assert layer.sparsity == 1.0 and layer.packed.FORMAT == format
    layer = torch.nn.utils.skip_init(SparseLinear, 70, 130, device=device)
    layer.packed.validate()


def test_meta_layer_can_be_cast_and_called(format):
    layer = SparseLinear(70, 130, device="meta", payload_words=400, format=format).bfloat16()
    assert layer.dtype == torch.bfloat16
    y = layer(torch.empty(3, 70, dtype=torch.bfloat16, device="meta"))
    assert y.is_meta and y.shape == (3, 130)


def test_device_context_is_followed():
    with torch.device("meta"):
        layer = SparseLinear(70, 130)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


# ---- state dict ----


@each("assign", [False, True])
def test_packed_keys_of_another_size_load(assign, format, device):
    layer, linear = sparse_linear_and_dense(device=device, format=format)
    other = SparseLinear(70, 130, device=device, format=format)
    result = other.load_state_dict(layer.state_dict(), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same_layer(other, layer)
    x = torch.randn(3, 70, device=device).half()
    assert torch.equal(other(x), layer(x))
    shares = other.weight_payload.data_ptr() == layer.weight_payload.data_ptr()
    assert shares == assign
    # And down to a smaller one again.
    other.load_state_dict(SparseLinear(70, 130, device=device, format=format).state_dict())
    assert other.sparsity == 1.0
    other.packed.validate()


def test_loading_into_one_of_two_layers_leaves_the_other(format):
    """Both share the buffers of one packed weight; half of them must not change."""
    packed = flash_llm.pack(testing.random_sparse(130, 70, 0.7), format)
    one, two = SparseLinear.from_packed(packed), SparseLinear.from_packed(packed)
    expected = one.weight
    two.load_state_dict(SparseLinear(70, 130, bias=False, format=format).state_dict())
    one.packed.validate()
    assert torch.equal(one.weight, expected) and two.sparsity == 1.0


def test_loading_the_same_size_keeps_the_buffers_in_place(format):
    layer, _ = sparse_linear_and_dense(format=format)
    other = copy.deepcopy(layer)
    address = other.weight_payload.data_ptr()
    layer.weight = layer.weight * 2
    other.load_state_dict(layer.state_dict())
    assert other.weight_payload.data_ptr() == address
    assert_same_layer(other, layer)


@each("assign", [False, True])
@each("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dense_weight_key_loads_and_is_packed(assign, stored, format, device):
    _, linear = sparse_linear_and_dense(device=device)
    model = nn.Sequential(nn.Linear(3, 70), SparseLinear(70, 130, device=device, format=format))
    state = nn.Sequential(nn.Linear(3, 70), linear).state_dict()
    state["1.weight"] = state["1.weight"].to(stored)
    result = model.load_state_dict(state, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert model[1].dtype == torch.float16
    assert torch.equal(model[1].weight, linear.weight.to(stored).half())
    model[1].packed.validate()
    assert model[1].packed.FORMAT == format


@each("dense", [False, True])
def test_loading_onto_meta_with_assign(dense, format, device):
    layer, linear = sparse_linear_and_dense(device=device, format=format)
    meta = nn.Sequential(SparseLinear(70, 130, device="meta", payload_words=8, format=format))
    source = nn.Sequential(linear if dense else layer)
    meta.load_state_dict(source.state_dict(), assign=True)
    assert meta[0].weight_payload.device == layer.weight_payload.device
    x = torch.randn(3, 70, device=device).half()
    assert torch.equal(meta[0](x), layer(x))


def test_loading_onto_meta_without_assign_warns_as_torch_does():
    layer, _ = sparse_linear_and_dense()
    meta = SparseLinear(70, 130, device="meta")
    with pytest.warns(UserWarning, match="no-op"):
        meta.load_state_dict(layer.state_dict())
    assert all(t.is_meta for t in meta.buffers())


@pytest.mark.gpu
def test_loading_keeps_the_device():
    layer, _ = sparse_linear_and_dense()
    other = SparseLinear(70, 130, device="cuda")
    other.load_state_dict(layer.state_dict())
    assert other.weight_payload.is_cuda and other.weight_header.is_cuda
    assert_same_layer(other, layer)


def broken_state(change):
    layer, _ = sparse_linear_and_dense(seed=1)
    state = {f"mlp.{key}": value.clone() for key, value in layer.state_dict().items()}
    change(state)
    return state


def other_size(state):
    state.update({f"mlp.{k}": v for k, v in sparse_linear_and_dense(k=71)[0].state_dict().items()})


def other_dtype(state):
    other, _ = sparse_linear_and_dense(dtype=torch.bfloat16)
    state.update({f"mlp.{k}": v for k, v in other.state_dict().items()})


def set_header(index, value):
    def change(state):
        state["mlp.weight_header"][index] = value

    return change


BROKEN = {
    "another shape": (other_size, r"weight .*\[130, 70\].*\[130, 71\]"),
    "another dtype": (other_dtype, "weight .*torch.float16 .*torch.bfloat16"),
    "wrong magic": (set_header(0, 1), "magic"),
    "newer version": (set_header(1, 2), "version 2"),
    "unknown format": (set_header(2, 99), "format 99"),
    "wrong nnz": (set_header(6, 1), "nnz = 1"),
    "truncated payload": (
        lambda s: s.update({"mlp.weight_payload": s["mlp.weight_payload"][:-4]}),
        "payload ",
    ),
    "decreasing offsets": (
        lambda s: s["mlp.weight_offsets"].__setitem__(1, -1),
        "offsets",
    ),
    "other bits": (
        lambda s: s["mlp.weight_payload"].__setitem__(1, s["mlp.weight_payload"][0].item()),
        "block 0: ",
    ),
    "integer type": (
        lambda s: s.update({"mlp.weight_payload": s["mlp.weight_payload"].long()}),
        "payload .*int32",
    ),
    "header type": (
        lambda s: s.update({"mlp.weight_header": s["mlp.weight_header"].int()}),
        "header .*int64",
    ),
    "header length": (
        lambda s: s.update({"mlp.weight_header": s["mlp.weight_header"][:7]}),
        r"header .*\[8\].*\[7\]",
    ),
    "part missing": (
        lambda s: s.pop("mlp.weight_offsets"),
        "weight_offsets",
    ),
    "dense and packed": (
        lambda s: s.update({"mlp.weight": torch.zeros(130, 70)}),
        "weight .*weight_header",
    ),
    "no tensor": (
        lambda s: s.update({"mlp.weight_payload": "words"}),
        "weight_payload .*str",
    ),
    "bias shape": (
        lambda s: s.update({"mlp.bias": torch.zeros(131)}),
        r"bias .*\[130\].*\[131\]",
    ),
}


@each("strict", [True, False])
@each("case", BROKEN)
def test_a_broken_state_dict_names_the_layer_and_changes_nothing(case, strict):
    change, message = BROKEN[case]
    model = nn.ModuleDict({"mlp": sparse_linear_and_dense()[0]})
    before = copy.deepcopy(model["mlp"])
    with pytest.raises(RuntimeError, match=f'(?s)SparseLinear "mlp" .*{message}'):
        model.load_state_dict(broken_state(change), strict=strict)
    assert_same_layer(model["mlp"], before)


def test_missing_and_unexpected_keys_are_reported_as_usual():
    layer, _ = sparse_linear_and_dense()
    before = copy.deepcopy(layer)
    result = layer.load_state_dict({"extra": torch.zeros(1)}, strict=False)
    assert result.missing_keys == KEYS and result.unexpected_keys == ["extra"]
    assert_same_layer(layer, before)
    with pytest.raises(RuntimeError, match="weight_header"):
        layer.load_state_dict({})


def test_safetensors_round_trip(format, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.ModuleDict(
        {"a": sparse_linear_and_dense(format=format)[0], "b": SparseLinear(64, 8, format=format)}
    )
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = nn.ModuleDict(
        {"a": SparseLinear(70, 130, format=format), "b": SparseLinear(64, 8, format=format)}
    )
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    for name in model:
        assert_same_layer(other[name], model[name])


def with_equal_payloads(format):
    """Two layers whose headers differ in nnz only, of payloads of equal length."""
    dense = torch.zeros(130, 70).half()
    dense[0, :5] = 1
    first = SparseLinear.from_packed(flash_llm.pack(dense, format))
    dense[0, 5] = 1
    second = SparseLinear.from_packed(flash_llm.pack(dense, format))
    assert first.weight_payload.shape == second.weight_payload.shape
    return first, second


def copy_in_place(layer, name, value):
    getattr(layer, name).copy_(value)


def assign_data(layer, name, value):
    getattr(layer, name).data = value


def put_into_buffers(layer, name, value):
    layer._buffers[name] = value


def swap(layer, name, value):
    torch.utils.swap_tensors(getattr(layer, name), value)


def set_parameter(layer, name, value):
    setattr(layer, name, nn.Parameter(value, requires_grad=False))


def set_by_accelerate(layer, name, value):
    accelerate = pytest.importorskip("accelerate")
    accelerate.utils.set_module_tensor_to_device(layer, name, "cpu", value)


BUFFER_WRITES = [
    *(copy_in_place, assign_data, put_into_buffers, swap, setattr, set_parameter),
    set_by_accelerate,
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", BUFFER_WRITES, ids=lambda write: write.__name__)
def test_another_header_is_noticed_however_it_is_written(write, inference, format):
    """Also of a payload of the same length, and in tensors that count no writes."""
    with torch.inference_mode(inference):
        layer, other = with_equal_payloads(format)
        x = torch.randn(3, 70).half()
        expected, header = other(x), other.packed.header
        layer(x)
        for name in BUFFERS:
            write(layer, name, getattr(other, name).clone())
        assert torch.equal(layer(x), expected)
        assert layer.packed.header == header and layer.sparsity == header.sparsity
        layer.packed.validate()


@pytest.mark.parametrize("assign", [False, True])
def test_another_header_is_noticed_in_a_state_dict(assign, format):
    layer, other = with_equal_payloads(format)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert_same_layer(layer, other)
    layer.packed.validate()


def test_another_header_is_noticed_in_a_functional_call_and_in_copies(format):
    layer, other = with_equal_payloads(format)
    x = torch.randn(3, 70).half()
    own, expected = layer(x), other(x)
    buffers = dict(other.named_buffers())
    assert torch.equal(torch.func.functional_call(layer, buffers, (x,)), expected)
    assert torch.equal(layer(x), own)
    layer.packed.validate()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.weight_payload.copy_(other.weight_payload)
        copied.weight_header.copy_(other.weight_header)
        copied.packed.validate()
        assert torch.equal(copied(x), expected) and torch.equal(layer(x), own)


def test_a_new_compilation_sees_a_header_that_was_written_in_place(format):
    layer, other = with_equal_payloads(format)
    headers = []

    def record(graph, inputs):
        calls = [node for node in graph.graph.nodes if "spmm" in str(node.target)]
        headers.extend(tuple(call.args[1]) for call in calls)
        return graph

    x = torch.randn(3, 70).half()
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=record)(x)
    first = layer.packed.header
    for name in BUFFERS:
        copy_in_place(layer, name, getattr(other, name))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=record)
    compiled(x)
    # Compiled code is guarded by the header that it was compiled for.
    layer.load_state_dict(with_equal_payloads(format)[0].state_dict())
    compiled(x)
    torch._dynamo.reset()
    assert headers == [first, other.packed.header, first]


def test_replicas_of_data_parallel_training_read_the_header_that_was_sent(format, tmp_path):
    layer, other = with_equal_payloads(format)
    layer.bias = nn.Parameter(torch.zeros(130).half())
    x = torch.randn(3, 70).half()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        replica = nn.parallel.DistributedDataParallel(layer)
        replica(x).sum().backward()
        for name in BUFFERS:
            copy_in_place(layer, name, getattr(other, name))
        assert torch.equal(replica(x), other(x))
    finally:
        torch.distributed.destroy_process_group()
    layer.packed.validate()


def test_a_header_of_another_shape_or_of_no_format_is_refused(format):
    layer = sparse_linear_and_dense(format=format)[0]
    before = copy.deepcopy(layer)
    with pytest.raises(ValueError, match=r"weight .*\[130, 70\].*\[8, 64\]"):
        layer.weight_header = SparseLinear(64, 8).weight_header
    with pytest.raises(NotImplementedError, match=r"SparseLinear: .*format 99"):
        layer.weight_header = PackedHeader(*layer.packed.header)._replace(format=99).to_tensor()
    assert_same_layer(layer, before)
    layer.weight_header[0] = 1
    with pytest.raises(ValueError, match=r"SparseLinear: .*magic number .*, got 1$"):
        layer(torch.ones(1, 70).half())


# ---- accelerate ----


def test_accelerate_offloads_and_dispatches(format):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(3, 70).half()
    model = nn.Sequential(sparse_linear_and_dense(format=format)[0], nn.ReLU())
    expected, before = model(x), copy.deepcopy(model[0])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert model[0].weight_payload.is_meta
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert model[0].weight_payload.is_meta
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same_layer(model[0], before)


def test_accelerate_loads_a_checkpoint_into_an_empty_model(format, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    safetensors = pytest.importorskip("safetensors.torch")
    source = nn.Sequential(sparse_linear_and_dense(format=format)[0])
    safetensors.save_model(source, str(tmp_path / "model.safetensors"))
    with accelerate.init_empty_weights(include_buffers=True):
        words = source[0].weight_payload.numel()
        model = nn.Sequential(
            SparseLinear(70, 130, device="meta", payload_words=words, format=format)
        )
    accelerate.load_checkpoint_and_dispatch(
        model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    x = torch.randn(3, 70).half()
    assert torch.equal(model(x), source(x))


@pytest.mark.gpu
def test_accelerate_runs_an_offloaded_layer_on_the_gpu(format):
    accelerate = pytest.importorskip("accelerate")
    x = torch.randn(3, 70).half().cuda()
    model = nn.Sequential(sparse_linear_and_dense(format=format)[0])
    expected = copy.deepcopy(model).cuda()(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cuda"), offload_buffers=True)
    assert torch.equal(model(x), expected)


# ---- training and compilation ----


def test_gradients_reach_input_and_bias_but_not_the_weight(format, device):
    layer, linear = sparse_linear_and_dense(device=device, format=format)
    x = torch.randn(4, 70, device=device).half().requires_grad_()
    before = layer.weight_payload.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 4))
    expected = linear.weight.double().sum(0).expand(4, -1)
    torch.testing.assert_close(x.grad.double(), expected, rtol=2e-3, atol=2e-3)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert torch.equal(layer.weight_payload, before)


def test_an_adapter_over_a_frozen_layer_trains():
    """What LoRA does: the loss falls, the packed base stays."""
    base, _ = sparse_linear_and_dense(dtype=torch.bfloat16)
    payload = base.weight_payload.clone()
    adapter = nn.Sequential(nn.Linear(70, 4, bias=False), nn.Linear(4, 130, bias=False))
    front = nn.Linear(70, 70)
    x, target = torch.randn(32, 70), torch.randn(32, 130)
    optimizer = torch.optim.Adam([*adapter.parameters(), *front.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        hidden = front(x)
        loss = (base(hidden.bfloat16()).float() + adapter(hidden) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert front.weight.grad.any() and torch.equal(base.weight_payload, payload)


@pytest.mark.parametrize("compiled", [False, True])
@each("autocast", [torch.bfloat16, torch.float16])
@each("dtype", DTYPES)
def test_autocast_takes_and_returns_what_the_dense_layer_does(autocast, compiled, dtype, device):
    """Also with a bias that prepare_model_for_kbit_training made float32."""
    layer, linear = sparse_linear_and_dense(dtype=dtype, device=device)
    layer.bias = nn.Parameter(layer.bias.detach().float())
    linear.weight.requires_grad_(False)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    inputs = [torch.randn(4, 70, device=device, dtype=d) for d in (torch.float32, dtype)]
    for x in inputs:
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.autocast(device, autocast):
            y, z = run(ours), linear(theirs)
        assert y.dtype == z.dtype == autocast
        torch.testing.assert_close(y, z, rtol=0.02, atol=0.02)
        y.float().sum().backward()
        z.float().sum().backward()
        assert ours.grad.dtype == x.dtype and layer.bias.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.02, atol=0.02)
    torch._dynamo.reset()


def test_without_autocast_a_wider_input_is_refused_as_by_the_dense_layer():
    layer, linear = sparse_linear_and_dense()
    x = torch.randn(4, 70)
    with pytest.raises(TypeError, match="x .*Half"):
        layer(x)
    for wrong in (x.double(), x.int()):
        for module in (layer, linear):
            with torch.autocast("cpu", torch.float16), pytest.raises((TypeError, RuntimeError)):
                module(wrong)


def test_model_of_sparse_layers_compiles_into_one_graph(format, device):
    torch._dynamo.reset()
    layers = [
        sparse_linear_and_dense(70, 130, device=device, format=format)[0],
        sparse_linear_and_dense(130, 70, bias=False, device=device, seed=3, format=format)[0],
    ]
    model = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 9, 40):
        x = torch.randn(n, 70, device=device).half()
        assert torch.equal(compiled(x), model(x))
    torch._dynamo.reset()


def loaded(layer):
    new = SparseLinear(70, 130, format=layer.format)
    new.load_state_dict(layer.state_dict())
    return new


def unpickled(layer):
    return pickle.loads(pickle.dumps(layer))


def emptied(layer):
    return copy.deepcopy(layer).to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("made_by", [copy.deepcopy, unpickled, loaded, emptied, nn.Module.half])
def test_a_call_writes_no_attribute_and_reads_no_header(made_by, inference, monkeypatch):
    """No device synchronisation hides in it, not even in the first one of a layer."""
    with torch.inference_mode(inference):
        layer = made_by(sparse_linear_and_dense()[0])

        def refuse(*_):
            raise AssertionError("forward read the header or set an attribute")

        monkeypatch.setattr(PackedHeader, "from_tensor", refuse)
        monkeypatch.setattr(SparseLinear, "__setattr__", refuse)
        assert layer(torch.ones(1, 70, dtype=torch.float16)).shape == (1, 130)


@pytest.mark.gpu
def test_layer_is_captured_in_a_graph(gpu_format):
    layer, _ = sparse_linear_and_dense(device="cuda", format=gpu_format)
    x = testing.small_integers(2, 70, device="cuda")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode():
        layer(x)  # kernels load on first use, which a capture may not do
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=side):
        y = layer(x)
    x.copy_(testing.small_integers(2, 70, device="cuda", seed=5))
    graph.replay()
    torch.cuda.synchronize()
    with torch.inference_mode():
        assert torch.equal(y, layer(x))
