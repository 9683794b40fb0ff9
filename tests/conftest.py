"""What all tests share."""

import signal
from collections.abc import Iterator

import pytest
import torch


def pytest_sessionstart() -> None:
    """Have Ctrl-C arrive, here and in child processes, also where a shell has turned it off for
    what it runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow ones: the last one to end decides how long all of them take."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's own cache out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give every test the number of threads that the first one had: bits may depend on it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
