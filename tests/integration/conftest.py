"""One server over tiny models for all tests of the API that want real text."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.api_server import embedded_app, serving


@pytest.fixture(scope="session")
def url(tiny_target: Path, tiny_drafter: Path) -> Iterator[str]:
    with serving(embedded_app(tiny_target, tiny_drafter)) as url:
        yield url
