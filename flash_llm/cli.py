"""The command ``flash-llm``: argument parsing only; commands call functions of the package."""

# No postponed annotations here: typer is imported inside, and reads the annotations that it finds.

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any


def build_app() -> Any:
    """Build the typer application with its commands.

    Raises:
        ImportError: typer (extra ``demo``) is not installed.
    """
    try:
        import typer
    except ModuleNotFoundError as error:
        raise ImportError(
            "the command line needs typer, which is not installed; run: "
            "pip install 'flash-llm[demo]'"
        ) from error
    from flash_llm import convert as convert_module
    from flash_llm import demo as demo_module
    from flash_llm import doctor as doctor_module
    from flash_llm import verify as verify_module

    app = typer.Typer(
        name="flash-llm",
        help="Language models with sparse weights, loaded as sparse and computed as dense.",
        no_args_is_help=True,
        add_completion=False,
    )

    @contextlib.contextmanager
    def reported(command: str) -> Iterator[None]:
        """Print an expected error as one line and exit with 1."""
        try:
            yield
        except (ImportError, OSError, RuntimeError, ValueError, TypeError) as error:
            typer.echo(f"flash-llm {command}: {error}", err=True)
            raise typer.Exit(1) from None

    @app.command()
    def demo(
        sparsity: Annotated[
            float, typer.Option(min=0.0, max=1.0, help="Fraction of zeros in every row.")
        ] = demo_module.SPARSITY,
        windows: Annotated[
            int, typer.Option(min=1, help="Held-out windows of 512 tokens for the perplexity.")
        ] = demo_module.WINDOWS,
        calibration_samples: Annotated[
            int, typer.Option(min=1, help="Samples of 512 tokens for Wanda.")
        ] = demo_module.CALIBRATION_SAMPLES,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        question: Annotated[str, typer.Option(help="Asked of both models.")] = demo_module.QUESTION,
        json_path: Annotated[
            Path | None,
            typer.Option("--json", metavar="OUT", help="Also write all numbers to this file."),
        ] = None,
    ) -> None:
        """Prune and pack SmolLM2-135M-Instruct, and show what that costs and saves."""
        with reported("demo"):
            agrees = demo_module.main(
                sparsity=sparsity,
                windows=windows,
                calibration_samples=calibration_samples,
                device=device,
                question=question,
                json_path=json_path,
            )
        if not agrees:
            raise typer.Exit(1)

    @app.command()
    def convert(
        source: Annotated[Path, typer.Argument(help="Folder of safetensors, pruned and dense.")],
        target: Annotated[Path, typer.Argument(help="Folder to make; it must not be there.")],
        targets: Annotated[
            list[str] | None, typer.Option(help="Layers to pack: a name's end, or re:…")
        ] = None,
        ignore: Annotated[
            list[str] | None, typer.Option(help="Layers to leave alone; instead of the default.")
        ] = None,
        format: Annotated[str, typer.Option(help="auto, or a format's name.")] = "auto",
        dtype: Annotated[
            str | None, typer.Option(help="float16 or bfloat16: cast float32 weights first.")
        ] = None,
        workers: Annotated[int, typer.Option(min=1, help="Files to work on at once.")] = 1,
        dry_run: Annotated[bool, typer.Option(help="Only say what would be done.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    ) -> None:
        """Pack the pruned weights of a checkpoint; an interrupted run goes on when repeated."""
        with reported("convert"):
            report = convert_module.convert_checkpoint(
                source,
                target,
                targets=targets or convert_module.EVERY_LAYER,
                ignore=convert_module.CONVERT_IGNORE if ignore is None else ignore,
                format=format,
                dtype=convert_module.parse_dtype(dtype),
                workers=workers,
                dry_run=dry_run,
                progress=sys.stderr.isatty(),
            )
            typer.echo(report.to_json() if as_json else str(report))

    @app.command()
    def inspect(
        folder: Annotated[Path, typer.Argument(help="Folder of safetensors, dense or packed.")],
        format: Annotated[
            str, typer.Option(help="What dense weights would be packed in.")
        ] = "auto",
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    ) -> None:
        """Show the sparsity of every weight, and what packing gives or would give."""
        with reported("inspect"):
            report = convert_module.inspect_checkpoint(folder, format=format)
            typer.echo(report.to_json() if as_json else str(report))

    @app.command()
    def verify(
        folder: Annotated[Path, typer.Argument(help="Folder of safetensors, packed or dense.")],
        reference: Annotated[Path, typer.Option(help="The dense folder that it was made from.")],
        max_error: Annotated[
            float, typer.Option(min=0.0, help="Exit with 1 above this relative error.")
        ] = float("inf"),
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    ) -> None:
        """Show how far every tensor is from that of a reference."""
        with reported("verify"):
            report = verify_module.verify_checkpoint(folder, reference)
            typer.echo(report.to_json() if as_json else str(report))
        if report.max_relative_error > max_error:
            raise typer.Exit(1)

    @app.command()
    def doctor(
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    ) -> None:
        """Say what is installed and built, and test every operator; exit code 1 on a failure."""
        diagnosis = doctor_module.diagnose()
        typer.echo(diagnosis.to_json() if as_json else str(diagnosis))
        if not diagnosis.ok:
            raise typer.Exit(1)

    return app


def main() -> None:
    """Entry point of the script ``flash-llm``."""
    try:
        app = build_app()
    except ImportError as error:
        sys.exit(f"flash-llm: {error}")
    app()
