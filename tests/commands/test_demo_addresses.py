# SPDX-License-Identifier: Apache-2.0
"""Laws of the local page's addresses: which hosts it answers, and which port it takes."""

import socket

import pytest

from t5x_lite.demo import __main__ as command
from t5x_lite.serving import connections


@pytest.mark.parametrize(
    "host, addresses, answered",
    [
        ("lab.example", False, True),
        ("LAB.example:8765", False, True),
        ("evil.example", True, False),
        ("lab.example.evil", True, False),
        ("192.168.1.4:8765", False, False),
        ("192.168.1.4:8765", True, True),
        ("[fe80::1]:80", True, True),
        ("", True, False),
    ],
)
def test_hosts_that_are_named_and_addresses_are_answered(host, addresses, answered):
    """A name of another site may lead here (DNS rebinding); an address cannot."""
    guard = connections.HostGuard(None, ["lab.example"], addresses, None)
    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    assert guard.allows(connections.host_of(scope)) == answered
    twice = {"type": "http", "headers": [(b"host", b"lab.example"), (b"host", b"evil.example")]}
    assert not guard.allows(connections.host_of(twice))


def test_a_page_for_other_machines_still_refuses_names_that_nobody_gave():
    names = connections.own_names("0.0.0.0")
    assert {"localhost", socket.gethostname().lower()} <= set(names)
    assert connections.own_names("127.0.0.1") == ["localhost", "127.0.0.1", "::1"]
    assert "--allow_host" in command.parser().format_help()


def test_only_this_machine_is_loopback():
    assert all(map(connections.is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(connections.is_loopback, ("0.0.0.0", "::", "192.168.1.4", "example.org")))


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys):
    with connections.bind_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            command.main(["--checkpoint=nowhere", f"--port={port}"])
    assert "Choose another --port" in capsys.readouterr().err
