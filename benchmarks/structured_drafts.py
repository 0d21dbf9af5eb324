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

from benchmarks.decoding import decode, held_out_prompts
from drafters.base import Draft, DraftRequest, Pipeline
from service.bench.cells import build, find_cell
from service.bench.environment import describe_environment
from service.bench.loading import load
from service.settings import load_settings
from service.structured import StructureCompiler, StructureSpec

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

    def __init__(self, inner: Pipeline) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
        return self._inner.propose([replace(request, constraint=None) for request in requests], num_prefill_rows)


async def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cells = ["default", "cps-fixed"]
    loaded = load(load_settings(), [find_cell(name) for name in cells], 1)
    prompts, tokenizer = held_out_prompts(loaded, arguments.num_prompts, 192), loaded.tokenizer
    compiler = StructureCompiler(tokenizer.to_json, tokenizer.end_token_ids, 8)
    json_structure = compiler.compile(StructureSpec("json_schema", json.dumps(SCHEMA)))
    columns = {"free text": (None, True), "JSON": (json_structure, True), "JSON, not told": (json_structure, False)}
    print(f"{'accepted share; tokens per step':34}" + "".join(f"{name:>18}" for name in columns))
    for cell in cells:
        for heat in (0.0, 0.5):
            found = []
            for structure, is_told in columns.values():

                def drafting(cell: str = cell, is_told: bool = is_told) -> Pipeline:
                    pipeline = build(find_cell(cell), loaded.settings, loaded.models)
                    return pipeline if is_told else Untold(pipeline)  # type: ignore[return-value]

                found.append(await decode(loaded, drafting, prompts, 128, heat, structure))
            numbers = "".join(f"{f'{one.acceptance_rate:.2f}; {one.acceptance_length:.2f}':>18}" for one in found)
            same = "" if found[1].outputs == found[2].outputs else "  OUTPUTS DIFFER"
            print(f"{f'{cell}, temperature {heat:g}':34}{numbers}{same}", flush=True)
    compiler.close()
    print("\n".join(describe_environment().lines))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=16)
    asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
