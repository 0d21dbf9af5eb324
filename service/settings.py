"""All settings of the service, in one frozen tree.

Flags of the command line come first, then environment variables (`DIFFUSPEC_GROUP__NAME`), then the `--config` file
(TOML or JSON), then the defaults. The settings themselves are in `service.setting_groups` and
`service.speculation_settings`.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from service.setting_groups import (
    NO_DRAFTER,
    AuditSettings,
    AuthSettings,
    LimitSettings,
    LoggingSettings,
    ModelSettings,
    SchedulerSettings,
    ServerSettings,
    SettingsGroup,
    VllmSettings,
)
from service.speculation_settings import SpeculationSettings

PREFIX = "DIFFUSPEC_"


class SettingsError(Exception):
    """A setting is unknown or has an impossible value. The message has one sentence per problem."""


class Settings(BaseSettings):
    """All settings; build it with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True)

    server: ServerSettings = Field(default_factory=ServerSettings, description="HTTP server")
    model: ModelSettings = Field(default_factory=ModelSettings, description="Models")
    speculation: SpeculationSettings = Field(default_factory=SpeculationSettings, description="Speculative decoding")
    scheduler: SchedulerSettings = Field(default_factory=SchedulerSettings, description="Batching and admission")
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="The vLLM engine")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="Limits on single requests")
    audit: AuditSettings = Field(default_factory=AuditSettings, description="Runtime audit")
    auth: AuthSettings = Field(default_factory=AuthSettings, description="API keys")
    logging: LoggingSettings = Field(default_factory=LoggingSettings, description="Logs")

    @property
    def drafts_freely(self) -> bool:
        """True if free drafts are on and the causal model knows something to draft from."""
        speculation, model = self.speculation, self.model
        has_ngrams = model.ngram_folder is not None and speculation.reads_ngrams
        is_wanted = speculation.free_drafts and model.drafter_choice != NO_DRAFTER
        return is_wanted and (speculation.reads_text or has_ngrams)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings)


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Combine the file, the environment and `overrides` (dotted names, such as `server.port`).

    Raises SettingsError naming every unknown or impossible setting.
    """
    from_file = _read_file(config) if config is not None else {}
    _refuse_unknown_variables(os.environ)

    class ConfiguredSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            *sources: PydanticBaseSettingsSource,
            **named: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (named["init_settings"], named["env_settings"], InitSettingsSource(settings_cls, from_file))

    nested: dict[str, dict[str, Any]] = {}
    for name, value in (overrides or {}).items():
        group, _, key = name.partition(".")
        nested.setdefault(group, {})[key] = value
    try:
        return ConfiguredSettings(**nested)  # type: ignore[arg-type]  # validated right here
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(problem) for problem in error.errors())) from None
    except ValueError as error:  # an environment variable that holds broken JSON
        raise SettingsError(str(error)) from None


def _sentence(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name}"
    if name.startswith("auth"):  # never print a key
        return f"{name}: {problem['msg']}"
    return f"{name}: {problem['msg']}, got {problem['input']!r}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold an object with groups such as server and model")
    return content


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raise SettingsError for a misspelled variable, such as DIFFUSPEC_SERVER_PORT (one underscore)."""
    for variable in environment:
        if not variable.upper().startswith(PREFIX):
            continue
        group, separator, name = variable[len(PREFIX) :].lower().partition("__")
        if group not in Settings.model_fields or (separator and not name):
            raise SettingsError(
                f"unknown environment variable {variable}; settings are named {PREFIX}GROUP__NAME, "
                f"with a group of {', '.join(Settings.model_fields)}"
            )


def iterate_fields() -> Iterator[tuple[str, FieldInfo]]:
    """Yield `group.name` and the field of every setting, in order."""
    for group, group_field in Settings.model_fields.items():
        group_type = group_field.annotation
        assert isinstance(group_type, type)
        assert issubclass(group_type, SettingsGroup)
        for name, field in group_type.model_fields.items():
            yield f"{group}.{name}", field


def describe(name: str) -> str:
    """Return the description of one setting, such as `server.port`."""
    return dict(iterate_fields())[name].description or ""
