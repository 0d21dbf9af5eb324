"""`diffuspec bench`: compare configurations side by side, in one run."""

import argparse
import asyncio
import gc
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from drafters.search.ngram import NgramError
from service.bench import prompts as prompt_sources
from service.bench.arguments import MIN_PAIRS
from service.bench.cells import Cell, UnknownCellError, choose_cells
from service.bench.contestant import Contestant
from service.bench.environment import describe_environment
from service.bench.interleave import Task, measure
from service.bench.loading import embedded_contestants, has_drafter, load
from service.bench.page import to_html
from service.bench.prompts import Encode, PromptError, batches
from service.bench.records import Workload, WorkloadRecord
from service.bench.report import Report, to_json
from service.bench.server import ServerClient, ServerContestant, ServerError
from service.bench.table import legend, render_table
from service.hub import HubError, locate_models
from service.settings import Settings, SettingsError, load_settings
from service.text.tokenizer import TokenizerError
from transformer.config import CheckpointError, TransformerConfig

EXIT_DIFFERENT, EXIT_USAGE = 1, 2
EXPECTED_ERRORS = (
    SettingsError,
    HubError,
    CheckpointError,
    TokenizerError,
    NgramError,
    PromptError,
    ServerError,
    UnknownCellError,
)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write a report.

    Returns 0 if all outputs are identical to plain decoding, 1 if some are not, 2 if nothing could be measured.
    """
    try:
        return asyncio.run(_run(args))
    except EXPECTED_ERRORS as error:
        print(f"diffuspec bench: {error}", file=sys.stderr)
        return EXIT_USAGE


async def _run(args: argparse.Namespace) -> int:
    started, began = datetime.now(UTC), time.perf_counter()
    if args.url:
        facts, records = await _measure_server(args)
    elif args.engine == "vllm":
        facts, records = await _measure_vllm(args)
    else:
        facts, records = await _measure_embedded(args)
    done = all(record.num_pairs == record.num_pairs_planned for record in records)
    report = Report(
        command=shlex.join(["diffuspec", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        elapsed_seconds=time.perf_counter() - began,
        stopped_early="" if done else f"the time budget of {args.budget_seconds:g} s is used up",
        environment=describe_environment(),
        facts=facts,
        workloads=records,
    )
    print("Columns:\n" + legend())
    print("\n".join(report.environment.lines))
    if report.stopped_early:
        print(f"Stopped early: {report.stopped_early}.")
    name = f"bench-{started:%Y%m%d-%H%M%S}"
    for path, content in (
        (args.json or Path("reports", f"{name}.json"), to_json(report)),
        (args.html or Path("reports", f"{name}.html"), to_html(report)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}")
    failed = any(not mismatch.is_near_tie for record in records for mismatch in record.mismatches)
    return EXIT_DIFFERENT if failed else 0


async def _measure_embedded(args: argparse.Namespace) -> tuple[dict[str, str], list[WorkloadRecord]]:
    settings = _settings(args)
    names = None if args.cells is None else [name.strip() for name in args.cells.split(",")]
    cells = choose_cells(names, args.all, has_drafter(settings))
    if settings.model.threads_choice is not None:
        torch.set_num_threads(settings.model.threads_choice)
    _say(f"loading {settings.model.target}")
    loaded = await asyncio.to_thread(load, settings, cells, max(args.concurrency))

    def encode(text: str) -> list[int]:
        return loaded.tokenizer.encode(text, add_special_tokens=False)

    tasks = _tasks(args, encode, loaded.verifier.context_length - args.max_tokens)
    _say(f"starting {', '.join(cell.name for cell in cells)}")
    async with embedded_contestants(loaded, cells) as embedded:
        contestants: list[Contestant] = [*embedded]
        if args.against:
            from service.bench.transformers_generate import TransformersContestant

            dtype = getattr(torch, settings.model.dtype)
            contestants.append(TransformersContestant(settings.model.target, dtype, settings.model.device))
        gc.freeze()  # loaded objects stay, so the collections between passes can skip them
        try:
            records = await _measure_all(args, contestants, tasks)
        finally:
            gc.unfreeze()
    return loaded.facts | {"prompts": _source(args), "contestants": _meanings(cells)}, records


async def _measure_vllm(args: argparse.Namespace) -> tuple[dict[str, str], list[WorkloadRecord]]:
    from service.bench.vllm import choose_vllm_cells, vllm_contestants
    from service.wiring import build_tokenizer

    settings = _settings(args)
    names = None if args.cells is None else [name.strip() for name in args.cells.split(",")]
    cells = choose_vllm_cells(names, args.all)
    args.temperatures = [0.0]  # sampled texts of different engines can't be compared
    tokenizer = build_tokenizer(settings.model.target)
    context = TransformerConfig.read(settings.model.target).max_positions
    tasks = _tasks(args, lambda text: tokenizer.encode(text, add_special_tokens=False), context - args.max_tokens)
    _say(f"starting {', '.join(cell.name for cell in cells)}")
    async with vllm_contestants(settings, cells, max(args.concurrency)) as contestants:
        records = await _measure_all(args, contestants, tasks)
    facts = {
        "target": f"{settings.model.target}, {settings.model.dtype} on {settings.model.device}",
        "drafter": settings.model.drafter_choice,
        "prompts": _source(args),
        "contestants": "; ".join(f"{cell.name}: {cell.meaning}" for cell in cells),
    }
    return facts, records


async def _measure_server(args: argparse.Namespace) -> tuple[dict[str, str], list[WorkloadRecord]]:
    client = ServerClient(args.url, args.api_key)
    try:
        await client.connect()
        loop = asyncio.get_running_loop()
        tasks = await asyncio.to_thread(
            _tasks, args, _remote_encode(client, loop), client.context_length - args.max_tokens
        )
        contestants = [
            ServerContestant("plain", client, speculates=False),
            ServerContestant("speculative", client, speculates=True),
        ]
        records = await _measure_all(args, contestants, tasks)
    finally:
        await client.aclose()
    facts = {
        "server": f"{client.url}, model {client.model}; the machine shown is the client's",
        "prompts": f"{_source(args)}; the server read each prompt once before the clock started",
        "contestants": "one server, with and without speculation",
    }
    return facts, records


def _remote_encode(client: ServerClient, loop: asyncio.AbstractEventLoop) -> Encode:
    """Return the server's tokenizer as a function for code in another thread."""

    def encode(text: str) -> list[int]:
        return asyncio.run_coroutine_threadsafe(client.tokenize(text), loop).result()

    return encode


async def _measure_all(
    args: argparse.Namespace, contestants: Sequence[Contestant], tasks: Sequence[Task]
) -> list[WorkloadRecord]:
    """Measure one workload after another. Each gets an equal share of the time left."""
    ends = time.perf_counter() + args.budget_seconds
    records = []
    for number, task in enumerate(tasks):
        now = time.perf_counter()
        deadline = now + max(ends - now, 0.0) / (len(tasks) - number)
        record = await measure(contestants, task, args.seed, deadline, time.perf_counter, _say)
        _say("")
        print(render_table(record), flush=True)
        records.append(record)
    return records


def _tasks(args: argparse.Namespace, encode: Encode, max_prompt_tokens: int) -> list[Task]:
    """Build a task for every concurrency and temperature. The prompts are the same at every temperature."""
    if max_prompt_tokens < 1:
        raise PromptError(f"--max-tokens {args.max_tokens} leaves no room for a prompt in the model's context")
    length = min(args.prompt_tokens, max_prompt_tokens)
    held_out = prompt_sources.held_out_texts()
    whole = None if args.prompts is None else prompt_sources.file_texts(args.prompts)
    texts = held_out if args.prompt_source is None else prompt_sources.folder_texts(args.prompt_source)
    tasks = []
    for concurrency in args.concurrency:
        count = concurrency * max(-(-args.num_prompts // concurrency), MIN_PAIRS)
        if whole is None:
            measured = prompt_sources.cut_prompts(texts, count, length, encode, args.seed)
        else:
            measured = prompt_sources.whole_prompts(whole, count, max_prompt_tokens, encode)
        warm_up = prompt_sources.cut_prompts(held_out, args.warmup * concurrency, length, encode, args.seed + 1)
        tasks += [
            Task(
                Workload(concurrency, temperature, args.max_tokens),
                batches(measured, concurrency) * args.repeats,
                batches(warm_up, concurrency),
            )
            for temperature in args.temperatures
        ]
    return tasks


def _settings(args: argparse.Namespace) -> Settings:
    named = {
        "model.target": args.target,
        "model.drafter": args.drafter,
        "model.ngram": args.ngram,
        "model.num_threads": args.threads,
    }
    return locate_models(
        load_settings(args.config, {name: value for name, value in named.items() if value is not None})
    )


def _source(args: argparse.Namespace) -> str:
    if args.prompts is not None:
        return f"whole, from {args.prompts}"
    place = "the standard library's held-out files" if args.prompt_source is None else str(args.prompt_source)
    return f"{args.prompt_tokens} tokens from random places (seed {args.seed}) in {place}"


def _meanings(cells: Sequence[Cell]) -> str:
    return "; ".join(f"{cell.name}: {cell.meaning}" for cell in cells)


def _say(text: str) -> None:
    """Show progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
