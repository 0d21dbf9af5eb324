"""Time forward passes of a small model by their rows: layer by layer in torch, and as one compiled call.

    python -m benchmarks.passes --threads 1

Both use the same matrix products, and they take turns. Figures are medians in milliseconds, logits included, of rows at
the end of one sequence's context.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from service.bench.environment import describe_environment
from transformer.checkpoint import load_weights
from transformer.config import TransformerConfig
from transformer.model import RowBatch, Transformer


def medians(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median milliseconds of each. They run in turn, so that all meet the same conditions."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 2):
        for work, times in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            if turn >= 2:
                times.append(time.perf_counter() - started)
    return [1e3 * statistics.median(times) for times in seconds]


def pass_of(model: Transformer, rows: int, context: int) -> Callable[[], object]:
    """Return a function that runs a pass of `rows` rows and computes its logits."""
    cache = model.new_cache(1, context + rows)
    tokens = torch.arange(rows) % model.config.vocabulary_size
    batch = RowBatch(tokens, [0], [context], [rows], bounds_padding=True)
    return lambda: model.logits(model.forward(batch, cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/target"), help="folder of the model")
    parser.add_argument("--rows", default="1,2,4,8,12,16,32", help="rows of the passes")
    parser.add_argument("--context", type=int, default=256, help="tokens before the rows")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TransformerConfig.from_folder(args.model)
    by_layer, compiled = (
        Transformer(config, load_weights(args.model, config, "cpu", torch.float32), by_layer=way)
        for way in (True, False)
    )
    if not compiled.is_compiled:
        raise SystemExit(f"{args.model}: only small float32 models have a compiled pass")
    print(f"{'rows':>6}{'by layer':>10}{'compiled':>10}{'ratio':>8}")
    for rows in map(int, args.rows.split(",")):
        layered, at_once = medians([pass_of(model, rows, args.context) for model in (by_layer, compiled)], args.repeats)
        print(f"{rows:>6}{layered:>10.2f}{at_once:>10.2f}{layered / at_once:>8.2f}")
    print("\n".join(describe_environment().lines))


if __name__ == "__main__":
    main()
