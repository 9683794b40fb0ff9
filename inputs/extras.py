"""What to say where a package is missing that an optional extra brings."""

from __future__ import annotations

from collections.abc import Iterable


def missing_extra(extra: str, what: str, packages: Iterable[str]) -> str:
    """A message: what needs which packages, and the command that installs them."""
    return f"{what} needs {', '.join(packages)}: pip install 'model-soups-toolkit[{extra}]'"
