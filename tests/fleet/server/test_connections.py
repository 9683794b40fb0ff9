import resource

import pytest

from fleet.errors import FleetError
from fleet.server.connections import OTHER_FILES, raise_open_files
from fleet.server.limits import Limits

WANTED = 700 + OTHER_FILES


@pytest.mark.parametrize(
    ("allowed", "raised"),
    [
        ((100, 5000), [(WANTED, 5000)]),
        ((100, resource.RLIM_INFINITY), [(WANTED, resource.RLIM_INFINITY)]),
        ((WANTED, WANTED), []),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), []),
    ],
)
def test_a_file_for_each_connection(
    monkeypatch: pytest.MonkeyPatch, allowed: tuple[int, int], raised: list[tuple[int, int]]
):
    found: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda what: allowed)
    monkeypatch.setattr("resource.setrlimit", lambda what, limits: found.append(limits))
    raise_open_files(Limits(max_connections=700))
    assert found == raised


def test_more_connections_than_the_system_allows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resource.getrlimit", lambda what: (100, 512))
    with pytest.raises(FleetError) as caught:
        raise_open_files(Limits(max_connections=700))
    assert str(caught.value) == (
        f"max_connections: 700 need {WANTED} open files, this process may have 512; lower it, or "
        "raise that limit (ulimit -n)"
    )
