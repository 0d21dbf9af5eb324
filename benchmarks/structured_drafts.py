"""How well JSON is drafted, beside free text, and beside drafts that know nothing of the structure.

    python -m benchmarks.structured_drafts

The bundled pair, held-out prompts, a nested schema. Three engines over the same weights see the same requests: free
text, JSON, and JSON with a pipeline that isn't told of the structure (the verifier is, so the text is the same).
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from drafters.base import Draft, DraftRequest
from service.bench.cells import build, find_cell
from service.bench.embedded import StepLog
from service.bench.environment import describe_environment
from service.bench.loading import Loaded, load
from service.bench.prompts import Prompt, cut_prompts, held_out_texts
from service.engine.base import GenerationRequest
from service.engine.drafting import Drafting
from service.engine.embedded import EmbeddedEngine, Progress
from service.engine.scheduler import SchedulerLimits
from service.settings import load_settings
from service.structured import Structure, StructureCompiler, StructureSpec
from verifiers.base import SamplingRules, Verifier

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "arguments": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 12},
                    "kind": {"enum": ["int", "str", "list", "dict"]},
                    "is_optional": {"type": "boolean"},
                },
                "required": ["name", "kind", "is_optional"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 4,
        },
        "returns": {"enum": ["int", "str", "list", "dict", "None"]},
    },
    "required": ["name", "arguments", "returns"],
    "additionalProperties": False,
}


class Untold:
    """A pipeline that never hears of structures."""

    def __init__(self, inner: Drafting) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
        return self._inner.propose([replace(request, constraint=None) for request in requests], num_prefill_rows)


async def measure(
    loaded: Loaded, cell_name: str, prompts: Sequence[Prompt], structure: Structure | None, is_told: bool, heat: float
) -> tuple[float, float, list[tuple[int, ...]]]:
    """Accepted share of the drafted tokens, tokens per step, and the outputs; one request at a time."""
    log = StepLog()

    def parts(progress: Progress) -> tuple[Verifier, Drafting]:
        pipeline = build(find_cell(cell_name), loaded.settings, loaded.models)
        return loaded.verifier, pipeline if is_told else Untold(pipeline)  # type: ignore[return-value]

    engine = EmbeddedEngine(parts, SchedulerLimits(1, reuse_prefixes=False), observers=[log])
    await engine.start()
    outputs = []
    try:
        for number, prompt in enumerate(prompts):
            rules = SamplingRules(number, temperature=heat, stop_token_ids=loaded.models.target.end_token_ids)
            request = GenerationRequest(f"{number}", prompt.tokens, 128, rules, structure=structure)
            tokens: list[int] = []
            async for delta in engine.generate(request):
                tokens += delta.tokens
            outputs.append(tuple(tokens))
    finally:
        await engine.stop(0)
    outcomes = [outcome for record in log.take() for outcome in record.outcomes]
    verified = [outcome for outcome in outcomes if outcome.draft.bypass_reason != "prefill"]
    accepted = sum(outcome.num_accepted for outcome in verified)
    drafted = sum(len(outcome.draft.tokens) for outcome in verified)
    return accepted / max(drafted, 1), 1 + accepted / len(verified), outputs


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cells = ["default", "cps-fixed"]
    loaded = load(load_settings(), [find_cell(name) for name in cells], 1)
    tokenizer = loaded.tokenizer
    prompts = cut_prompts(
        held_out_texts(), arguments.num_prompts, 192, lambda text: tokenizer.encode(text, add_special_tokens=False), 0
    )
    compiler = StructureCompiler(tokenizer.to_json, tokenizer.end_token_ids, 8)
    structure = compiler.compile(StructureSpec("json_schema", json.dumps(SCHEMA)))
    columns = {"free text": (None, True), "JSON": (structure, True), "JSON, not told": (structure, False)}
    print(f"{'accepted share; tokens per step':34}" + "".join(f"{name:>18}" for name in columns))
    for cell in cells:
        for heat in (0.0, 0.5):
            found = [await measure(loaded, cell, prompts, *column, heat) for column in columns.values()]
            numbers = "".join(f"{f'{rate:.2f}; {length:.2f}':>18}" for rate, length, _ in found)
            same = "" if found[1][2] == found[2][2] else "  OUTPUTS DIFFER"
            print(f"{f'{cell}, temperature {heat:g}':34}{numbers}{same}", flush=True)
    compiler.close()
    print("\n".join(describe_environment().lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=16)
    asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
