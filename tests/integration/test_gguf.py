"""GGUF targets, end to end: served, measured, converted, and refused before the port opens."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from service import convert
from service.check import CheckOptions, check
from service.cli import main
from service.text.tokenizer import TextTokenizer
from tests.checkpoints import write_block_drafter
from tests.gguf_files import Content, gguf_of
from tests.integration.api_server import embedded_app, post, serving
from tests.integration.test_unfit_pairs import port, refusal, settings_of
from tests.unit.bench.test_cli import _parse, run
from transformer.config import TransformerConfig
from transformer.model import Transformer
from transformer.weights import INDEX_FILE, weight_shapes

__all__ = ["port"]  # a fixture

PROMPT = "for line in lines:"
MAX_TOKENS = 24


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A file with matrices in Q4_1, and transformers' model of the same values."""
    content, reference = gguf_of("llama", "Q4_1")
    content.write(tmp_path / "Tiny-Q4_1.gguf")
    return tmp_path / "Tiny-Q4_1.gguf", reference


def greedy(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    prompt = torch.tensor([tokens])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_TOKENS, do_sample=False)
    generated: list[int] = output[0, len(tokens) :].tolist()
    return generated


def test_a_file_is_served_as_transformers_generates_with_and_without_drafts(
    tmp_path: Path, written: tuple[Path, PreTrainedModel]
) -> None:
    path, reference = written
    write_block_drafter(tmp_path / "drafter")
    tokenizer = TextTokenizer.read(path, ())
    expected = greedy(reference, tokenizer.encode(PROMPT, add_special_tokens=True))
    with serving(embedded_app(path, tmp_path / "drafter")) as url:
        for temperature in (0.0, 0.9):
            answers = [
                post(
                    url, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=temperature, seed=1,
                    return_token_ids=True, speculative=speculative,
                )
                for speculative in ({"enabled": False}, {"enabled": True}, {"enabled": True, "policy": "fixed"})
            ]  # fmt: skip
            ids = [answer["choices"][0]["token_ids"] for answer in answers]
            assert ids[0] == ids[1] == ids[2]
            if temperature == 0:
                assert ids[0] == expected
        chat = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        assert chat["usage"]["prompt_tokens"] == len("<user>hi<assistant>")


def test_bench_measures_a_file_against_transformers(tmp_path: Path, written: tuple[Path, PreTrainedModel]) -> None:
    options = ["--num-prompts", "4", "--prompt-tokens", "16", "--max-tokens", "8", "--warmup", "1", "--drafter", "none"]
    files = ["--json", str(tmp_path / "b.json"), "--html", str(tmp_path / "b.html")]
    arguments = ["--target", str(written[0]), *options, *files, "--cells", "plain", "--against", "transformers"]
    assert run(_parse(*arguments)) == 0


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_converted_folder_is_the_same_model_for_transformers(
    family: str, is_sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_sharded:
        monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 50_000)
    content, reference = gguf_of(family, "Q8_0", tied=False)  # type: ignore[arg-type]
    content.write(tmp_path / "model.gguf")
    folder = tmp_path / "folder"
    assert main(["convert", str(tmp_path / "model.gguf"), str(folder)]) == 0
    assert "--target" in capsys.readouterr().err
    assert (folder / INDEX_FILE).exists() == is_sharded
    loaded = AutoModelForCausalLM.from_pretrained(str(folder))
    assert loaded.dtype == torch.float32
    wanted = reference.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    tokens = AutoTokenizer.from_pretrained(str(folder))(PROMPT).input_ids
    assert greedy(loaded, tokens) == greedy(reference, tokens)
    ours, theirs = TransformerConfig.read(folder), TransformerConfig.read(tmp_path / "model.gguf")
    assert replace(ours, family=None) == replace(theirs, family=None)
    assert check(settings_of(folder, Path("none")), io.StringIO(), CheckOptions(bandwidth=10)) == 0


def test_a_converted_folder_may_be_half_as_large(tmp_path: Path, written: tuple[Path, PreTrainedModel]) -> None:
    path, reference = written
    assert main(["convert", str(path), str(tmp_path / "folder"), "--dtype", "bfloat16"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "folder"))
    assert loaded.dtype == torch.bfloat16
    wanted = reference.state_dict()
    assert all(torch.equal(value, wanted[name].bfloat16()) for name, value in loaded.state_dict().items())


def test_convert_overwrites_nothing_and_reads_only_files(
    tmp_path: Path, written: tuple[Path, PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(written[0]), str(tmp_path)]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "is no file; `convert` reads GGUF files" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def without(name: str) -> Callable[[Content], None]:
    return lambda content: content.tensors.pop(name) and None


def with_architecture(content: Content) -> None:
    content.architecture = "gemma3"


def with_tokenizer(content: Content) -> None:
    content.metadata["tokenizer.ggml.pre"] = "unheard-of"


UNFIT: dict[str, tuple[Callable[[Content], None], str]] = {
    "tensor": (without("blk.0.attn_v.weight"), "the weight blk.0.attn_v.weight is missing"),
    "architecture": (with_architecture, "the architecture 'gemma3' is not supported"),
    "tokenizer": (with_tokenizer, "the pre-tokenizer 'unheard-of' is not supported"),
}


@pytest.mark.parametrize(("change", "sentence"), UNFIT.values(), ids=UNFIT.keys())
def test_an_unfit_file_is_refused_before_the_port_opens(
    change: Callable[[Content], None], sentence: str, tmp_path: Path, port: int
) -> None:
    content, _ = gguf_of()
    change(content)
    path = tmp_path / "model.gguf"
    content.write(path)
    settings = settings_of(path, Path("prompt-lookup"), port)
    assert sentence in refusal(settings)
    output = io.StringIO()
    assert check(settings, output, CheckOptions(bandwidth=10)) == 1
    assert sentence in output.getvalue()
    assert main(["convert", str(path), str(tmp_path / "folder")]) == 1
    assert not (tmp_path / "folder").exists()


def test_cut_and_foreign_files_are_refused_before_the_port_opens(
    tmp_path: Path, written: tuple[Path, PreTrainedModel], port: int
) -> None:
    path = written[0]
    data = path.read_bytes()
    for content, sentence in (
        (data[:-200], "the download may have stopped early"),
        (data[:5000], "the download may have stopped early"),
        (b"\x80\x04pickle" * 100, "is no GGUF file"),
    ):
        damaged = tmp_path / f"{len(content)}.gguf"
        damaged.write_bytes(content)
        assert sentence in refusal(settings_of(damaged, Path("prompt-lookup"), port))


def test_vllm_is_told_how_to_convert(written: tuple[Path, PreTrainedModel], port: int) -> None:
    path = written[0]
    text = refusal(settings_of(path, Path("prompt-lookup"), port, **{"model.engine": "vllm"}))
    assert f"run `diffuspec convert {path} Tiny-Q4_1`, then serve with --target Tiny-Q4_1" in text


def test_a_file_is_no_drafter(tmp_path: Path, written: tuple[Path, PreTrainedModel], port: int) -> None:
    path = written[0]
    assert "is not a diffusion language model" in refusal(settings_of(path, path, port))


def test_loading_reports_its_progress(written: tuple[Path, PreTrainedModel]) -> None:
    reported: list[float] = []
    model = Transformer.load(written[0], progress=reported.append)
    assert reported == sorted(reported)
    assert reported[-1] == 1
    assert len(reported) == len(weight_shapes(model.config))
