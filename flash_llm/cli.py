"""The command ``flash-llm``: argument parsing only; commands call functions of the package."""

# No postponed annotations here: typer is imported inside, and reads the annotations that it finds.

import sys
from pathlib import Path
from typing import Annotated, Any


def build_app() -> Any:
    """Build the typer application with the commands ``demo`` and ``doctor``.

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
    from flash_llm import demo as demo_module
    from flash_llm import doctor as doctor_module

    app = typer.Typer(
        name="flash-llm",
        help="Language models with sparse weights, loaded as sparse and computed as dense.",
        no_args_is_help=True,
        add_completion=False,
    )

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
        try:
            agrees = demo_module.main(
                sparsity=sparsity,
                windows=windows,
                calibration_samples=calibration_samples,
                device=device,
                question=question,
                json_path=json_path,
            )
        except (ImportError, RuntimeError, ValueError) as error:
            typer.echo(f"flash-llm demo: {error}", err=True)
            raise typer.Exit(1) from None
        if not agrees:
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
