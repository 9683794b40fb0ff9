"""`python -m soups.documentation config > docs/config.md` writes it again, and so for commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from soups.documentation.commands import commands_markdown
from soups.documentation.keys import config_markdown

DOCUMENTS: dict[str, Callable[[], str]] = {
    "commands": commands_markdown,
    "config": config_markdown,
}


def main(arguments: Sequence[str]) -> None:
    """Print the document that is named; SystemExit with what can be where none is."""
    if len(arguments) != 1 or arguments[0] not in DOCUMENTS:
        sys.exit(f"usage: python -m soups.documentation {{{','.join(DOCUMENTS)}}}")
    sys.stdout.write(DOCUMENTS[arguments[0]]())


if __name__ == "__main__":
    main(sys.argv[1:])
