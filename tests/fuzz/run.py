"""Fuzz with atheris: `make fuzz MINUTES=10`, or `python -m tests.fuzz.run TARGET SECONDS`.

Starts from the kept corpus and writes new inputs to reports/fuzz/TARGET. A finding ends it with status 1 and prints the
input's name. `python -m tests.fuzz.run TARGET keep` adds inputs that reach new code to the kept corpus.
"""

import importlib
import os
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
with atheris.instrument_imports(include=["service"]):
    import service.api.tools
    import service.app
    import service.text.detokenizer
    import service.text.tool_calls  # noqa: F401


def main(name: str, action: str, *given: str) -> None:
    target = importlib.import_module(f"tests.fuzz.{name}")
    kept, found = ROOT / "tests" / "fuzz" / "corpus" / name, ROOT / "reports" / "fuzz" / name
    for folder in (kept, found):
        folder.mkdir(parents=True, exist_ok=True)
    if not any(found.iterdir()):
        for number, seed in enumerate(target.SEEDS):
            (found / f"seed-{number}").write_bytes(seed)
    target.check(b"")  # loads everything that is loaded once, before the measurement
    options = [f"-artifact_prefix={found.parent}/{name}-", "-timeout=20", "-rss_limit_mb=4096", "-verbosity=1"]
    command = f"{sys.executable} -m tests.fuzz.run {name} given"  # libFuzzer calls itself with it for a merge
    if action == "given":
        options = list(given)
    elif action == "keep":
        # Only edges: counting how often each is taken would keep ten times as many inputs.
        options += ["-merge=1", "-use_counters=0", "-max_len=512", str(kept), str(found)]
    else:
        options += [f"-max_total_time={action}", "-max_len=4096", "-print_final_stats=1", str(found), str(kept)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    atheris.Setup([command, *options], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
