"""The first words on rank 0's sockets: strangers, and ranks that fail at once."""

from __future__ import annotations

import json
import socket
import threading

import pytest

import dpa.train.lifeline as lifeline_module
from dpa.train.lifeline import _accept


def test_strangers_delay_nobody_and_no_word_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "_HELLO_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def connect(said: bytes) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(said)
            return connection

        hello = {"secret": "s", "rank": 1, "where": "here"}
        lines = [
            b"",  # a port scanner that says nothing
            b"GET / HTTP/1.0\r\n\r\n",
            json.dumps({**hello, "secret": "é"}, ensure_ascii=False).encode() + b"\n",
            json.dumps(hello).encode() + b"\n" + b'{"kind": "failed"}\n',
        ]
        found: dict[int, bytes] = {}
        thread = threading.Thread(
            target=lambda: found.update(
                {rank: peer.connection.recv(100) for rank, peer in _accept(server, 2, "s").items()}
            )
        )
        ends = [connect(line) for line in lines]
        thread.start()
        thread.join(20)
        for end in ends:
            end.close()
    assert found == {1: b'{"kind": "failed"}\n'}
