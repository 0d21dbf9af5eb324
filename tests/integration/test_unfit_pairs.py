"""Every pair that can't work is refused in one sentence, with exit status 1, before the port opens.

The test holds the port, so a server that gets as far as listening complains about that instead.
"""

import io
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.check import CheckOptions, check
from service.serve import serve
from service.settings import Settings, load_settings
from tests.checkpoints import change_vocabulary, write_checkpoint, write_hub_drafter

Change = Callable[[Path, Path], None]


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_weight(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights[name]
    save_file(weights | ({} if tensor is None else {name: tensor}), path)


def condition(drafter: Path, target_hidden_size: int) -> None:
    """Make it a drafter for a target with hidden states of this size."""
    edit(drafter / "config.json", target_hidden_size=target_hidden_size)
    path = drafter / "model.safetensors"
    weights = load_file(path)
    rows = weights["model.embed_tokens.weight"].shape[1]
    save_file(weights | {"model.target_projection.weight": torch.zeros(rows, target_hidden_size)}, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "no target": (lambda target, _: (target / "config.json").unlink(), "config.json does not exist"),
    "target's shard": (lambda target, _: shard(target).unlink(), "safetensors does not exist"),
    "target cut": (lambda target, _: cut(shard(target)), "the download may have stopped early"),
    "target's tokenizer": (lambda target, _: (target / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "target of an unknown kind": (lambda target, _: edit(target / "config.json", model_type="mamba"), "'mamba'"),
    "no weights": (lambda _, drafter: (drafter / "model.safetensors").unlink(), "only safetensors are loaded"),
    "drafter cut": (lambda _, drafter: cut(drafter / "model.safetensors"), "the download may have stopped early"),
    "drafter of another target": (
        lambda _, drafter: condition(drafter, 24),
        "belongs to another target",
    ),
    "header": (lambda _, drafter: (drafter / "model.safetensors").write_bytes(b"\xff" * 99), "damaged"),
    "a weight": (lambda _, drafter: edit_weight(drafter, NORM, None), f"the weight {NORM} is missing"),
    "a shape": (lambda _, drafter: edit_weight(drafter, NORM, torch.ones(5)), r"has the shape [5]"),
    "a type": (
        lambda _, drafter: edit_weight(drafter, NORM, torch.ones(32, dtype=torch.int8)),
        "is I8; supported are float32, float16 and bfloat16",
    ),
    "drafter's tokenizer": (lambda _, drafter: (drafter / "tokenizer.json").unlink(), "has no tokenizer"),
    "a broken tokenizer": (lambda _, drafter: (drafter / "tokenizer.json").write_text("{}"), "read as a tokenizer"),
    "a causal drafter": (
        lambda _, drafter: write_checkpoint(drafter, "qwen3") and None,
        "its configuration names no mask token",
    ),
    "a mask beyond the vocabulary": (
        lambda _, drafter: edit(drafter / "config.json", mask_token_id=9999),
        "within the vocabulary",
    ),
    "quantized": (lambda _, drafter: edit(drafter / "config.json", quantization_config={"bits": 4}), "quantized"),
    "DFlash": (lambda _, drafter: edit(drafter / "config.json", dflash_config={"x": 1}), "DFlash"),
    "DiffuGPT": (lambda _, drafter: edit(drafter / "config.json", model_type="gpt2"), "DiffuGPT"),
    "fewer ids than tokens": (
        lambda _, drafter: edit_vocabulary_size(drafter, 200),
        "has 200 token ids in config.json, but its tokenizer has ids up to 258",
    ),
}


def edit_vocabulary_size(folder: Path, size: int) -> None:
    edit(folder / "config.json", vocab_size=size, mask_token_id=100)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        edit_weight(folder, name, torch.zeros(size, 32))


def pair(tmp_path: Path) -> tuple[Path, Path]:
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_checkpoint(target, "llama", max_shard_size="30KB")
    write_hub_drafter(drafter, "sdar")
    return target, drafter


def settings_of(target: Path, drafter: Path, port: int = 0, **overrides: Any) -> Settings:
    given = {"model.target": target, "model.drafter": str(drafter), "server.port": port}
    return load_settings(overrides=given | overrides)


def refusal(settings: Settings) -> str:
    output = io.StringIO()
    assert serve(settings, output) == 1
    text = output.getvalue()
    assert text.startswith("diffuspec: cannot load the model: ")
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(("change", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_refused_before_the_port_opens(
    change: Change, sentence: str, tmp_path: Path, port: int
) -> None:
    target, drafter = pair(tmp_path)
    change(target, drafter)
    settings = settings_of(target, drafter, port)
    assert sentence in refusal(settings)
    output = io.StringIO()
    assert check(settings, output, CheckOptions(bandwidth=10)) == 1
    assert sentence in output.getvalue()


def test_a_folder_that_is_none_is_refused(tmp_path: Path, port: int) -> None:
    target, drafter = pair(tmp_path)
    assert "`diffuspec pull NAME` fetches one" in refusal(settings_of(target, Path("org/nothing-here"), port))
    assert "is neither a folder nor" in refusal(settings_of(tmp_path / "nowhere", drafter, port))


def test_a_diffusion_model_is_no_target(tmp_path: Path, port: int) -> None:
    _, drafter = pair(tmp_path)
    assert "name a causal model as the target" in refusal(settings_of(drafter, drafter, port))


def test_a_context_beyond_the_targets_is_refused(tmp_path: Path, port: int) -> None:
    target, drafter = pair(tmp_path)
    overrides = {"model.context_length": 4096}
    assert "supports at most 512 tokens" in refusal(settings_of(target, drafter, port, **overrides))


def test_a_foreign_vocabulary_without_a_tokenizer_file_is_refused(tmp_path: Path, port: int) -> None:
    target, drafter = pair(tmp_path)
    change_vocabulary(drafter, "byte-names")
    content = json.loads((drafter / "tokenizer.json").read_text())
    (drafter / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (drafter / "tokenizer.json").unlink()
    assert "its tokenizer is Python code, which is never run" in refusal(settings_of(target, drafter, port))


def test_a_pair_that_fits_gets_as_far_as_the_port(tmp_path: Path, port: int) -> None:
    target, drafter = pair(tmp_path)
    output = io.StringIO()
    assert serve(settings_of(target, drafter, port), output) == 1
    assert "cannot listen on" in output.getvalue()


def test_an_unused_drafter_is_not_looked_at(tmp_path: Path, port: int) -> None:
    target, drafter = pair(tmp_path)
    (drafter / "config.json").unlink()
    output = io.StringIO()
    serve(settings_of(target, drafter, port, **{"speculation.diffusion": False}), output)
    assert "cannot listen on" in output.getvalue()
