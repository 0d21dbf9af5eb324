"""Run guidellm against completions and chats, streamed and whole: `python try_guidellm.py URL`.

Every request must succeed with the requested number of tokens, by the server's count.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TARGET = Path(__file__).resolve().parents[3] / "models" / "target"
NUM_REQUESTS = 10
OUTPUT_TOKENS = 24
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


def benchmark(url: str, endpoint: str, is_streamed: bool) -> None:
    """Run it once. Raises AssertionError unless all requests succeed."""
    with tempfile.TemporaryDirectory(prefix="guidellm-") as folder:
        report_path = Path(folder) / "report.json"
        stream = str(is_streamed).lower()
        command = [
            Path(sys.executable).with_name("guidellm"),
            "run",
            *("--backend", f"kind=openai_http,target={url},request_format={endpoint},stream={stream}"),
            *("--tokenizer", f"kind=huggingface_auto,model={TARGET}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=48,output_tokens={OUTPUT_TOKENS}"),
            *("--profile", "kind=concurrent,streams=3", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--output", f"kind=json,path={report_path}", "--output", "kind=console", "--disable-progress"),
        ]
        done = subprocess.run([str(part) for part in command], cwd=folder)
        assert done.returncode == 0, f"guidellm ended with status {done.returncode}"
        [run] = json.loads(report_path.read_text())["benchmarks"]
    print(json.dumps(run["metrics"]["request_totals"]))
    totals = run["metrics"]["request_totals"]
    assert totals["errored"] == 0, run["requests"]["errored"][:1]
    assert totals["successful"] == NUM_REQUESTS, totals
    counts = [request["output_metrics"]["text_tokens"] for request in run["requests"]["successful"]]
    assert counts == [OUTPUT_TOKENS] * NUM_REQUESTS, counts
    how = "streamed" if is_streamed else "whole"
    print(f"passed  guidellm {version('guidellm')} {endpoint} {how}: {NUM_REQUESTS} requests", flush=True)


def main(url: str) -> None:
    for endpoint in ENDPOINTS:
        for is_streamed in (True, False):
            benchmark(url, endpoint, is_streamed)


if __name__ == "__main__":
    main(sys.argv[1])
