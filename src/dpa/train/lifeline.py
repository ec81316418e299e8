"""Sockets between rank 0 and every other rank: when one process ends, however it ends, all end, with one message.

A rank that dies in the middle of a collective leaves the others waiting until a timeout of many minutes, and says
nothing. The system, though, closes a dead process's sockets at once, so rank 0 holds one to every other rank. It is
also the way in which a rank's error reaches the one rank that prints.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from dpa.errors import UserError

_CONNECT_SECONDS = 120.0
_HELLO_SECONDS = 10.0
_LONGEST_HELLO = 4096
"""Bytes."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}
"""A machine that lost its power closes nothing: 10 s of silence, then six questions, 5 s apart."""

CONTINUES = "the same command continues from the last saved state"


@dataclass(slots=True)
class _Peer:
    """The other end of a socket."""

    rank: int
    where: str
    """Host and process id."""
    connection: socket.socket
    read: bytes = b""
    left: bool = False
    """It has said goodbye."""


class Lifeline:
    """From its making, a collective call, to :meth:`close`, another one."""

    def __init__(self, rank: int, world: int, from_main: Callable[[Any], Any]) -> None:
        """
        Args:
            rank, world: of this process.
            from_main: hands rank 0's object to all ranks; tells where rank 0 listens.

        Raises:
            UserError: rank 0 cannot be reached.
        """
        self._rank = rank
        self._lock = threading.RLock()
        self._ended = False
        self._stop, self._stopped = socket.socketpair()
        if rank == 0:
            with socket.create_server(("", 0), backlog=world) as server:
                secret = secrets.token_hex(16)
                from_main((server.getsockname()[1], secret))
                self._peers = _accept(server, world, secret)
        else:
            port, secret = from_main(None)
            self._peers = {0: _Peer(0, os.environ["MASTER_ADDR"], _connect(port, {"secret": secret, "rank": rank}))}
        # a loader's worker is a copy of this process: it must not hold the socket of a rank that has died
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._watch, name="dpa-lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """All is well: whoever leaves from now on may. The caller sees to it that all ranks come here."""
        with self._lock:
            self._ended = True
        for peer in self._peers.values():
            _send(peer, {"kind": "goodbye"})
        self._stop.close()
        self._thread.join()
        self._forget()

    def fail(self, message: str, code: int, *, everywhere: bool) -> None:
        """This rank's error. On rank 0: ends the other ranks, and the caller prints. Elsewhere: does not return.

        Args:
            message: for people.
            code: exit code of all ranks.
            everywhere: all ranks have the same error, so rank 0 needs no telling.
        """
        if self._rank == 0:
            with self._lock:
                self._ended = True
                self._tell(code)
            return
        if not everywhere:
            _send(self._peers[0], {"kind": "failed", "text": message, "code": code})
        self._thread.join(_CONNECT_SECONDS)  # rank 0's word ends this process there
        sys.stderr.write(f"dpa: rank {self._rank}: {message}\n")
        os._exit(code)

    def wait_for_cause(self, seconds: float) -> None:
        """This rank saw a connection break: that is somebody else's end, whose reason is about to arrive here."""
        self._thread.join(seconds)

    def _forget(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()
        self._stopped.close()
        self._stop.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if not self._read(key.data):
                        selector.unregister(key.data.connection)

    def _read(self, peer: _Peer) -> bool:
        """False: nothing more will come from there."""
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        peer.read += data
        while b"\n" in peer.read:
            line, _, peer.read = peer.read.partition(b"\n")
            self._heard(peer, json.loads(line))
        if data:
            return True
        if not peer.left and not self._ended:
            self._lost(peer)
        return False

    def _heard(self, peer: _Peer, message: dict[str, Any]) -> None:
        if message["kind"] == "goodbye":
            peer.left = True
        elif message["kind"] == "end":
            os._exit(message["code"])  # rank 0 has said why
        elif message["kind"] == "failed":
            self._end(f"rank {peer.rank}: {message['text']}", message["code"])

    def _lost(self, peer: _Peer) -> None:
        if self._rank > 1:  # rank 0 is gone: rank 1 speaks in its place
            time.sleep(1.0)
            os._exit(1)
        self._end(
            f"rank {peer.rank} ({peer.where}) is gone: its process was killed (out of memory?), or its machine or the "
            f"network failed. All ranks end; {CONTINUES}",
            1,
        )

    def _end(self, message: str, code: int) -> NoReturn:
        with self._lock:
            if not self._ended:
                self._ended = True
                sys.stderr.write(f"dpa: {message}\n")
                sys.stderr.flush()
                if self._rank == 0:
                    self._tell(code)
                os._exit(code)
        threading.Event().wait()  # the main thread ends this process
        raise AssertionError

    def _tell(self, code: int) -> None:
        for peer in self._peers.values():
            _send(peer, {"kind": "end", "code": code})


def _accept(server: socket.socket, world: int, secret: str) -> dict[int, _Peer]:
    peers: dict[int, _Peer] = {}
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(peers) < world - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            absent = ", ".join(str(rank) for rank in range(1, world) if rank not in peers)
            raise UserError(
                f"rank {absent} did not connect to rank 0 within {_CONNECT_SECONDS:.0f} s: do all machines reach "
                "MASTER_ADDR on any port?"
            ) from None
        except OSError:
            continue
        hello = _hello(connection)
        if not isinstance(hello, dict) or not secrets.compare_digest(
            str(hello.get("secret")).encode(), secret.encode()
        ):
            connection.close()  # a stranger
            continue
        _keep_alive(connection)
        peers[hello["rank"]] = _Peer(hello["rank"], hello["where"], connection)
    return peers


def _hello(connection: socket.socket) -> Any:
    """What the other end says first, and not a byte more: the next may be about its failure. None: nothing of use."""
    line = bytearray()
    connection.settimeout(_HELLO_SECONDS)
    try:
        while not line.endswith(b"\n") and len(line) < _LONGEST_HELLO:
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        return json.loads(line)
    except (OSError, ValueError):
        return None


def _connect(port: int, hello: dict[str, Any]) -> socket.socket:
    address = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise UserError(
            f"rank {hello['rank']} on {socket.gethostname()} cannot reach rank 0 at {address}, port {port} ({error}): "
            "ranks must reach MASTER_ADDR on any port"
        ) from None
    _keep_alive(connection)
    where = f"{socket.gethostname()}, process {os.getpid()}"
    connection.sendall(json.dumps(hello | {"where": where}).encode() + b"\n")
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        option = getattr(socket, name, None)  # not on every system
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(peer: _Peer, message: dict[str, Any]) -> None:
    try:
        peer.connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # it is gone, which the watching thread sees for itself
