"""One door for every format: what kind of checkpoint it is, is told from its bytes."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from merge.checkpoints.envelopes import PREFIXES, strip_prefixes
from merge.checkpoints.files import HEADER_BYTES_LIMIT, InputFile
from merge.checkpoints.folder import INDEX_SUFFIX, Opened, choose_in_folder, read_sharded
from merge.checkpoints.hub import fetch_snapshot, is_hub_id
from merge.checkpoints.safetensors_file import read_safetensors
from merge.checkpoints.tensors import Checkpoint
from merge.checkpoints.torch_file import read_torch
from merge.errors import MergeError


def open_checkpoint(
    path_or_id: str | Path,
    *,
    names: Collection[str] = (),
    prefixes: Collection[str] = PREFIXES,
    ema: bool = False,
    revision: str | None = None,
    memory_budget: int | None = None,
) -> Checkpoint:
    """Open a checkpoint from its headers alone: a file, a folder, or a Hugging Face Hub id.

    Files are safetensors or of torch.save (zip or older; weights only, nothing is executed);
    folders hold one such file or an index of several. Of `prefixes` those that all names share are
    stripped; `names` are the model's where it is known: they say how far. `ema` chooses averaged
    weights, `revision` one of the Hub's; a header larger than `memory_budget` is not read.
    Raises MergeError for anything that is no checkpoint, corrupt, or wants to run code.
    """
    label = str(path_or_id)
    path = _local(label, revision)
    limit = min(HEADER_BYTES_LIMIT, memory_budget or HEADER_BYTES_LIMIT)
    notes: list[str] = []
    if path.is_dir():
        path, notes = choose_in_folder(path)
    with ExitStack() as opened:

        def open_file(path: Path) -> InputFile:
            file = InputFile(path)
            opened.callback(file.close)
            return file

        def read_file(file: InputFile) -> Opened:
            return _read_file(file, ema=ema, header_limit=limit)

        if path.name.endswith(INDEX_SUFFIX):
            stored, more = read_sharded(path, open_file, read_file)
        else:
            stored, more = read_file(open_file(path))
        stored, stripped = strip_prefixes(stored, names, prefixes)
        if not stored:
            raise MergeError(f"{label}: has no tensors; it is a checkpoint without weights")
        checkpoint = Checkpoint(label, stored, [*notes, *more, *stripped])
        opened.pop_all()
    return checkpoint


def _local(label: str, revision: str | None) -> Path:
    path = Path(label)
    if path.exists():
        if revision is not None:
            raise MergeError(
                f"{label}: is a local path, a revision ('{revision}') is for ids of the Hub; "
                "leave it out"
            )
        return path
    if is_hub_id(label):
        return fetch_snapshot(label, revision)
    folder = path.parent
    if not folder.is_dir():
        raise MergeError(f"{label}: does not exist, nor does its folder {folder}")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    hint = f"; the nearest name there is '{near[0]}'" if near else ""
    raise MergeError(
        f"{label}: does not exist; wanted a file, a folder, or an id of the Hub (owner/name){hint}"
    )


def _read_file(file: InputFile, *, ema: bool, header_limit: int) -> Opened:
    """Read one file as what its first bytes say it is, whatever its name."""
    start = bytes(file.read_bytes(0, min(512, file.size)))
    if not start:
        raise MergeError(f"{file}: is empty; get or write it again")
    if start.startswith(b"version https://git-lfs"):
        raise MergeError(f"{file}: is a pointer of git-lfs, not the weights; run git lfs pull")
    is_torch = start.startswith(b"PK\x03\x04") or start[0] == 0x80
    # The brace that opens a JSON header decides: its length may begin like the other kinds.
    if start[8:9] == b"{" or (file.path.suffix == ".safetensors" and not is_torch):
        if ema:
            raise MergeError(
                f"{file}: is a safetensors file, which has one set of weights and no averaged ones "
                "beside it; set ema to false"
            )
        return read_safetensors(file, header_limit=header_limit), []
    if start[257:262] == b"ustar":
        raise MergeError(
            f"{file}: is a tar archive, as torch before 0.1.10 wrote them, and is not read; load "
            "and save it again with a current torch"
        )
    if is_torch:
        return read_torch(file, ema=ema, header_limit=header_limit)
    raise MergeError(
        f"{file}: is no checkpoint: it begins with {start[:8]!r}; wanted a safetensors file or one "
        "of torch.save"
    )
