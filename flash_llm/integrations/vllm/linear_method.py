"""``FlashLLMLinearMethod``: a linear layer of vLLM with a packed weight.

A layer is loaded as vLLM loads weights that it quantises itself: what the files hold is collected
until the layer is complete, one dense weight at a time is on the device, and vLLM's own loaders
fuse shards and cut the part of this process. So packed and dense checkpoints, fused layers and
tensor parallel take one way, and the packed bytes are those of packing the dense weight. Where all
shards of a layer have quantised values of one type, these take the place of the dense weight,
beside their scales, so nothing is rounded again. If only some have, the layer gets 16-bit values,
because quantised ones would round the other shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    get_layerwise_info,
    initialize_online_processing,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from flash_llm import ops, quantize
from flash_llm.linear import BUFFERS
from flash_llm.ops import PackedWeight
from flash_llm.sparsify import LayerReport, decide

if TYPE_CHECKING:
    from flash_llm.integrations.vllm.config import FlashLLMConfig

_PLACES = {"q": 0, "k": 1, "v": 2}
"""Place in a fused layer of the shards that vLLM gives names; it numbers the others."""


class FlashLLMLinearMethod(LinearMethodBase):
    """Packs the weight of one layer when it is complete, and multiplies by it.

    Until then the layer has the parameters that the files hold: ``weight`` where a shard is dense,
    ``weight_header``, ``weight_offsets`` and ``weight_payload`` where one is packed. Afterwards it
    has ``weight_offsets`` and ``weight_packed`` (int32), and their header in Python. A layer that
    stays dense gets vLLM's method for such layers.

    Args:
        config: of the model.
        prefix: name of the layer in vLLM's model.
        shards: the checkpoint's names of the layers that this one is fused of, in vLLM's order.
        dummy: whether nothing will be loaded, because the weights are random.
    """

    uses_meta_device = True

    def __init__(self, config: FlashLLMConfig, prefix: str, shards: list[str], dummy: bool) -> None:
        self.config = config
        self.prefix = prefix
        self.shards = shards
        self.dummy = dummy
        packed = {} if config.checkpoint is None else config.checkpoint.packed
        self.headers = [packed.get(name) for name in shards]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room on the meta device for what the files hold of the layer.

        Raises:
            ValueError: the columns of a process begin within a group that shares scales.
        """
        self.shape = sum(output_partition_sizes), input_size_per_partition
        self.num_outputs = len(output_partition_sizes)
        self.dtype = params_dtype
        self.values = self._values()
        if self.values != "16-bit":
            try:
                quantize.check_parts(self.values, input_size, input_size_per_partition)
            except ValueError as error:
                raise ValueError(f"flash_llm: {self.prefix}: {error}") from None
        if None in self.headers:
            layer.register_parameter("weight", self._empty_weight(layer, "meta", self.dtype))
        if self.config.stored:  # empty in a dense layer, whose loaders refuse packed parts
            for buffer, dtype in zip(BUFFERS, (torch.int64, torch.int32, torch.int32), strict=True):
                sizes = self._sizes(buffer)
                room = torch.empty(sum(sizes), dtype=dtype, device="meta")
                parameter: Any = nn.Parameter(room, requires_grad=False)
                parameter.weight_loader = self._loader(buffer, sizes)
                layer.register_parameter(buffer, parameter)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight, or leave the layer to vLLM's dense method, and report it.

        Raises:
            ValueError: a part of the layer was not loaded, a packed one is malformed, or quantised
                values cannot hold a row.
            NotImplementedError: the weights are loaded again, with another sparsity.
        """
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        weight, scales = self._assemble(layer)
        try:
            row, packed = self._pack(weight, scales)
        except ValueError as error:  # quantised values cannot hold a row, or overflow the dtype
            raise ValueError(f"flash_llm: {self.prefix}: {error}") from None
        if packed is not None:
            packed = interchangeable(packed)
        previous = getattr(layer, "packed_header", None)
        if previous is None:
            self.config.note(row)
        elif packed is None or packed.header != previous:
            raise NotImplementedError(
                f"flash_llm: the new weight of {self.prefix} has another sparsity, for which "
                "compiled code and CUDA graphs have no room; start the engine again"
            )
        for name in ("weight", *BUFFERS):
            layer._parameters.pop(name, None)
        if packed is None:
            layer.register_parameter("weight", weight)
            layer.quant_method = UnquantizedLinearMethod()
            return
        layer.packed_header = packed.header
        layer.weight_offsets = nn.Parameter(packed.offsets, requires_grad=False)
        # compressed-tensors' name: by it LoRA and latent attention find a layer's device.
        layer.weight_packed = nn.Parameter(packed.payload, requires_grad=False)
        layer._already_called_process_weights_after_loading = True

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias`` for ``x`` of any leading shape."""
        header = layer.packed_header
        return ops.spmm_buffers(
            *(x, header, layer.weight_offsets, layer.weight_packed, bias),
            x_quantization=None if header.values == "16-bit" else self.config.x_quantization,
        )

    def _empty_weight(
        self, layer: Any, device: torch.device | str, dtype: torch.dtype
    ) -> ModelWeightParameter:
        """A dense weight for this process, which vLLM's loader of the layer can fill."""
        return ModelWeightParameter(
            data=torch.empty(self.shape, dtype=dtype, device=device),
            input_dim=1,
            output_dim=0,
            weight_loader=layer.weight_loader,
        )

    def _empty_scales(
        self, layer: Any, device: torch.device
    ) -> ChannelQuantScaleParameter | GroupQuantScaleParameter:
        """The scales of a quantised weight, likewise."""
        shape = quantize.scales_shape(*self.shape, self.values)
        options: dict[str, Any] = {
            "data": torch.empty(shape, dtype=torch.float32, device=device),
            "output_dim": 0,
            "weight_loader": layer.weight_loader,
        }
        if len(shape) == 1:
            return ChannelQuantScaleParameter(**options)
        return GroupQuantScaleParameter(input_dim=1, **options)

    def _values(self) -> str:
        """What the weight will store, if it is packed."""
        if not ops.is_packable(self.dtype):
            return "16-bit"
        if not any(self.headers):
            return self.config.values or "16-bit"
        values = {header.values if header else "16-bit" for header in self.headers}
        return values.pop() if len(values) == 1 else "16-bit"

    def _stored_formats(self) -> set[str]:
        """Formats of the shards that are packed in the checkpoint."""
        return {PackedWeight.class_for(header.format).FORMAT for header in self.headers if header}

    def _sizes(self, buffer: str) -> list[int]:
        """Elements of a part of each shard in the checkpoint, 0 where the shard is dense."""
        checkpoint = self.config.checkpoint
        return [
            0 if checkpoint is None or header is None else checkpoint.shape(f"{name}.{buffer}")[0]
            for name, header in zip(self.shards, self.headers, strict=True)
        ]

    def _loader(self, buffer: str, sizes: list[int]) -> Callable[..., None]:
        # vLLM keeps it after the layer is gone, so it must not refer to the layer.
        def load(param: Tensor, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
            places = self._places(loaded_shard_id)
            if len(places) != 1 or not places <= set(range(len(sizes))):
                raise NotImplementedError(
                    f"flash_llm: vLLM loads a packed part of {self.prefix} as shard "
                    f"{loaded_shard_id!r}; leave that layer dense when packing"
                )
            (place,) = places
            if not sizes[place]:
                raise NotImplementedError(
                    f"flash_llm: vLLM loads a packed part of {self.prefix}, but "
                    f"{self.shards[place]} was not packed when the engine started; start it again, "
                    "or, if vLLM fuses this layer from others, leave those dense when packing"
                )
            if loaded_weight.numel() != sizes[place]:
                raise NotImplementedError(
                    f"flash_llm: {self.shards[place]}.{buffer} has {loaded_weight.numel()} "
                    f"elements, in the checkpoint that the engine started with {sizes[place]}; "
                    "start the engine again"
                )
            param.data.narrow(0, sum(sizes[:place]), sizes[place]).copy_(loaded_weight)

        return load

    def _places(self, shard_id: Any) -> set[Any]:
        """Places of the shards that a tensor holds which vLLM loads under this name."""
        if shard_id is None:  # all of them, in one tensor
            return set(range(len(self.shards)))
        return set(shard_id) if isinstance(shard_id, tuple) else {_PLACES.get(shard_id, shard_id)}

    def _assemble(self, layer: Any) -> tuple[Any, Any]:
        """Return the weight of this process from what was loaded, which must be complete.

        Returns:
            The dense weight, and None; or quantised values, and their scales.
        """
        loaded: dict[str, dict[Any, Any]] = {name: {} for name in ("weight", *BUFFERS)}
        for name, arguments in get_layerwise_info(layer).loaded_weights:
            shard_id = arguments.arguments.get("loaded_shard_id")
            for place in self._places(shard_id):
                loaded.setdefault(name, {})[place] = shard_id
        if not self.dummy:
            self._refuse_missing(layer, loaded)
        weight, scales = getattr(layer, "weight", None), None
        if weight is None:
            device = layer.weight_payload.device
            if self.values == "16-bit":
                weight = self._empty_weight(layer, device, self.dtype)
            else:
                weight = self._empty_weight(layer, device, quantize.stored_dtype(self.values))
                scales = self._empty_scales(layer, device)
        for place, parts in self._packed_parts(layer).items():
            name, shard_id = self.shards[place], loaded[BUFFERS[0]][place]
            shard = () if shard_id is None else (shard_id,)
            try:
                packed = PackedWeight.from_tensors(*parts)
            except (ValueError, TypeError) as error:
                raise type(error)(
                    f"flash_llm: {name} in {self.config.file_of(name)} is malformed: {error}"
                ) from None
            if scales is not None:
                for parameter, whole in zip((weight, scales), packed.to_quantized(), strict=True):
                    layer.weight_loader(parameter, whole, *shard)
            else:
                layer.weight_loader(weight, packed.to_dense(), *shard)
        return weight, scales

    def _packed_parts(self, layer: Any) -> dict[int, tuple[Tensor, ...]]:
        """Header, offsets and payload of each shard that is packed, by its place."""
        if not any(self.headers):
            return {}
        parts = (getattr(layer, buffer).split(self._sizes(buffer)) for buffer in BUFFERS)
        shards = zip(self.headers, zip(*parts, strict=True), strict=True)
        return {place: shard for place, (header, shard) in enumerate(shards) if header}

    def _refuse_missing(self, layer: Any, loaded: dict[str, dict[Any, Any]]) -> None:
        """Refuse a layer without all of its weights: vLLM would leave the others uninitialised."""
        missing = [
            f"{self.shards[place]}.{buffer}"
            for buffer in BUFFERS
            for place, size in enumerate(self._sizes(buffer))
            if size and place not in loaded[buffer]
        ]
        dense = [place for place, header in enumerate(self.headers) if header is None]
        if dense and None not in loaded["weight"].values():
            if len(self.shards) == self.num_outputs:
                missing += [f"{self.shards[p]}.weight" for p in dense if p not in loaded["weight"]]
            elif len(loaded["weight"]) < self.num_outputs:
                missing.append(f"{self.prefix}.weight")
        if layer.bias is not None and self.config.checkpoint is not None:
            # vLLM may load a bias before it takes down what it loads.
            stored = self.config.checkpoint.tensors
            missing += [
                f"{name}.bias"
                for place, (name, header) in enumerate(zip(self.shards, self.headers, strict=True))
                if header and f"{name}.bias" not in stored and place not in loaded.get("bias", {})
            ]
        if missing:
            raise ValueError(
                f"flash_llm: {', '.join(missing)} of {self.prefix} was not loaded; is it in the "
                "model's files?"
            )

    def _pack(
        self, weight: Tensor, scales: Tensor | None
    ) -> tuple[LayerReport, PackedWeight | None]:
        """Return what becomes of a layer, and its packed weight if that is what it gets."""
        stored = any(self.headers)
        if not ops.is_packable(self.dtype):
            reason = f"{self.dtype} is not packed"
        elif self.config.stored and not stored:
            reason = "dense in the folder"
        else:
            # A folder has gather if few tokens are expected; only GPUs have kernels for it.
            few = weight.device.type == "cuda" and "gather" in self._stored_formats()
            format = "gather" if few else "auto"
            options: dict[str, Any] = {
                "values": self.values,
                "expected_tokens": self.config.expected_tokens,
            }
            if scales is not None:
                packed = ops.pack_quantized(weight.data, scales.data, self.dtype)
            elif self.config.sparsity is None:
                packed = ops.pack(weight.data, format, **options)
            else:
                packed = ops.prune_pack(weight.data, self.config.sparsity, **options)
            row = decide(self.prefix, packed, pack_unprofitable=stored)
            return row, packed if row.decision == "packed" else None
        row = LayerReport(
            name=self.prefix,
            shape=tuple(weight.shape),
            sparsity=None,
            dense_bytes=weight.nbytes,
            packed_bytes=None,
            format=None,
            decision="skipped",
            reason=reason,
        )
        return row, None


def interchangeable(packed: PackedWeight) -> PackedWeight:
    """Return a weight for products whose header and lengths other layers share.

    vLLM compiles equal parts of a model once, and the integers of a header are constants in them:
    with its own ``nnz`` and payload length each layer would be compiled for itself. ``nnz``, in
    which plans only see the sparsity, is rounded to a hundredth of the elements. The payload is
    padded with zeros, by less than 2 % of a large one, to a length that most weights of this
    shape and sparsity have in common. Both stay as they are where the format refuses them:
    ``tiled_csl`` derives the one from the other, and a payload of almost all elements has no room.

    Args:
        packed: ``[M, K]`` weight.

    Returns:
        A weight with the same products, which :func:`flash_llm.ops.validate` would refuse.
    """
    header, (m, k) = packed.header, packed.shape
    hundredth = max(m * k // 100, 1)
    step = 1 << max(header.payload_words.bit_length() - 7, 4)
    words = -(-header.payload_words // step) * step
    shared = header._replace(nnz=round(header.nnz / hundredth) * hundredth, payload_words=words)
    try:
        ops.check_header(
            "flash_llm", shared, num_offsets=packed.offsets.numel(), payload_words=words
        )
    except ValueError:
        return packed
    padding = (0, words - header.payload_words)
    return type(packed)(shared, packed.offsets, nn.functional.pad(packed.payload, padding))
