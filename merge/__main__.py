"""`python -m merge config.yaml OUT`: checkpoints in, one checkpoint out."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Nothing is begun while the imports run: Ctrl-C ends them without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import difflib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from inputs.command import (
    ConfigPath,
    Debug,
    Overrides,
    Quiet,
    configure_logging,
    reported_errors,
    run_and_exit,
    size,
)
from merge.errors import MISTAKES


class _ConfigFirst(TyperGroup):
    """A first word that is no command is the config of a merge."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                ctx.fail(f"no command and no file {args[0]!r}; did you mean {near[0]!r}?")
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ConfigFirst,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help=f"{__doc__.strip()} `run` may be left out." if __doc__ else None,
)

Out = Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a .safetensors file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what a merge made there.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a killed merge of the same config and sizes.")
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A file, a folder or a Hub id.")]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...")]
Base = Annotated[str | None, typer.Option("--base", help="What they were fine-tuned from.")]


@app.command()
def run(
    config: ConfigPath,
    out: Out,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    max_shard_size: Annotated[str, typer.Option(help="The most bytes of one file.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and stop.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge checkpoints as a config in mergekit's shape says."""
    with reported_errors(debug, MISTAKES, go_on="run the same command with --resume"):
        configure_logging(quiet=quiet, debug=debug)
        from inputs.config import load_config
        from merge.planning.config import MergeConfig

        settings = load_config(config, overrides or [], MergeConfig)
        max_shard_bytes = size(max_shard_size)
        from merge.result.output import check_output

        check_output(out.resolve(), overwrite=overwrite)
        from merge.merging import describe, merge, prepare

        if dry_run:
            with ExitStack() as opened:
                order = prepare(settings, opened)
                order.check_output(out.resolve())
                typer.echo(describe(order, max_shard_bytes=max_shard_bytes, out=out))
            return
        record = merge(
            settings,
            out,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            overwrite=overwrite,
            progress=not quiet,
        )
        if not quiet:
            from inputs.budget import format_bytes

            typer.echo(
                f"{out}: {format_bytes(record['bytes_written'])} from "
                f"{format_bytes(record['bytes_read'])} in {record['seconds']:.1f} s, peak "
                f"{format_bytes(record['peak_bytes'])}"
            )


@app.command()
def inspect(
    models: Models,
    base: Base = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder for the tables and the picture.")
    ] = None,
    memory_budget: Annotated[str, typer.Option(help="The most bytes of tensors.")] = "512MiB",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare models: norms, cosines of their deltas, sign conflicts, frozen and tied tensors."""
    with reported_errors(debug, MISTAKES), ExitStack() as opened:
        configure_logging(quiet=quiet, debug=debug)
        budget = size(memory_budget)
        from merge.checkpoints import open_checkpoint
        from merge.inspection.inspection import inspect_models

        checkpoints = [opened.enter_context(open_checkpoint(model)) for model in models]
        anchor = opened.enter_context(open_checkpoint(base)) if base is not None else None
        inspection = inspect_models(
            checkpoints, base=anchor, memory_budget=budget, progress=not quiet
        )
        typer.echo(inspection.to_markdown())
        if out is not None:
            from inputs.figures import save_figure
            from merge.inspection.heatmap import plot_inspection

            inspection.save(out)
            save_figure(plot_inspection(inspection.tables()), out / "inspection.png")
            typer.echo(f"\n{out}: tables as CSV, inspection.png and .svg")


@app.command()
def adapters(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Merge LoRA adapters into one adapter, as a config says: no base is read."""
    with reported_errors(debug, MISTAKES), ExitStack() as opened:
        configure_logging(quiet=False, debug=debug)
        from inputs.config import load_config
        from merge.adapters.config import AdapterMergeConfig

        settings = load_config(config, overrides or [], AdapterMergeConfig)
        import torch

        from merge.adapters import combine_adapters, open_adapter

        record = combine_adapters(
            [opened.enter_context(open_adapter(entry.model)) for entry in settings.models],
            settings.merge_method,
            weights=[entry.parameters.weight for entry in settings.models],
            out=out,
            rank=settings.rank,
            seed=settings.seed,
            dtype=getattr(torch, settings.dtype),
            **settings.parameters,
        )
        _write_record(out, record)


@app.command()
def extract(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    base: Annotated[str, typer.Option("--base", help="What it was fine-tuned from.")],
    rank: Annotated[int | None, typer.Option(help="The rank of every module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of squared singular values to keep.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave out what no adapter can hold.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Extract a LoRA adapter from a full fine-tune, by rank or by energy."""
    with reported_errors(debug, MISTAKES), ExitStack() as opened:
        configure_logging(quiet=False, debug=debug)
        from merge.adapters import extract_adapter
        from merge.checkpoints import open_checkpoint
        from merge.checkpoints.envelopes import WRAPPERS

        record = extract_adapter(
            opened.enter_context(open_checkpoint(base, prefixes=WRAPPERS)),
            opened.enter_context(open_checkpoint(model, prefixes=WRAPPERS)),
            out,
            rank=rank,
            energy=energy,
            allow_partial=allow_partial,
        )
        _write_record(out, record)


def _write_record(out: Path, record: dict[str, Any]) -> None:
    from inputs.files import write_whole

    write_whole(out / "merge.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    typer.echo(f"{out}: an adapter; merge.json has what was kept of each module")


@app.command()
def methods(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None) -> None:
    """Print the catalogue of merge methods, or all there is to know of one."""
    with reported_errors(False, MISTAKES):
        from merge.documentation import methods_text

        typer.echo(methods_text(name))


if __name__ == "__main__":
    run_and_exit(app, "python -m merge")
