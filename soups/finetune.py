"""`python -m soups.finetune config.yaml`: make the zoo that a config describes."""

from __future__ import annotations

import signal
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Nothing is begun while the imports run: Ctrl-C ends them without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer

from inputs.command import (
    ConfigPath,
    Debug,
    Fresh,
    Overrides,
    Quiet,
    choose_device,
    configure_logging,
    new_app,
    reported_errors,
)
from inputs.config import load_config
from soups.config import LearnConfig
from soups.errors import MISTAKES, SoupError

app = new_app()


@app.command()
def finetune(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune one base model into a zoo of ingredients, as the config's `zoo.finetune` says.

    The config is that of `soups.learn`. All ingredients are trained together (`joint: false`: one
    after another). What is finished is kept, and what is under way is saved now and then and on
    Ctrl-C; run it again to go on.
    """
    with reported_errors(debug, MISTAKES):
        configure_logging(quiet=quiet, debug=debug)
        settings = load_config(config, overrides or [], LearnConfig)
        if settings.zoo.finetune is None:
            raise SoupError(
                f"{config}: zoo.finetune is not set, so there is nothing to make; add it (see "
                "configs/digits.yaml), or run `python -m soups.learn` on the finished checkpoints"
            )
        run(settings, root=config.parent, fresh=fresh, progress=not quiet)


def run(config: LearnConfig, *, root: Path, fresh: bool, progress: bool) -> None:
    """Load the images, make the zoo, show its table."""
    from inputs.data import load_learning_data
    from soups.report_door import shut
    from soups.zoo import describe, left_out, make_zoo

    device = choose_device(config.device)
    data = load_learning_data(config.data, memory_budget=config.memory_budget)
    with shut(lambda: "fine-tuning"):
        table = make_zoo(config, data, root=root, device=device, fresh=fresh, progress=progress)
    typer.echo(describe(table, left_out(config.zoo.path)))
    count = f"{len(table)} ingredient{'s' * (len(table) != 1)}"
    typer.echo(f"{count} in {config.zoo.path}, with curves.png")


if __name__ == "__main__":
    app(prog_name="python -m soups.finetune")
