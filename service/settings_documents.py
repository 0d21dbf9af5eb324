"""Documents made from the settings: `.env.example` and `docs/settings.md`.

`make settings` (`python -m service.settings_documents`) writes both; tests compare.
"""

import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from service.setting_groups import BUNDLED_MODELS
from service.settings import PREFIX, Settings, iterate_fields

ROOT = BUNDLED_MODELS.parent
ENV_EXAMPLE = ROOT / ".env.example"
SETTINGS_PAGE = ROOT / "docs" / "settings.md"

PAGE_HEAD = """\
# Settings

<!-- Written by `make settings` from service/setting_groups.py and service/speculation_settings.py: edit those. -->

Give a setting in any of these ways. If it is given twice, the first of them wins:

1. as a flag: `diffuspec serve --help` lists those there are;
2. as an environment variable, `DIFFUSPEC_GROUP__NAME`, with two underscores;
3. in a file that `--config FILE` names, in TOML or JSON, with a table for each group.

```toml
[server]
port = 9000

[speculation]
policy = "paper"
```

An unknown name or an impossible value stops the server with a message and exit status 2. A default that is empty
below means *unset*. [.env.example](../.env.example) has the same list for Docker Compose.
"""

COMPOSE = """\
# Copy this file to .env, uncomment what you want to change, and run `docker compose up` again.

# ---- Compose: how the containers are built and run -------------------------------------------------------------------

# Where the services can be reached. 127.0.0.1: from this machine only.
#SERVICE_BIND=127.0.0.1
#SERVICE_PORT=8000
#PROMETHEUS_PORT=9090
#GRAFANA_PORT=3000
#LOCUST_PORT=8089

# Base images and package indexes for the build. PIP_INDEX_URL empty: PyPI. For a mirror with credentials, give its
# pip.conf, and the certificates that it names as /run/secrets/ca_bundle. Both are build secrets and stay out of the
# image.
#BASE_IMAGE=python:3.11-slim-bookworm
#GPU_BASE_IMAGE=vllm/vllm-openai:v0.32.0
#TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#PIP_INDEX_URL=
#PIP_CONF_FILE=./deploy/secrets/pip.conf
#CA_BUNDLE_FILE=/etc/ssl/certs/ca-certificates.crt
#BUILD_NETWORK=default
#PROMETHEUS_IMAGE=prom/prometheus:v3.5.0
#GRAFANA_IMAGE=grafana/grafana:12.2.0

# User and group of the service. With your own ids (`id -u`, `id -g`) the file of API keys can stay readable by you
# alone.
#SERVICE_UID=10001
#SERVICE_GID=10001

# File of API keys, one per line. To ask clients for a key, uncomment DIFFUSPEC_AUTH__API_KEYS_FILE as well.
#API_KEYS_FILE=./deploy/secrets/api_keys
# Prometheus has no key: set DIFFUSPEC_AUTH__OPEN_METRICS to true as well.
#DIFFUSPEC_AUTH__API_KEYS_FILE=/run/secrets/api_keys

# Anyone who reaches Grafana's port can see its dashboards. To log in as `admin`, write a password into a file.
#GRAFANA_PASSWORD_FILE=./deploy/secrets/grafana_password
#GRAFANA_LOGIN_DISABLED=false

# Limits of the service's container. It must get more time to stop than DIFFUSPEC_SERVER__DRAIN_SECONDS.
#SERVICE_MEMORY=4g
#SERVICE_PIDS=512
#SERVICE_STOP_GRACE=45s

# The gpu profile: the models to serve. They are fetched once, into the volume `weights`. A revision is a branch or a
# commit.
#TARGET_REPO=Qwen/Qwen2.5-7B-Instruct
#TARGET_REVISION=main
#DRAFTER_REPO=Dream-org/Dream-v0-Instruct-7B
#DRAFTER_REVISION=main
#HF_TOKEN_FILE=./deploy/secrets/hf_token
#GPU_COUNT=1
#GPU_PORT=8001
#GPU_MEMORY=64g

# The load test profiles: server, users, seconds (headless only), closed or open loop, requests per second of each
# open-loop user, and shape (steady, ramp or soak).
#LOADTEST_URL=http://diffuspec:8000
#LOADTEST_USERS=8
#LOADTEST_SECONDS=60
#LOADTEST_ARRIVALS=closed
#LOADTEST_RATE=1
#LOADTEST_SHAPE=steady
"""


def env_example() -> str:
    """Return the text of `.env.example`: every setting as an environment variable, commented out."""
    parts = [COMPOSE]
    for title, _, fields in _groups():
        parts.append(f"\n{f'# ---- {title} ':-<120}\n")
        for name, field in fields:
            meaning = (field.description or "").replace("`", "")
            comment = textwrap.fill(meaning, 118, initial_indent="# ", subsequent_indent="# ")
            parts.append(f"\n{comment}\n#{_variable(name)}={_text(field.default)}\n")
    return "".join(parts)


def settings_page() -> str:
    """Return the text of `docs/settings.md`: a section for each group, with a table row for each setting."""
    parts = [PAGE_HEAD]
    for title, intro, fields in _groups():
        parts.append(f"\n## {title}\n\n{intro}\n\n")
        parts.append("| setting | environment | default | meaning |\n| --- | --- | --- | --- |\n")
        for name, field in fields:
            default = _text(field.default)
            meaning = (field.description or "").replace("|", "\\|")
            parts.append(f"| `{name}` | `{_variable(name)}` | {default and f'`{default}`'} | {meaning} |\n")
    return "".join(parts)


def _groups() -> Iterator[tuple[str, str, list[tuple[str, FieldInfo]]]]:
    """Yield each group's title, its one-line introduction and its settings."""
    for group, group_field in Settings.model_fields.items():
        fields = [(name, field) for name, field in iterate_fields() if name.partition(".")[0] == group]
        yield group_field.description or "", inspect.getdoc(group_field.annotation) or "", fields


def _variable(name: str) -> str:
    return PREFIX + name.upper().replace(".", "__")


def _text(default: Any) -> str:
    """Return a default in the form of an environment variable; empty if unset."""
    if default is None or default == ():
        return ""
    if isinstance(default, Path):
        return str(default.relative_to(ROOT))
    return json.dumps(default) if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    ENV_EXAMPLE.write_text(env_example(), encoding="utf-8")
    SETTINGS_PAGE.write_text(settings_page(), encoding="utf-8")
