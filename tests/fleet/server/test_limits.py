import pytest

from fleet.errors import FleetError
from fleet.server.limits import Limits


def test_defaults_hold_together():
    limits = Limits()
    assert limits.request_size() == "8.00 MiB"
    assert limits.max_held_bytes >= 2 * limits.max_request_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch: found 0 inputs; wanted at least 1"),
        ({"queue": -1}, "queue: found -1 inputs"),
        ({"max_request_bytes": 0}, "max_request_bytes: found 0 bytes"),
        ({"max_pixels": 0}, "max_pixels: found 0 pixels"),
        ({"max_connections": 0}, "max_connections: found 0 connections"),
        ({"max_wait_s": -0.1}, "max_wait: found -0.1 s"),
        ({"max_wait_s": float("nan")}, "max_wait: found nan s"),
        ({"timeout_s": 0.001}, "timeout: found 0.001 s; wanted more than max_wait"),
        ({"timeout_s": float("inf")}, "timeout: found inf s"),
        ({"queue": 8, "max_batch": 9}, "queue: found 8 inputs; wanted at least max_batch, 9"),
    ],
)
def test_limits_that_cannot_hold(settings: dict, message: str):
    with pytest.raises(FleetError) as caught:
        Limits(**settings)
    assert message in str(caught.value)
