"""Run schemathesis over /openapi.json: `python try_schemathesis.py URL SMALL_URL`.

It makes valid and invalid requests from the API's own description. There must be no 5xx, no answer or stream event that
the description lacks, and no invalid request accepted. The server at SMALL_URL has a short context and allows few
choices, because a chat without `max_tokens` runs to the end of the context, and 16 such choices take a laptop a minute.
"""

import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

CONFIGURATION = Path(__file__).resolve().with_name("schemathesis.toml")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)


def main(small_url: str) -> int:
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "--config-file", CONFIGURATION),
        *("run", f"{small_url}/openapi.json", "--seed", "7", "--max-examples", "50", "--continue-on-failure"),
        *("--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS), "--request-timeout", "60"),
    ]
    with tempfile.TemporaryDirectory(prefix="schemathesis-") as folder:  # it writes a cache where it runs
        status = subprocess.run([str(part) for part in command], cwd=folder).returncode
    print(f"{'FAILED ' if status else 'passed '} schemathesis {version('schemathesis')}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[2]))
