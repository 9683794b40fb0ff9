"""`python -m fleet.store`: a base and its variants, small, in one folder."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Nothing is begun while the imports run: Ctrl-C ends them without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from fleet.errors import FleetError
from fleet.storage.config import BuildConfig, HowToStore, zoo_config
from fleet.storage.records import BASE, Encoded
from inputs.budget import format_bytes
from inputs.command import (
    Debug,
    Quiet,
    configure_logging,
    reported_errors,
    run_and_exit,
)
from inputs.config import explain, load_config
from inputs.errors import InputError
from merge.errors import MISTAKES as MISTAKES_BELOW

if TYPE_CHECKING:
    from fleet.variants import Store

MISTAKES = (*MISTAKES_BELOW, FleetError)
PROBLEMS_FOUND = 1
ROWS_SHOWN = 40

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help=__doc__,
)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="A folder that holds a store.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A variant of the store.")]
Exact = Annotated[bool, typer.Option("--exact", help="Keep every bit.")]
Tolerance = Annotated[
    float | None, typer.Option(help="The most error of a tensor, relative to its change.")
]


@app.command(no_args_is_help=True)
def build(
    places: Annotated[
        list[str],
        typer.Argument(metavar="[CONFIG] OUT [KEY=VALUE]...", help="A YAML file; a new folder."),
    ],
    zoo: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Its base and checkpoints; no CONFIG.")
    ] = None,
    exact: Exact = False,
    tolerance: Tolerance = None,
    lost: Annotated[
        float | None, typer.Option(help="The most accuracy lost on the zoo's data, as a fraction.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a store of a base and its variants, as a config says, or of a zoo (default: exact).

    A build that was killed goes on when it is run again. The table says of each variant what it
    takes, and how near it is.
    """
    with reported_errors(debug, MISTAKES):
        configure_logging(quiet=quiet, debug=debug)
        measure = _measure(exact, tolerance, lost)
        if zoo is not None:
            if len(places) != 1:
                raise InputError(f"build --zoo: wanted OUT alone, found {' '.join(places)}")
            settings, out, root = _of_zoo(zoo, measure or {"exact": True}), places[0], Path()
        else:
            if len(places) < 2 or "=" in places[1]:
                raise InputError("build: wanted CONFIG and OUT, or --zoo FOLDER and OUT")
            if measure:
                raise InputError(
                    "build: --exact, --tolerance and --lost are for --zoo; with a config say "
                    "exact=true, tolerance=0.1 or accuracy.lost=0.005"
                )
            config, out, *overrides = places
            settings, root = load_config(config, overrides, BuildConfig), Path(config).parent
        from fleet.storage.building import build

        typer.echo(build(settings, Path(out), root=root, progress=not quiet).describe(ROWS_SHOWN))


@app.command()
def add(
    store: StorePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of that name is replaced.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, or a folder with adapters.")
    ],
    node: Annotated[str, typer.Option(help="The node that it is made from.")] = BASE,
    exact: Exact = False,
    tolerance: Tolerance = None,
    debug: Debug = False,
) -> None:
    """Add a variant, or replace one; as closely as the store was built, unless said."""
    with reported_errors(debug, MISTAKES):
        configure_logging(quiet=True, debug=debug)
        measure = _measure(exact, tolerance, None)
        opened = _open(store)
        opened.node(node)
        how = _how(opened, measure)
        from fleet.storage.building import add_variant

        variant = add_variant(opened, name, model, how, node=node)
        own, plain = opened.nbytes(name), opened.plain_bytes(name)
        error = variant.about.get("error")
        near = f", error {error:.3g}" if isinstance(error, float) else ""
        typer.echo(f"{name}: {format_bytes(own)} of {format_bytes(plain)}, over {node}{near}")


@app.command()
def remove(store: StorePath, name: Name, debug: Debug = False) -> None:
    """Remove a variant; gc frees its bytes."""
    with reported_errors(debug, MISTAKES):
        _open(store).remove(name)


@app.command(name="list")
def list_variants(store: StorePath, debug: Debug = False) -> None:
    """Print what each variant takes, and all of them together."""
    with reported_errors(debug, MISTAKES):
        opened = _open(store)
        from fleet.storage.building import build_table

        typer.echo(build_table(opened).describe())


@app.command()
def show(store: StorePath, name: Name, debug: Debug = False) -> None:
    """Print what a variant has of its own, and from which nodes the rest is."""
    with reported_errors(debug, MISTAKES):
        opened = _open(store)
        path = " → ".join(node.name for node in opened.path(name))
        variant = opened.variant(name)
        own, plain = opened.nbytes(name), opened.plain_bytes(name)
        typer.echo(f"{name}: {format_bytes(own)} of its own of {format_bytes(plain)}, over {path}")
        if variant.classes is not None:
            typer.echo(f"classes: {variant.classes}")
        for key, value in sorted(variant.about.items()):
            typer.echo(f"{key}: {value}")
        own_parts = {**variant.tensors, **variant.adapters}
        rows = [
            (key, _described(encoded), format_bytes(_nbytes(opened, encoded)))
            for key, encoded in sorted(own_parts.items())
        ]
        if rows:
            from tabulate import tabulate

            typer.echo()
            typer.echo(tabulate(rows, ["tensor", "stored as", "bytes"], tablefmt="pipe"))


@app.command()
def export(
    store: StorePath,
    name: Name,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A .safetensors file; a folder for an adapter.")
    ],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only what it has over the base, as PEFT reads it.")
    ] = False,
    prefix: Annotated[
        str, typer.Option(help="Put before an adapter's names, to get the model's own.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Write a variant as a plain checkpoint again, or as an adapter folder."""
    with reported_errors(debug, MISTAKES):
        if adapter:
            _open(store).export_adapter(name, path, prefix=prefix)
            return
        if prefix:
            raise InputError("export: --prefix is for --adapter")
        _open(store).export(name, path)


@app.command()
def verify(store: StorePath, debug: Debug = False) -> None:
    """Read everything, and print each problem; exit code 1 if there is one."""
    with reported_errors(debug, MISTAKES):
        opened = _open(store)
        problems = opened.verify()
        for problem in problems:
            typer.echo(problem, err=True)
        if problems:
            raise typer.Exit(PROBLEMS_FOUND)
        count = len(opened.packs.contents)
        typer.echo(f"{store}: {len(opened.variants)} variants in {count} packs, all of them whole")


@app.command()
def gc(store: StorePath, debug: Debug = False) -> None:
    """Remove files of which nothing is needed, and what killed runs left."""
    with reported_errors(debug, MISTAKES):
        freed = _open(store).gc()
        typer.echo(f"{format_bytes(freed)} freed")


def _open(folder: Path) -> Store:
    if not folder.is_dir():
        raise FleetError(f"{folder}: there is no such folder; name one that holds a store")
    from fleet.variants import Store

    return Store(folder)


def _measure(exact: bool, tolerance: float | None, lost: float | None) -> dict[str, Any]:
    """What the options say of how closely tensors are kept; nothing, if nothing."""
    given: dict[str, Any] = {}
    if exact:
        given["exact"] = True
    if tolerance is not None:
        given["tolerance"] = tolerance
    if lost is not None:
        given["accuracy"] = {"lost": lost}
    if len(given) > 1:
        raise InputError("give one of --exact, --tolerance and --lost")
    return given


def _of_zoo(folder: Path, measure: dict[str, Any]) -> BuildConfig:
    try:
        return zoo_config(folder, **measure)
    except ValidationError as error:
        raise _explained(str(folder), error, measure) from error


def _how(store: Store, measure: dict[str, Any]) -> HowToStore:
    """The measure that is given, else the store's own; the rest as the store was built."""
    built = store.about.get("build")
    own = dict(built["how"]) if isinstance(built, dict) and "how" in built else {"exact": True}
    if measure:
        own = {**own, "exact": False, "tolerance": None, "accuracy": None, **measure}
    elif own.get("accuracy"):
        raise InputError(
            f"{store.folder}: was built to keep an accuracy, which is not measured here; say "
            "--tolerance 0.1 or --exact"
        )
    try:
        return HowToStore.model_validate(own)
    except ValidationError as error:
        raise _explained(str(store.folder), error, own) from error


def _explained(where: str, error: ValidationError, data: dict[str, Any]) -> InputError:
    problems = explain(error, data)
    return InputError("\n".join(f"{where}: {key}: {text}" for key, text in problems.items()))


def _described(encoded: Encoded) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in encoded.settings.items())
    return f"{encoded.encoding} ({settings})" if settings else encoded.encoding


def _nbytes(store: Store, encoded: Encoded) -> int:
    return sum(map(store.packs.nbytes, set(encoded.parts.values())))


if __name__ == "__main__":
    run_and_exit(app, "python -m fleet.store")
