import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from fleet.serve import app
from fleet.variants import Encoded, Store, Variant, tensor_hash
from inputs.config import TimmModel
from inputs.models import build_model

ROOT = Path(__file__).parents[2]
RESNET = {
    "source": "timm",
    "name": "resnet10t",
    "kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8, "stem_type": ""},
}
ABOUT = {
    "model": RESNET,
    "data": {"size": 8, "channels": 1, "mean": [0.3], "std": [0.38], "classes": 10},
}


def resnet(classes: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    root = Path()
    return build_model(
        TimmModel.model_validate(RESNET), classes=classes, channels=1, root=root
    ).eval()


def add_head(store: Store, name: str, classes: int) -> None:
    """A variant that has the base's layers and a head of its own."""
    head = {k: v.detach() for k, v in resnet(classes, len(name)).named_parameters() if "fc" in k}
    own = {key: Encoded("plain", {"value": tensor_hash(value)}) for key, value in head.items()}
    store.add(
        Variant(name, "base", own, classes, {}),
        {tensor_hash(value): value for value in head.values()},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "store"
    store = Store.create(folder, resnet(10, 0).state_dict(), about=ABOUT)
    add_head(store, "two", 2)
    add_head(store, "three", 3)
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch", 0], "max_batch: found 0 inputs; wanted at least 1"),
        (["--queue", 3], "queue: found 3 inputs; wanted at least max_batch, 64"),
        (["--max-wait-ms", -1], "max_wait: found -0.001 s"),
        (["--timeout", 0], "timeout: found 0.0 s"),
        (["--max-request", "much"], "--max-request: 'much' is no size; wanted bytes, such as"),
        (["--memory-budget", "2 apples"], "--memory-budget: '2 apples' is no size"),
        (["--memory-budget", "2"], "--memory-budget: found 2 B; wanted at least "),
        (["--model", "a.yaml", "--timm", "b"], "--model and --timm both say which model it is"),
        (["--model", "none.yaml"], "none.yaml: no such config file"),
        (["--tokens", "none.yaml"], "none.yaml: No such file or directory"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: is no address of this machine"),
    ],
)
def test_settings_that_are_refused(folder: Path, arguments: list[Any], message: str):
    assert message in error(folder, *arguments)


def test_folders_that_are_no_stores(tmp_path: Path):
    assert "is no store" in error(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is no store" in error(tmp_path / "empty")


def test_a_store_that_does_not_say_what_its_base_is(tmp_path: Path):
    Store.create(tmp_path / "store", resnet(2, 0).state_dict())
    assert "its base record does not say model and data; say it with --model" in error(
        tmp_path / "store"
    )


def test_a_config_with_mistakes(folder: Path, tmp_path: Path):
    (tmp_path / "model.yaml").write_text("model: {source: tim}\ndata: {clases: 3}\n")
    text = error(folder, "--model", tmp_path / "model.yaml")
    assert "model.source: found 'tim'" in text
    assert "unknown key; did you mean 'classes'?" in text


def test_tokens_with_mistakes(folder: Path, tmp_path: Path):
    (tmp_path / "tokens.yaml").write_text("two: swordfish\n")
    text = error(folder, "--tokens", tmp_path / "tokens.yaml")
    assert "'two': found no SHA-256" in text
    assert "swordfish" not in text


def test_a_second_server_on_the_port(folder: Path):
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken" in error(folder, "--port", port)


def test_mistakes_are_told_before_torch_is_imported(folder: Path):
    code = (
        "import sys\n"
        "from fleet.serve import app\n"
        "try:\n"
        "    app()\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = str(first.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), "--port", port],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    assert f"port {port} of 127.0.0.1 is taken" in done.stderr
    assert done.stdout == "2 False\n"


def test_the_extra_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fleet.serve.EXTRA", ("fastapi", "no_such_package"))
    assert "needs no_such_package: pip install 'model-soups-toolkit[serve]'" in error(folder)


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "fleet.serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+): 2 variants of ", line)
        assert found, (line, process.communicate())
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_store_is_served_and_followed(folder: Path, tmp_path: Path):
    image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    with (
        serving(folder, "--device", "cpu", "--memory-budget", "64MiB") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        names = [one["name"] for one in client.get("/v1/variants").json()["variants"]]
        assert names == ["three", "two"]
        for name, classes in (("two", 2), ("three", 3)):
            question = {"variant": name, "inputs": [image.tolist()] * 3}
            answer = client.post("/v1/predict", json=question)
            assert answer.status_code == 200, answer.text
            found = [one["logits"] for one in answer.json()["predictions"]]
            model = resnet(classes, 0)
            model.load_state_dict(Store(folder).tensors(name))
            expected = model(image[None])[0]
            torch.testing.assert_close(torch.tensor(found), expected.expand(3, -1))
        assert client.post("/v1/predict", json={"variant": "twoo", "inputs": [1]}).json() == {
            "error": "no variant 'twoo'; did you mean 'two'?"
        }
        text = client.get("/metrics").text
        assert "fleet_tenants_" in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_variants_come_and_go_and_tokens_open_them(tmp_path: Path):
    folder = tmp_path / "store"
    store = Store.create(folder, resnet(10, 0).state_dict(), about=ABOUT)
    add_head(store, "two", 2)
    add_head(store, "three", 3)
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("two", "late")}
    (tmp_path / "tokens.yaml").write_text(json.dumps(hashes))
    question = {"variant": "late", "inputs": [torch.zeros(1, 8, 8).tolist()]}

    def status(client: httpx.Client, token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return client.post("/v1/predict", json=question, headers=headers).status_code

    with (
        serving(folder, "--tokens", tmp_path / "tokens.yaml") as (_, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert [status(client, token) for token in ("late", "two", "none")] == [404, 403, 401]
        add_head(store, "late", 4)
        until(lambda: status(client, "late") == 200)
        store.remove("late")
        until(lambda: status(client, "late") == 404)


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
