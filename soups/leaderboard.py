"""`python -m soups.leaderboard results/…`: runs joined into one table for each task, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inputs.command import Debug, Quiet, configure_logging, new_app, reported_errors, run_and_exit
from soups.errors import MISTAKES

app = new_app()

Folders = Annotated[
    list[Path],
    typer.Argument(
        metavar="FOLDER…",
        help="Results of runs and sweeps, or what has such directly in it.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write.")]
Published = Annotated[
    bool, typer.Option("--published", help="Show the numbers of two papers too, below and quoted.")
]


@app.command()
def leaderboard(
    folders: Folders,
    out: Out = Path("results"),
    published: Published = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Join runs into one table for each task, and write a page to look at them.

    The tables are leaderboard_TASK.csv, .md, .tex and .parquet; the page is leaderboard.html.
    """
    with reported_errors(debug, MISTAKES):
        configure_logging(quiet=quiet, debug=debug)
        from soups.boards.making import write_boards

        boards = write_boards(folders, out, quoted=published)
    if quiet:
        return
    for title, sentence in boards.headlines:
        typer.echo(f"{title}: {sentence}")
    typer.echo(f"\n{out}: {', '.join(file.name for file in boards.files)}")
    typer.echo(f"Open {boards.files[-1]} in a browser.")


if __name__ == "__main__":
    run_and_exit(app, "python -m soups.leaderboard")
