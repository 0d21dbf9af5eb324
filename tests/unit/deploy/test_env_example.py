"""`.env.example` shows every setting with its default."""

import re
from pathlib import Path

import pytest

from service.settings import PREFIX, iterate_fields, load_settings
from service.settings_documents import ENV_EXAMPLE, env_example

VARIABLES = dict(
    line.removeprefix("#").split("=", 1)
    for line in ENV_EXAMPLE.read_text().splitlines()
    if line.startswith("#") and line[1:2].isupper()
)


def test_the_file_is_the_settings() -> None:
    assert ENV_EXAMPLE.read_text() == env_example(), "run: make settings"
    expected = {PREFIX + name.upper().replace(".", "__") for name, _ in iterate_fields()}
    assert {name for name in VARIABLES if name.startswith(PREFIX)} == expected


def test_nothing_is_set_before_a_line_is_uncommented() -> None:
    assert all(not line or line.startswith("#") for line in ENV_EXAMPLE.read_text().splitlines())


def test_the_defaults_it_shows_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    expected = load_settings()
    for name, value in VARIABLES.items():
        if name.startswith(PREFIX) and value and not value.startswith("/run/secrets"):
            monkeypatch.setenv(name, value)
    given = load_settings()
    assert given.model.target.resolve() == expected.model.target
    assert given.model_dump(exclude={"model": {"target"}}) == expected.model_dump(exclude={"model": {"target"}})


def test_every_variable_of_the_compose_file_is_shown_with_its_default() -> None:
    compose = (ENV_EXAMPLE.parent / "docker-compose.yml").read_text()
    used = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", compose))
    assert len(re.findall(r"(?<!\$)\$\{?[A-Z]", compose)) == len(re.findall(r"\$\{([A-Z_]+):-", compose))
    shown = {name: value for name, value in VARIABLES.items() if not name.startswith(PREFIX)}
    placeholders = {"API_KEYS_FILE", "GRAFANA_PASSWORD_FILE", "HF_TOKEN_FILE", "PIP_CONF_FILE", "CA_BUNDLE_FILE"}
    placeholders |= {"GRAFANA_LOGIN_DISABLED"}  # these show an example, not their default
    assert set(shown) == {name for name in used if not name.startswith(PREFIX)}
    assert {name: value for name, value in shown.items() if name not in placeholders} == {
        name: value for name, value in used.items() if name in shown and name not in placeholders
    }
