#!/usr/bin/env bash
# Builds stand-ins for the base images from Debian packages, to try the deployment where no image registry is reachable.
# Python and Prometheus are real; Grafana's stand-in only sleeps, so that the rest can start.
#
#   deploy/tests/stand-ins.sh > stand-ins.env          needs root, debootstrap and a running Docker
#   COMPOSE_TEST_ENV_FILE=stand-ins.env COMPOSE_TEST_WITHOUT=grafana make compose-test
#
# DEBIAN_MIRROR names another mirror.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$folder/root" "$mirror" >&2
tar -C "$folder/root" -c . |
  docker import -c 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - standin/python:3.11-bookworm >&2

docker build --network host -t standin/prometheus:2.42 - >&2 << 'END'
FROM standin/python:3.11-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends prometheus wget && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /prometheus && chown 65534:65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/usr/bin/prometheus"]
END

docker build -t standin/none:1 - >&2 << 'END'
FROM standin/python:3.11-bookworm
USER 65534:65534
ENTRYPOINT ["sleep", "infinity"]
END

cat << 'END'
BASE_IMAGE=standin/python:3.11-bookworm
PROMETHEUS_IMAGE=standin/prometheus:2.42
GRAFANA_IMAGE=standin/none:1
BUILD_NETWORK=host
END
