import socket

import pytest

from fleet.errors import FleetError
from fleet.server.listening import take_port


def test_a_free_port():
    with take_port("127.0.0.1", 0) as taken:
        assert taken.getsockname()[1] > 0


def test_a_port_is_taken_where_another_listens():
    with take_port("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(FleetError) as caught:
            take_port("127.0.0.1", port)
        assert str(caught.value) == (
            f"port {port} of 127.0.0.1 is taken, perhaps by another server; choose another with "
            "--port"
        )
    # A server can follow another at once.
    with take_port("127.0.0.1", port):
        pass


def test_a_port_that_was_used_a_moment_ago():
    with take_port("127.0.0.1", 0) as first:
        first.listen()
        address = first.getsockname()
        with socket.create_connection(address) as client:
            accepted, _ = first.accept()
            accepted.close()  # the server's side: the port stays in TIME_WAIT
            client.recv(1)
    with take_port(*address) as second:
        second.listen()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("no-such-host.invalid", "--host no-such-host.invalid: "),
        ("192.0.2.1", "--host 192.0.2.1: is no address of this machine"),
    ],
)
def test_hosts_that_are_not_ours(host: str, message: str):
    with pytest.raises(FleetError) as caught:
        take_port(host, 0)
    assert message in str(caught.value)
