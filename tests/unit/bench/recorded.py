"""A small hand-written record, whose figures can be worked out on paper."""

from service.bench.records import DraftedStep, Generation, Mismatch, Pass, Phases, Workload, WorkloadRecord

LOOP = (1, 2, 3) * 6  # 18 tokens: 11 8-grams, 3 of them different
VARIED = tuple(range(18))


def plain_steps(tokens: tuple[int, ...]) -> tuple[DraftedStep, ...]:
    return (DraftedStep("none", 0, 0),) * (len(tokens) - 1)


def drafted_steps(tokens: tuple[int, ...]) -> tuple[DraftedStep, ...]:
    """Draft 4 and keep 3, draft 2 and keep none, and so on, until all tokens after the first are made."""
    steps: list[DraftedStep] = []
    made = 1
    while made < len(tokens):
        kept = min(3, len(tokens) - made - 1) if len(steps) % 2 == 0 else 0
        step = DraftedStep("free", 4, kept) if len(steps) % 2 == 0 else DraftedStep("diffusion", 2, 0)
        steps.append(step)
        made += kept + 1
    return tuple(steps)


def one_pass(name: str, pair: int, tokens: tuple[int, ...], seconds: float, steps: tuple[DraftedStep, ...]) -> Pass:
    arrivals = tuple(0.5 + (seconds - 0.5) * i / len(steps) for i in range(len(steps) + 1))
    phases = Phases(prompt=0.5, draft=0.1, search=0.05, verify=seconds - 0.85, commit=0.1, other=0.1)
    return Pass(name, pair, seconds, (Generation(f"prompt-{pair}", tokens, arrivals, steps),), phases, 0.5)


def record(mismatches: tuple[Mismatch, ...] = ()) -> WorkloadRecord:
    """Four pairs: plain takes 2, 4, 6, 8 seconds, `free` half of that, `fast` a quarter or half. Two pairs loop."""
    passes = []
    for pair, tokens in enumerate((LOOP, VARIED, LOOP, VARIED)):
        seconds = 2.0 * (pair + 1)
        passes += [
            one_pass("plain", pair, tokens, seconds, plain_steps(tokens)),
            one_pass("free", pair, tokens, seconds / 2, drafted_steps(tokens)),
            one_pass("fast <b>", pair, tokens, seconds / (4 if pair < 2 else 2), drafted_steps(tokens)),
        ]
    return WorkloadRecord(Workload(1, 0.0, 18), "plain", ("free",), tuple(passes), mismatches, 4)
