"""The clients of `make test-clients`: each has its script and its pins, and the documentation has their versions."""

import re
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.clients import serve_and_run
from tests.e2e.clients.serve_and_run import CLIENTS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "e2e" / "clients"


def test_every_client_has_a_script_and_pins() -> None:
    assert {path.stem.removeprefix("try_") for path in FOLDER.glob("try_*.py")} == set(CLIENTS)
    assert {path.stem for path in (FOLDER / "requirements").glob("*.txt")} == set(CLIENTS)
    listed = re.search(r"^CLIENTS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed
    assert listed[1].split() == list(CLIENTS)


def test_the_documentation_has_the_versions() -> None:
    table = set(re.findall(r"^\|[^|]*\| `([^`]+)` \|", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE))
    pins = {pin for path in (FOLDER / "requirements").glob("*.txt") for pin in path.read_text().split()}
    assert table
    assert table == {pin for pin in pins if not pin.startswith(("torch==", "transformers=="))}


def test_a_server_that_ends_badly_fails_the_run() -> None:
    with pytest.raises(serve_and_run.ServerError), serve_and_run.server(["--no-such-option"], {}):
        pass


@pytest.mark.parametrize(("waits", "ends_well"), [("", True), ("process.wait()", False)])
def test_what_a_script_started_ends_with_it(tmp_path: Path, waits: str, ends_well: bool) -> None:
    found = tmp_path / "pid"
    script = "import pathlib, subprocess\nprocess = subprocess.Popen(['sleep', '600'])\n"
    script += f"pathlib.Path({str(found)!r}).write_text(str(process.pid))\n{waits}"
    assert serve_and_run.run([sys.executable, "-c", script], limit_seconds=20 if ends_well else 3) == ends_well
    deadline = time.monotonic() + 10
    while _is_running(int(found.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    """Neither gone, nor dead and not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
