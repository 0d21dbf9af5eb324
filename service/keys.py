"""API keys: stored as hashes, each with limits and an expiry, and compared in constant time.

`diffuspec key` makes long random keys, which can't be guessed, so a plain SHA-256 is enough.
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.settings import SettingsError

HASHED = re.compile(r"sha256:[0-9a-f]{64}")
MIN_KEY_CHARACTERS = 8  # of keys given in plain text; `diffuspec key` makes 43
SECONDS_PER_MINUTE = 60.0


class KeyEntry(BaseModel):
    """One `[[keys]]` table of a keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    hash: str = Field(pattern=HASHED.pattern)
    expires: datetime | date | None = None
    max_sequences: int | None = Field(None, ge=1)  # running and waiting at the same time
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)  # prompts and outputs together
    best_priority: int = 0  # the lowest `priority` value that a request may have


@dataclass(slots=True)
class Allowance:
    """A budget that refills at a constant rate, up to one minute's worth. Once it is overdrawn, callers must wait."""

    per_minute: float
    left: float
    at: float  # seconds of the clock

    def seconds_until_free(self, now: float) -> float:
        """Return how long to wait until something is left; 0 if something is."""
        rate = self.per_minute / SECONDS_PER_MINUTE
        self.left = min(self.per_minute, self.left + rate * max(now - self.at, 0.0))
        self.at = now
        return 0.0 if self.left > 0 else (-self.left + 1e-9) / rate

    def spend(self, amount: float) -> None:
        self.left -= amount


@dataclass(slots=True)
class Key:
    """One key and what it has used. Only the event loop's thread uses it."""

    name: str
    digest: bytes
    expires: float | None = None  # Unix time
    max_sequences: int | None = None
    best_priority: int | None = None  # None: any
    requests: Allowance | None = None
    tokens: Allowance | None = None
    num_sequences: int = 0  # running and waiting now


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys of a server. Without any, everybody is let in."""

    keys: Sequence[Key] = field(default_factory=tuple)

    def find(self, given: str, now: float) -> Key | None:
        """Return the key with this text, unless it has expired. `now`: Unix time.

        Every key is compared in constant time, so the duration reveals nothing.
        """
        digest = digest_of(given)
        matches = [key for key in self.keys if hmac.compare_digest(digest, key.digest)]
        return next((key for key in matches if key.expires is None or now < key.expires), None)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def make_key() -> tuple[str, str]:
    """Make a new key. Returns it and its hash, as written in a keys file."""
    key = "sk-" + secrets.token_urlsafe(30)
    return key, "sha256:" + digest_of(key).hex()


def load_keys(plain: Sequence[str], file: Path | None, clock: Callable[[], float]) -> KeyRing:
    """Read keys from the settings (plain, or as `sha256:` and the hash) and from a keys file.

    Raises SettingsError. Its message never contains a key.
    """
    keys = [Key(f"key-{number}", _digest_from_setting(text)) for number, text in enumerate(plain, start=1)]
    keys += [_from_entry(entry, clock()) for entry in _read(file)] if file is not None else []
    if len({key.digest for key in keys}) < len(keys) or len({key.name for key in keys}) < len(keys):
        raise SettingsError("auth: two keys are equal or have the same name")
    return KeyRing(tuple(keys))


def _digest_from_setting(text: str) -> bytes:
    if HASHED.fullmatch(text):
        return bytes.fromhex(text.removeprefix("sha256:"))
    if len(text) < MIN_KEY_CHARACTERS or not text.isascii() or not text.isprintable() or " " in text:
        raise SettingsError(f"auth.api_keys: a key needs at least {MIN_KEY_CHARACTERS} printable ASCII characters")
    return digest_of(text)


def _read(file: Path) -> list[KeyEntry]:
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        if set(content) != {"keys"} or not isinstance(content["keys"], list) or not content["keys"]:
            raise SettingsError(f"{file} must have one [[keys]] table per key, and nothing else")
        return [KeyEntry.model_validate(entry) for entry in content["keys"]]
    except OSError as error:
        raise SettingsError(f"cannot read the keys file {file}: {error.strerror}") from None
    except ValidationError as error:  # before ValueError, of which it is a kind
        problem = error.errors(include_input=False)[0]
        raise SettingsError(f"{file}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except ValueError:
        raise SettingsError(f"{file} is not valid TOML") from None


def _from_entry(entry: KeyEntry, now: float) -> Key:
    def allowance(per_minute: float | None) -> Allowance | None:
        return None if per_minute is None else Allowance(per_minute, per_minute, now)

    expires = entry.expires
    if isinstance(expires, date) and not isinstance(expires, datetime):
        expires = datetime(expires.year, expires.month, expires.day, tzinfo=UTC)
    if expires is not None and expires.tzinfo is None:
        expires = expires.replace(tzinfo=UTC)
    return Key(
        name=entry.name,
        digest=bytes.fromhex(entry.hash.removeprefix("sha256:")),
        expires=None if expires is None else expires.timestamp(),
        max_sequences=entry.max_sequences,
        best_priority=entry.best_priority,
        requests=allowance(entry.requests_per_minute),
        tokens=allowance(entry.tokens_per_minute),
    )
