"""Train the target: a Llama-style decoder, written as an ordinary Hugging Face folder.

Uses Muon for the matrices, and AdamW for embeddings and norms. The learning rate is constant, then decays linearly to
zero. A run can be resumed: the state is saved every `SAVE_EVERY` steps.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.training.checkpoint import Checkpoint
from models.training.data import TARGET_CONTEXT, Corpus, windows
from models.training.muon import Muon

SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class TargetRecipe:
    """Sizes and schedule. The run reads `steps * batch_tokens` tokens."""

    hidden_size: int = 256
    intermediate_size: int = 640
    layers: int = 12
    start_layers: int = 4  # trained first, then stacked to `layers`
    start_steps: int = 700
    heads: int = 4
    key_value_heads: int = 2
    steps: int = 300  # after stacking
    batch_tokens: int = 4096
    short_window: int = 512
    long_share: float = 0.15  # share of the steps, at the end, with windows of the full context
    decay_share: float = 0.6
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    seed: int = 0


def build_target(recipe: TargetRecipe, layers: int, vocabulary_size: int, end_token: int) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            head_dim=recipe.hidden_size // recipe.heads,
            max_position_embeddings=TARGET_CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=end_token,
            eos_token_id=end_token,
            pad_token_id=end_token,
        )
    )


def stack_layers(small: LlamaForCausalLM, large: LlamaForCausalLM) -> None:
    """Start `large` from `small`: its layer i is a copy of layer `i mod len(small)` (Du et al., 2024)."""
    large.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    large.model.norm.load_state_dict(small.model.norm.state_dict())
    for index, layer in enumerate(large.model.layers):
        layer.load_state_dict(small.model.layers[index % len(small.model.layers)].state_dict())


def token_losses(model: Callable[..., Any], tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy in nats of `tokens[:, 1:]`, given the tokens before."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def held_out_bits_per_byte(
    model: torch.nn.Module, corpus: Corpus, length: int = 512, max_tokens: int = 100_000
) -> float:
    """Return the mean bits per byte of held-out text, from windows of `length` tokens."""
    tokens = torch.from_numpy(corpus.held_out.astype("int64"))
    count = min(max_tokens, len(tokens) - 1) // length
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    losses = [
        token_losses(model, torch.stack([tokens[s : s + length + 1] for s in batch]))
        for batch in torch.split(starts, 8)
    ]
    nats_per_token = float(torch.stack(losses).mean())
    return nats_per_token / math.log(2) * len(tokens) / corpus.held_out_bytes


def optimizers_of(model: torch.nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=muon_rate),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int, decay_share: float, warmup: int = 50) -> float:
    """Return the rate's factor: linear warm-up, constant, linear decay to zero over the last `decay_share` of steps.

    decay_share 0 means no decay.
    """
    decay = (steps - step) / (decay_share * steps) if decay_share else 1.0
    return min(1.0, (step + 1) / warmup, decay)


@dataclass(frozen=True)
class Stage:
    """One run of the training loop."""

    name: str
    steps: int
    decay_share: float
    long_share: float
    seed: int


def train_stage(model: LlamaForCausalLM, corpus: Corpus, work: Path, recipe: TargetRecipe, stage: Stage) -> None:
    """Train `model` in place for `stage.steps`; continue from the saved state if there is one."""
    optimizers = optimizers_of(model, recipe.muon_rate, recipe.adam_rate)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    checkpoint = Checkpoint(work / f"{stage.name}.pt", model, optimizers)
    step = checkpoint.load()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # loading replaced them
    compiled = torch.compile(model)
    long_from = round(stage.steps * (1 - stage.long_share))
    started, tokens_seen = time.monotonic(), 0
    with (work / f"{stage.name}.jsonl").open("a") as log:
        while step < stage.steps:
            is_long = step >= long_from
            length = TARGET_CONTEXT if is_long else recipe.short_window
            first, last = (long_from, stage.steps) if is_long else (0, long_from)
            batches = windows(corpus.train, length, recipe.batch_tokens // length, stage.seed + first)
            for tokens in islice(batches, step - first, last - first):
                for group, rate in zip(groups, base_rates, strict=True):
                    group["lr"] = rate * rate_factor(step, stage.steps, stage.decay_share)
                loss = token_losses(compiled, tokens)
                torch.autograd.backward(loss)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1
                tokens_seen += tokens.numel()
                if step % 20 == 0:
                    speed = tokens_seen / (time.monotonic() - started)
                    print(
                        json.dumps({"step": step, "loss": round(loss.item(), 4), "tokens_per_second": round(speed)}),
                        file=log,
                        flush=True,
                    )
                if step % SAVE_EVERY == 0 or step == stage.steps:
                    checkpoint.save(step)


def load_start(corpus: Corpus, work: Path, recipe: TargetRecipe) -> LlamaForCausalLM:
    """Load the small model that the target was stacked from. Raises FileNotFoundError before the stage `target`."""
    model = build_target(recipe, recipe.start_layers, corpus.tokenizer.get_vocab_size(), corpus.separator)
    model.load_state_dict(torch.load(work / "target-start.pt", weights_only=True)["model"])
    return model.eval()


def train_target(corpus: Corpus, work: Path, folder: Path, recipe: TargetRecipe) -> None:
    """Train the target, or continue, and write it into `folder`."""
    vocabulary_size = corpus.tokenizer.get_vocab_size()
    small = build_target(recipe, recipe.start_layers, vocabulary_size, corpus.separator)
    train_stage(small, corpus, work, recipe, Stage("target-start", recipe.start_steps, 0.0, 0.0, recipe.seed))
    model = build_target(recipe, recipe.layers, vocabulary_size, corpus.separator)
    stack_layers(small, model)
    train_stage(
        model,
        corpus,
        work,
        recipe,
        Stage("target", recipe.steps, recipe.decay_share, recipe.long_share, recipe.seed + 1),
    )
    bits = held_out_bits_per_byte(model, corpus)
    save_target(model, folder, corpus, work, {"recipe": asdict(recipe), "held_out_bits_per_byte": round(bits, 4)})


def save_target(model: LlamaForCausalLM, folder: Path, corpus: Corpus, work: Path, facts: dict[str, object]) -> None:
    """Write a folder for transformers, vLLM and this project: bfloat16 weights, to compute in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    GenerationConfig(
        eos_token_id=corpus.separator, bos_token_id=corpus.separator, pad_token_id=corpus.separator
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((work / "tokenizer" / name).read_text())
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
