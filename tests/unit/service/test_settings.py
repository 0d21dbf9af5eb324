"""Settings: which source wins, and what is refused."""

import json
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from service import VERSION
from service.settings import PREFIX, Settings, SettingsError, iterate_fields, load_settings
from service.settings_documents import SETTINGS_PAGE, settings_page

ROOT = Path(__file__).parents[3]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_serve_the_bundled_pair() -> None:
    settings = load_settings()
    assert settings.server.host == "127.0.0.1"
    assert settings.server.port == 8000
    assert settings.model.target == ROOT / "models" / "target"
    assert settings.model.drafter_choice == str(ROOT / "models" / "drafter")
    assert settings.model.public_name == "diffuspec-python"
    assert settings.model.threads_choice == 1


def test_another_target_does_not_get_the_bundled_drafter() -> None:
    settings = load_settings(overrides={"model.target": "/somewhere/else"})
    assert settings.model.drafter_choice == "prompt-lookup"
    assert settings.model.ngram_folder is None
    assert settings.model.public_name == "else"
    assert settings.model.threads_choice is None


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "a.toml", '[server]\nport = 1\nhost = "file"\n[scheduler]\nmax_running = 3\n')
    monkeypatch.setenv("DIFFUSPEC_SERVER__PORT", "2")
    monkeypatch.setenv("DIFFUSPEC_SERVER__HOST", "environment")
    settings = load_settings(config, {"server.port": 3})
    assert (settings.server.port, settings.server.host, settings.scheduler.max_running) == (3, "environment", 3)


def test_json_files_are_read(tmp_path: Path) -> None:
    config = write(tmp_path / "a.json", json.dumps({"speculation": {"policy": "paper"}}))
    assert load_settings(config).speculation.policy == "paper"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[server]\nprot = 1", "unknown setting server.prot"),
        ("[sever]\nport = 1", "unknown setting sever"),
        ("[server]\nport = 70000", "server.port: .*65535, got 70000"),
        ("[speculation]\npolicy = 'best'", "speculation.policy"),
        ("port = ", "not valid TOML"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(write(tmp_path / "a.toml", content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        load_settings(tmp_path / "none.toml")


@pytest.mark.parametrize("name", ["SERVER_PORT", "SERVER__", "PORT", "SERVER__PROT", "server__prot"])
def test_unknown_variables_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, "1")
    with pytest.raises(SettingsError, match="unknown"):
        load_settings()


def test_keys_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSPEC_AUTH__API_KEYS", '["hidden-key"]')
    assert "hidden-key" not in repr(load_settings())
    monkeypatch.setenv("DIFFUSPEC_AUTH__API_KEYS", '{"hidden-key": 1}')
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "hidden-key" not in str(caught.value)


def test_keys_come_from_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSPEC_AUTH__API_KEYS", '["first"]')
    keys = write(tmp_path / "keys", "# who: the team\nkey-of-file\n\n  another-key  \n")
    settings = load_settings(overrides={"auth.api_keys_file": str(keys)})
    assert [key.get_secret_value() for key in settings.auth.api_keys] == ["first", "key-of-file", "another-key"]
    assert "key-of-file" not in repr(settings)


@pytest.mark.parametrize("content", [None, "", "# nothing here\n"])
def test_a_file_without_keys_never_means_an_open_server(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        write(tmp_path / "keys", content)
    with pytest.raises(SettingsError, match="API keys"):
        load_settings(overrides={"auth.api_keys_file": str(tmp_path / "keys")})


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.server.port = 1


def test_every_setting_is_described_and_in_the_table() -> None:
    table = settings_page()
    assert SETTINGS_PAGE.read_text() == table, "run: make settings"
    names = [name for name, _ in iterate_fields()]
    assert len(names) > 30
    assert all(field.description for _, field in iterate_fields())
    assert all(f"| `{name}` | `{PREFIX}{name.upper().replace('.', '__')}` |" in table for name in names)
    assert str(ROOT) not in table
    assert {name.partition(".")[0] for name in names} == set(Settings.model_fields)


def test_the_version_is_the_projects() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
