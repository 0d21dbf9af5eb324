"""Measure integer arithmetic on a quantised model: passes by rows, decoding and prompts beside llama.cpp, perplexity.

    python -m benchmarks.integer --gguf FILE.gguf --llama-cpp FOLDER

FOLDER has the npm package `node-llama-cpp` installed, with its prebuilt library; without it, llama.cpp is left out. The
two take turns, with the same file and the same number of threads. Figures are medians; run nothing else meanwhile.
Perplexity is that of docstrings of the standard library, for the integer pass and for float32 arithmetic on the same
weights.
"""

import argparse
import inspect
import json
import math
import pydoc
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.passes import medians
from service.bench.environment import describe_environment
from transformer.config import TransformerConfig
from transformer.integer_model import IntegerTransformer, Weight, quantised_weights
from transformer.model import RowBatch, Transformer
from transformer.quantised import QuantisedWeight

MODULES = ("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "functools", "heapq", "json")
PART = 512  # tokens of a text whose perplexity is measured
PROMPT = 512  # tokens
CHUNK = 256  # rows of a prefill pass
LLAMA_CPP = """
import {getLlama} from "node-llama-cpp";
import readline from "node:readline";
const [path, threads] = process.argv.slice(2);
const llama = await getLlama({build: "never", gpu: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({threads: Number(threads), contextSize: 2048, batchSize: 512});
const sequence = context.getSequence();
console.log(JSON.stringify({ready: true}));
for await (const line of readline.createInterface({input: process.stdin})) {
    const {tokens, count} = JSON.parse(line);
    await sequence.clearHistory();
    let start = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, -1));
    const prompt = performance.now() - start;
    let written = 0;
    for await (const token of sequence.evaluate(tokens.slice(-1), {temperature: 0})) {
        if (written === 0) start = performance.now();
        if (++written > count) break;
    }
    console.log(JSON.stringify({prompt, decode: (performance.now() - start) / count}));
}
"""


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, folder: Path, gguf: Path, threads: int) -> None:
        (folder / "diffuspec-bench.mjs").write_text(LLAMA_CPP)
        command = ["node", "diffuspec-bench.mjs", str(gguf.resolve()), str(threads)]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit("llama.cpp stopped; see its message above.")

    def measure(self, tokens: list[int], count: int) -> tuple[float, float]:
        """Return the milliseconds of the prompt, and of each token after it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"tokens": tokens, "count": count}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["prompt"], answer["decode"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def measure(model: IntegerTransformer, tokens: list[int], count: int) -> tuple[float, float]:
    """Return the milliseconds of the prompt, and of each of `count` greedy tokens after it."""
    cache = model.new_cache(1, len(tokens) + count + 1)
    started = time.perf_counter()
    for first in range(0, len(tokens), CHUNK):
        part = torch.tensor(tokens[first : first + CHUNK])
        hidden = model.forward(RowBatch(part, [0], [first], [len(part)]), cache)
    token = int(model.logits(hidden[-1:]).argmax())
    prompt = time.perf_counter() - started
    started = time.perf_counter()
    for position in range(len(tokens), len(tokens) + count):
        hidden = model.forward(RowBatch(torch.tensor([token]), [0], [position], [1]), cache)
        token = int(model.logits(hidden).argmax())
    return 1e3 * prompt, 1e3 * (time.perf_counter() - started) / count


def pass_of(model: IntegerTransformer, rows: int, context: int) -> Callable[[], object]:
    """Return a function that runs a pass of `rows` rows and computes its logits."""
    cache: Any = model.new_cache(1, context + rows)
    batch = RowBatch(torch.arange(rows) % model.config.vocabulary_size, [0], [context], [rows])
    return lambda: model.logits(model.forward(batch, cache))


def perplexity(model: IntegerTransformer | Transformer, texts: list[list[int]]) -> tuple[float, NDArray[np.int64]]:
    """Return the perplexity of texts, and the most probable token of every position."""
    total, best = 0.0, []
    for text in texts:
        cache: Any = model.new_cache(1, len(text))
        tokens = torch.tensor(text)
        logits = model.logits(model.forward(RowBatch(tokens, [0], [0], [len(text)]), cache)).double()
        total += float(torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum"))
        best.append(logits[:-1].argmax(-1).numpy())
    count = sum(len(text) - 1 for text in texts)
    return math.exp(total / count), np.concatenate(best)


def docstrings(count: int) -> Iterator[str]:
    """Yield the documentation of the standard library's modules, in `count` modules at most."""
    for name in MODULES[:count]:
        module = pydoc.locate(name)
        members = inspect.getmembers(module, lambda member: inspect.isclass(member) or inspect.isfunction(member))
        yield "\n\n".join(filter(None, (inspect.getdoc(member) for _, member in [(name, module), *members])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="a Llama, Qwen2 or Qwen3 file")
    parser.add_argument("--llama-cpp", type=Path, help="folder with node_modules/node-llama-cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64", help="rows of the passes")
    parser.add_argument("--context", type=int, default=256, help="tokens before the rows")
    parser.add_argument("--repeats", type=int, default=40, help="passes of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine")
    parser.add_argument("--tokens", type=int, default=100, help="tokens decoded in a turn")
    parser.add_argument("--texts", type=int, default=len(MODULES), help="texts for perplexity; 0: leave it out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, weights, encode = open_file(args.gguf)
    floats = {n: w.floats() if isinstance(w, QuantisedWeight) else w.numpy() for n, w in weights.items()}
    model = IntegerTransformer(config, weights, args.threads)
    print(f"{model.num_bytes / 1e6:.0f} MB of weights, {args.threads} threads")
    print(f"\n{'rows':>6}{'ms':>9}{'ratio':>8}")
    row_counts = [int(rows) for rows in args.rows.split(",")]
    times = medians([pass_of(model, rows, args.context) for rows in row_counts], args.repeats)
    for rows, milliseconds in zip(row_counts, times, strict=True):
        print(f"{rows:>6}{milliseconds:>9.2f}{milliseconds / times[0]:>8.2f}")
    texts = [encode(text)[:PART] for text in docstrings(args.texts or 1)]
    compare_speed(model, args, (encode("\n".join(docstrings(3))) * 2)[:PROMPT])
    if args.texts:
        whole, best = perplexity(model, texts)
        exact, exact_best = perplexity(Transformer(config, {n: torch.from_numpy(w) for n, w in floats.items()}), texts)
        print(f"\nperplexity of {len(best)} tokens: {whole:.3f} with integers, {exact:.3f} in float32", end="")
        print(f" ({100 * (whole / exact - 1):+.2f}%); the same best token at {100 * (best == exact_best).mean():.1f}%")
    print("\n".join(describe_environment().lines))


def compare_speed(model: IntegerTransformer, args: argparse.Namespace, prompt: list[int]) -> None:
    """Print the speed of decoding and of reading a prompt, in turns with llama.cpp."""
    other = Llama(args.llama_cpp, args.gguf, args.threads) if args.llama_cpp else None
    ours, theirs = [], []
    for turn in range(args.rounds + 1):
        result = measure(model, prompt, args.tokens)
        other_result = other.measure(prompt, args.tokens) if other else (math.nan, math.nan)
        if turn:  # the first warms up
            ours.append(result)
            theirs.append(other_result)
    if other:
        other.close()
    print(f"\n{'':>12}{'prompt tokens/s':>18}{'tokens/s':>12}{'ms a token':>12}")
    for name, results in (("integers", ours), ("llama.cpp", theirs)):
        read, decode = (statistics.median(times) for times in zip(*results, strict=True))
        if not math.isnan(read):
            print(f"{name:>12}{1e3 * len(prompt) / read:>18.0f}{1e3 / decode:>12.1f}{decode:>12.2f}")


def open_file(path: Path) -> tuple[TransformerConfig, dict[str, Weight], Callable[[str], list[int]]]:
    """Return configuration, weights and tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    from transformer.gguf_model import GgufModel

    config = TransformerConfig.read(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return config, quantised_weights(config, GgufModel.open(path)), lambda text: tokenizer(text)["input_ids"]


if __name__ == "__main__":
    main()
