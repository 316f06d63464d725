"""The quantizer that transformers calls when a checkpoint's config names flash_llm.

transformers has one extension point for weights that are stored in another form, and calls any
class that uses it a quantizer. :func:`install` wraps five functions of transformers for what that
point does not cover: the names of packed layers in files, models whose layers were packed in
memory, packed files whose config does not name flash_llm, and weights that a packed checkpoint
lacks. :mod:`flash_llm.integrations.hf` calls it as soon as transformers is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flash_llm import _extension, ops
from flash_llm.integrations import tensor_parallel
from flash_llm.io.checkpoint import (
    CHECKPOINT_VERSION,
    METADATA,
    PACKED_PARTS,
    Checkpoint,
    make_room_,
)
from flash_llm.linear import BUFFERS, SparseLinear, is_conv1d, refuse_parts

METHOD = "flash_llm"

_CONVERTED = "joins, splits or permutes this weight"


class FlashLLMConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model with packed layers; the files say which layers these are.

    Args:
        version: version of the layout in files; newer ones are refused.
        x_quantization: :attr:`SparseLinear.x_quantization` of the layers with quantised values.
        unused: fields that a later version may add.

    Raises:
        NotImplementedError: ``version`` is newer than the versions that this package reads.
        ValueError: ``x_quantization`` is unknown.
    """

    x_quantization: str | None = None  # stays out of files that do not need it

    def __init__(
        self,
        version: int = CHECKPOINT_VERSION,
        x_quantization: str | None = None,
        **unused: Any,
    ) -> None:
        if version > CHECKPOINT_VERSION:
            raise NotImplementedError(
                f"flash_llm: the checkpoint's quantization_config has version {version}, this "
                f"flash_llm reads up to {CHECKPOINT_VERSION}"
            )
        ops.check_x_quantization(x_quantization)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        if x_quantization is not None:
            self.x_quantization = x_quantization


@dataclasses.dataclass
class _Loading:
    """A model that is being loaded."""

    model: Any
    checkpoint: Checkpoint
    stored_names: dict[str, str] = dataclasses.field(default_factory=dict)
    """The name in the checkpoint of each packed layer, by its name in the model."""
    dtypes: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)
    """The dtype of each packed layer in the dense model, by its name in the model."""


class FlashLLMQuantizer(HfQuantizer):
    """Creates the packed layers before their buffers are loaded, and checks them afterwards."""

    requires_calibration = True  # it cannot pack a dense checkpoint; sparsify_ does

    _loading: _Loading | None = None  # while a model is being loaded

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a dense checkpoint or a missing extension before the model is built."""
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
        self._loading = _Loading(model, Checkpoint(checkpoint_files))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Create the packed layers, now that it is known how transformers renames weights."""
        if self._loading is not None:
            model, checkpoint = self._loading.model, self._loading.checkpoint
            stored_names = _stored_names(model, checkpoint, weight_conversions)
            self._loading.stored_names = stored_names
            state = model.state_dict()
            self._loading.dtypes = {name: state[f"{name}.weight"].dtype for name in stored_names}
            make_room_(model, checkpoint, stored_names)
            for layer in _sparse_layers(model).values():
                layer.format = "auto"
                # Otherwise transformers would initialise the layer, and ask for its dense weight.
                layer._is_hf_initialized = True
        return weight_conversions

    def finish_loading(self, load_config: Any, loading_info: Any) -> None:
        """Check the packed layers, and give them memory of their own and the model's dtype.

        Args:
            load_config: the configuration of this load, from transformers.
            loading_info: the missing and unexpected names, from transformers.

        Raises:
            ValueError: a weight is missing, a packed weight was not loaded completely, quantised
                values overflow the model's dtype, or a plan cuts columns that share scales.
            TypeError: a layer that is offloaded to the disk has another dtype in the checkpoint.
        """
        loading, self._loading = self._loading, None  # the quantizer outlives the load
        assert loading is not None
        folder = load_config.pretrained_model_name_or_path
        _refuse_missing(loading, folder, loading_info.missing_keys)
        distributed = tensor_parallel.styles(loading.model)
        config = self.quantization_config
        assert isinstance(config, FlashLLMConfig)
        for name, layer in _sparse_layers(loading.model).items():
            dtype = loading.dtypes[name]
            if layer.values != "16-bit":
                layer.x_quantization = config.x_quantization
            if layer.weight_payload.is_meta:  # offloaded to the disk; accelerate loads it
                if layer.dtype != dtype:
                    raise TypeError(
                        f"flash_llm: {name} of {folder} is packed as {layer.dtype} and cannot "
                        f"become {dtype} while it is offloaded to the disk; load the model in "
                        f"{layer.dtype}"
                    )
                continue
            if layer.weight_payload.device.type == "cpu":
                # Otherwise they stay mapped to the file, and writing to it changes the weights.
                for part in BUFFERS:
                    setattr(layer, part, getattr(layer, part).clone())
            try:
                layer.packed.validate()
            except (ValueError, TypeError) as error:
                raise type(error)(f"flash_llm: {name} was not loaded completely: {error}") from None
            try:
                layer.to(dtype)
            except ValueError as error:  # quantised values overflow float16
                raise ValueError(f"flash_llm: {name} cannot become {dtype}: {error}") from None
            if layer in distributed:
                try:
                    tensor_parallel.shard_(layer, *distributed[layer])
                except ValueError as error:  # of groups of columns that share scales
                    raise ValueError(f"flash_llm: {name} of {folder}: {error}") from None
            layer.refit()

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        # Unpacking is exact in each layer's own dtype, whatever ``dtype`` asks for.
        for name, layer in _sparse_layers(model).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to_linear())
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Save the buffers unchanged, with the metadata of flash_llm in each file."""
        refuse_parts(model)
        return None, dict(METADATA)

    def is_serializable(self) -> bool:
        """Return True: packed layers are plain integer tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return True: gradients reach biases and inputs, so adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return True: the operators have fake kernels."""
        return True


def install() -> None:
    """Register with transformers and wrap its functions; calling it again changes nothing."""
    from transformers.modeling_utils import PreTrainedModel

    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FlashLLMConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = FlashLLMQuantizer
    _extend(core_model_loading, "rename_source_key", _rename_packed)
    _extend(PreTrainedModel, "save_pretrained", _save_packed)
    _extend(PreTrainedModel, "dequantize", _dequantize_packed)
    _extend(PreTrainedModel, "_load_pretrained_model", _refuse_unnamed, staticmethod)
    _extend(PreTrainedModel, "_finalize_model_loading", _finish_loading, staticmethod)


def _extend(
    owner: Any, name: str, extension: Callable[..., Any], kind: Callable[[Any], Any] = lambda f: f
) -> None:
    """Replace a function by one that calls ``extension(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    if getattr(original, "_extended_by_flash_llm", False):
        return

    @functools.wraps(original)
    def extended(*args: Any, **kwargs: Any) -> Any:
        return extension(original, *args, **kwargs)

    extended._extended_by_flash_llm = True  # type: ignore[attr-defined]
    setattr(owner, name, kind(extended))


# ---- names ----


def _rename_packed(
    rename: Callable[..., tuple[str, str | None]],
    source_key: str,
    weight_renamings: Sequence[Any],
    weight_converters: Sequence[Any],
    base_model_prefix: str | None = None,
    meta_state_dict: Mapping[str, Any] | None = None,
    reverse: bool = False,
) -> tuple[str, str | None]:
    """Name the parts of a packed layer after its dense weight; they are never converted."""
    layer, part = _split(source_key)
    prefixes = {"base_model_prefix": base_model_prefix, "meta_state_dict": meta_state_dict}
    if not part:
        return rename(source_key, weight_renamings, weight_converters, **prefixes, reverse=reverse)
    renamed, pattern = rename(
        f"{layer}.weight", weight_renamings, weight_converters, reverse=reverse
    )
    if pattern is None and renamed.endswith(".weight"):
        source_key = renamed.removesuffix(".weight") + part
    return rename(source_key, [], [], **prefixes, reverse=reverse)


def _split(key: str) -> tuple[str, str]:
    """Split a tensor's name into layer and part of a packed weight; the part is "" for others."""
    for part in PACKED_PARTS:
        if key.endswith(part):
            return key.removesuffix(part), part
    return key, ""


def _targets(
    model: Any, keys: Iterable[str], conversions: Sequence[Any]
) -> dict[str, tuple[str, str | None]]:
    """Return where transformers loads tensors of files.

    Args:
        model: the dense model, on the meta device.
        keys: names of tensors in files.
        conversions: of names and weights between the files and the model.

    Returns:
        For each key that the model has a tensor for, the tensor's name in the model, and a pattern
        if transformers makes it from several tensors or from a part of one.
    """
    conversions = copy.deepcopy(conversions)  # transformers marks those that it used
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    rename = functools.partial(
        core_model_loading.rename_source_key,
        base_model_prefix=model.base_model_prefix,
        meta_state_dict=state,
    )
    targets = {}
    for key in sorted(keys, key=core_model_loading.dot_natural_key):
        name, pattern = rename(key, renamings, converters)
        if name not in state and key in state:  # as transformers does
            name, pattern = rename(key, [], [])
        if name in state:
            targets[key] = name, pattern
    return targets


def _stored_names(model: Any, checkpoint: Checkpoint, conversions: Sequence[Any]) -> dict[str, str]:
    """Return the name in the checkpoint of each packed layer, by its name in the model.

    A packed layer goes where transformers would load its dense weight. Layers that the model does
    not have are left out, as transformers ignores dense weights that the model does not have.

    Raises:
        ValueError: transformers would convert a packed weight, or a dense tensor has another shape
            in the model.
    """
    stored = {f"{name}.weight": name for name in checkpoint.packed}
    plain = {key for key in checkpoint.tensors if _split(key)[0] not in checkpoint.packed}
    state, stored_names = model.state_dict(), {}
    for key, (name, pattern) in _targets(model, stored.keys() | plain, conversions).items():
        if key in plain and pattern is None and checkpoint.shape(key) != tuple(state[name].shape):
            # In a quantised model transformers does not compare the shapes.
            raise ValueError(
                f"flash_llm: {key} in {checkpoint.file_of(key)} has shape "
                f"{list(checkpoint.shape(key))}, but {name} of {type(model).__name__} has "
                f"{list(state[name].shape)}"
            )
        if key in stored and pattern is not None:
            raise ValueError(
                f"flash_llm: {stored[key]} is packed in "
                f"{checkpoint.file_of(stored[key] + PACKED_PARTS[0])}, but transformers "
                f"{_CONVERTED} to make {name}; convert the dense checkpoint again, which leaves it "
                "dense"
            )
        if key in stored:
            stored_names[name.removesuffix(".weight")] = stored[key]
    return stored_names


def why_dense(model: Any, layers: Iterable[str]) -> dict[str, str]:
    """Return which weights of a dense checkpoint transformers could not load if they were packed.

    Args:
        model: the model of the checkpoint, on the meta device.
        layers: names of layers in the checkpoint.

    Returns:
        The reason for each such layer, by name.
    """
    conversions = conversion_mapping.get_model_conversion_mapping(model)
    reasons = {}
    keys = (f"{layer}.weight" for layer in layers)
    for key, (name, pattern) in _targets(model, keys, conversions).items():
        module = model.get_submodule(name.rpartition(".")[0])
        if pattern is not None:
            reason = f"transformers {_CONVERTED} to make {name}"
        elif not (isinstance(module, nn.Linear) or is_conv1d(module)):
            reason = f"{name} is of class {type(module).__name__}, which is not a linear layer"
        else:
            continue
        reasons[key.removesuffix(".weight")] = reason
    return reasons


# ---- saving ----


def _save_packed(save_pretrained: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    _adopt(model)
    with _separate_weights(model):
        return save_pretrained(model, *args, **kwargs)


def _dequantize_packed(
    dequantize: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> Any:
    _adopt(model)
    return dequantize(model, *args, **kwargs)


def _adopt(model: Any) -> None:
    """Make the model's quantizer and config say whether the model has packed layers.

    Raises:
        ValueError: it has, and it is quantised by another method too.
    """
    packed = _sparse_layers(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if packed and quantizer is not None and not isinstance(quantizer, FlashLLMQuantizer):
        raise ValueError(
            f"flash_llm: {next(iter(packed))} is packed, and the model is quantised by "
            f"{quantizer.quantization_config.quant_method}; a config can name only one of them"
        )
    if packed:
        model.hf_quantizer = quantizer or FlashLLMQuantizer(FlashLLMConfig(), pre_quantized=True)
        model.quantization_method = METHOD
        # A config names one for all layers, and none if they differ.
        ways = {m.x_quantization for m in packed.values() if m.values != "16-bit"}
        config = FlashLLMConfig(x_quantization=ways.pop() if len(ways) == 1 else None)
        model.hf_quantizer.quantization_config = model.config.quantization_config = config
    elif isinstance(quantizer, FlashLLMQuantizer):
        quantizer.remove_quantization_config(model)  # type: ignore[no-untyped-call]


@contextmanager
def _separate_weights(model: Any) -> Iterator[None]:
    """Make transformers save packed weights under the model's names instead of joining them.

    It can load these names too.
    """
    weights = [f"{name}.weight" for name in _sparse_layers(model)]
    if not weights:
        yield
        return
    before = conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [  # as transformers does
            entry
            for entry in conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(entry, core_model_loading.PrefixChange)
        ]

    def joins_packed(entry: Any) -> bool:
        if not isinstance(entry, WeightConverter):
            return False
        back = entry.reverse_transform()
        return any(back.rename_source_key(weight)[1] is not None for weight in weights)

    model._weight_conversions = [entry for entry in conversions if not joins_packed(entry)]
    try:
        yield
    finally:
        if before is None:
            del model._weight_conversions
        else:
            model._weight_conversions = before


# ---- loading ----


def _refuse_unnamed(
    load: Callable[..., Any],
    model: Any,
    state_dict: Mapping[str, Any] | None,
    checkpoint_files: Sequence[str] | None,
    load_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse packed weights whose config does not name flash_llm, and files outside the folder."""
    folder = load_config.pretrained_model_name_or_path
    if isinstance(load_config.hf_quantizer, FlashLLMQuantizer) and os.path.isdir(folder or ""):
        for file in checkpoint_files or ():  # an index may name any path
            if os.path.relpath(file, folder).split(os.sep)[0] == os.pardir:
                raise ValueError(f"flash_llm: {file}, which {folder} names, lies outside it")
    if not isinstance(load_config.hf_quantizer, FlashLLMQuantizer):
        sources = dict.fromkeys(state_dict or (), "the state dict")
        for file in checkpoint_files or ():
            if str(file).endswith(".safetensors"):
                with safe_open(file, framework="pt") as handle:
                    sources |= dict.fromkeys(handle.keys(), str(file))
        packed = next((key for key in sources if _split(key)[1]), None)
        # A user's own class may build packed layers itself.
        if packed is not None and not any(_split(key)[1] for key in model.state_dict()):
            raise ValueError(
                f"flash_llm: {sources[packed]} contains the packed {packed}, but the config that "
                f"{type(model).__name__} is loaded with does not name flash_llm; it needs "
                f'"quantization_config": {{"quant_method": "{METHOD}", "version": '
                f"{CHECKPOINT_VERSION}}}"
            )
    return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


def _finish_loading(
    finalize: Callable[..., Any], model: Any, load_config: Any, loading_info: Any
) -> Any:
    loading_info = finalize(model, load_config, loading_info)
    if isinstance(load_config.hf_quantizer, FlashLLMQuantizer):
        load_config.hf_quantizer.finish_loading(load_config, loading_info)
    return loading_info


def _refuse_missing(loading: _Loading, folder: str, missing_keys: set[str]) -> None:
    """Refuse a checkpoint that lacks parameters of the class that wrote it; they would be random.

    Parameters that only the loading class has, such as a new head, are initialised as usual.
    """
    model, checkpoint = loading.model, loading.checkpoint
    missing = [name for name in _parameters(model) if name in missing_keys]
    if missing and type(model).__name__ not in (model.config.architectures or ()):
        written = {_bare_name(model, name) for name in _written_parameters(model)}
        missing = [name for name in missing if _bare_name(model, name) in written]
    if not missing:
        return
    message = f"flash_llm: {folder} lacks {missing[0]}"
    if len(missing) > 1:
        message += f" and {len(missing) - 1} more"
    message += f" of {type(model).__name__}"
    left = sorted(checkpoint.packed.keys() - set(loading.stored_names.values()))
    if left:
        file = checkpoint.file_of(left[0] + PACKED_PARTS[0])
        message += f"; the model has no layer for the packed {left[0]} in {file}"
    raise ValueError(message)


def _parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _written_parameters(model: Any) -> list[str]:
    """Return the names of the parameters of the class that wrote the checkpoint."""
    try:
        with torch.device("meta"):
            cls = getattr(transformers, model.config.architectures[0])
            return _parameters(cls(copy.deepcopy(model.config)))
    except Exception:  # the config may contain anything; then all parameters are required
        return _parameters(model)


def _bare_name(model: Any, name: str) -> str:
    """Return a parameter's name in the model without a head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
