import pytest

from service.bench.cells import CELLS, Models, UnknownCellError, build, choose_cells, find_cell
from service.settings import load_settings
from transformer.config import TransformerConfig
from transformer.model import Transformer


def test_a_cell_may_be_given_settings_of_its_own() -> None:
    cell = find_cell("cps-fixed+refinement_steps=2+draft_part_confidence=0.5+free_drafts=true")
    plain = find_cell("cps-fixed")
    assert cell.name == "cps-fixed+refinement_steps=2+draft_part_confidence=0.5+free_drafts=true"
    assert cell.overrides == {
        **plain.overrides, "refinement_steps": 2, "draft_part_confidence": 0.5, "free_drafts": True
    }  # fmt: skip
    assert (cell.drafter, cell.role) == (plain.drafter, plain.role)
    assert "refinement_steps=2" in cell.meaning


@pytest.mark.parametrize("policy", ["fixed", "paper", "goodput"])
def test_the_path_is_all_that_tells_the_search_from_the_raw_argmax(policy: str) -> None:
    searched, raw = find_cell(f"cps-{policy}"), find_cell(f"argmax-{policy}")
    assert searched.overrides == {**raw.overrides, "search": True}
    assert searched.overrides["free_drafts"] is False
    assert searched.drafter == raw.drafter == "real"


def test_what_drafts_without_a_model_is_measured_whatever_the_settings_say_of_one() -> None:
    settings = load_settings(overrides={"model.drafter": "none"})
    models = Models(TransformerConfig.from_folder(settings.model.target), {})
    for name, sources in (("own-text", "own text"), ("ngram", "n-grams"), ("free", "own text + n-grams")):
        built = build(find_cell(name), settings, models)
        assert (built.description, built.max_draft_tokens) == (sources, 32)
    assert build(find_cell("plain"), settings, models).max_draft_tokens == 0


def test_a_cell_without_diffusion_drafts_without_the_model() -> None:
    settings = load_settings()
    model = Transformer.load(settings.model.target.parent / "drafter")
    models = Models(TransformerConfig.from_folder(settings.model.target), {"real": model})
    assert "diffusion" in build(find_cell("default"), settings, models).description
    assert build(find_cell("default+diffusion=false"), settings, models).description == "own text + n-grams"


def test_plain_is_always_measured_first_and_each_cell_once() -> None:
    names = [cell.name for cell in choose_cells(["default", "default+beam_width=1", "default", "plain"], False, True)]
    assert names == ["plain", "default", "default+beam_width=1"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("fastest", "unknown cell 'fastest'"),
        ("cps-fixed+speed=9", "speed: Extra inputs"),
        ("cps-fixed+refinement_steps=0", "refinement_steps: Input should be greater"),
        ("cps-fixed+refinement_steps", "refinement_steps: Input should be a valid integer"),
        ("plain+max_draft_tokens=3", "takes no settings"),
        ("prompt-lookup+beam_width=1", "takes no settings"),
    ],
)
def test_a_wrong_setting_is_named(name: str, complaint: str) -> None:
    with pytest.raises(UnknownCellError, match=complaint):
        find_cell(name)


def test_cells_that_need_a_drafter_say_so() -> None:
    with pytest.raises(UnknownCellError, match="needs a diffusion drafter"):
        choose_cells(["cps-fixed+beam_width=1"], False, has_drafter=False)
    assert all(cell.drafter == "none" for cell in choose_cells(None, True, has_drafter=False))
    assert len(choose_cells(None, True, has_drafter=True)) == len(CELLS)
