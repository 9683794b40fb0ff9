"""Folders of checkpoints: a sharded one by its index, or the one file that holds the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from merge.checkpoints.envelopes import quoted
from merge.checkpoints.files import HEADER_BYTES_LIMIT, InputFile
from merge.checkpoints.strict_json import parse_json
from merge.checkpoints.tensors import Stored
from merge.errors import MergeError

INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".th")
USUAL_TORCH_NAMES = {"pytorch_model.bin", "open_clip_pytorch_model.bin"}

Opened = tuple[dict[str, Stored], list[str]]


def choose_in_folder(folder: Path) -> tuple[Path, list[str]]:
    """The index or the only weight file of `folder`, safetensors before torch, and notes.

    Raises MergeError where there is none, or where it cannot be told which one is meant.
    """
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    safetensors = [name for name in names if name.endswith(".safetensors")]
    torch_files = [name for name in names if name.endswith(TORCH_SUFFIXES)]
    usual = [name for name in torch_files if name in USUAL_TORCH_NAMES]
    choices = (
        [name for name in names if name.endswith(f".safetensors{INDEX_SUFFIX}")],
        safetensors,
        [name for name in names if name.endswith(f".bin{INDEX_SUFFIX}")],
        usual if len(usual) == 1 else torch_files,
    )
    found = next((choice for choice in choices if choice), [])
    if len(found) == 1:
        chosen = found[0]
        shards = torch_files if chosen.endswith(f".bin{INDEX_SUFFIX}") else []
        others = [name for name in torch_files if name not in {chosen, *shards}]
        return folder / chosen, [f"'{chosen}' read, not {quoted(others)}"] if others else []
    if not found:
        raise MergeError(
            f"{folder}: is a folder without a checkpoint; it holds {quoted(names)}; wanted one "
            f"*.safetensors or {', '.join('*' + suffix for suffix in TORCH_SUFFIXES)} file, or an "
            f"index ({INDEX_SUFFIX})"
        )
    raise MergeError(
        f"{folder}: holds several checkpoints ({quoted(found)}) and no one index that joins "
        "them; name the file that is meant"
    )


def read_sharded(
    index: Path, open_file: Callable[[Path], InputFile], read_file: Callable[[InputFile], Opened]
) -> Opened:
    """The tensors that an index.json lists, each found in the shard it names, and notes.

    Shards are plain file names beside the index: a path, or a link that leaves the folder (of a
    Hub cache: the cached repository), is a MergeError.
    """
    weight_map = _weight_map(index, open_file)
    stored: dict[str, Stored] = {}
    notes: list[str] = []
    for shard in sorted(set(weight_map.values())):
        path = _inside(index, shard)
        tensors, shard_notes = read_file(open_file(path))
        notes.extend(note for note in shard_notes if note not in notes)
        listed = {name for name, holder in weight_map.items() if holder == shard}
        missing, extra = sorted(listed - tensors.keys()), sorted(tensors.keys() - listed)
        if missing:
            raise MergeError(
                f"{index}: says that {shard!r} holds {quoted(missing)}, which it does not; the "
                "index and its shards do not belong together: get them again"
            )
        if extra:
            notes.append(f"ignored in '{shard}', not listed there by the index: {quoted(extra)}")
        stored.update((name, tensors[name]) for name in listed)
    return stored, notes


def _weight_map(index: Path, open_file: Callable[[Path], InputFile]) -> dict[str, str]:
    file = open_file(index)
    if file.size > HEADER_BYTES_LIMIT:
        raise MergeError(f"{index}: has {file.size} bytes, at most {HEADER_BYTES_LIMIT} are read")
    content = parse_json(file.read_bytes(0, file.size), str(index))
    file.close()
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise MergeError(f"{index}: has no 'weight_map' from tensor names to file names")
    return weight_map


def _inside(index: Path, shard: str) -> Path:
    """The path of a shard, resolved far enough to know that it stays inside the folder."""
    folder = index.parent
    if (
        shard in {"", ".", ".."}
        or "\\" in shard
        or "\0" in shard
        or PurePosixPath(shard).name != shard
    ):
        raise MergeError(
            f"{index}: lists {shard!r} as a shard; wanted the plain name of a file beside the index"
        )
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parent.parent  # in the Hub's cache, snapshots link to the blobs beside them
    path = folder / shard
    if not path.resolve().is_relative_to(home):
        raise MergeError(
            f"{index}: its shard {shard!r} is a link to {path.resolve()}, outside {home}; put the "
            "file itself there"
        )
    if not path.is_file():
        raise MergeError(f"{index}: lists the shard {shard!r}, which is missing; get it again")
    return path
