"""The scans of many checkpoints, with a file of earlier ones, so that nothing is read twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from inputs.files import write_whole
from merge.checkpoints import Checkpoint, Scan, scan

log = logging.getLogger(__name__)


def scan_all(
    checkpoints: Sequence[Checkpoint], *, cache: Path | None = None, progress: bool = True
) -> tuple[Scan, ...]:
    """The scan of each checkpoint, two read at a time; unchanged files are not read again.

    `cache` is a JSON file of earlier scans, known by the files' paths, sizes and modification
    times and by what was unwrapped; finished scans are kept in it when the rest fails.
    """
    known = _load_cache(cache)
    keys = [_key(checkpoint) for checkpoint in checkpoints]
    stamps = [_stamp(checkpoint) for checkpoint in checkpoints]  # before the data is read
    scans: dict[int, Scan] = {}
    for k, (key, stamp) in enumerate(zip(keys, stamps, strict=True)):
        entry = known.get(key)
        if entry is not None and entry["stamp"] == stamp:
            scans[k] = Scan(**entry["scan"])
    wanted = [k for k in range(len(checkpoints)) if k not in scans]
    if not wanted:
        return tuple(scans[k] for k in range(len(checkpoints)))
    sizes = [sum(info.nbytes for info in c.tensors.values()) for c in checkpoints]
    bar = tqdm(
        total=sum(sizes[k] for k in wanted),
        desc="hashing",
        unit="B",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )
    with bar, ThreadPoolExecutor(2, thread_name_prefix="scan") as executor:
        futures = {executor.submit(scan, checkpoints[k]): k for k in wanted}
        try:
            for future in as_completed(futures):
                k = futures[future]
                scans[k] = future.result()
                known[keys[k]] = {"stamp": stamps[k], "scan": asdict(scans[k])}
                bar.update(sizes[k])
        finally:  # Ctrl-C or a corrupt file: what has not begun does not begin
            for future in futures:
                future.cancel()
            if cache is not None:
                write_whole(cache, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return tuple(scans[k] for k in range(len(checkpoints)))


def _key(checkpoint: Checkpoint) -> str:
    """Which files, and which of their contents: `ema` and prefixes show in the notes and names."""
    view = [[info.name, info.shape, str(info.dtype)] for info in checkpoint.tensors.values()]
    text = json.dumps([[str(file.resolve()) for file in checkpoint.files], checkpoint.notes, view])
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(checkpoint: Checkpoint) -> list[list[int]]:
    stats = [file.stat() for file in checkpoint.files]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def _load_cache(cache: Path | None) -> dict[str, Any]:
    """The scans in the file; one that cannot be used is reported and made again."""
    if cache is None or not cache.exists():
        return {}
    try:
        known = json.loads(cache.read_bytes())
        for entry in known.values():
            Scan(**entry["scan"])
            list(entry["stamp"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: not a cache of scans (%s); reading the checkpoints again", cache, error)
        return {}
    return known
