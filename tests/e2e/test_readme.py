"""The README's code blocks work: they run against a server on the bundled pair."""

import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import ROOT

README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run_in_order(bundled_server: str, tmp_path: Path) -> None:
    script = "\n".join(["import os", *code_blocks("python")]).replace("http://127.0.0.1:8000", bundled_server)
    assert script.count(bundled_server) == 1
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "num_accepted_draft_tokens" in done.stdout


def test_the_curl_command_answers(bundled_server: str, tmp_path: Path) -> None:
    commands = [block for block in code_blocks("sh") if block.startswith("curl")]
    assert len(commands) == 1
    command = commands[0].replace("http://127.0.0.1:8000", bundled_server)
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert '"text"' in done.stdout, done.stderr


def test_complete_writes_text_and_what_was_accepted(bundled_server: str) -> None:
    command = [sys.executable, "-m", "service.cli", "complete", "import os", "--url", bundled_server]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "accepted" in done.stdout + done.stderr


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"serve", "setup-vllm", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README names make {target}"
