"""`python -m soups.learn config.yaml`: from a zoo of checkpoints to soups and a leaderboard."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Nothing is begun while the imports run: Ctrl-C ends them without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from inputs.command import (
    ConfigPath,
    Debug,
    Fresh,
    Overrides,
    Quiet,
    configure_logging,
    new_app,
    reported_errors,
)
from inputs.config import checked, read_config
from soups.config import LearnConfig
from soups.errors import MISTAKES
from soups.sweeps.sweep import is_sweep, plan_sweep, run_sweep

app = new_app()


@app.command()
def learn(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Fresh = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn soups from a zoo of fine-tuned checkpoints and rank them.

    What is finished is not run again unless its inputs changed; run the same command to go on.
    A config with `sweep` makes many runs of itself, and tables over all of them.
    """
    with reported_errors(debug, MISTAKES):
        configure_logging(quiet=quiet, debug=debug)
        read = read_config(config, overrides or [])
        if is_sweep(read):
            sweep = plan_sweep(read)
            run_sweep(sweep, root=config.parent, fresh=fresh, progress=not quiet, say=say)
            return
        settings = checked(read, LearnConfig)
        from soups.pipeline import run

        run(settings, root=config.parent, fresh=fresh, progress=not quiet, say=say)


def say(text: str) -> None:
    """Print what the run reports: the plan, the table, where things are."""
    import typer

    typer.echo(text)


if __name__ == "__main__":
    app(prog_name="python -m soups.learn")
