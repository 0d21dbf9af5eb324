"""Time the phases of a speculative step at real sizes, with random weights, and project speed-ups from them.

    python -m benchmarks.step_costs --target tiny --drafters tiny-dream,tiny-fast-dllm
    python -m benchmarks.step_costs --device cuda --dtype bfloat16 --contexts 256,2048,8192 \\
        --target 7b --drafters 7b-dream,0.6b-bd3lm,1.5b-fast-dllm

Times are medians. Each is compared with its floor: the bytes of weights, keys and values, divided by the bandwidth of a
large copy, which is measured first. A speed-up compares `draft + search + verify` with a plain step, at acceptance
lengths (tokens per step, including the extra one) from the literature or from the command line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import KINDS, SIZES, drafter_config, random_model, target_config
from drafters.diffusion.drafter import DiffusionDrafter, DiffusionOptions
from drafters.diffusion.masked import MaskedRequest
from drafters.search.causal_model import CausalModel
from drafters.search.lattice import DraftLattice, LatticeOptions
from drafters.search.path_search import PathSearch
from service.bench.environment import describe_environment
from service.footprint import measure_bandwidth, model_footprint
from transformer.cache import KeyValueCache
from transformer.config import TransformerConfig
from transformer.model import RowBatch, Transformer
from transformer.weights import weight_shapes

CACHED, ALL_READ = "draft, context cached", "draft, all read"
REFRESH = DiffusionOptions().refresh_interval
NEW_TOKENS = 3  # tokens committed between two drafts
PREFILL_ROWS = 512
PUBLISHED_LENGTHS = (6.99, 3.79)  # acceptance length of DiffuSpec, and of an independent reproduction


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one kind of pass at one context length."""

    what: str  # kind of pass
    context: int  # tokens
    rows: int
    milliseconds: float  # median
    floor_milliseconds: float  # bytes over bandwidth


class Stopwatch:
    """Measure the median time of work on a device, until the device has finished."""

    def __init__(self, device: str, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def measure(self, work: Callable[[], object], warm_up: int = 2, repeats: int | None = None) -> float:
        """Return the median seconds of `work`."""
        seconds = []
        for turn in range(warm_up + (repeats or self._repeats)):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            if turn >= warm_up:
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True, slots=True)
class Bench:
    """The conditions of every measurement."""

    device: str
    dtype: str
    bandwidth: float  # bytes per second
    watch: Stopwatch

    def model(self, config: TransformerConfig) -> Transformer:
        return random_model(config, self.device, getattr(torch, self.dtype))

    def floor_milliseconds(self, config: TransformerConfig, context: int) -> float:
        cost = model_footprint(config, self.dtype, not self.device.startswith("cuda"), context)
        return 1e3 * (cost.read_bytes + cost.cache_bytes) / self.bandwidth


def time_target(
    bench: Bench, config: TransformerConfig, contexts: Sequence[int], drafted: Sequence[int]
) -> list[Timing]:
    """Time a plain step, and the verification of each number of drafted tokens, after each context."""
    model = bench.model(config)
    cache = model.new_cache(1, max(contexts) + max(drafted) + 1)
    timings = []
    for context in contexts:
        _read_context(model, cache, context)
        floor = bench.floor_milliseconds(config, context)
        for count in (0, *drafted):
            tokens = torch.zeros(count + 1, dtype=torch.int64, device=model.device)
            rows = RowBatch(tokens, [0], [context], [count + 1])

            def step(rows: RowBatch = rows) -> None:
                model.logits(model.forward(rows, cache)).argmax(-1).cpu()

            seconds = bench.watch.measure(step)
            what = f"verify {count} drafted" if count else "plain step"
            timings.append(Timing(what, context, count + 1, 1e3 * seconds, floor))
    return timings


class GrowingText:
    """One request whose text grows by NEW_TOKENS from draft to draft."""

    def __init__(self, drafter: DiffusionDrafter, context: int, length: int, vocabulary_size: int, grows: bool) -> None:
        self._drafter, self._committed, self._length, self._grows = drafter, context, length, grows
        self._text = np.random.default_rng(0).integers(0, vocabulary_size - 1, context + 4096).astype(np.int32)

    def draft(self) -> None:
        request = MaskedRequest("measured", self._text[: self._committed], self._length)
        self._drafter.propose([request]).argmax(-1).cpu()
        self._committed += NEW_TOKENS if self._grows else 0


def time_drafter(bench: Bench, config: TransformerConfig, contexts: Sequence[int], length: int) -> list[Timing]:
    """Time a draft of `length` tokens after NEW_TOKENS new ones: with a cached context, and reading all of it."""
    model = bench.model(config)
    timings = []
    for context in contexts:
        floor = bench.floor_milliseconds(config, context)

        def text(reuse: bool, interval: int, context: int = context) -> GrowingText:
            options = DiffusionOptions(window=2 * context, reuse_prefix=reuse, refresh_interval=interval)
            drafter = DiffusionDrafter(model, 1, config.vocabulary_size, options)
            return GrowingText(drafter, context, length, config.vocabulary_size, grows=reuse)

        cached = bench.watch.measure(text(reuse=True, interval=0).draft, warm_up=3)
        timings.append(Timing(CACHED, context, length, 1e3 * cached, floor))
        if config.attention == "full":  # the cache of block models is exact, and never refreshed
            refreshed = text(reuse=True, interval=REFRESH)
            refreshed.draft()
            # One draft of each round costs much more than the others, so take the mean of a whole round.
            mean = statistics.fmean(bench.watch.measure(refreshed.draft, 0, 1) for _ in range(REFRESH))
            timings.append(Timing(f"draft, refreshed every {REFRESH}", context, length, 1e3 * mean, floor))
        everything = bench.watch.measure(text(reuse=False, interval=0).draft, warm_up=1, repeats=3)
        timings.append(Timing(ALL_READ, context, length, 1e3 * everything, floor))
    return timings


def time_search(bench: Bench, vocabulary_size: int, length: int) -> Timing:
    """Time lattice and path search, for one request's logits as the drafter returns them."""
    logits = torch.randn(length, vocabulary_size, device=bench.device) * 4
    history = np.arange(512, dtype=np.int32)
    search = PathSearch(CausalModel(vocabulary_size))

    def find() -> None:
        search.search([history], DraftLattice.from_logits(logits, [length], LatticeOptions()))

    return Timing("lattice and path search", len(history), length, 1e3 * bench.watch.measure(find), 0.0)


def _read_context(model: Transformer, cache: KeyValueCache, context: int) -> None:
    for start in range(0, context, PREFILL_ROWS):
        count = min(PREFILL_ROWS, context - start)
        tokens = torch.arange(start, start + count, device=model.device) % model.config.vocabulary_size
        model.forward(RowBatch(tokens, [0], [start], [count]), cache)


def project(plain: float, verify: float, draft: float, search: float, lengths: Sequence[float]) -> list[float]:
    """Return the speed-up over plain decoding at each acceptance length. All times have the same unit."""
    return [length * plain / (verify + draft + search) for length in lengths]


def _parameters(config: TransformerConfig) -> str:
    total = sum(int(np.prod(shape)) for shape in weight_shapes(config).values())
    return f"{total / 1e6:.0f}M parameters"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(SIZES), default="tiny")
    parser.add_argument("--drafters", default="tiny-dream,tiny-fast-dllm", help=f"size-kind; kinds: {', '.join(KINDS)}")
    parser.add_argument("--contexts", type=_numbers, default=[128, 512, 1984], help="tokens")
    parser.add_argument("--drafted", type=_numbers, default=[4, 8, 12, 16, 32], help="drafted tokens per verification")
    parser.add_argument("--length", type=int, default=12, help="tokens of a draft")
    parser.add_argument("--acceptance", type=float, nargs="*", default=list(PUBLISHED_LENGTHS), help="tokens per step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    bench = Bench(
        arguments.device,
        arguments.dtype,
        measure_bandwidth(arguments.device),
        Stopwatch(arguments.device, arguments.repeats),
    )
    print(f"{arguments.dtype} on {arguments.device}, {bench.bandwidth / 1e9:.0f} GB/s of a large copy")
    target = target_config(arguments.target)
    drafted = sorted({*arguments.drafted, arguments.length})
    found = {f"target {arguments.target}": time_target(bench, target, arguments.contexts, drafted)}
    _print_timings(f"target {arguments.target}, {_parameters(target)}", found[f"target {arguments.target}"])
    for name in arguments.drafters.split(","):
        config = drafter_config(name)
        found[name] = time_drafter(bench, config, arguments.contexts, arguments.length)
        _print_timings(f"drafter {name}, {_parameters(config)}", found[name])
    found["search"] = [time_search(bench, target.vocabulary_size, arguments.length)]
    _print_timings("path search", found["search"])
    _print_projections(found, arguments)
    print("\n".join(describe_environment().lines))
    if arguments.json:
        report = {name: [asdict(timing) for timing in timings] for name, timings in found.items()}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _print_timings(title: str, timings: Sequence[Timing]) -> None:
    print(f"\n{title}\n{'':28}{'context':>8}{'ms':>11}{'floor ms':>11}{'of floor':>10}")
    for timing in timings:
        share = f"{timing.milliseconds / timing.floor_milliseconds:9.1f}x" if timing.floor_milliseconds else ""
        floor = f"{timing.floor_milliseconds:11.2f}" if timing.floor_milliseconds else " " * 11
        print(f"{timing.what:28}{timing.context:8}{timing.milliseconds:11.2f}{floor}{share}", flush=True)


def _print_projections(found: dict[str, list[Timing]], arguments: argparse.Namespace) -> None:
    """Print the speed-up of every pair at every context, for each acceptance length."""
    target = {(timing.context, timing.rows): timing.milliseconds for timing in found[f"target {arguments.target}"]}
    search = found["search"][0].milliseconds
    heads = "".join(f"{f'at {length:g}':>10}" for length in arguments.acceptance)
    print(f"\nspeed-up over plain decoding, by tokens per step\n{'':28}{'context':>8}{heads}{'break-even':>12}")
    for name in arguments.drafters.split(","):
        for timing in found[name]:
            if timing.what == ALL_READ:
                continue
            plain, verify = target[timing.context, 1], target[timing.context, arguments.length + 1]
            speedups = project(plain, verify, timing.milliseconds, search, arguments.acceptance)
            even = (verify + timing.milliseconds + search) / plain
            cells = "".join(f"{speedup:9.2f}x" for speedup in speedups)
            label = name if timing.what == CACHED else f"{name}, refreshed every {REFRESH}"
            print(f"{label:28}{timing.context:8}{cells}{even:12.2f}")


if __name__ == "__main__":
    main()
