"""Keys are read strictly, and error messages never repeat a key."""

from pathlib import Path

import pytest

from service.cli import main
from service.keys import Allowance, digest_of, load_keys, make_key
from service.settings import SettingsError


def test_a_new_key_is_long_and_its_hash_is_its_own() -> None:
    (key, hashed), (other, _) = make_key(), make_key()
    assert key != other
    assert len(key) >= 40
    assert hashed == f"sha256:{digest_of(key).hex()}"
    assert key not in repr(load_keys([key], None, lambda: 0.0))


def test_the_command_makes_a_file_that_can_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["key", "team-a"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "keys.toml"
    file.write_text(printed)
    key = next(line for line in printed.splitlines() if line.startswith("# sk-")).removeprefix("# ")
    found = load_keys([], file, lambda: 0.0).find(key, 0.0)
    assert found is not None
    assert found.name == "team-a"


HASH = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "content",
    [
        "",
        "keys = []",
        "keys = 3",
        "x = [",
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\n[other]',
        '[[keys]]\nname = "a"\nhash = "secret-plain"',
        f'[[keys]]\nname = "a b"\nhash = "{HASH}"',
        f'[[keys]]\nhash = "{HASH}"',
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\nmax_sequences = 0',
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\nlimit = 3',
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\nexpires = "tomorrow"',
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\n[[keys]]\nname = "b"\nhash = "{HASH}"',
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\n[[keys]]\nname = "a"\nhash = "sha256:{"1" * 64}"',
    ],
)
def test_a_wrong_file_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(SettingsError) as caught:
        load_keys([], file, lambda: 0.0)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "short", "has space in it", "kéy-with-accent", "tab\tin-key-here"])
def test_a_key_that_no_header_could_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_keys([key], None, lambda: 0.0)
    assert not key or key not in str(caught.value)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        load_keys([], Path("/nowhere/keys.toml"), lambda: 0.0)


def test_an_allowance_fills_up_to_a_minutes_worth_and_debts_are_paid_by_waiting() -> None:
    one = Allowance(per_minute=60, left=60, at=0.0)
    one.spend(90)
    assert one.seconds_until_free(0.0) == pytest.approx(30)
    assert one.seconds_until_free(29.0) == pytest.approx(1)
    assert one.seconds_until_free(30.5) == 0
    assert one.seconds_until_free(10_000.0) == 0
    assert one.left == 60
    assert one.seconds_until_free(0.0) == 0  # the clock went back
