"""`.env.example` shows every setting, and uncommented it is what the settings are without it."""

from pathlib import Path

import pytest

from service.env_example import TARGET, env_example
from service.settings import PREFIX, iterate_fields, load_settings

VARIABLES = dict(
    line.removeprefix("#").split("=", 1)
    for line in TARGET.read_text().splitlines()
    if line.startswith("#") and line[1:2].isupper()
)


def test_the_file_is_the_settings() -> None:
    assert TARGET.read_text() == env_example(), "run: python -m service.env_example"
    expected = {PREFIX + name.upper().replace(".", "__") for name, _ in iterate_fields()}
    assert {name for name in VARIABLES if name.startswith(PREFIX)} == expected


def test_nothing_is_set_before_a_line_is_uncommented() -> None:
    assert all(not line or line.startswith("#") for line in TARGET.read_text().splitlines())


def test_the_defaults_it_shows_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    expected = load_settings()
    for name, value in VARIABLES.items():
        if name.startswith(PREFIX) and value and not value.startswith("/run/secrets"):
            monkeypatch.setenv(name, value)
    given = load_settings()
    assert given.model.target.resolve() == expected.model.target
    assert given.model_dump(exclude={"model": {"target"}}) == expected.model_dump(exclude={"model": {"target"}})
