"""`python -m fleet.serve STORE`: every variant of a store, answering over HTTP."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Nothing is begun while the imports run: Ctrl-C ends them without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from fleet.errors import FleetError
from fleet.server.limits import Limits
from inputs.budget import format_bytes
from inputs.command import (
    Debug,
    Quiet,
    configure_logging,
    new_app,
    reported_errors,
    run_and_exit,
)
from inputs.extras import missing_extra
from merge.errors import MISTAKES

if TYPE_CHECKING:
    from fleet.server.model_inputs import ModelInputs
    from fleet.server.served import ServedModel
    from fleet.server.service import Engine

app = new_app()

EXTRA = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
UNANSWERED = 1
DEFAULTS = Limits()


@app.command()
def serve(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A folder that holds a store.")],
    model: Annotated[
        Path | None, typer.Option(help="A YAML file: what the store itself does not say.")
    ] = None,
    timm: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base is this model of timm.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(help="The most bytes of variants in memory, such as 2GiB.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="The most inputs of a batch.")
    ] = DEFAULTS.max_batch,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long an input waits for others.")
    ] = DEFAULTS.max_wait_s * 1000,
    queue: Annotated[int, typer.Option(help="How many inputs may wait.")] = DEFAULTS.queue,
    max_request: Annotated[str, typer.Option(help="The largest request.")] = "8MiB",
    max_pixels: Annotated[
        int, typer.Option(help="The most pixels of a request's images.")
    ] = DEFAULTS.max_pixels,
    max_connections: Annotated[
        int, typer.Option(help="The most that are open.")
    ] = DEFAULTS.max_connections,
    timeout: Annotated[
        float, typer.Option(help="The most seconds for a request to arrive, and for its answer.")
    ] = DEFAULTS.timeout_s,
    tokens: Annotated[
        Path | None, typer.Option(help="A YAML file of lines `variant: SHA-256 of its token`.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve every variant of a store over HTTP.

    POST /v1/predict takes {"variant": NAME, "inputs": [...]} or a form of `variant` and `images`;
    GET /v1/variants, /health and /metrics. SIGTERM and Ctrl-C end it when it has answered what it
    took. Variants that are added, replaced or removed meanwhile are taken up within a second.
    """
    with reported_errors(debug, (FleetError, *MISTAKES)):
        configure_logging(quiet=quiet, debug=debug)
        limits = Limits(
            max_batch=max_batch,
            max_wait_s=max_wait_ms / 1000,
            queue=queue,
            max_request_bytes=_size("max-request", max_request),
            max_pixels=max_pixels,
            max_connections=max_connections,
            timeout_s=timeout,
        )
        budget = None if memory_budget is None else _size("memory-budget", memory_budget)
        _check_extra()
        from fleet.server.listening import DrainingServer, take_port
        from fleet.server.tokens import TokenFile

        token_file = None if tokens is None else TokenFile(tokens)
        if token_file is not None:
            token_file.tokens()
        served, root = _served(store, model, timm)
        taken = take_port(host, port)
        engine, read_variants, inputs = _open(store, served, root, limits, device, budget)
        if not quiet and tokens is None and not _is_local(taken.getsockname()[0]):
            typer.echo(
                "anyone who reaches this address may ask any variant: see --tokens", err=True
            )
        from fleet.server.app import create_app
        from fleet.server.service import Service

        service = Service(
            engine,
            read_variants,
            inputs,
            limits,
            read_tokens=None if token_file is None else token_file.tokens,
        )

        def ready(url: str) -> None:
            typer.echo(f"{url}: {len(service.variants)} variants of {store}; Ctrl-C ends it")

        drain = service.batcher.drain
        server = DrainingServer(
            create_app(service), taken, drain, limits, ready=ready, access_log=debug
        )
        if not server.serve_until_told():
            raise typer.Exit(UNANSWERED)


def _served(store: Path, model: Path | None, timm: str | None) -> tuple[ServedModel, Path]:
    """The model as `--model` says, else as the store does, and where its paths start from."""
    from fleet.server.served import ServedModel
    from fleet.storage.manifest import Manifest
    from inputs.config import load_config

    if model is not None and timm is not None:
        raise FleetError("--model and --timm both say which model it is; give one of them")
    first = Manifest(store).read()[:1]
    if model is not None:
        return load_config(model, [], ServedModel), model.parent
    about: Mapping[str, Any] = first[0].content.get("about", {}) if first else {}
    return ServedModel.from_about(about, str(store), timm), store


def _open(
    folder: Path,
    served: ServedModel,
    root: Path,
    limits: Limits,
    device: str,
    budget: int | None,
) -> tuple[Engine, Callable[[], Mapping[str, Any]], ModelInputs]:
    """What answers, which variants there are, and what their model takes."""
    from fleet.server.served import build_served
    from fleet.tenants import Tenants
    from fleet.variants import Store
    from inputs.command import choose_device

    store = Store(folder)
    largest = max(map(store.nbytes, store.variants), default=0)
    if budget is not None and budget < largest:
        raise FleetError(
            f"--memory-budget: found {format_bytes(budget)}; wanted at least "
            f"{format_bytes(largest)}, which is the largest variant's own"
        )
    module, inputs = build_served(served, root, limits)
    tenants = Tenants(store, module, memory_budget=budget, device=choose_device(device))
    return tenants, lambda: store.variants, inputs


def _size(option: str, text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise FleetError(f"--{option}: {text!r} is no size; wanted bytes, such as 8MiB") from error


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise FleetError(missing_extra("serve", "serving", missing))


def _is_local(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


if __name__ == "__main__":
    run_and_exit(app, "python -m fleet.serve")
