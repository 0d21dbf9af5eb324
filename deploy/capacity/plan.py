"""Find how many replicas serve a request rate within a 99th percentile, from step costs that a replica measured.

    python deploy/capacity/plan.py --metrics http://127.0.0.1:8000/metrics --rate 5 --p99-seconds 10

reads a loaded replica's decode step metrics by batch size, simulates Poisson arrivals against steps of that cost, and
prints what each of several replicas would see. docs/capacity.md says when to trust it.
"""

import argparse
import sys
import urllib.request
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import quantiles

from prometheus_client.parser import text_string_to_metric_families

MAX_REPLICAS = 256
NUM_REQUESTS = 4000  # per simulated replica; the first tenth is warm-up
MIN_STEPS = 20  # for a batch size to count as measured
Point = tuple[float, float, float]  # batch size, seconds per step, tokens per step


@dataclass(frozen=True)
class StepCosts:
    """The seconds and tokens of steps."""

    points: Sequence[Point]  # in ascending batch size
    prefill_seconds: float  # per prompt token

    def at(self, batch: float) -> tuple[float, float]:
        """Return seconds and tokens of a step of `batch` sequences.

        Interpolates linearly between measured sizes, and scales in proportion outside of them.
        """
        below = [point for point in self.points if point[0] <= batch]
        above = [point for point in self.points if point[0] >= batch]
        if not below:
            first = above[0]
            return first[1], first[2] * batch / first[0]
        if not above:
            last = below[-1]
            return last[1] * batch / last[0], last[2] * batch / last[0]
        (x0, s0, t0), (x1, s1, t1) = below[-1], above[0]
        share = (batch - x0) / (x1 - x0) if x1 > x0 else 0.0
        return s0 + share * (s1 - s0), t0 + share * (t1 - t0)


def read_costs(text: str) -> StepCosts:
    """Read step costs from a replica's /metrics. Raises ValueError if it has not served enough."""
    steps: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, float] = defaultdict(float)
    all_seconds = prompt_tokens = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            batch = sample.labels.get("batch", "")
            if sample.name == "diffuspec_decode_steps_total":
                steps[batch] += sample.value
            elif sample.name == "diffuspec_decode_step_seconds_total":
                seconds[batch] += sample.value
            elif sample.name == "diffuspec_decode_step_tokens_total":
                tokens[batch] += sample.value
            elif sample.name == "diffuspec_step_seconds_sum":
                all_seconds += sample.value
            elif sample.name == "diffuspec_rows_total" and sample.labels["kind"] == "prefill":
                prompt_tokens += sample.value
    points = sorted(
        (_middle(batch), seconds[batch] / count, tokens[batch] / count)
        for batch, count in steps.items()
        if count >= MIN_STEPS
    )
    if not points or not prompt_tokens:
        raise ValueError("this replica has not decoded enough: load it first, with as many users as it will have")
    # Steps that read prompts also decode, but all their time counts as prompt time: an overestimate.
    return StepCosts(points, max(all_seconds - sum(seconds.values()), 0.0) / prompt_tokens)


def _middle(label: str) -> float:
    low, _, high = label.rstrip("+").partition("-")
    return (int(low) + int(high or low)) / 2


@dataclass(frozen=True)
class Workload:
    """The sizes of requests and the limits of a replica."""

    prompt_tokens: int
    min_output_tokens: int
    max_output_tokens: int
    max_running: int = 32
    prefill_chunk_tokens: int = 256


@dataclass(frozen=True)
class Outcome:
    """The simulated seconds of requests, and the load of the replica."""

    first_token: list[float]
    total: list[float]
    mean_batch: float
    busy: float  # share of the time with a step running

    def percentile(self, values: list[float], percent: int) -> float:
        return quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass
class _Request:
    arrived: float
    unread: float  # prompt tokens
    left: float  # output tokens
    first: float | None = None


def simulate(costs: StepCosts, workload: Workload, rate: float, random: Random, count: int = NUM_REQUESTS) -> Outcome:
    """Simulate one replica under Poisson arrivals of `rate` requests per second, served in order of arrival."""
    arrivals, moment = deque[_Request](), 0.0
    for _ in range(count):
        moment += random.expovariate(rate)
        output = random.randint(workload.min_output_tokens, workload.max_output_tokens)
        arrivals.append(_Request(moment, workload.prompt_tokens, output))
    running: list[_Request] = []
    ended: list[tuple[_Request, float]] = []
    now = busy = weighted = 0.0
    while arrivals or running:
        if not running and arrivals[0].arrived > now:
            now = arrivals[0].arrived
        while arrivals and arrivals[0].arrived <= now and len(running) < workload.max_running:
            running.append(arrivals.popleft())
        chunk_left = float(workload.prefill_chunk_tokens)
        decoding = [request for request in running if request.unread <= 0]
        reading = 0.0
        for request in running:
            num_read = min(request.unread, chunk_left)
            request.unread -= num_read
            chunk_left -= num_read
            reading += num_read
        seconds, num_tokens = costs.at(len(decoding)) if decoding else (0.0, 0.0)
        seconds = max(seconds, reading * costs.prefill_seconds) if reading else seconds
        now += seconds
        busy += seconds
        weighted += seconds * len(running)
        for request in decoding:
            request.left -= num_tokens / len(decoding)
            request.first = now if request.first is None else request.first
        ended += [(request, now) for request in decoding if request.left <= 1e-9]
        running = [request for request in running if request.unread > 0 or request.left > 1e-9]
    measured = ended[count // 10 :]
    return Outcome(
        [(request.first or end) - request.arrived for request, end in measured],
        [end - request.arrived for request, end in measured],
        weighted / busy if busy else 0.0,
        busy / now if now else 0.0,
    )


def max_rate(costs: StepCosts, workload: Workload) -> float:
    """Return the requests per second that keep one replica fully busy with a full batch."""
    seconds, tokens = costs.at(workload.max_running)
    output = (workload.min_output_tokens + workload.max_output_tokens) / 2
    return 1 / (output * seconds / tokens + workload.prompt_tokens * costs.prefill_seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", required=True, help="URL of /metrics, or a file with its content")
    parser.add_argument("--rate", type=float, required=True, help="requests per second, over all replicas")
    parser.add_argument(
        "--p99-seconds", type=float, required=True, help="limit for the 99th percentile of request durations"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument(
        "--output-tokens", default="32-96", help="MIN-MAX, uniformly distributed (default: %(default)s)"
    )
    parser.add_argument("--max-running", type=int, default=32, help="DIFFUSPEC_SCHEDULER__MAX_RUNNING")
    options = parser.parse_args(argv)
    try:
        costs = read_costs(_read(options.metrics))
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    low, _, high = options.output_tokens.partition("-")
    workload = Workload(options.prompt_tokens, int(low), int(high or low), options.max_running)
    print("batch  step ms  tokens a step")
    for batch, seconds, tokens in costs.points:
        print(f"{batch:5.1f} {1000 * seconds:8.1f} {tokens:14.2f}")
    print(f"prompts: {1000 * costs.prefill_seconds:.2f} ms a token\n")
    print("replicas  requests/s each  busy  batch  first token p50 / p99 s  request p50 / p99 s")
    replicas = max(1, int(options.rate / max_rate(costs, workload)))
    for count in range(replicas, MAX_REPLICAS + 1):
        found = simulate(costs, workload, options.rate / count, Random(0))
        first, total = ([found.percentile(times, p) for p in (50, 99)] for times in (found.first_token, found.total))
        print(
            f"{count:8d} {options.rate / count:16.2f} {found.busy:5.0%} {found.mean_batch:6.1f}"
            f" {first[0]:15.2f} / {first[1]:5.2f} {total[0]:14.2f} / {total[1]:5.2f}"
        )
        if total[1] <= options.p99_seconds:
            print(f"\n{count} replicas keep the 99th percentile under {options.p99_seconds:g} s.")
            return 0
        if count > replicas + 12 and found.busy < 0.05:
            break
    print("\nNo number of replicas is enough: one request alone takes longer. Use faster hardware or a smaller target.")
    return 1


def _read(source: str) -> str:
    if source.startswith("http"):
        with urllib.request.urlopen(source, timeout=30) as answer:
            text: str = answer.read().decode()
            return text
    return Path(source).read_text()


if __name__ == "__main__":
    sys.exit(main())
