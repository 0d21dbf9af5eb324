"""What the ways across vocabularies cost, apart from the vocabularies: the bundled drafter, as if they differed.

    python -m benchmarks.across_vocabularies

`identical`: ids pass through. `overlapping`: through maps of ids that change nothing. `disjoint`: through text,
with the same tokenizer on either side; what is lost is the search, which sees one candidate per position.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import torch

import service.drafter_loading
from benchmarks.decoding import decode, held_out_prompts
from drafters.base import Pipeline
from drafters.diffusion.vocabulary_map import VocabularyMap, VocabularyRelation
from service.bench.cells import build, find_cell
from service.bench.environment import describe_environment
from service.bench.loading import load
from service.folders import FolderFacts, relate
from service.settings import load_settings

RELATIONS: tuple[VocabularyRelation, ...] = ("identical", "overlapping", "disjoint")


async def run(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    loaded = load(load_settings(), [find_cell(arguments.cell)], 1)
    prompts = held_out_prompts(loaded, arguments.num_prompts, 128)
    plain = await decode(loaded, lambda: build(find_cell("plain"), loaded.settings, loaded.models), prompts, 64)
    print(f"{arguments.cell}, greedy, {len(prompts)} prompts of 128 tokens, 64 new ones")
    print(f"{'':14}{'accepted per draft':>20}{'ms per draft':>14}{'plain tokens':>14}")
    status = 0
    for relation in RELATIONS:

        def related(
            target: FolderFacts, drafter: FolderFacts, relation: VocabularyRelation = relation
        ) -> VocabularyMap:
            return replace(relate(target, drafter), relation=relation)

        def drafting() -> Pipeline:
            return build(find_cell(arguments.cell), loaded.settings, loaded.models)

        with patch.object(service.drafter_loading, "relate", related):
            found = await decode(loaded, drafting, prompts, 64)
        same = found.outputs == plain.outputs
        status |= not same
        print(
            f"{relation:14}{found.accepted_per_draft:20.2f}{1e3 * found.seconds_per_draft:14.2f}"
            f"{'yes' if same else 'NO':>14}",
            flush=True,
        )
    print("\n".join(describe_environment().lines))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--cell", default="cps-fixed")
    return asyncio.run(run(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
