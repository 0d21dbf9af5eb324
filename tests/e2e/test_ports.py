"""A server process opens one port to the network."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.conftest import Server

LISTENING = "0A"


def test_the_server_listens_on_its_one_port_alone(server: Server) -> None:
    links = [os.readlink(link) for link in Path(f"/proc/{server.pid}/fd").iterdir() if link.is_symlink()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                listening.append(fields[1])
    address, port = "0100007F", urlsplit(server.url).port  # 127.0.0.1 as /proc writes it
    assert port is not None
    assert listening == [f"{address}:{port:04X}"]
