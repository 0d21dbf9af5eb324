"""Cut off clients that stop reading their answers.

Such a connection would stay open forever, because the client's kernel still acknowledges every window probe.
TCP_USER_TIMEOUT doesn't help: it also cuts off slow readers, once more data is waiting than fits their window.
"""

import asyncio
import fcntl
import logging
import socket
import struct
import sys
import termios

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

_BYTES_ACKED = 120  # offset in Linux's `struct tcp_info`, of 8 bytes
_RESET = struct.pack("ii", 1, 0)  # linger for no time: the kernel drops what it holds for the client


def progress(connection: socket.socket) -> int | None:
    """Return how many bytes the client has acknowledged so far.

    None if no data is waiting to be sent, if the connection is closed, or if this is not Linux.
    """
    if sys.platform != "linux" or connection.fileno() < 0:
        return None
    (num_waiting,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    if num_waiting == 0:
        return None
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    acknowledged: int = struct.unpack_from("=Q", info, _BYTES_ACKED)[0]
    return acknowledged


def cutting_off_after(unread_seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, extended to reset connections whose clients read nothing for `unread_seconds`.

    Connections are checked once per `unread_seconds`, so a reset may take up to twice as long.
    """

    class Watching(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._look(None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._next_look.cancel()
            super().connection_lost(exc)

        def _look(self, before: int | None) -> None:
            connection = self.transport.get_extra_info("socket")
            now = progress(connection)
            self._next_look = self.loop.call_later(unread_seconds, self._look, now)
            if now is not None and now == before:
                log.warning("cutting off a client that has read nothing for %g seconds", unread_seconds)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self.transport.abort()

    return Watching
