"""The clients of `make test-clients`: each has its script and its pins, and the documentation has their versions."""

import re
from pathlib import Path

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
