"""Clients that do what no library would: stop reading, and hang up at any moment."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any


def begin(
    url: str,
    body: dict[str, Any],
    path: str = "/v1/completions",
    room: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> socket.socket:
    """Send a request; the answer is up to the caller. room: bytes that the kernel keeps of what is not read."""
    host, _, port = url.removeprefix("http://").partition(":")
    client = socket.socket()
    client.settimeout(20)
    if room is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)  # as on a network, not the loopback's 64 KiB
    client.connect((host, int(port)))
    content = json.dumps(body).encode()
    fields = {
        "Host": host,
        "Content-Type": "application/json",
        "Content-Length": len(content),
        **(headers or {}),
    }
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    client.sendall("\r\n".join([*lines, "", ""]).encode() + content)
    return client


def hang_up(client: socket.socket, *, politely: bool) -> None:
    """Close the connection, or reset it."""
    if not politely:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read_frames(client: socket.socket, count: int) -> bytes:
    """Read until `count` frames of a stream have come; returns what was read."""
    received = b""
    while received.count(b"data: ") < count:
        piece = client.recv(4096)
        assert piece, f"the connection ended after {received!r}"
        received += piece
    return received
