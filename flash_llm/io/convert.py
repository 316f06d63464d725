"""Pack a checkpoint file by file, without building the model.

The source is any folder of safetensors whose weights contain zeros, stored dense or as
compressed-tensors stores sparse and 8-bit weights (:mod:`flash_llm.io.encoded`). One tensor of each
file is in memory at a time. The new folder is built under a temporary name and renamed when it is
complete; files that were finished before an interruption are not converted again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flash_llm import ops
from flash_llm.integrations import hf
from flash_llm.io import encoded
from flash_llm.io.checkpoint import (
    CHECKPOINT_VERSION,
    DTYPES,
    INDEX_NAME,
    PACKED_PARTS,
    SINGLE_NAME,
    Checkpoint,
    TensorWriter,
    checkpoint_files,
)
from flash_llm.io.dense_view import DenseView, is_conv1d_model, is_conv1d_name
from flash_llm.io.files import fingerprint, from_json, read_json, replacing, write_whole
from flash_llm.io.unfinished import UnfinishedFolder, check_destination
from flash_llm.ops import PackedWeight
from flash_llm.progress import ProgressBar, track
from flash_llm.select import matches_name, parse_patterns
from flash_llm.sparsify import LayerReport, SparsifyReport, compared_size, decide
from flash_llm.table import natural

EVERY_LAYER = "re:.*"
CONVERT_IGNORE = (
    r"re:.*(embed|wte$|wpe$|lm_head$|shared$)",
    r"re:.*(router|gate)$",
)
"""Weights in models of transformers that are not linear layers of their own: embeddings, heads tied
to them, and the routers of experts."""

CARD_NOTE = """
## Packed by flash_llm

Some weights of this checkpoint are packed. Import flash_llm before you load them: transformers does
not find it by itself, and would continue with **random weights** instead of the packed ones.

```python
import flash_llm

model = flash_llm.from_pretrained("this folder")  # or AutoModelForCausalLM.from_pretrained
```
"""
"""The section that a model card gets if weights are packed."""

# Copies of the weights in other forms, which would still be dense beside the packed weights.
_COMPRESSION_KEYS = ("quantization_config", "compression_config", "sparsity_config")
"""What ``config.json`` says about compressed weights; versions of compressed-tensors before 0.7
wrote the last two."""

_WEIGHT_SUFFIXES = (".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options that decide the result's bytes; only equal ones continue an unfinished folder."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    format: str
    values: str | None
    expected_tokens: int | None
    dtype: str | None
    pack_unprofitable: bool
    conv1d: bool
    x_quantization: str | None = None


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    targets: str | Sequence[str] = EVERY_LAYER,
    ignore: str | Sequence[str] = CONVERT_IGNORE,
    format: str = "auto",
    values: str | None = None,
    expected_tokens: int | None = None,
    x_quantization: str | None = None,
    dtype: torch.dtype | None = None,
    pack_unprofitable: bool = False,
    workers: int = 1,
    dry_run: bool = False,
    progress: bool | ProgressBar = False,
) -> SparsifyReport:
    """Pack the pruned weights of a safetensors folder into another folder.

    Two-dimensional tensors named ``….weight`` are packed if that makes them smaller, except where
    transformers knows the model and could not load them packed (it joins the experts of many models
    into one tensor). The other tensors and the other files of the folder are copied, but no weights
    in other forms, such as ``.bin``. ``config.json`` gets a ``quantization_config``, so that
    transformers loads the result once flash_llm is imported, and the model card says so.

    Weights that compressed-tensors quantised to int8 or float8, with one scale or one for each row,
    keep their values and scales, except that the int8 value -128, which packed weights do not have,
    becomes -127; the reason in the layer's row counts them. Other 8-bit weights, with zero points
    or scales of groups, are dequantised, to the dtype of their scales. Fixed scales of activations
    are left out.

    Args:
        src: folder with ``model.safetensors`` or an index of several files.
        dst: folder to create; it must not exist. Until it is complete it is named ``dst.partial``,
            and the same call continues from that folder.
        targets: patterns of the layers to pack: a layer's name or the end of one, or ``"re:"`` and
            a regular expression that matches the name from its beginning.
        ignore: patterns of the layers to leave dense; overrides ``targets``.
        format: ``"auto"`` (the fastest on the CPU; a layer is packed again when it is loaded on a
            device for which another format is faster), or a format's name.
        values: as :func:`flash_llm.pack` takes it. ``"int8"``, ``"fp8_e4m3"`` and ``"int4"``
            shrink weights without zeros too, so these are rounded and packed as well; ``ignore``
            leaves them dense. None packs each weight as ``src`` stores it: 8-bit values as such,
            all others in 16 bits.
        expected_tokens: how many tokens most products on a GPU will have at most, if that is known:
            ``"auto"`` then writes ``"gather"`` where :func:`flash_llm.pack` would on a GPU.
        x_quantization: None, or ``"dynamic"``: layers with quantised values will multiply so when
            transformers or vLLM loads the folder (:attr:`SparseLinear.x_quantization`).
        dtype: cast float32 weights, and 8-bit ones with float32 scales, to this dtype first,
            float16 or bfloat16. None leaves them dense.
        pack_unprofitable: also pack weights that do not get smaller.
        workers: files to convert at once; each needs memory for about two tensors.
        dry_run: only report what would be done; nothing is written.
        progress: True for a tqdm bar over the files, or a callable such as
            ``rich.progress.track``.

    Returns:
        The decision and its reason for each layer, in the natural order of the names.

    Raises:
        FileNotFoundError: ``src`` holds no checkpoint.
        FileExistsError: ``dst`` exists, or ``dst.partial`` belongs to other work or is in use by
            another run.
        ValueError: a file is broken, or not directly in ``src``; weights are compressed or
            quantised in a way that is not read; a target matches nothing; a layer is packed
            already; ``format``, ``values``, ``expected_tokens``, ``x_quantization``, ``dtype`` or
            ``workers`` is invalid; ``x_quantization`` is given, and no values are quantised; an
            element to quantise is NaN or infinite; a row overflows float16.
        TypeError: the format does not hold such values; ``expected_tokens`` is no integer.
        OSError: the disk is full or not writable; ``src`` is untouched, and finished files stay in
            ``dst.partial``.

    Example:
        >>> import tempfile, torch, flash_llm
        >>> from pathlib import Path
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 256)).bfloat16()
        >>> model[0].weight.data.masked_fill_(torch.rand(256, 512) < 0.8, 0)
        tensor(...)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flash_llm.save(model, Path(folder, "dense"))
        ...     report = flash_llm.convert_checkpoint(Path(folder, "dense"), Path(folder, "packed"))
        >>> report.rows[0].decision
        'packed'
    """
    src, dst = Path(src), Path(dst)
    ops.check_format(format)
    if values is not None:
        ops.check_values(values)
    ops.check_expected_tokens(expected_tokens)
    ops.check_x_quantization(x_quantization)
    if dtype is not None and not ops.is_packable(dtype):
        raise ValueError(
            "flash_llm.convert_checkpoint: dtype must be torch.float16 or torch.bfloat16, got "
            f"{dtype}"
        )
    if workers < 1:
        raise ValueError(f"flash_llm.convert_checkpoint: workers must be positive, got {workers}")
    files = checkpoint_files(src)
    source = DenseView(files)
    if source.checkpoint.packed:
        name = next(iter(source.checkpoint.packed))
        raise ValueError(f"flash_llm.convert_checkpoint: {name} in {src} is packed already")
    for file in files:
        if file.parent != src:
            raise ValueError(
                f"flash_llm.convert_checkpoint: the index of {src} names {file}, which is not "
                "directly in that folder"
            )
    config = read_config(src, "flash_llm.convert_checkpoint", source)
    stored = {one.values for one in source.encoded.values()}
    if x_quantization is not None and (stored if values is None else {values}) <= {"16-bit"}:
        raise ValueError(
            f"flash_llm.convert_checkpoint: x_quantization {x_quantization!r} is for quantised "
            "values; pass values="
        )
    options = _Options(
        targets=parse_patterns("targets", targets),
        ignore=parse_patterns("ignore", ignore),
        format=format,
        values=values,
        expected_tokens=expected_tokens,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        pack_unprofitable=pack_unprofitable,
        conv1d=bool(is_conv1d_model(src)),
        x_quantization=x_quantization,
    )
    chosen = dict.fromkeys(choose_layers(source, options.targets, options.ignore), "")
    if config is not None and "model_type" in config:
        chosen |= hf.why_dense(src, chosen)
    caller = "flash_llm.convert_checkpoint"
    encoded_layers = [layer for layer in chosen if f"{layer}.weight" in source.encoded]
    kinds = {source.encoded[f"{layer}.weight"].values for layer in encoded_layers}
    for kind in kinds if values is None else {values}:  # before a folder is made
        ops.check_holds(caller, format, torch.float16, kind)  # the dtype does not matter
    check_destination(dst, caller)

    stop = threading.Event()
    rows: list[LayerReport] = []
    with contextlib.ExitStack() as stack:
        unfinished = None
        if not dry_run:
            unfinished = stack.enter_context(UnfinishedFolder(dst, src, vars(options), caller))
            done = _keep_finished(unfinished, files)

        def convert(file: Path) -> list[LayerReport]:
            if unfinished is None:
                return _convert_file(source, file, None, chosen, options, stop)
            if file.name in done:
                return done[file.name]
            out = unfinished.content / file.name
            with replacing(out) as opened:
                found = _convert_file(source, file, opened, chosen, options, stop)
            entries = [dataclasses.asdict(row) for row in found]
            marker = {"file": fingerprint(out.stat()), "rows": entries}
            write_whole(_marker(unfinished, file), json.dumps(marker).encode())
            return found

        pool = stack.enter_context(ThreadPoolExecutor(workers))
        try:
            converted = [pool.submit(convert, file) for file in files]
            for found in track(converted, "convert", progress):
                rows.extend(found.result())
        except BaseException:  # including Ctrl-C: each worker stops at its next tensor
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        if unfinished is not None:
            cast = any(source.dtype(f"{layer}.weight") == "F32" for layer in chosen)
            dtype_name = options.dtype if cast else None
            _complete(unfinished.content, src, files, config, dtype_name, x_quantization)
            unfinished.finish()
    return SparsifyReport(tuple(sorted(rows, key=lambda row: natural(row.name))))


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name such as ``"bfloat16"``; None for None.

    Raises:
        ValueError: it is neither ``"float16"`` nor ``"bfloat16"``.
    """
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in ops.VALUE_DTYPES.values()}
    if name is not None and name not in dtypes:
        raise ValueError(f"dtype must be {' or '.join(dtypes)}, got {name!r}")
    return None if name is None else dtypes[name]


def inspect_checkpoint(
    folder: str | os.PathLike[str], *, format: str = "auto", values: str | None = None
) -> SparsifyReport:
    """Report the sparsities in a safetensors folder, and the sizes of its weights when packed.

    Args:
        folder: dense or packed, written by this package or any other.
        format: format to pack dense weights in; ``"auto"`` as in :func:`convert_checkpoint`.
        values: what to pack of dense weights, one of :data:`flash_llm.ops.STORED_VALUES`, or None,
            likewise.

    Returns:
        A row for each packed layer and each two-dimensional dense weight: ``decision`` says how it
        is stored, ``packed_bytes`` is its packed size. Packed layers come first; both kinds are in
        the natural order of their names.

    Raises:
        FileNotFoundError: ``folder`` holds no checkpoint.
        ValueError: a file is broken, or ``format`` or ``values`` is unknown.
    """
    ops.check_format(format)
    if values is not None:
        ops.check_values(values)
    source = DenseView(checkpoint_files(folder))
    options = _Options((EVERY_LAYER,), (), format, values, None, None, False, conv1d=False)
    rows = []
    for name in sorted(source.checkpoint.packed, key=natural):
        packed = source.checkpoint.placeholder(name)
        row = decide(name, packed, pack_unprofitable=True)
        rows.append(dataclasses.replace(row, reason=f"stored so: {compared_size(packed)}"))
    buffer = _buffer(source.checkpoint, source.checkpoint.tensors)
    for name in sorted(choose_layers(source, options.targets, options.ignore), key=natural):
        row, _ = _convert_tensor(name, source, buffer, options)
        if row.decision == "packed":
            row = dataclasses.replace(row, decision="dense", reason=f"would be {row.reason}")
        rows.append(row)
    return SparsifyReport(tuple(rows))


def read_config(
    folder: Path, caller: str, source: DenseView | None = None
) -> dict[str, Any] | None:
    """Return the ``config.json`` of a checkpoint without its entries about compression.

    Args:
        folder: the checkpoint.
        caller: function named in errors.
        source: its tensors, if quantised weights will be read; None refuses them.

    Returns:
        The JSON object; None if there is no such file.

    Raises:
        ValueError: it is not a JSON object, or weights are compressed or quantised in a way that is
            not read.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, caller)
    for key in _COMPRESSION_KEYS:
        found = config.pop(key, None)
        if not found:
            continue
        if not isinstance(found, dict):
            raise ValueError(f"{caller}: {key} in {path} must be an object, got {found!r:.50}")
        if key == "sparsity_config":
            found = {key: found}
        if key != "quantization_config":
            found = {"quant_method": "compressed-tensors", **found}
        scheme = encoded.unread_scheme(found, quantized=source is not None)
        if scheme is not None:
            raise ValueError(
                f"{caller}: {path} says that weights are stored by {scheme}, which is not read here"
            )
        if source is not None and found.get("config_groups"):
            encoded.check_quantized(source.checkpoint, source.encoded)
    return config


def choose_layers(source: DenseView, targets: Sequence[str], ignore: Sequence[str]) -> set[str]:
    """Return the dense layers with two-dimensional weights that the patterns select.

    Args:
        source: a checkpoint.
        targets: parsed patterns of the layers to pack.
        ignore: parsed patterns of the layers to leave dense; overrides ``targets``.

    Raises:
        ValueError: a target matches nothing.
    """
    layers = {
        name
        for name, shape in source.shapes.items()
        if len(shape) == 2 and source.dtype(f"{name}.weight") in DTYPES
    }
    for pattern in targets:
        if pattern != EVERY_LAYER and not any(matches_name(pattern, name) for name in layers):
            raise ValueError(
                f'flash_llm.convert_checkpoint: target "{pattern}" matches no two-dimensional '
                "weight"
            )
    return {
        name
        for name in layers
        if any(matches_name(pattern, name) for pattern in targets)
        and not any(matches_name(pattern, name) for pattern in ignore)
    }


def copy_other_files(src: Path, folder: Path, files: Sequence[Path]) -> None:
    """Copy a checkpoint's files other than its weights: tokenizer, model card, subfolders.

    Not copied are other forms of the same weights beside ``files``, such as ``.bin``, and folders
    whose names begin with a dot, which belong to tools such as git. Links to files are copied as
    files, because the hub's cache consists of them; links to folders are not followed.

    Args:
        src: folder of a checkpoint.
        folder: destination; it may be inside ``src``.
        files: the files with the checkpoint's weights.
    """
    inside = [folder.resolve(), *folder.resolve().parents]
    for root, folders, names in os.walk(src):
        here = Path(root)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() not in inside
        ]
        for path in map(here.joinpath, names):
            weights = path in files or (
                here == src
                and (path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json"))
            )
            if path.is_file() and not weights:
                copy = folder / path.relative_to(src)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def write_card(src: Path, folder: Path) -> None:
    """Write the model card of a checkpoint with packed weights: the card of ``src`` and a note."""
    card = src / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    (folder / "README.md").write_text(text + CARD_NOTE)


def _buffer(checkpoint: Checkpoint, names: Iterable[str]) -> Tensor:
    """Allocate memory that is large enough for any one of these tensors."""
    nbytes = max(map(checkpoint.nbytes_of, names), default=0)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _with_dtype(config: Any, dtype: str) -> Any:
    """Return a config of transformers with every dtype, also in inner configs, replaced."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _marker(unfinished: UnfinishedFolder, file: Path) -> Path:
    """Return the path of the marker that is written when ``file`` is converted."""
    return unfinished.path / f"{file.name}.done"


def _keep_finished(
    unfinished: UnfinishedFolder, files: Sequence[Path]
) -> dict[str, list[LayerReport]]:
    """Remove what an earlier run left unfinished; return the rows of finished files by name.

    A file is finished if its fingerprint is the one in its marker.
    """
    finished = {}
    for file in files:
        try:
            marker = read_json(_marker(unfinished, file))
            if fingerprint((unfinished.content / file.name).stat()) == marker.get("file"):
                finished[file.name] = from_json(list[LayerReport], marker.get("rows"))
        except (OSError, ValueError):
            continue  # without a marker, or with a broken one, the file is converted again
    for path in unfinished.content.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in finished:
            path.unlink()
    return finished


def _convert_file(
    source: DenseView,
    file: Path,
    out: BinaryIO | None,
    chosen: Mapping[str, str],
    options: _Options,
    stop: threading.Event,
) -> list[LayerReport]:
    """Convert one file, writing to ``out`` if given; raises InterruptedError once ``stop`` is set.

    ``chosen`` maps each layer to report to the reason why it stays dense, or to "".
    """
    rows = []
    names = source.checkpoint.names(file)
    buffer = _buffer(source.checkpoint, names)
    with contextlib.ExitStack() as stack:
        writer = None if out is None else stack.enter_context(TensorWriter(out, names))
        for name in source.in_file(file):
            if stop.is_set():
                raise InterruptedError(f"flash_llm.convert_checkpoint: stopped in {file}")
            layer = name.removesuffix(".weight")
            if layer in chosen and name.endswith(".weight"):
                row, parts = _convert_tensor(layer, source, buffer, options, chosen[layer])
                rows.append(row)
                if writer is not None:
                    for part, stored in parts.items():
                        writer.add(part, stored)
            elif writer is not None and name in source.encoded:
                writer.add(name, source.tensor(name))
            elif writer is not None:
                raw, shape = source.checkpoint.raw(name, buffer), source.shape(name)
                writer.add_raw(name, raw, source.dtype(name), shape)
    return rows


def _convert_tensor(
    name: str, source: DenseView, buffer: Tensor, options: _Options, why_dense: str = ""
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Pack a weight unless ``why_dense`` is given or packing does not pay; then return it dense."""
    dtype = DTYPES[source.dtype(f"{name}.weight")]
    if dtype == torch.float32 and options.dtype is not None:
        dtype = getattr(torch, options.dtype)

    def dense() -> Tensor:
        return source.tensor(f"{name}.weight", buffer).to(dtype)

    if not why_dense and not ops.is_packable(dtype):
        why_dense = f"{dtype} cannot be packed; for float32 pass dtype="
    transposed = options.conv1d and is_conv1d_name(name)
    if why_dense:
        tensor = dense()
        shape = tuple(tensor.t().shape if transposed else tensor.shape)
        row = LayerReport(name, shape, None, tensor.nbytes, None, None, "skipped", why_dense)
        return row, {f"{name}.weight": tensor}
    # The scales of a weight that is to be transposed would be those of its columns.
    quantized = None if transposed else _stored_quantized(name, source, options)
    weight = dense() if quantized is None else quantized
    try:
        packed = _pack(weight, dtype, transposed, options)
    except ValueError as error:
        raise ValueError(f"flash_llm: {name}: {error}") from None
    row = decide(name, packed, options.pack_unprofitable)
    if row.decision != "packed":
        return row, {f"{name}.weight": weight if isinstance(weight, Tensor) else dense()}
    if quantized is not None and quantized.num_clipped:
        clipped = f"values of -128 became -127: {quantized.num_clipped}"
        row = dataclasses.replace(row, reason=f"{clipped}; {row.reason}")
    parts = zip(PACKED_PARTS, packed.parts(), strict=True)
    return row, {name + suffix: part for suffix, part in parts}


def _stored_quantized(name: str, source: DenseView, options: _Options) -> encoded.Quantized | None:
    """Return the values of a weight that are to be packed as they are stored."""
    stored = source.encoded.get(f"{name}.weight")
    if stored is None or stored.read_quantized is None:
        return None
    return stored.read_quantized() if options.values in (None, stored.values) else None


def _pack(
    weight: Tensor | encoded.Quantized, dtype: torch.dtype, transposed: bool, options: _Options
) -> PackedWeight:
    if isinstance(weight, encoded.Quantized):
        return ops.pack_quantized(weight.values, weight.scales, dtype, options.format)
    values = options.values or "16-bit"
    weight = weight.t() if transposed else weight
    format = ops.stored_format(weight, options.format, options.expected_tokens, values)
    return ops.pack(weight, format, values=values)


def _complete(
    folder: Path,
    src: Path,
    files: list[Path],
    config: Mapping[str, Any] | None,
    dtype: str | None,
    x_quantization: str | None,
) -> None:
    """Write the index, the config and the model card, and copy the other files."""
    converted = Checkpoint(folder / file.name for file in files)
    copy_other_files(src, folder, files)
    if [file.name for file in files] != [SINGLE_NAME]:
        index = {
            "metadata": {"total_size": converted.nbytes},
            "weight_map": {
                name: file.name for file in converted.files for name in converted.names(file)
            },
        }
        write_whole(folder / INDEX_NAME, json.dumps(index, indent=2).encode())
    if config is not None:
        method = {"quant_method": "flash_llm", "version": CHECKPOINT_VERSION}
        if x_quantization is not None:
            method["x_quantization"] = x_quantization
        changed = {**config, "quantization_config": method} if converted.packed else dict(config)
        if dtype is not None:
            changed = {"dtype": dtype, **_with_dtype(changed, dtype)}
        write_whole(folder / "config.json", json.dumps(changed, indent=2).encode())
    if converted.packed:
        write_card(src, folder)
