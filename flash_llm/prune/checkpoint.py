"""Prune a saved model of transformers into another folder: what ``flash-llm prune`` does.

The new folder has a temporary name until it is complete. It also holds the finished layers, so that
an interrupted run continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn

from flash_llm import ops
from flash_llm.integrations import hf
from flash_llm.io.checkpoint import Checkpoint, checkpoint_files
from flash_llm.io.convert import copy_other_files, read_config, write_card
from flash_llm.io.files import read_json
from flash_llm.io.unfinished import UnfinishedFolder, check_destination
from flash_llm.progress import ProgressBar
from flash_llm.prune.calibrate import layer_sparsities, make_recipe, needs_calibration, prune_
from flash_llm.prune.layers import matrix
from flash_llm.prune.report import PruneRecipe, PruneReport
from flash_llm.prune.resume import ALLOCATION_NAME
from flash_llm.prune.samples import samples_for
from flash_llm.report_base import Report
from flash_llm.select import DEFAULT_IGNORE, DEFAULT_TARGETS, match_layers, refuse_tied
from flash_llm.sparsify import SparsifyReport, sparsify_for_files_
from flash_llm.table import aligned, kind, shape_text

_CALLER = "flash_llm.prune_checkpoint"
# Subfolder of the unfinished folder: the resume_dir of prune_.
_STATE = "state"
# The fields of a recipe that say how samples are drawn from a text.
_SAMPLING = ("nsamples", "seqlen", "seed")


@dataclasses.dataclass(frozen=True)
class PrunePlan(Report):
    """What would be pruned; prints as a table.

    Attributes:
        shapes: ``(M, K)`` of each layer, by name, in the model's order.
        left_alone: the other linear layers that targets match, and why they are not pruned.
        dtype: of the weights.
        model_bytes: bytes of all weights of the model.
        missing: arguments that pruning needs and that were not given.
    """

    shapes: dict[str, tuple[int, int]]
    left_alone: dict[str, str]
    dtype: str
    model_bytes: int
    missing: tuple[str, ...] = ()

    IN_JSON: ClassVar[tuple[str, ...]] = ("num_layers", "layer_bytes")

    @property
    def num_layers(self) -> int:
        """Number of layers that would be pruned."""
        return len(self.shapes)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the dense weights of all layers that would be pruned."""
        itemsize = int(getattr(torch, self.dtype).itemsize)
        return sum(m * k * itemsize for m, k in self.shapes.values())

    def __str__(self) -> str:
        return self._text([(name, "1", shape) for name, shape in self.shapes.items()])

    def summary(self) -> str:
        """Return the same text; layers whose names differ only in indices share a line."""
        groups = Counter((kind(name), shape) for name, shape in self.shapes.items())
        return self._text([(name, str(n), shape) for (name, shape), n in groups.items()])

    def _text(self, rows: list[tuple[str, str, tuple[int, int]]]) -> str:
        table = [("layers", "number", "shape")]
        table += [(name, number, shape_text(shape)) for name, number, shape in rows]
        return "\n".join(
            [
                *aligned(table, left={0, 2}),
                *_left_alone_lines(self.left_alone),
                f"{self.num_layers} layers would be pruned: {self.layer_bytes / 1e6:.3f} of "
                f"{self.model_bytes / 1e6:.3f} MB of weights, {self.dtype}",
                *([f"Still needed: {', '.join(self.missing)}"] if self.missing else []),
            ]
        )


@dataclasses.dataclass(frozen=True)
class PrunedCheckpoint(PruneReport):
    """What was pruned, and how large the result is.

    Attributes:
        left_alone: the other linear layers that targets match, and why they were not pruned.
        packing: the report of packing; None for ``pack=False``.
        source_bytes: bytes of all tensors of the dense checkpoint.
        nbytes: bytes of all tensors of the result.
    """

    left_alone: dict[str, str]
    packing: SparsifyReport | None
    source_bytes: int
    nbytes: int

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the :class:`PruneReport` beside a saved model."""
        names = [field.name for field in dataclasses.fields(PruneReport)]
        return PruneReport(**{name: getattr(self, name) for name in names}).save(folder)

    def __str__(self) -> str:
        return self._text(super().__str__(), str(self.packing))

    def summary(self) -> str:
        """Return the same text; layers whose names differ only in indices share a line."""
        return self._text(super().summary(), self.packing.summary() if self.packing else "")

    def _text(self, pruning: str, packing: str) -> str:
        sizes = (
            f"The model takes {self.nbytes / 1e6:.3f} MB, the dense one "
            f"{self.source_bytes / 1e6:.3f} MB ({self.nbytes / max(self.source_bytes, 1):.2f}x)."
        )
        if self.packing is None:
            return "\n".join([pruning, *_left_alone_lines(self.left_alone), sizes])
        last = [] if self.packing.packed else ["Nothing is packed; the table says why."]
        return "\n".join([pruning, "", packing, "", sizes, *last])


def _left_alone_lines(left_alone: Mapping[str, str]) -> list[str]:
    groups = Counter((kind(name), reason) for name, reason in left_alone.items())
    return [f"{name} ({n}) is not pruned: {reason}" for (name, reason), n in groups.items()]


def plan_pruning(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str] | None = None,
    *,
    calibration: str | os.PathLike[str] | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    pack: bool = True,
    format: str = "auto",
    values: str | None = None,
    expected_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PrunePlan:
    """Return which layers :func:`prune_checkpoint` would prune; reads no weights, writes nothing.

    The arguments are checked in the same way, and the calibration text is read; sparsity and
    calibration may be missing.

    Args:
        src: as in :func:`prune_checkpoint`.
        dst: likewise; None checks no destination.
        calibration: likewise.
        targets: likewise.
        ignore: likewise.
        pack: likewise.
        format: likewise.
        values: likewise.
        expected_tokens: likewise.
        dtype: likewise.
        trust_remote_code: likewise.
        options: likewise.

    Raises:
        ImportError: as :func:`prune_checkpoint`.
        OSError: likewise.
        TypeError: likewise.
        ValueError: likewise, except for errors in the values of weights.
    """
    src, missing = Path(src), []
    options["values"] = values
    if _needs_sparsity(make_recipe(**options)):
        missing.append("sparsity")
        options["sparsity"] = 0.0  # any value, to check the rest
    request = _Request(
        *(src, dst, targets, ignore, pack, format, expected_tokens),
        *(dtype, trust_remote_code, options),
    )
    recipe, text = request.recipe, _text_options(src, calibration, trust_remote_code)
    if needs_calibration(recipe) and calibration is None:
        missing.append("calibration")
    elif needs_calibration(recipe):
        samples_for(request.model, **text, **{key: getattr(recipe, key) for key in _SAMPLING})
    return dataclasses.replace(request.plan, missing=tuple(missing))


def prune_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str] | None = None,
    targets: str | Sequence[str] = DEFAULT_TARGETS,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    pack: bool = True,
    format: str = "auto",
    values: str | None = None,
    expected_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: bool | ProgressBar = False,
    **options: Any,
) -> PrunedCheckpoint:
    """Prune a model of transformers that is saved as safetensors, and save the result.

    ``dst`` receives the pruned model, packed or dense with zeros, the report with the recipe
    (:meth:`PruneReport.save`), and the other files of ``src``: tokenizer, model card.

    Args:
        src: folder of a dense model, and of its tokenizer if ``calibration`` is text.
        dst: folder to create; it must not exist. Until it is complete it is called
            ``dst.partial``; a call with the same arguments continues from there.
        calibration: a ``.txt`` or ``.jsonl`` file; see :func:`flash_llm.prune_`.
        targets: patterns of the layers to prune, as in :func:`flash_llm.sparsify_`.
        ignore: patterns of the layers to leave alone; wins over ``targets``.
        pack: pack the layers that become smaller; False saves dense weights with zeros.
        format: of the packed weights, as in :func:`flash_llm.sparsify_`.
        values: round the weights that stay, as in :func:`flash_llm.prune_`. Values of
            :data:`flash_llm.ops.STORED_VALUES` are packed as such; those of other types are stored
            as numbers of 16 bits.
        expected_tokens: as in :func:`flash_llm.convert_checkpoint`.
        dtype: load the model in this dtype; None for the dtype of its weights. Packed weights are
            float16 or bfloat16.
        device: where the blocks are pruned, one at a time; the model stays on the CPU.
        resume: False removes a ``dst.partial`` of an earlier call and starts over.
        trust_remote_code: run the Python code in ``src`` for its model and tokenizer.
        progress: as in :func:`flash_llm.prune_`.
        options: ``method``, ``sparsity``, ``scope``, ``allocation``, ``nsamples``, ``seqlen``,
            ``seed`` and other arguments of :func:`flash_llm.prune_`.

    Returns:
        The report of pruning and packing, with sizes.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: ``src`` holds no checkpoint, or ``calibration`` does not exist.
        FileExistsError: ``dst`` exists, or ``dst.partial`` belongs to other arguments or is in use
            by another run.
        TypeError: ``pack``, and the weights are neither float16 nor bfloat16, or the format does
            not hold such values; an option is unknown.
        ValueError: ``src`` is packed, quantised, broken, of an architecture that transformers does
            not know, or contains code that is not trusted; an argument or a weight that
            :func:`flash_llm.prune_` refuses; there is no tokenizer for the calibration text.
        OSError: the disk is full or cannot be written; ``src`` is unchanged, and the finished
            layers stay in ``dst.partial``.
    """
    src, dst = Path(src), Path(dst)
    options["values"] = values
    request = _Request(
        *(src, dst, targets, ignore, pack, format, expected_tokens),
        *(dtype, trust_remote_code, options),
    )
    if calibration is not None:
        options |= _text_options(src, calibration, trust_remote_code)
    note = {"dtype": request.plan.dtype}
    with UnfinishedFolder(dst, src, note, _CALLER, resume=resume) as unfinished:
        state = unfinished.path / _STATE
        if not _is_worth_keeping(state):  # left by a run that was killed early, with any arguments
            shutil.rmtree(state, ignore_errors=True)
        state.mkdir(exist_ok=True)
        try:
            model = hf.from_pretrained(
                src, dtype=dtype or "auto", trust_remote_code=trust_remote_code
            )
            report = prune_(
                model,
                targets=targets,
                ignore=ignore,
                device=device,
                resume_dir=state,
                progress=progress,
                **options,
            )
        except BaseException:
            if not _is_worth_keeping(state):
                unfinished.discard()
            raise
        packing = None
        if pack:
            packing = sparsify_for_files_(
                *(model, targets, ignore),
                format=format,
                values=_stored_values(request.recipe),
                expected_tokens=expected_tokens,
                progress=progress,
            )
        shutil.rmtree(unfinished.content)  # perhaps part of a model, left by a run that was killed
        unfinished.content.mkdir()
        copy_other_files(src, unfinished.content, checkpoint_files(src))
        try:
            model.save_pretrained(unfinished.content)
        except SafetensorError as error:  # safetensors raises it for every failure to write
            raise OSError(
                f"{_CALLER}: the model cannot be written to {unfinished.content}: {error}"
            ) from None
        result = Checkpoint(checkpoint_files(unfinished.content))
        if result.packed:
            write_card(src, unfinished.content)
        report.save(unfinished.content)
        unfinished.finish()
    return PrunedCheckpoint(
        **vars(report),
        left_alone=request.plan.left_alone,
        packing=packing,
        source_bytes=Checkpoint(checkpoint_files(src)).nbytes,
        nbytes=result.nbytes,
    )


class _Request:
    """The arguments of :func:`prune_checkpoint`, checked without reading a weight.

    Attributes:
        model: on the meta device.
        recipe: the arguments of :func:`flash_llm.prune_`.
        plan: what would be pruned.
    """

    def __init__(
        self,
        src: Path,
        dst: str | os.PathLike[str] | None,
        targets: str | Sequence[str],
        ignore: str | Sequence[str],
        pack: bool,
        format: str,
        expected_tokens: int | None,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
        options: Mapping[str, Any],
    ) -> None:
        ops.check_format(format)
        ops.check_expected_tokens(expected_tokens)
        _check_source(src)
        self.model, dtype = _empty_model(src, dtype, trust_remote_code)
        self.recipe = make_recipe(targets=targets, ignore=ignore, **options)
        matched = match_layers(self.model, targets, ignore)
        layers = {name: layer for name, layer, left_alone in matched if not left_alone}
        if not layers:
            raise ValueError(f"{_CALLER}: ignore={ignore!r} leaves nothing of targets={targets!r}")
        refuse_tied(self.model, list(layers.items()), _CALLER, "pruning one would prune the other")
        layer_sparsities(
            self.model, layers, self.recipe.sparsity, self.recipe.scope, self.recipe.allocation
        )
        if pack and not ops.is_packable(dtype):
            raise TypeError(
                f"{_CALLER}: the weights of {src} are {str(dtype).removeprefix('torch.')}, packed "
                "ones are float16 or bfloat16; pass dtype=, or pack=False"
            )
        if pack:
            ops.check_holds(_CALLER, format, dtype, _stored_values(self.recipe))
        if dst is not None:
            check_destination(Path(dst), _CALLER)
        self.plan = PrunePlan(
            {name: (m, k) for name, layer in layers.items() for m, k in [matrix(layer).shape]},
            {name: left_alone for name, _, left_alone in matched if left_alone},
            str(dtype).removeprefix("torch."),
            sum(parameter.numel() * dtype.itemsize for parameter in self.model.parameters()),
        )


def _stored_values(recipe: PruneRecipe) -> str:
    """What packed weights store of a pruned model: their values tell the scales."""
    return recipe.values if recipe.values in ops.STORED_VALUES else "16-bit"


def _needs_sparsity(recipe: PruneRecipe) -> bool:
    """Whether the sparsity is missing and neither scope nor allocation gives it."""
    told = isinstance(recipe.allocation, Mapping) or ":" in recipe.scope
    return recipe.sparsity is None and not told


def _text_options(
    src: Path, calibration: str | os.PathLike[str] | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Return the arguments of prune_ for the calibration text."""
    if calibration is None:
        return {"calibration": None, "tokenizer": None}
    path = Path(calibration)
    if not path.is_file():
        raise FileNotFoundError(f"{_CALLER}: calibration {path} is no file")
    return {"calibration": path, "tokenizer": _load_tokenizer(src, trust_remote_code)}


def _is_worth_keeping(state: Path) -> bool:
    """Whether an interrupted run left something to continue with: a layer, or an allocation."""
    return any(state.glob("*.safetensors")) or (state / ALLOCATION_NAME).exists()


def parse_allocation(text: str) -> str | Mapping[str, float]:
    """Return an allocation for :func:`flash_llm.prune_`: a name, or the object in a ``.json`` file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not hold an object from patterns to numbers.
    """
    if not text.endswith(".json"):
        return text
    found = read_json(Path(text), "allocation")
    if not all(type(v) in (int, float) for v in found.values()):
        raise ValueError(f"allocation {text} must hold an object from patterns to sparsities")
    return found


def _check_source(src: Path) -> None:
    checkpoint = Checkpoint(checkpoint_files(src))
    if checkpoint.packed:
        name = next(iter(checkpoint.packed))
        raise ValueError(f"{_CALLER}: {name} in {src} is packed; prune before packing")
    if read_config(src, _CALLER) is None:
        raise FileNotFoundError(f"{_CALLER}: {src} has no config.json, which describes the model")


def _empty_model(
    src: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[nn.Module, torch.dtype]:
    """Return the model on the meta device, and the dtype to load it in."""
    cls, config = hf.model_class(src, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = cls(config)
    model.tie_weights()  # type: ignore[operator]
    return model, dtype or config.dtype or torch.float32


def _load_tokenizer(src: Path, trust_remote_code: bool) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(src, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{_CALLER}: calibration text needs the model's tokenizer, and {src} has none that "
            f"transformers can load: {error}"
        ) from error
