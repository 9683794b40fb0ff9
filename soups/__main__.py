"""`python -m soups doctor zoo/`: what a folder of checkpoints is fit for."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Nothing is begun while the imports run: Ctrl-C ends them without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
from pathlib import Path
from typing import Annotated

import typer

from inputs.command import (
    Debug,
    Overrides,
    Quiet,
    configure_logging,
    new_app,
    reported_errors,
    run_and_exit,
    size,
)
from soups.errors import MISTAKES

app = new_app()


@app.callback()
def soups() -> None:
    """Model soups: see also python -m soups.finetune, soups.learn and soups.leaderboard."""


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of checkpoints.")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A YAML file of soups.learn: its model and its images."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Which one the others were fine-tuned from.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=2, help="With --config, on how many images of select.")
    ] = 512,
    memory_budget: Annotated[str, typer.Option(help="The most bytes of tensors.")] = "512MiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what is wrong or odd with a folder of checkpoints, and what would probably work on it.

    Duplicates, values that are not finite, other architectures, heads and bases, the likely base;
    with --config also which ones share a basin: the loss half-way between each two.
    """
    with reported_errors(debug, MISTAKES):
        configure_logging(quiet=quiet or as_json, debug=debug)
        from inputs.config import load_config
        from soups.config import LearnConfig

        settings = None
        if config is not None:
            settings = load_config(config, overrides or [], LearnConfig)
        elif overrides:
            raise typer.BadParameter(f"{overrides[0]!r} is a setting of a config; give --config")
        budget = size(memory_budget)
        from soups.doctor.diagnosis import examine
        from soups.doctor.wording import wording

        diagnosis = examine(
            folder,
            base=base,
            config=settings,
            root=config.parent if config is not None else Path(),
            images=images,
            memory_budget=budget,
            progress=not (quiet or as_json),
        )
        typer.echo(json.dumps(diagnosis.record(), indent=1) if as_json else wording(diagnosis))


if __name__ == "__main__":
    run_and_exit(app, "python -m soups")
