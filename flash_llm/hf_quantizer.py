"""The quantizer that transformers calls when a checkpoint's config names flash_llm.

transformers has one extension point for weights that are stored in another way, and calls whatever
uses it a quantizer. :mod:`flash_llm.hf` imports this module, which registers its classes, as soon
as transformers is there.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flash_llm import _extension, tensor_parallel
from flash_llm.checkpoint import CHECKPOINT_VERSION, METADATA, Checkpoint, make_room_
from flash_llm.linear import SparseLinear, refuse_parts

METHOD = "flash_llm"


@register_quantization_config(METHOD)
class FlashLLMConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with packed layers; the files say which those are.

    Args:
        version: of the layout in files; newer ones are refused.
        unused: what a later version may add.

    Raises:
        NotImplementedError: ``version`` is newer than this package.
    """

    def __init__(self, version: int = CHECKPOINT_VERSION, **unused: Any) -> None:
        if version > CHECKPOINT_VERSION:
            raise NotImplementedError(
                f"flash_llm: the checkpoint's quantization_config has version {version}, this "
                f"flash_llm reads up to {CHECKPOINT_VERSION}"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version


@register_quantizer(METHOD)
class FlashLLMQuantizer(HfQuantizer):
    """Makes room for packed layers before their buffers are loaded, and checks them afterwards."""

    requires_calibration = True  # dense checkpoints are pruned and packed by sparsify_

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but the extension is needed; say so before the model is built."""
        if not self.pre_quantized:
            raise ValueError(
                "flash_llm: from_pretrained does not pack a dense checkpoint; load it without "
                "quantization_config and call flash_llm.sparsify_(model)"
            )
        _extension.require()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise ValueError("flash_llm: packed layers can only be loaded from safetensors files")
        checkpoint = Checkpoint(checkpoint_files)
        make_room_(model, checkpoint, _names_in_model(model, checkpoint))
        for layer in _sparse_layers(model).values():
            layer.format = "auto"
            # What is loaded is all there is: else transformers would ask for the dense weight, to
            # initialise it.
            layer._is_hf_initialized = True
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        distributed = tensor_parallel.styles(model)
        for name, layer in _sparse_layers(model).items():
            if layer.weight_payload.is_meta:
                continue  # offloaded to disk, and brought back by a hook of accelerate
            try:
                layer.packed.validate()
            except (ValueError, TypeError) as error:
                raise type(error)(f"flash_llm: {name} was not loaded whole: {error}") from None
            if layer in distributed:
                tensor_parallel.shard_(layer, *distributed[layer])
            layer.refit()
        return model

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        # Exact, so the layers keep their dtype; ``dtype`` is the model's own by default.
        for name, layer in _sparse_layers(model).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to_linear())
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Save the buffers as they are, and say in each file who wrote it."""
        refuse_parts(model)
        return None, dict(METADATA)

    def is_serializable(self) -> bool:
        """Packed layers are plain integer tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach biases and inputs, so adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operators have fake kernels."""
        return True


def _sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def _names_in_model(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The model's names of the packed layers; those of a head that the model lacks are left out.

    A model with a head holds the bare one under ``base_model_prefix``, and either may be loaded
    from the files of the other.
    """
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    modules = {name for name, _ in model.named_modules()}
    names = {}
    for stored in checkpoint.packed:
        for name in (stored, stored.removeprefix(prefix), prefix + stored):
            if name in modules:
                names[name] = stored
                break
    return names
