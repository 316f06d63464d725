"""``SparseLinear``: an ``nn.Linear`` whose weight is packed, as three plain integer buffers.

With buffers instead of a tensor subclass, ``state_dict``, safetensors, deepcopy, pickle, ``.to()``,
the meta device and accelerate's hooks work without special cases. The buffer ``weight_header`` is
the only source of the header. Its eight integers are passed to the operators as Python ints, which
are constants for ``torch.compile`` and CUDA graphs. They are read from the device again only if the
buffer was replaced or written to.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from flash_llm import ops
from flash_llm.ops import PackedHeader, PackedWeight
from flash_llm.weight_view import WeightView

BUFFERS = tuple(f"weight_{part}" for part in PackedWeight.PARTS)
"""Names of the buffers of a :class:`SparseLinear`, one for each part of its weight."""


class SparseLinear(nn.Linear):
    """Linear layer ``y = x @ weight.T + bias`` with a packed sparse weight.

    State: buffers ``weight_header`` int64[8], ``weight_offsets`` and ``weight_payload`` int32, and
    the parameter ``bias`` (or None). The weight is frozen; ``bias`` and the input are
    differentiable. ``weight`` is a read-only dense tensor, which is unpacked when its values are
    needed (:mod:`flash_llm.weight_view`); a tensor that is assigned to ``weight`` is packed.
    :mod:`flash_llm.integrations.adapters` merges adapters of PEFT.
    ``load_state_dict`` accepts packed buffers of any length, and a dense ``weight``, which it
    packs. Packed buffers keep their format; :meth:`refit` changes it if another one is faster on
    the device. ``.half()`` and ``.bfloat16()`` round 16-bit values to the new dtype; quantised
    values and their scales stay as they are, and a row that would overflow float16 is refused.
    Casts to other dtypes do not change the weight: only bias, input and output have the new dtype.

    Code may replace the three buffers or write to them between two calls, by operations that torch
    counts as writes. A write that it does not count (through ``.data``, ``.numpy()`` or a kernel of
    another library) must end with ``layer.weight_header = layer.weight_header``, which reads the
    header again. A function that was compiled by ``torch.compile`` contains the header as
    constants. It is compiled again after ``load_state_dict``, but not after a write to
    ``weight_header``.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is a bias, initially zero.
        device: where the buffers live; ``"meta"`` for placeholders to load into.
        dtype: float16 or bfloat16.
        payload_words: length of the payload on the meta device, so that tools which compute the
            size of a model before it is loaded get the right size; 0 on other devices.
        format: the name of a format, as :func:`flash_llm.pack` takes it, or ``"auto"``, which
            chooses the format that multiplies fastest on the device, whenever a dense weight is
            packed and when the layer moves between CPU and GPU. A layer that was packed as
            ``"gather"`` is packed so again on every GPU: its caller expects few tokens.
        values: what :func:`flash_llm.pack` stores of each dense weight that the layer gets, one of
            :data:`flash_llm.ops.STORED_VALUES`.
        expected_tokens: as :func:`flash_llm.pack` takes it, for each choice of ``"auto"``.

    Attributes:
        x_quantization: None, or ``"dynamic"``, which :func:`flash_llm.spmm` describes. It may be
            set at any time and is not part of the state dict; ``save_pretrained`` of transformers
            writes it into the config.

    Raises:
        ValueError: a size is negative, ``format`` or ``values`` is unknown, ``expected_tokens`` is
            not positive, or ``payload_words`` is not 0 off the meta device.
        TypeError: ``dtype`` is neither float16 nor bfloat16; the format does not hold such values;
            ``expected_tokens`` is no integer.
        RuntimeError: the compiled extension is missing.

    Example:
        >>> import torch, flash_llm
        >>> linear = torch.nn.Linear(256, 128, dtype=torch.bfloat16)
        >>> layer = flash_llm.SparseLinear.from_linear(linear, sparsity=0.75)
        >>> layer(torch.ones(2, 256, dtype=torch.bfloat16)).shape
        torch.Size([2, 128])
        >>> layer.sparsity
        0.75
    """

    weight_header: Tensor
    weight_offsets: Tensor
    weight_payload: Tensor
    format: str
    x_quantization: str | None = None
    expected_tokens: int | None = None
    _had_gather: bool = False
    is_part: bool = False  # whether this is one process's part of a distributed weight
    # The header that was last read from weight_header; while that is on the meta device, the header
    # of the weight that will be loaded.
    _header: PackedHeader
    # What was read: the tensor, its storage (a reference, so that its address is not used again),
    # its address and its version.
    _header_read: tuple[Tensor, torch.UntypedStorage, int, int] | None = None
    _wide_dtype: torch.dtype | None = None  # of a cast to a dtype that a weight cannot have

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float16,
        payload_words: int = 0,
        format: str = "auto",
        values: str = "16-bit",
        expected_tokens: int | None = None,
    ) -> None:
        # nn.Linear's own constructor would allocate the dense weight.
        nn.Module.__init__(self)
        ops.check_format(format)
        ops.check_expected_tokens(expected_tokens)
        self.in_features = in_features
        self.out_features = out_features
        self.format = format
        self.expected_tokens = expected_tokens
        # Any format that holds the values will do for a weight of zeros.
        name = ops.format_that_holds(dtype, values) if format == "auto" else format
        packed = PackedWeight.class_for(name).empty(
            out_features,
            in_features,
            dtype=dtype,
            device=device,
            payload_words=payload_words,
            values=values,
        )
        for name in BUFFERS:
            self.register_buffer(name, None)
        self._install(packed)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        sparsity: float | None = None,
        scope: str = "row",
        format: str = "auto",
        values: str = "16-bit",
        expected_tokens: int | None = None,
    ) -> SparseLinear:
        """Pack the weight of a dense layer.

        Args:
            linear: ``nn.Linear`` (``[M, K]`` weight) or the Conv1D of transformers (``[K, M]``).
            sparsity: fraction of zeros in [0, 1] to which the weight is first pruned by magnitude,
                as by :func:`flash_llm.prune_pack`; None does not prune.
            scope: ``"row"``, ``"layer"`` or ``"N:M"``, which prunes even if ``sparsity`` is None.
            format: as for the constructor.
            values: likewise.
            expected_tokens: likewise.

        Returns:
            A new layer on the same device and in the same training mode. It shares the bias
            parameter with ``linear``.

        Raises:
            TypeError: ``linear`` is another module, or its weight or bias is not float16 or
                bfloat16 (cast the model with ``.to(torch.bfloat16)`` first).
            ValueError: ``sparsity``, ``scope``, ``format`` or ``values`` is not one that
                :func:`flash_llm.prune_pack` takes.
        """
        packed = pack_layer(
            linear,
            sparsity=sparsity,
            scope=scope,
            format=format,
            values=values,
            expected_tokens=expected_tokens,
        )
        bias = linear.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        layer = cls.from_packed(packed, bias, validate=False)
        layer.format, layer.expected_tokens = format, expected_tokens
        layer.train(linear.training)
        return layer

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: Tensor | None = None, *, validate: bool = True
    ) -> SparseLinear:
        """Build a layer that shares the buffers of a packed weight.

        Loading into the layer may change ``packed``. Pass a weight with cloned buffers to prevent
        that.

        Args:
            packed: ``[M, K]`` weight.
            bias: ``[M]`` tensor or parameter, dtype and device of ``packed``.
            validate: whether to check every invariant of ``packed``, which reads all of it; pass
                False for a weight that was just packed or checked.

        Raises:
            ValueError: ``packed`` is malformed, or ``bias`` has another shape.
            TypeError: ``packed`` is not a packed weight, ``bias`` is not a tensor, or ``bias`` has
                another dtype or device.
        """
        if validate:
            ops.validate(packed)
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(
                f"flash_llm.SparseLinear: bias must be a tensor, got {type(bias).__name__}"
            )
        m, k = packed.shape
        if bias is not None:
            if bias.shape != (m,):
                raise ValueError(
                    f"flash_llm.SparseLinear: bias must have shape [{m}], got {list(bias.shape)}"
                )
            if bias.dtype != packed.dtype or bias.device != packed.device:
                raise TypeError(
                    f"flash_llm.SparseLinear: bias must be {packed.dtype} on {packed.device}, "
                    f"as the weight is, got {bias.dtype} on {bias.device}"
                )
        layer = cls(
            *(k, m, False),
            device="meta",
            dtype=packed.dtype,
            format=packed.FORMAT,
            values=packed.values,
        )
        layer._install(packed)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the dense weight and the same bias parameter."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype
        )
        linear.weight = nn.Parameter(ops.unpack(self.packed))
        if self.bias is not None:
            linear.bias = self.bias
        linear.train(self.training)
        return linear

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, which shares the buffers of the layer."""
        header = self._current_header()
        return PackedWeight.class_for(header.format)(
            header, self.weight_offsets, self.weight_payload
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight, and of input and output of ``forward``."""
        return self._current_header().dtype

    @property
    def values(self) -> str:
        """What the weight stores; one of :data:`flash_llm.ops.STORED_VALUES`."""
        return self._current_header().values

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weight, in [0, 1]."""
        return self._current_header().sparsity

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense ``[M, K]`` weight, read-only; a tensor that is assigned is packed."""
        # torch.compile removes the operator if only dtype or shape is read.
        if torch.compiler.is_compiling():
            return ops.unpack(self.packed)
        return WeightView(self.packed, self._set_weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``; :func:`flash_llm.spmm` describes the arguments.

        Under ``torch.autocast`` the input may have any dtype that ``nn.Linear`` accepts, and the
        result has autocast's dtype. After a cast of the layer to a wider dtype, input and result
        have that dtype. In both cases the input is rounded to the weight's dtype.
        """
        # nn.TransformerEncoder makes nested tensors of padded inputs.
        if isinstance(input, Tensor) and input.is_nested:
            parts = [self.forward(part) for part in input.unbind()]
            return torch.nested.as_nested_tensor(parts, layout=input.layout)
        header, bias = self._current_header(), self.bias
        buffers: dict[str, Any] = self._buffers  # read as attributes, they cost 0.4 us each
        offsets, payload = buffers["weight_offsets"], buffers["weight_payload"]
        result = self._mixed_dtype(input)
        if result is None:
            return ops.spmm_buffers(
                input, header, offsets, payload, bias, x_quantization=self.x_quantization
            )
        x = input.to(header.dtype)
        cast_bias = None if bias is None else bias.to(header.dtype)
        y = ops.spmm_buffers(
            x, header, offsets, payload, cast_bias, x_quantization=self.x_quantization
        )
        return y.to(result)

    def _mixed_dtype(self, input: Tensor) -> torch.dtype | None:
        """Dtype of the result if the input may have another dtype than the weight, else None."""
        if torch._C._is_any_autocast_enabled():
            device = input.device.type
            # autocast does not cast float64.
            cast = input.is_floating_point() and input.dtype != torch.float64
            if cast and torch.is_autocast_enabled(device):
                return torch.get_autocast_dtype(device)
        wide = self._wide_dtype
        return wide if wide is not None and input.dtype == wide else None

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        packed = self.packed
        self._install(
            packed.empty(
                *packed.shape,
                dtype=packed.dtype,
                device=self.weight_payload.device,
                values=packed.values,
            )
        )
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Sizes, dtype, format and sparsity."""
        header = self._current_header()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={header.dtype}, "
            f"format={PackedWeight.class_for(header.format).FORMAT}, values={header.values}, "
            f"sparsity={header.sparsity:.4f}"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; one with the name ``weight`` is packed instead."""
        if name == "weight":
            self._set_weight(param)
        else:
            super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a ``weight`` is packed, a ``weight_header`` is checked."""
        if name == "weight":
            self._set_weight(value)
            return
        # Some loaders make a parameter of every tensor.
        if name in BUFFERS and isinstance(value, nn.Parameter):
            value = value.detach()
        if name == "weight_header" and _has_values(value):
            header = self._checked_header(value)
            super().__setattr__(name, value)
            self._remember(header)
        else:
            super().__setattr__(name, value)

    def _current_header(self) -> PackedHeader:
        self._refresh_header()
        return self._header

    def _refresh_header(self) -> None:
        """Read the header again if its buffer was replaced or written to since the last read."""
        tensor, read = self._buffers["weight_header"], self._header_read
        # swap_tensors and .data replace the memory of the same Python object.
        if (
            read is not None
            and tensor is read[0]
            and tensor.data_ptr() == read[2]
            and tensor._version == read[3]
        ):
            return
        if _has_values(tensor):
            self._remember(self._checked_header(tensor))

    # torch.compile calls it while it traces and compiles none of it. Then it traces the read of
    # _header, whose values become guards of the compiled code. (This is the effect of
    # torch.compiler.assume_constant_result, which would import torch._dynamo.)
    _refresh_header._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _checked_header(self, tensor: Tensor) -> PackedHeader:
        header = PackedHeader.from_tensor(tensor)
        ops.check_header("flash_llm.SparseLinear", header)
        self._check_shape(header.m, header.k)
        return header

    def _remember(self, header: PackedHeader) -> None:
        """Record that the buffer ``weight_header`` has the values of ``header``."""
        tensor = self._buffers["weight_header"]
        self._header, self._header_read = header, None
        self._had_gather |= PackedWeight.class_for(header.format).FORMAT == "gather"
        if not _has_values(tensor):
            return
        if tensor.is_inference():  # such tensors have no version
            with torch.inference_mode(False):
                tensor = self._buffers["weight_header"] = tensor.clone()
        self._header_read = tensor, tensor.untyped_storage(), tensor.data_ptr(), tensor._version

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy or a pickle, with the current header."""
        self._refresh_header()
        return {name: value for name, value in vars(self).items() if name != "_header_read"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state that ``__getstate__`` returned."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._remember(self._header)

    def _install(self, packed: PackedWeight) -> None:
        self._buffers.update(zip(BUFFERS, packed.parts(), strict=True))
        self._remember(packed.header)

    def _pack(self, dense: Tensor, values: str = "16-bit") -> PackedWeight:
        format = self._format_on(dense.device)
        return ops.pack(dense, format, values=values, expected_tokens=self.expected_tokens)

    def _format_on(self, device: torch.device) -> str:
        return "gather" if self._keeps_gather(device) else self.format

    def _keeps_gather(self, device: torch.device) -> bool:
        """Whether the layer has gather on a device because it was chosen before."""
        had_gather = self._had_gather and self.values == "16-bit"
        return self.format == "auto" and had_gather and device.type == "cuda"

    def _set_weight(self, dense: Any) -> None:
        if not isinstance(dense, Tensor):
            raise TypeError(
                f"flash_llm.SparseLinear: weight must be a dense tensor, got {type(dense).__name__}"
            )
        self._check_shape(*dense.shape)
        if dense.dtype != self.dtype:
            raise TypeError(
                f"flash_llm.SparseLinear: weight must be {self.dtype}, got {dense.dtype}"
            )
        packed = self._pack(dense, self.values)
        here = self.weight_payload.device
        self._install(packed if here.type == "meta" else packed.to(here))

    def _check_shape(self, *shape: int) -> None:
        if shape != (self.out_features, self.in_features):
            raise ValueError(
                f"flash_llm.SparseLinear: weight must have shape "
                f"[{self.out_features}, {self.in_features}], got {list(shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        header, old_device = self._current_header(), self.weight_payload.device
        old_dtype = header.dtype
        # fn casts floating point tensors, but the packed values are in an integer buffer. A tensor
        # of their dtype shows how they are to be cast.
        probe = torch.empty(0, dtype=self._wide_dtype or old_dtype, device=old_device)
        new_dtype = fn(probe).dtype
        packable = ops.is_packable(new_dtype)
        if new_dtype != probe.dtype:
            # Not an error, because the modules before this one are already cast.
            wide = not packable and new_dtype.is_floating_point
            self._wide_dtype = new_dtype if wide else None
            if not packable:
                warnings.warn(
                    f"flash_llm.SparseLinear: a packed weight stays {old_dtype} when the model is "
                    f"cast to {new_dtype}, and inputs of the layer are rounded to {old_dtype}; "
                    "call to_linear() first for a layer that can be cast",
                    stacklevel=2,
                )

        def keep_integers(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # Module.type(dtype) casts integers too.
            is_cast = moved.dtype != tensor.dtype and not tensor.is_floating_point()
            return tensor.to(moved.device) if is_cast else moved

        cast = packable and new_dtype != old_dtype
        recast = None
        if cast and header.values != "16-bit" and not self.weight_payload.is_meta:
            # Before anything changes, because it refuses rows that overflow.
            packed = self.packed
            recast = ops.pack_quantized(*packed.to_quantized(), new_dtype, packed.FORMAT)
        super()._apply(keep_integers, recurse)  # type: ignore[no-untyped-call]
        self._remember(header)
        if old_device.type == "meta" and not self.weight_payload.is_meta:
            # to_empty() does not initialise memory, so the offsets would be malformed.
            self.reset_parameters()
        if cast:
            value_type = ops.value_type_of(new_dtype, header.values)
            if self.weight_payload.is_meta:
                self._header = self._header._replace(value_type=value_type)
            elif recast is not None:
                self._install(recast.to(self.weight_payload.device))
                self.refit()
            else:
                self._install(self._pack(self.weight.to(new_dtype)))
        elif self.weight_payload.device.type != old_device.type:
            self.refit()
        return self

    def keep_part(self, weight: Tensor, scales: Tensor | None = None) -> None:
        """Replace the weight by one process's part of it; the bias does not change.

        Args:
            weight: ``[M', K']`` dense part, of the layer's dtype; of a quantised weight its values.
            scales: of a quantised weight, as :func:`flash_llm.ops.pack_quantized` takes them;
                otherwise None.
        """
        if scales is None:
            packed = self._pack(weight)
        else:
            packed = ops.pack_quantized(weight, scales, self.dtype, self._format_on(weight.device))
        self.out_features, self.in_features = weight.shape
        self._install(packed)
        self.is_part = True

    def refit(self) -> None:
        """Pack the weight again if ``format="auto"`` would choose another format on its device.

        ``.to()`` calls this; it is for code that replaces the buffers.
        """
        if self._wants_other_format():
            format = self._format_on(self.weight_payload.device)
            self._install(ops.repack(self.packed, format, expected_tokens=self.expected_tokens))

    def _wants_other_format(self) -> bool:
        """Whether ``format="auto"`` would choose another format on the layer's device."""
        header, device = self._current_header(), self.weight_payload.device
        if self.format != "auto" or device.type == "meta":
            return False
        if self._keeps_gather(device):
            return self.packed.FORMAT != "gather"
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        name, _ = ops.explain_format(
            *(header.m, header.k, header.nnz),
            compute_capability=10 * major + minor,
            values=header.values,
            expected_tokens=self.expected_tokens,
        )
        return name != self.packed.FORMAT

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            packed = self._packed_from_state_dict(state_dict, prefix)
        except (ValueError, TypeError, NotImplementedError) as error:
            error_msgs.append(
                f'SparseLinear "{prefix.removesuffix(".")}" ({self.extra_repr()}): {error}'
            )
            return
        if packed is not None:
            self._had_gather = packed.FORMAT == "gather"
            incoming = packed.parts()
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
            state_dict.update(zip((prefix + name for name in BUFFERS), incoming, strict=True))
            current = (self.weight_header, self.weight_offsets, self.weight_payload)
            # The load below copies in place, which captured CUDA graphs depend on, but which needs
            # buffers of the same length. If one buffer must be replaced then all are: modules that
            # share them would otherwise see a mixture of two weights.
            if any(old.shape != new.shape for old, new in zip(current, incoming, strict=True)):
                for name, old, new in zip(BUFFERS, current, incoming, strict=True):
                    self._buffers[name] = torch.empty_like(new, device=old.device)
        num_errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if packed is not None and len(error_msgs) == num_errors:
            self._remember(packed.header)

    def _packed_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str
    ) -> PackedWeight | None:
        """Read and check this layer's weight; None if the state dict has none of its keys."""
        bias = state_dict.get(prefix + "bias")
        if isinstance(bias, Tensor) and self.bias is not None and bias.shape != self.bias.shape:
            raise ValueError(
                f"bias must have shape {list(self.bias.shape)}, got {list(bias.shape)}"
            )
        parts = {name: state_dict.get(prefix + name) for name in BUFFERS}
        found = [name for name, part in parts.items() if part is not None]
        dense = state_dict.get(prefix + "weight")
        if dense is None and not found:
            return None
        if dense is not None and found:
            raise ValueError(f"expected a dense or a packed weight, got weight and {found[0]}")
        if dense is not None:
            if not isinstance(dense, Tensor) or not dense.is_floating_point() or dense.is_meta:
                raise TypeError(f"weight must be a floating point tensor with values, got {dense}")
            self._check_shape(*dense.shape)
            return self._pack(dense.to(self.dtype), self.values)
        if len(found) != len(BUFFERS):
            absent = next(name for name in BUFFERS if name not in found)
            raise ValueError(f"{absent} is missing, although there is {found[0]}")
        tensors: list[Tensor] = []
        for name, part in parts.items():
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(part).__name__}")
            tensors.append(part)
        packed = PackedWeight.from_tensors(tensors[0], tensors[1], tensors[2])
        self._check_shape(*packed.shape)
        if packed.dtype != self.dtype or self.format not in ("auto", packed.FORMAT):
            raise TypeError(
                f"weight must be {self.dtype} in format {self.format}, "
                f"got {packed.dtype} in format {packed.FORMAT}"
            )
        return packed


def _has_values(tensor: object) -> TypeGuard[Tensor]:
    """Whether a buffer has values: it is neither on the meta device nor a fake tensor."""
    return type(tensor) in (Tensor, nn.Parameter) and not cast(Tensor, tensor).is_meta


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a ``DTensor``, which is distributed over processes."""
    distributed = sys.modules.get("torch.distributed.tensor")  # importing it takes long
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a ``DTensor``; any other tensor unchanged."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return part


def refuse_parts(model: nn.Module) -> None:
    """Refuse to save a model with packed layers that are distributed over processes.

    Raises:
        NotImplementedError: a layer has only a part of its weight; the message names it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and layer.is_part:
            raise NotImplementedError(
                f"flash_llm: {name} has only this process's part of a packed weight and cannot be "
                "saved; pack and save the model in one process, then load it in several"
            )


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is the Conv1D of transformers: ``x @ weight + bias``, weight ``[K, M]``.

    Recognised by its name and attributes, so that transformers need not be imported.
    """
    weight = getattr(module, "weight", None) if type(module).__name__ == "Conv1D" else None
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and hasattr(module, "nx")
        and getattr(module, "nf", None) == weight.shape[1]
    )


def pack_layer(
    layer: nn.Module,
    *,
    sparsity: float | None = None,
    scope: str = "row",
    format: str = "auto",
    values: str = "16-bit",
    expected_tokens: int | None = None,
) -> PackedWeight:
    """Pack the ``[M, K]`` weight of a dense layer; arguments and errors as ``from_linear``."""
    name = type(layer).__name__
    if not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        raise TypeError(f"flash_llm.SparseLinear: expected nn.Linear or Conv1D, got {name}")
    original, mask = layer._parameters.get("weight_orig"), layer._buffers.get("weight_mask")
    if original is not None and mask is not None:
        # torch.nn.utils.prune computes .weight from these two, but only in forward.
        weight = original.detach() * mask
    else:
        assert isinstance(layer.weight, Tensor)
        weight = layer.weight
    if is_dtensor(weight):
        raise NotImplementedError(
            f"flash_llm.SparseLinear: weight of {name} is distributed over processes (DTensor); "
            "pack it before it is distributed"
        )
    for label, tensor in (("weight", weight), ("bias", layer.bias)):
        if isinstance(tensor, Tensor) and not ops.is_packable(tensor.dtype):
            raise TypeError(
                f"flash_llm.SparseLinear: {label} of {name} must be torch.float16 or "
                f"torch.bfloat16, got {tensor.dtype}; cast the model first, for instance with "
                ".to(torch.bfloat16)"
            )
    if is_conv1d(layer):
        weight = weight.t()
    if sparsity is None and scope in ("row", "layer"):
        return ops.pack(weight, format, values=values, expected_tokens=expected_tokens)
    return ops.prune_pack(
        *(weight, sparsity),
        scope=scope,
        format=format,
        values=values,
        expected_tokens=expected_tokens,
    )
