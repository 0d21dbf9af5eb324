"""The server speaks TLS when configured, and says why if it can't."""

import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from service.serve import _tls_problem
from service.setting_groups import ServerSettings
from service.settings import SettingsError, load_settings

DATA = Path(__file__).parent / "data"  # a self-signed certificate for localhost, with its key
ROOT = Path(__file__).resolve().parents[2]


def test_https_is_served_and_http_is_not(tiny_target: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:  # a port other than the session server's
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), "--target", str(tiny_target)]
    command += ["--tls-certificate", str(DATA / "certificate.pem"), "--tls-key", str(DATA / "key.pem")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        context = ssl.create_default_context(cafile=DATA / "certificate.pem")
        transport = httpx.HTTPTransport(verify=context, retries=0)
        with httpx.Client(transport=transport, base_url=f"https://localhost:{port}") as http:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.ConnectError:
                    time.sleep(0.1)
            assert http.get("/version").status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/version")
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_half_of_a_pair_is_refused() -> None:
    with pytest.raises(SettingsError, match="belong together"):
        load_settings(overrides={"server.tls_certificate": "certificate.pem"})


def test_unusable_files_are_named_before_anything_is_loaded() -> None:
    def problem(certificate: Path, key: Path) -> str:
        return _tls_problem(ServerSettings(tls_certificate=certificate, tls_key=key))

    assert "No such file" in problem(Path("missing.pem"), DATA / "key.pem")
    assert problem(DATA / "key.pem", DATA / "certificate.pem")
    assert not problem(DATA / "certificate.pem", DATA / "key.pem")
