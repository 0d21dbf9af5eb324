#!/usr/bin/env bash
# `make lock`: writes service.lock and loadtest.lock, with version and sha256 of every package of the two images.
set -euo pipefail
cd "$(dirname "$0")/../.."
uv=${UV:-uv}

# torch is in torch.txt instead, because every index has its own build of it, with its own hash.
for image in service loadtest; do
  python3 deploy/image/requirements.py ${image#service} |
    "$uv" pip compile - --config-file deploy/image/lock.toml --quiet --upgrade --generate-hashes --no-annotate \
      --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-package torch \
      --custom-compile-command "make lock" --output-file "deploy/image/$image.lock" > /dev/null
done
