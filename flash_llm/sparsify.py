"""``sparsify_``: replaces linear layers of a model by packed ones, in place, and reports on each.

All layers are checked and packed before the first is replaced, so a call that fails does not change
the model. A layer is replaced only if it takes fewer bytes packed than dense. The report has the
decision and its reason for every layer that matched.
"""

from __future__ import annotations

import dataclasses
import functools
import html
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import BasePruningMethod

from flash_llm import ops
from flash_llm.integrations import tensor_parallel
from flash_llm.linear import SparseLinear, is_conv1d, is_dtensor, local_part, pack_layer
from flash_llm.ops import PackedWeight
from flash_llm.progress import ProgressBar, track
from flash_llm.report_base import Report
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS, match_layers, refuse_tied
from flash_llm.table import aligned, grouped, kind, shape_text, span, stored_text

# The attributes of nn.Module for hooks. The new layer gets the same dictionaries, because the
# handles with which users remove hooks refer to them.
_HOOK_STATE = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The decision for one layer.

    Attributes:
        name: dotted name in the model; the first one of a module that has several.
        shape: ``[out_features, in_features]``; the parameter's shape if a 3-D one was skipped.
        sparsity: fraction of zeros in [0, 1] in the packed weight; None if there is none.
        dense_bytes: bytes of the dense weight; of a layer that was packed before, its packed bytes.
        packed_bytes: bytes of the packed weight, also if the layer stays dense; None if there is
            none: the layer was skipped and is not packed.
        format: name of the packed format, likewise.
        decision: ``"packed"``, ``"dense"`` (packing would not shrink it) or ``"skipped"`` (the
            layer cannot be packed, or is left alone).
        reason: one sentence.
        values: what the packed weight stores, likewise: one of
            :data:`flash_llm.ops.STORED_VALUES`.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float | None
    dense_bytes: int
    packed_bytes: int | None
    format: str | None
    decision: str
    reason: str
    values: str | None = None

    @property
    def stored_as(self) -> str:
        """Format, and values that are not of 16 bits, for a table."""
        return stored_text(self.format or "-", self.values or "16-bit")


@dataclasses.dataclass(frozen=True)
class SparsifyReport(Report):
    """One row for each layer that matched; is printed as a table, in notebooks too.

    Attributes:
        rows: in the model's order, layers before skipped 3-D parameters; rows of a folder are
            sorted by name.
    """

    rows: tuple[LayerReport, ...]

    IN_JSON: ClassVar[tuple[str, ...]] = ("dense_bytes", "total_bytes")

    @property
    def packed(self) -> tuple[LayerReport, ...]:
        """The rows of the layers that were replaced."""
        return tuple(row for row in self.rows if row.decision == "packed")

    @property
    def dense_bytes(self) -> int:
        """Weight bytes of all rows before packing."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """Weight bytes of all rows after packing."""
        return sum(
            row.packed_bytes
            if row.decision == "packed" and row.packed_bytes is not None
            else row.dense_bytes
            for row in self.rows
        )

    def __str__(self) -> str:
        """Aligned plain text; sizes in MB of 10^6 bytes."""
        table = [self._titles(), *self._cells()]
        # Numbers (sparsity, dense MB, packed MB) align right, words left.
        lines = aligned(table, left=set(range(len(table[0]))) - {2, 3, 4})
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, self._totals()])

    def summary(self) -> str:
        """Return the same table; layers whose names differ only in indices share a line."""

        def alike(row: LayerReport) -> tuple[str, tuple[int, ...], str, str, str]:
            # The size of a weight, which follows the colon of a reason, is in the columns.
            reason, colon, _ = row.reason.partition(":")
            reason = row.reason if row.packed_bytes is None else reason if colon else ""
            return kind(row.name), row.shape, row.stored_as, row.decision, reason

        table = [("layers", "number", *self._titles()[1:])]
        for (name, shape, stored_as, decision, reason), rows in grouped(self.rows, alike).items():
            packed = [row.packed_bytes for row in rows if row.packed_bytes is not None]
            table.append(
                (
                    name,
                    str(len(rows)),
                    shape_text(shape),
                    span(row.sparsity for row in rows),
                    f"{sum(row.dense_bytes for row in rows) / 1e6:.3f}",
                    f"{sum(packed) / 1e6:.3f}" if packed else "-",
                    stored_as,
                    decision,
                    reason,
                )
            )
        lines = aligned(table, left=set(range(len(table[0]))) - {1, 3, 4, 5})
        return "\n".join([*lines, self._totals()])

    def _repr_html_(self) -> str:
        def row_html(cells: Sequence[str], tag: str) -> str:
            inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inner}</tr>"

        body = "".join(row_html(cells, "td") for cells in self._cells())
        return (
            f"<table><thead>{row_html(self._titles(), 'th')}</thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(self._totals())}</p>"
        )

    @staticmethod
    def _titles() -> tuple[str, ...]:
        return (
            "layer",
            "shape",
            "sparsity",
            "dense MB",
            "packed MB",
            "format",
            "decision",
            "reason",
        )

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            yield (
                row.name,
                shape_text(row.shape),
                "-" if row.sparsity is None else f"{row.sparsity:.4f}",
                f"{row.dense_bytes / 1e6:.3f}",
                "-" if row.packed_bytes is None else f"{row.packed_bytes / 1e6:.3f}",
                row.stored_as,
                row.decision,
                row.reason,
            )

    def _totals(self) -> str:
        """Bytes of all rows; if nothing is packed, another line with the reasons."""

        def sizes(after: int) -> str:
            ratio = after / self.dense_bytes if self.dense_bytes else 1.0
            return f"{after / 1e6:.3f} MB ({ratio:.2f}x)"

        text = (
            f"{len(self.packed)} of {len(self.rows)} layers packed: "
            f"{self.dense_bytes / 1e6:.3f} MB of dense weights take {sizes(self.total_bytes)}"
        )
        # A report may have dense rows that packing would shrink.
        saved = sum(
            max(row.dense_bytes - row.packed_bytes, 0)
            for row in self.rows
            if row.decision == "dense" and row.packed_bytes is not None
        )
        if saved:
            text += f"; packing would make that {sizes(self.total_bytes - saved)}"
        elif self.rows and not self.packed:
            reasons = Counter(row.reason.partition(":")[0] for row in self.rows)
            counted = (f"{reason} ({count})" for reason, count in reasons.most_common())
            text += f"\nNothing is packed: {'; '.join(counted)}"
        return text


def sparsify_(
    model: nn.Module,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    *,
    sparsity: float | None = None,
    scope: str = "row",
    format: str = "auto",
    values: str = "16-bit",
    expected_tokens: int | None = None,
    pack_unprofitable: bool = False,
    progress: bool | ProgressBar = False,
) -> SparsifyReport:
    """Replace the matching linear layers of ``model`` by :class:`SparseLinear`, in place.

    A pattern is a class name (``"Linear"``, which matches subclasses too), a module's dotted name
    or the end of one (``"q_proj"``, ``"mlp.up_proj"``), or ``"re:"`` and a regular expression that
    matches the name from its beginning. A pattern that matches a container selects all modules
    inside it. Of the modules that match, ``nn.Linear``, subclasses that compute the same, and the
    Conv1D of transformers are packed.

    Models of transformers can be saved afterwards with their ``save_pretrained``.
    The new layer gets the forward and backward hooks and the bias parameter; masks of
    ``torch.nn.utils.prune`` are applied to the weight. Reported as skipped: ignored layers,
    subclasses with their own ``forward`` or parameters, layers that are already sparse, whose
    ``forward`` was replaced (accelerate hooks) or that are on the meta device, and, with the
    default targets, 3-D expert parameters.

    Args:
        model: its matching layers are float16 or bfloat16; others may have any dtype.
        targets: patterns of the layers to pack. The defaults exclude routers of experts and
            adapters (:func:`flash_llm.roles.routers_and_adapters`); name those to pack them.
        ignore: patterns of the layers to leave alone; wins over ``targets``. The default (this
            tuple) may match nothing, and also leaves alone output layers, task heads
            (:func:`flash_llm.roles.output_layers`) and tied weights that no target names.
        sparsity: None packs the zeros that are there. Otherwise each layer is pruned by magnitude
            to this fraction of zeros in [0, 1]; a layer that stays dense keeps its weight.
        scope: ``"row"``, ``"layer"`` or ``"N:M"`` (which prunes even when ``sparsity`` is None).
        format: ``"auto"`` (the format that multiplies fastest on the layer's device),
            ``"row_bitmap"``, ``"tiled_csl"``, ``"bitmap"``, ``"gather"`` or ``"quantized_bitmap"``.
        values: as :func:`flash_llm.pack` takes it. ``"int8"``, ``"fp8_e4m3"`` and ``"int4"``
            shrink layers without zeros too, so these are rounded and packed as well; ``ignore``
            leaves them alone. Layers that are packed already keep their values:
            :meth:`SparseLinear.to_linear` makes them dense first.
        expected_tokens: how many tokens most products will have at most, if that is known; see
            :func:`flash_llm.pack`.
        pack_unprofitable: whether to replace layers that packing does not shrink too.
        progress: True for a tqdm bar, or a callable such as ``rich.progress.track``.

    Returns:
        The decision and its reason for each layer.

    Raises:
        ValueError: a pattern matches nothing; a weight to pack is tied to another parameter;
            ``sparsity``, ``scope``, ``format``, ``values`` or ``expected_tokens`` is wrong;
            ``model`` itself is the layer; an element to quantise is NaN or infinite; a tensor
            parallel plan cuts columns that share scales.
        TypeError: a weight or bias to pack is not float16 or bfloat16, ``expected_tokens`` is no
            integer, ``model`` is not a module, or the format does not hold such values.
        NotImplementedError: a weight is distributed over processes, but not by a tensor parallel
            plan of transformers (with such a plan, all processes must call this together).
        RuntimeError: the compiled extension is missing, or CUDA failed.

    Example:
        >>> import torch, flash_llm
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU()).half()
        >>> report = flash_llm.sparsify_(model, sparsity=0.8)
        >>> type(model[0]).__name__, report.rows[0].decision
        ('SparseLinear', 'packed')
    """
    ops.check_values(values)
    pack = functools.partial(
        pack_layer,
        sparsity=sparsity,
        scope=scope,
        format=format,
        values=values,
        expected_tokens=expected_tokens,
    )
    return _sparsify(
        model, targets, ignore, pack, format, expected_tokens, pack_unprofitable, progress
    )


def sparsify_for_files_(
    model: nn.Module,
    targets: str | Sequence[str],
    ignore: str | Sequence[str],
    *,
    format: str,
    values: str,
    expected_tokens: int | None,
    progress: bool | ProgressBar,
) -> SparsifyReport:
    """As :func:`sparsify_`, for a model that is saved next and that GPUs will load.

    The formats are those of :func:`flash_llm.ops.stored_format`.
    """

    def pack(layer: nn.Module) -> PackedWeight:
        packed = pack_layer(layer, format=format, values=values)
        stored = ops.stored_format(packed, format, expected_tokens, values)
        return packed if stored == format else ops.repack(packed, stored)

    return _sparsify(model, targets, ignore, pack, format, expected_tokens, False, progress)


def _sparsify(
    model: nn.Module,
    targets: str | Sequence[str],
    ignore: str | Sequence[str],
    pack: Callable[[nn.Module], PackedWeight],
    format: str,
    expected_tokens: int | None,
    pack_unprofitable: bool,
    progress: bool | ProgressBar,
) -> SparsifyReport:
    if not isinstance(model, nn.Module):
        raise TypeError(f"flash_llm.sparsify_: model must be a module, got {type(model).__name__}")
    ops.check_format(format)
    ops.check_expected_tokens(expected_tokens)
    layers = match_layers(model, targets, ignore)
    distributed = tensor_parallel.styles(model)
    skip = {
        module: left_alone or _why_skipped(module, module in distributed)
        for _, module, left_alone in layers
    }
    to_pack = [(name, module) for name, module, _ in layers if not skip[module]]
    if any(name == "" for name, _ in to_pack):
        raise ValueError(
            "flash_llm.sparsify_: the model itself is the layer and cannot be replaced in place; "
            "use SparseLinear.from_linear"
        )
    refuse_tied(model, to_pack, "flash_llm.sparsify_", "packing one would untie them")
    for name, module in to_pack:
        if module not in distributed and any(map(is_dtensor, module.parameters())):
            raise NotImplementedError(
                f"flash_llm.sparsify_: {name} is distributed over processes (DTensor), but not by "
                "a tensor parallel plan of transformers; pack it before it is distributed, or add "
                f'"{name}" to ignore'
            )
        _refuse_dtype(name, module)

    rows: list[LayerReport] = []
    swaps: dict[nn.Module, SparseLinear] = {}
    for name, module, _ in track(layers, "sparsify", progress):
        if skip[module]:
            rows.append(_skipped_row(name, module, skip[module]))
            continue
        whole = tensor_parallel.gathered(module) if module in distributed else module
        try:
            packed = pack(whole)
            row = decide(name, packed, pack_unprofitable)
            rows.append(row)
            if row.decision == "packed":
                assert module.bias is None or isinstance(module.bias, nn.Parameter)
                swaps[module] = SparseLinear.from_packed(packed, module.bias, validate=False)
                swaps[module].format = format
                swaps[module].expected_tokens = expected_tokens
                if module in distributed:
                    tensor_parallel.shard_(swaps[module], *distributed[module])
        except ValueError as error:
            raise ValueError(f"flash_llm.sparsify_: {name}: {error}") from None
    if targets == DEFAULT_TARGETS:
        rows.extend(_expert_rows(model))

    # Nothing below can fail.
    for old, new in swaps.items():
        _carry_state(old, new)
        if old in distributed:
            tensor_parallel.carry_plan(old, new, *distributed[old])
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child in swaps:
                parent._modules[child_name] = swaps[child]
    return SparsifyReport(tuple(rows))


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model; shared storage is counted once.

    Args:
        model: any module; tensors on the meta device count with their size.
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = local_part(tensor).untyped_storage()
        # Meta and empty storages have no address, so their tensors are distinguished by identity.
        address = storage.data_ptr() if tensor.device.type != "meta" else 0
        storages[(tensor.device, address or id(tensor))] = storage.nbytes()
    return sum(storages.values())


def _why_skipped(module: nn.Module, distributed: bool) -> str:
    """Why a selected layer cannot be packed, or ""."""
    if isinstance(module, SparseLinear):
        return "already sparse"
    own = _own_behaviour(module)
    if own:
        return f"{type(module).__name__} may compute something other than nn.Linear: {own}"
    if "forward" in vars(module) and not distributed:
        return "its forward was replaced (accelerate?); remove that hook first"
    pruned = {"weight_orig", "weight_mask"} <= {*module._parameters, *module._buffers}
    if ("weight" not in module._parameters and not pruned) or "bias" not in module._parameters:
        return "its weight or bias is computed by a hook, not a parameter"
    if len([*module._parameters, *module._buffers]) > 2 + pruned or module._modules:
        return "it holds more than a weight and a bias"
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return "its weight is on the meta device (offloaded, or not loaded yet)"
    return ""


def _own_behaviour(module: nn.Module) -> str:
    """Return why the layer may not behave like nn.Linear, or ""."""
    if is_conv1d(module):
        return ""
    if not isinstance(module, nn.Linear):
        return "it is not the one of transformers"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and does not call it"
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Linear)]
    for name in ("forward", "__call__", "_call_impl", "__getattr__", "weight", "bias"):
        if any(name in vars(cls) for cls in classes):
            return f"it has a {name} of its own"
    return ""


def _refuse_dtype(name: str, module: nn.Module) -> None:
    for label, parameter in module.named_parameters(recurse=False):
        if not ops.is_packable(parameter.dtype):
            raise TypeError(
                f"flash_llm.sparsify_: {name}.{label} must be torch.float16 or torch.bfloat16, got "
                f"{parameter.dtype}; cast the model first, for instance with .to(torch.bfloat16), "
                f'or add "{name}" to ignore'
            )


def decide(name: str, packed: PackedWeight, pack_unprofitable: bool) -> LayerReport:
    """Decide whether a layer is replaced by its packed weight, and give the reason.

    Args:
        name: of the layer, for the report.
        packed: the layer's weight.
        pack_unprofitable: whether to pack it even if that takes more bytes.
    """
    size = compared_size(packed)
    if packed.nbytes < packed.dense_nbytes:
        decision, reason = "packed", size
    elif pack_unprofitable:
        decision, reason = "packed", f"{size}, as pack_unprofitable asks"
    else:
        decision, reason = "dense", f"packing would not shrink it: {size}"
    return LayerReport(
        name=name,
        shape=tuple(packed.shape),
        sparsity=packed.sparsity,
        dense_bytes=packed.dense_nbytes,
        packed_bytes=packed.nbytes,
        format=packed.FORMAT,
        decision=decision,
        reason=reason,
        values=packed.values,
    )


def compared_size(packed: PackedWeight) -> str:
    """Return the packed size of a weight as a multiple of its dense size, in words."""
    if packed.dense_nbytes:
        return f"{packed.nbytes / packed.dense_nbytes:.2f}x the dense bytes"
    return f"{packed.nbytes} bytes instead of none"


def _skipped_row(name: str, module: nn.Module, reason: str) -> LayerReport:
    if isinstance(module, SparseLinear):
        packed = module.packed
        return LayerReport(
            name,
            tuple(packed.shape),
            packed.sparsity,
            packed.nbytes,
            packed.nbytes,
            packed.FORMAT,
            "skipped",
            reason,
            packed.values,
        )
    shape: tuple[int, ...] = ()
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    elif is_conv1d(module) and isinstance(module.weight, Tensor):
        shape = tuple(module.weight.t().shape)
    # Subclasses may store their weight in several parameters, so all of them count.
    weights = (p for key, p in module.named_parameters() if key.rpartition(".")[2] != "bias")
    return LayerReport(
        name, shape, None, sum(p.nbytes for p in weights), None, None, "skipped", reason
    )


def _expert_rows(model: nn.Module) -> Iterator[LayerReport]:
    for module_name, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Bilinear)):
            continue
        for name, parameter in module.named_parameters(module_name, recurse=False):
            # Position embeddings and class tokens, unlike stacks of experts, have a dimension of 1.
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                yield LayerReport(
                    name,
                    tuple(parameter.shape),
                    None,
                    parameter.nbytes,
                    None,
                    None,
                    "skipped",
                    "a 3-D parameter (fused experts) is not packed yet",
                )


def _carry_state(old: nn.Module, new: SparseLinear) -> None:
    new.train(old.training)
    # torch.nn.utils.prune recomputes the weight before each forward; its mask is applied already.
    for key, hook in list(old._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod):
            del old._forward_pre_hooks[key]
    for attribute in _HOOK_STATE:
        setattr(new, attribute, getattr(old, attribute))
