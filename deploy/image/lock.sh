#!/usr/bin/env bash
# Writes service.lock and loadtest.lock: every package of the two images by version and sha256. `make lock`
set -euo pipefail
cd "$(dirname "$0")/../.."
uv=${UV:-uv}

# torch is in torch.txt instead: each index has a build, and so a hash, of its own.
for image in service loadtest; do
  python3 deploy/image/requirements.py ${image#service} |
    "$uv" pip compile - --config-file deploy/image/lock.toml --quiet --upgrade --generate-hashes --no-annotate \
      --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-package torch \
      --custom-compile-command "make lock" --output-file "deploy/image/$image.lock" > /dev/null
done
