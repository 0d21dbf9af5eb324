"""`diffuspec pull` against a stand-in for the hub: it pins, checks, resumes, and reports in plain words."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint, write_hub_drafter
from tests.gguf_files import gguf_of
from tests.integration.hub_server import COMMIT, HubState, hub

TARGET, DRAFTER, QUANTISED = "tiny-org/tiny-target", "tiny-org/tiny-sdar", "tiny-org/tiny-GGUF"
FILE = "Tiny-Q4_1.gguf"


@pytest.fixture
def state(tmp_path: Path) -> HubState:
    write_checkpoint(tmp_path / "target", "qwen3", max_shard_size="40KB")
    write_hub_drafter(tmp_path / "drafter", "sdar")
    for folder in ("target", "drafter"):
        (tmp_path / folder / "modeling_evil.py").write_text("raise SystemExit('run')\n")
        (tmp_path / folder / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "quantised" / "Q8").mkdir(parents=True)
    content, _ = gguf_of("llama", "Q4_1")
    for name in (FILE, "Q8/other.gguf"):
        content.write(tmp_path / "quantised" / name)
    folders = {TARGET: "target", DRAFTER: "drafter", QUANTISED: "quantised"}
    return HubState({name: tmp_path / folder for name, folder in folders.items()})


@pytest.fixture
def address(state: HubState) -> Iterator[str]:
    with hub(state) as address:
        yield address


def run(arguments: list[str], home: Path, address: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DIFFUSPEC_"))}
    environment = kept | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


def test_a_pulled_pair_is_pinned_checked_and_used_by_its_names(tmp_path: Path, state: HubState, address: str) -> None:
    home = tmp_path / "home"
    result = run(["pull", TARGET, f"{DRAFTER}@{COMMIT}"], home, address)
    assert result.returncode == 0, result.stderr
    assert f"{TARGET} at {COMMIT}" in result.stderr
    assert "files match the hub's checksums" in result.stderr
    assert "100%" in result.stderr  # progress
    fetched = {path.name for path in home.rglob("*") if path.is_symlink()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= fetched
    assert not {"modeling_evil.py", "pytorch_model.bin"} & fetched
    num_requests = len(state.requests)
    checked = run(["check", TARGET, f"{DRAFTER}@{COMMIT}", "--bandwidth", "10"], home, address, HF_HUB_OFFLINE="1")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "SDAR" in checked.stdout
    assert len(state.requests) == num_requests  # only `pull` fetches


@pytest.mark.parametrize("file", [FILE, "Q8/other.gguf"])
def test_one_gguf_file_is_pulled_and_used_by_its_name(tmp_path: Path, state: HubState, address: str, file: str) -> None:
    home, name = tmp_path / "home", f"{QUANTISED}/{file}"
    before = run(["check", name, "--bandwidth", "10"], home, address)
    assert before.returncode == 1
    assert f"{name} is neither a folder nor a GGUF file nor a hub checkpoint" in before.stdout
    result = run(["pull", name], home, address)
    assert result.returncode == 0, result.stderr
    assert "1 files match the hub's checksums" in result.stderr
    assert {path.name for path in home.rglob("*") if path.is_symlink()} == {Path(file).name}
    num_requests = len(state.requests)
    checked = run(["check", f"{name}@{COMMIT}", "--bandwidth", "10"], home, address)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "Q4_1" in checked.stdout
    converted = run(["convert", name, str(tmp_path / "folder")], home, address)
    assert converted.returncode == 0, converted.stderr
    assert len(state.requests) == num_requests  # only `pull` fetches


def test_a_damaged_gguf_file_is_deleted(tmp_path: Path, state: HubState, address: str) -> None:
    state.wrong_checksum.add(FILE)
    result = run(["pull", f"{QUANTISED}/{FILE}"], tmp_path / "home", address)
    assert result.returncode == 1
    assert f"{FILE} did not match the hub's checksum and was deleted" in last_line(result)


def test_a_download_that_breaks_off_goes_on_from_there(tmp_path: Path, state: HubState, address: str) -> None:
    (state.repositories[DRAFTER] / "large.safetensors").write_bytes(bytes(40_000_000))  # several chunks of a download
    state.cut_once.add("large.safetensors")
    result = run(["pull", DRAFTER], tmp_path / "home", address)
    assert result.returncode == 0, result.stderr
    first, second = state.downloads("large.safetensors")
    assert first is None
    assert second is not None
    assert second.startswith("bytes=")
    assert second != "bytes=0-"


def test_a_second_run_fetches_only_what_is_missing(tmp_path: Path, state: HubState, address: str) -> None:
    shards = sorted(path.name for path in state.repositories[TARGET].glob("*.safetensors"))
    assert len(shards) > 1
    state.broken.add(shards[-1])
    home = tmp_path / "home"
    failed = run(["pull", TARGET], home, address)
    assert failed.returncode == 1
    assert last_line(failed).startswith(f"diffuspec: cannot fetch {TARGET} from {address}")
    unusable = run(["check", TARGET, "--bandwidth", "10"], home, address)
    assert unusable.returncode == 1
    assert f"`diffuspec pull {TARGET}` fetches the rest" in unusable.stderr
    state.broken.clear()
    state.requests.clear()
    assert run(["pull", TARGET], home, address).returncode == 0
    assert len(state.downloads(shards[-1])) == 1
    assert not state.downloads(shards[0])


def test_a_wrong_checksum_is_found_and_the_file_deleted(tmp_path: Path, state: HubState, address: str) -> None:
    state.wrong_checksum.add("model.safetensors")
    home = tmp_path / "home"
    result = run(["pull", DRAFTER], home, address)
    assert result.returncode == 1
    assert "model.safetensors did not match the hub's checksum and was deleted" in last_line(result)
    assert not list(home.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("name", "variables", "sentence"),
    [
        ("tiny-org/nothing", {}, "the hub has no tiny-org/nothing; if it is private, set HF_TOKEN."),
        (f"{DRAFTER}@v9", {}, f"{DRAFTER} has no revision 'v9'."),
        (DRAFTER, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (DRAFTER, {"HF_ENDPOINT": "http://127.0.0.1:9"}, f"cannot fetch {DRAFTER} from http://127.0.0.1:9"),
        ("no name at all", {}, "'no name at all' is not a hub name"),
        (f"{QUANTISED}/missing.gguf", {}, f"{QUANTISED} has no file missing.gguf."),
        (QUANTISED, {}, f"a GGUF file is fetched by its name, {QUANTISED}/FILE.gguf"),
    ],
)
def test_what_cannot_be_fetched_is_said_in_one_sentence(
    tmp_path: Path, address: str, name: str, variables: dict[str, str], sentence: str
) -> None:
    result = run(["pull", name], tmp_path / "home", address, **variables)
    assert result.returncode == 1
    assert sentence in last_line(result)
    assert "Traceback" not in result.stderr


def test_tokens_and_gates_are_respected(tmp_path: Path, state: HubState, address: str) -> None:
    state.token = "hf_secret"
    refused = run(["pull", DRAFTER], tmp_path / "home", address)
    assert refused.returncode == 1
    assert "set HF_TOKEN" in last_line(refused)
    result = run(["pull", DRAFTER], tmp_path / "home", address, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    assert "hf_secret" not in result.stderr
    state.is_gated = True
    gated = run(["pull", TARGET], tmp_path / "home", address, HF_TOKEN="hf_secret")
    assert "is gated: accept its terms" in last_line(gated)
