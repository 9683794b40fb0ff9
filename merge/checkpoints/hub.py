"""Checkpoints of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from merge.checkpoints.folder import INDEX_SUFFIX, TORCH_SUFFIXES
from merge.errors import MergeError

# Two names and a slash, as the Hub allows them; a file name of a checkpoint is a local path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` can be `organisation/model`, and no local folder speaks against it."""
    return (
        _HUB_ID.fullmatch(name) is not None
        and not name.endswith((".safetensors", INDEX_SUFFIX, *TORCH_SUFFIXES))
        and not Path(name).parent.exists()
    )


def fetch_snapshot(name: str, revision: str | None) -> Path:
    """The local folder of the Hub's model `name`: its weights, safetensors where there are any,
    and the small files that go with them.

    Raises MergeError where the Hub cannot be reached or does not have it.
    """
    from huggingface_hub import snapshot_download

    torch_patterns = [f"*{suffix}" for suffix in TORCH_SUFFIXES]
    wanted = (
        ["*.safetensors", f"*.safetensors{INDEX_SUFFIX}"],
        [*torch_patterns, f"*.bin{INDEX_SUFFIX}"],
    )
    try:
        for patterns in wanted:
            snapshot = snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns, "*.json", "*.jinja", "*.txt", "*.model"],
                ignore_patterns="*/*",
            )
            folder = Path(snapshot)
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                return folder
    # The HTTP library below huggingface_hub, and so its errors, differ between its versions.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise MergeError(
            f"{name}: there is no such local path, and it could not be fetched from the Hugging "
            f"Face Hub either ({reason}); check the path, or the "
            "name, the revision and the connection"
        ) from error
    raise MergeError(f"{name}: has no weight files on the Hugging Face Hub")
