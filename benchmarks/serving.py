"""`python -m fleet.serve` with 1, 8 and 64 clients: batches of many requests against one at a time.

    python benchmarks/serving.py                     # both stores, about eight minutes
    python benchmarks/serving.py --only digits       # one of them: the zoo of configs/digits.yaml
    python benchmarks/serving.py --quick             # short turns, to see that it works

benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from medians import interval
from recording import ROOT, append_rows

CLIENTS = (1, 8, 64)
SIDES = {"batched": 64, "single": 1}  # side → inputs of a batch
REQUESTS = 256
VARIANTS = 64
RANK = 8
CHECKED = 16
WARM_UP_S = 1.0
Row = dict[str, Any]


def main(
    only: Annotated[str, typer.Option(help="Stores whose name contains this.")] = "",
    zoo: Annotated[Path, typer.Option(help="A zoo, for the first store.")] = ROOT / "zoo/digits",
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns; medians count.")] = 9,
    seconds: Annotated[float, typer.Option(help="How long a turn is.")] = 3.0,
    device: Annotated[str, typer.Option(help="The servers': cpu, cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Few, short turns.")] = False,
    record: Annotated[bool, typer.Option(help="Append to results/benchmarks.csv.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of a server; 0: one for each core.")] = 0,
    client: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure both servers of a store in turns, clients in a process of their own."""
    if client:
        clients_process(Path(client))
        return
    threads = threads or os.cpu_count() or 1
    if quick:
        turns, seconds = min(turns, 2), min(seconds, 1.0)
    rows: list[Row] = []
    for name, make in {"digits zoo": of_zoo, "vit": of_vits}.items():
        if only not in name:
            continue
        if name == "digits zoo" and not (zoo / "zoo.json").exists():
            print(f"{name}: there is none in {zoo}; python -m soups.finetune configs/digits.yaml")
            continue
        print(name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(folder, zoo, quick)
            found = measure(folder, turns, seconds, device, threads)
        found = [{**row, "case": f"{name}, {row['case']}"} for row in found]
        rows += found
        if record and not quick:  # at once: a run may be stopped
            append_rows(Path(__file__).stem, found, turns, f"{threads} threads; {device}")
    show(rows)


# --- stores, and what is asked of them -----------------------------------------------------------


def of_zoo(folder: Path, zoo: Path, quick: bool) -> None:
    """The zoo's fine-tunes bit for bit; its images as numbers."""
    import numpy as np

    command = [sys.executable, "-m", "fleet.store", "build", "--zoo", zoo, folder / "store"]
    subprocess.run([*map(str, command), "--exact", "--quiet"], check=True, cwd=ROOT, stdout=2)
    names = [file.stem for file in zoo.glob("*.safetensors") if file.stem.isdigit()]
    draws = np.random.default_rng(0)

    def request(number: int) -> bytes:
        image = draws.standard_normal((1, 8, 8)).round(3).tolist()
        body = {"variant": names[number % len(names)], "inputs": [image]}
        return post("application/json", json.dumps(body).encode())

    write_requests(folder, request)


def of_vits(folder: Path, zoo: Path, quick: bool) -> None:
    """A random ViT-Ti on 32 x 32 images, variants with low-rank parts and heads; PNG files."""
    import numpy as np
    import torch
    from PIL import Image

    from fleet.variants import Encoded, Store, Variant, tensor_hash
    from inputs.config import TimmModel
    from inputs.models import build_model

    kwargs = {"img_size": 32, "patch_size": 4, "depth": 2 if quick else 12}
    described = {"source": "timm", "name": "vit_tiny_patch16_224", "kwargs": kwargs}
    torch.manual_seed(0)
    model = build_model(TimmModel.model_validate(described), classes=10, channels=3, root=ROOT)
    base = model.state_dict()
    about = {"model": described, "data": {"size": 32, "classes": 10}}
    store = Store.create(folder / "store", base, about=about)
    draw = torch.Generator().manual_seed(0)
    names = [f"vit-{number:02d}" for number in range(VARIANTS)]
    for name in names:
        own, tensors = {}, {}
        for key, value in base.items():
            if "qkv.weight" in key:
                wide, narrow = value.shape
                parts = {
                    "down": torch.randn(RANK, narrow, generator=draw) / narrow**0.5,
                    "up": torch.randn(wide, RANK, generator=draw) / RANK**0.5,
                }
                encoding, settings = "low_rank", {"scale": 0.1}
            elif key.startswith("head."):
                parts, encoding, settings = {}, "plain", {}
                parts["value"] = torch.randn(value.shape, generator=draw) / 14
            else:
                continue
            hashes = {part: tensor_hash(tensor) for part, tensor in parts.items()}
            own[key] = Encoded(encoding, hashes, settings)
            tensors.update((hashes[part], tensor) for part, tensor in parts.items())
        store.add(Variant(name, "base", own, 10, {}), tensors)
    draws = np.random.default_rng(0)

    def request(number: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(draws.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        fields = {'"variant"': names[number % len(names)].encode()}
        fields['"images"; filename="0.png"'] = file.getvalue()
        body = b"".join(
            b"--boundary\r\nContent-Disposition: form-data; name=%s\r\n\r\n%s\r\n"
            % (name.encode(), content)
            for name, content in fields.items()
        )
        return post("multipart/form-data; boundary=boundary", body + b"--boundary--\r\n")

    write_requests(folder, request)


def post(kind: str, body: bytes) -> bytes:
    """A whole request of HTTP/1.1."""
    head = (
        "POST /v1/predict HTTP/1.1\r\nHost: benchmark\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def write_requests(folder: Path, request: Callable[[int], bytes]) -> None:
    (folder / "requests").mkdir()
    for number in range(REQUESTS):
        (folder / "requests" / f"{number:03d}").write_bytes(request(number))


# --- the processes -------------------------------------------------------------------------------


class Server:
    """One server, from its first answer on."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def batches(self) -> tuple[float, float]:
        """How many batches there were, and of how many inputs."""
        text = urlopen(f"{self.url}/metrics").read().decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        return float(values["fleet_batch_inputs_count"]), float(values["fleet_batch_inputs_sum"])


@contextmanager
def serving(store: Path, max_batch: int, device: str, threads: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "fleet.serve", str(store), "--port", "0", "--device", device]
    command += ["--max-batch", str(max_batch)]
    with process(command, threads) as started:
        assert started.stdout is not None
        found = re.match(r"(http://\S+): ", started.stdout.readline())
        if found is None:
            raise SystemExit(f"the server ended with {started.wait()}")
        yield Server(started, found[1])


@contextmanager
def process(command: Sequence[str], threads: int) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        yield started
    finally:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(20)
        started.kill()
        started.communicate()


def turn(clients: subprocess.Popen[str], server: Server, count: int, seconds: float) -> Row:
    """What `count` clients found in a turn."""
    assert clients.stdin is not None
    assert clients.stdout is not None
    before = server.batches()
    job = {"url": server.url, "clients": count, "seconds": seconds}
    clients.stdin.write(json.dumps(job) + "\n")
    clients.stdin.flush()
    line = clients.stdout.readline()
    if not line:
        raise SystemExit(f"the clients ended with {clients.wait()}")
    batches, inputs = (new - old for new, old in zip(server.batches(), before, strict=True))
    return {**json.loads(line), "batch_inputs": inputs / batches}


def measure(folder: Path, turns: int, seconds: float, device: str, threads: int) -> list[Row]:
    """A row for each number of clients: medians over turns, and ratios within them."""
    command = [sys.executable, __file__, "--client", str(folder / "requests")]
    with ExitStack() as stack:
        servers = {
            side: stack.enter_context(serving(folder / "store", most, device, threads))
            for side, most in SIDES.items()
        }
        clients = stack.enter_context(process(command, 1))
        apart = logits_apart(folder, servers)
        found: dict[tuple[int, str], list[Row]] = {}
        for count in CLIENTS:
            for server in servers.values():
                turn(clients, server, count, min(seconds, WARM_UP_S))
        for _ in range(turns):
            for count in CLIENTS:
                for side, server in servers.items():
                    measured = turn(clients, server, count, seconds)
                    found.setdefault((count, side), []).append(measured)
    return [row_of(count, found) | {"most_logits_apart": apart} for count in CLIENTS]


def row_of(count: int, found: dict[tuple[int, str], list[Row]]) -> Row:
    row: Row = {"case": f"{count} client{'s' * (count > 1)}"}
    for side in SIDES:
        for column in ("requests_per_second", "p50_ms", "p99_ms"):
            row[f"{side}_{column}"] = median(one[column] for one in found[count, side])
    pairs = zip(found[count, "batched"], found[count, "single"], strict=True)
    times = [ours["requests_per_second"] / one["requests_per_second"] for ours, one in pairs]
    row["times_single"] = median(times)
    row["times_single_low"], row["times_single_high"] = interval(times)
    for column in ("batch_inputs", "client_share"):
        row[column] = median(one[column] for one in found[count, "batched"])
    return row


def logits_apart(folder: Path, servers: dict[str, Server]) -> float:
    """The largest difference between the servers' answers, `CHECKED` of them asked at once."""
    requests = [file.read_bytes() for file in sorted((folder / "requests").iterdir())[:CHECKED]]

    async def one(url: str, request: bytes) -> list[float]:
        connection = await connected(url)
        answer = json.loads(await asked(*connection, request))
        connection[1].close()
        return answer["predictions"][0]["logits"]

    async def all_of(url: str) -> list[list[float]]:
        return await asyncio.gather(*(one(url, request) for request in requests))

    batched, single = (asyncio.run(all_of(server.url)) for server in servers.values())
    return max(
        abs(a - b)
        for ours, alone in zip(batched, single, strict=True)
        for a, b in zip(ours, alone, strict=True)
    )


# --- the process of the clients ------------------------------------------------------------------

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def clients_process(folder: Path) -> None:
    """Do the turns that are asked for on stdin. Bytes are sent and read without a library: a client
    that costs as much as the server would be what is measured."""
    requests = [file.read_bytes() for file in sorted(folder.iterdir())]
    for line in sys.stdin:
        print(json.dumps(asyncio.run(clients_turn(json.loads(line), requests))), flush=True)


async def clients_turn(job: Row, requests: Sequence[bytes]) -> Row:
    """Each client asks, reads the answer, and asks again, until the time is over.

    The time begins when all have had an answer: the queue is then as long as it stays.
    """
    connections = [await connected(job["url"]) for _ in range(job["clients"])]
    entered, busy = time.perf_counter(), time.process_time()
    begin = end = math.inf
    without_answer = len(connections)
    found: list[tuple[float, float]] = []

    async def client(number: int, connection: Connection) -> None:
        nonlocal begin, end, without_answer
        draw = random.Random(number)
        answered = 0.0
        while answered < end:
            sent = time.perf_counter()
            await asked(*connection, draw.choice(requests))
            without_answer -= answered == 0.0
            answered = time.perf_counter()
            found.append((sent, answered))
            if without_answer == 0 and begin == math.inf:
                begin, end = answered, answered + job["seconds"]
        connection[1].close()

    await asyncio.gather(*(client(*one) for one in enumerate(connections)))
    took = sorted(answered - sent for sent, answered in found if begin <= sent < end)
    if not took:
        raise SystemExit(f"no request within {job['seconds']} s; raise --seconds")
    return {
        "requests_per_second": sum(begin <= answered < end for _, answered in found)
        / job["seconds"],
        "p50_ms": 1000 * took[len(took) // 2],
        "p99_ms": 1000 * took[len(took) * 99 // 100],
        "client_share": (time.process_time() - busy) / (time.perf_counter() - entered),
    }


async def connected(url: str) -> Connection:
    host, _, port = url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


async def asked(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> bytes:
    """The body of the answer; the run ends on one that is none."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1]) if length else 0)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"{head.decode()}{body.decode()}")
    return body


def show(rows: list[Row]) -> None:
    import pandas as pd

    table = pd.DataFrame(rows)
    for column in [name for name in table if str(name).endswith(("_low", "_high"))]:
        table[column] = table[column].round(2)
    print(table.to_markdown(index=False, floatfmt=".4g"))


if __name__ == "__main__":
    typer.run(main)
