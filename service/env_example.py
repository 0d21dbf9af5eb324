"""`.env.example`: every setting as an environment variable, commented out, made from the settings themselves.

`python -m service.env_example` writes it; a test compares.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from service.setting_groups import BUNDLED_MODELS
from service.settings import PREFIX, Settings, iterate_fields

TARGET = BUNDLED_MODELS.parent / ".env.example"
COMPOSE = """\
# Copy this file to .env, uncomment what you want to change, and run `docker compose up` again.

# ---- Compose: how the containers are built and run -------------------------------------------------------------------

# Where the service is published. 127.0.0.1: this machine only.
#SERVICE_BIND=127.0.0.1
#SERVICE_PORT=8000
#PROMETHEUS_PORT=9090
#GRAFANA_PORT=3000
#LOCUST_PORT=8089

# Base images and package indexes of the build. PIP_INDEX_URL empty: PyPI. A mirror's pip.conf with its credentials, and
# the certificates that it names as /run/secrets/ca_bundle are secrets of the build: they stay out of the image.
#BASE_IMAGE=python:3.11-slim-bookworm
#GPU_BASE_IMAGE=vllm/vllm-openai:v0.32.0
#TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#PIP_INDEX_URL=
#PIP_CONF_FILE=./deploy/secrets/pip.conf
#CA_BUNDLE_FILE=/etc/ssl/certs/ca-certificates.crt
#BUILD_NETWORK=default
#PROMETHEUS_IMAGE=prom/prometheus:v3.5.0
#GRAFANA_IMAGE=grafana/grafana:12.2.0

# Who the service runs as; set both to your own (`id -u`, `id -g`) to keep the file of API keys readable for you alone.
#SERVICE_UID=10001
#SERVICE_GID=10001

# The file of API keys, one a line. To ask clients for a key, uncomment DIFFUSPEC_AUTH__API_KEYS_FILE as well.
#API_KEYS_FILE=./deploy/secrets/api_keys
# Prometheus has none: set DIFFUSPEC_AUTH__OPEN_METRICS to true as well.
#DIFFUSPEC_AUTH__API_KEYS_FILE=/run/secrets/api_keys

# Grafana shows its dashboards to whoever reaches its port. To log in as `admin`, put a password into a file.
#GRAFANA_PASSWORD_FILE=./deploy/secrets/grafana_password
#GRAFANA_LOGIN_DISABLED=false

# Bounds of the service's container, and how long it may take to stop: more than DIFFUSPEC_SERVER__DRAIN_SECONDS.
#SERVICE_MEMORY=4g
#SERVICE_PIDS=512
#SERVICE_STOP_GRACE=45s

# The gpu profile: what is fetched once into the volume `weights`, and served. Revisions may be branches or commits.
#TARGET_REPO=Qwen/Qwen2.5-7B-Instruct
#TARGET_REVISION=main
#DRAFTER_REPO=Dream-org/Dream-v0-Instruct-7B
#DRAFTER_REVISION=main
#HF_TOKEN_FILE=./deploy/secrets/hf_token
#GPU_COUNT=1
#GPU_PORT=8001
#GPU_MEMORY=64g

# The loadtest profiles: where, users, seconds (headless), closed or open loop, requests per second of an open-loop
# user, and steady, ramp or soak.
#LOADTEST_URL=http://diffuspec:8000
#LOADTEST_USERS=8
#LOADTEST_SECONDS=60
#LOADTEST_ARRIVALS=closed
#LOADTEST_RATE=1
#LOADTEST_SHAPE=steady
"""


def env_example() -> str:
    """The whole file."""
    parts = [COMPOSE]
    group = ""
    for name, field in iterate_fields():
        head = name.partition(".")[0]
        if head != group:
            group = head
            title = f"# ---- {Settings.model_fields[group].description} "
            parts.append(f"\n{title:-<120}\n")
        meaning = textwrap.fill(
            (field.description or "").replace("`", ""), 118, initial_indent="# ", subsequent_indent="# "
        )
        variable = PREFIX + name.upper().replace(".", "__")
        parts.append(f"\n{meaning}\n#{variable}={_text(field.default)}\n")
    return "".join(parts)


def _text(default: Any) -> str:
    """A default as the environment says it; empty where unset means something of its own."""
    if default is None or default == ():
        return ""
    if isinstance(default, Path):
        return str(default.relative_to(BUNDLED_MODELS.parent))
    return json.dumps(default) if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    TARGET.write_text(env_example(), encoding="utf-8")
