"""Run aiperf against streamed completions and chats: `python try_aiperf.py URL`.

Its speculative-decoding table must be filled. It reads `metrics.speculative_decoding` of each response, which a stream
has in its usage chunk.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TARGET = Path(__file__).resolve().parents[3] / "models" / "target"
NUM_REQUESTS = 12
SPECULATION = (
    "spec_decode_acceptance_length",
    "spec_decode_token_weighted_acceptance_length",
    "spec_decode_draft_acceptance_rate",
    "spec_decode_overall_draft_acceptance_rate",
    "spec_decode_accepted_per_verified",
    "spec_decode_steps",
)


def profile(url: str, endpoint: str) -> None:
    """Run it once. Raises AssertionError unless all requests succeed and the table shows how much was accepted."""
    with tempfile.TemporaryDirectory(prefix="aiperf-") as folder:
        command = [
            Path(sys.executable).with_name("aiperf"),
            *("profile", "--url", url, "--model", "diffuspec-python", "--endpoint-type", endpoint, "--streaming"),
            *("--tokenizer", TARGET, "--use-server-token-count", "--random-seed", "3"),
            *("--request-count", NUM_REQUESTS, "--concurrency", 3, "--isl", 60, "--osl", 40),
            *("--extra-inputs", "temperature:0.5", "--ui-type", "none", "--no-gpu-telemetry"),
            *("--output-artifact-dir", folder),
        ]
        done = subprocess.run([str(part) for part in command], cwd=folder, stdout=subprocess.PIPE, text=True)
        print(done.stdout)
        assert done.returncode == 0, f"aiperf ended with status {done.returncode}"
        report = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == NUM_REQUESTS, report["request_count"]
    assert "Spec Decode" in done.stdout
    values = {name: report[name]["avg"] for name in SPECULATION}
    assert values["spec_decode_acceptance_length"] >= 1, values
    assert 0 < values["spec_decode_overall_draft_acceptance_rate"] <= 100, values
    assert values["spec_decode_steps"] > 0, values
    print(f"passed  aiperf {version('aiperf')} {endpoint}: {values}", flush=True)


def main(url: str) -> None:
    for endpoint in ("completions", "chat"):
        profile(url, endpoint)


if __name__ == "__main__":
    main(sys.argv[1])
