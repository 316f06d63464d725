"""Options and functions that several commands share."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from flash_llm.io.unfinished import partial_path
from flash_llm.ops import STORED_VALUES
from flash_llm.progress import LogLines, ProgressBar
from flash_llm.prune.methods import METHODS
from flash_llm.report_base import Report

AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DryRun = Annotated[bool, typer.Option(help="Only show what would be done.")]
Dtype = Annotated[str | None, typer.Option(help="float16 or bfloat16: cast float32 weights first.")]
ExpectedTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that most products on a GPU have at most (batch size of decoding); "
        "up to 8, --format auto packs very sparse layers for them.",
    ),
]
Format = Annotated[str, typer.Option(help="Format of packed weights: auto, or its name.")]
Ignore = Annotated[
    list[str] | None, typer.Option(help="Layers to leave alone, instead of the default ones.")
]
Layers = Annotated[bool, typer.Option("--layers", help="Show a row for each single layer.")]
Method = Annotated[str, typer.Option(help=f"Pruning method: {', '.join(METHODS)}.")]
Target = Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")]
Targets = Annotated[list[str] | None, typer.Option(help="Layers to change: a name's end, or re:…")]
Values = Annotated[
    str, typer.Option(help=f"What to store of packed weights: {', '.join(STORED_VALUES)}.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code in the model's folder."),
]
ValuesOrStored = Annotated[
    str | None,
    typer.Option(
        "--values",
        help=f"What to store of packed weights: {', '.join(STORED_VALUES)}; else what is stored.",
    ),
]
XQuantization = Annotated[
    str | None,
    typer.Option(help="dynamic: products with quantised values may round their inputs too."),
]


def show(
    report: Report,
    as_json: bool,
    layers: bool = False,
    command: Callable[..., None] | None = None,
) -> None:
    """Print a report.

    Args:
        report: result of a command.
        as_json: print JSON, with all layers.
        layers: print a row for each layer instead of each kind of layer.
        command: function of the command whose arguments the report names; None if it names
            none.
    """
    if as_json:
        typer.echo(report.to_json())
    else:
        text = str(report) if layers else report.summary()
        typer.echo(text if command is None else in_words_of_the_shell(text, command))


def in_words_of_the_shell(text: str, command: Callable[..., None]) -> str:
    """Rewrite a text that names Python arguments for users of the command.

    Args:
        text: a report, or the message of an error.
        command: function of the command; only its parameters are rewritten.

    Returns:
        The text without a function's name at its beginning, and with ``--nsamples`` instead of
        ``nsamples=``.
    """
    text = re.sub(r"^flash_llm(\.\w+)*: ", "", text)
    known = inspect.signature(command).parameters

    def flag(match: re.Match[str]) -> str:
        if match[1] not in known:
            return match[0]
        return ("--no-" if match[2] == "False" else "--") + match[1].replace("_", "-")

    return re.sub(r"\b([a-z_]+)=(True\b|False\b|(?=[\s,;.)]|$))", flag, text)


def progress() -> bool | ProgressBar:
    """Return how to show progress: by a bar on a terminal, by lines on stderr elsewhere."""
    return True if sys.stderr.isatty() else LogLines


def transformers_progress() -> bool | ProgressBar:
    """Return :func:`progress`, and keep transformers from drawing bars outside a terminal.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return progress()


@contextlib.contextmanager
def resumable(target: Path) -> Iterator[None]:
    """Say after Ctrl-C where the unfinished result is and how to continue.

    Args:
        target: folder that is being created.
    """
    try:
        yield
    except KeyboardInterrupt:
        partial = partial_path(target)
        if not partial.is_dir():
            raise
        raise KeyboardInterrupt(
            f"; what is finished is kept in {partial}. To go on, run the same command again."
        ) from None
