"""Locust users that stream answers and measure what a reader notices: time to first token and time between tokens.

Closed loop (`--arrivals closed`): each user sends its next request when the last one has ended, so the load adapts to
the server. Open loop (`--arrivals open`): each user is a Poisson process of `--rate` requests per second that does not
wait for answers. An overloaded server shows a growing time to first token, and 429.

Rows of the report, by workload: `total` is the whole request, `TTFT` the time to first token, `ITL` the time between
tokens. A cancelled request ends when its user walks away.
"""

import functools
import itertools
import os
from argparse import Namespace
from random import Random
from typing import Any

import gevent
import requests
from gevent.pool import Pool
from locust import LoadTestShape, User, between, constant, events, task
from streaming import CutShortError, RefusedError, monotonic, read_stream
from workloads import Mix

MAX_OUTSTANDING = 500  # requests of one open-loop user; with more, the client would be the bottleneck
RAMP_STEPS = 8
SOAK_WARM_UP_SECONDS = 30

started_users = itertools.count()


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    def add(flag: str, default: Any, text: str, **options: Any) -> None:
        variable = f"LOADTEST_{flag.removeprefix('--').replace('-', '_').upper()}"
        kind = type(default)
        parser.add_argument(flag, default=kind(os.environ.get(variable) or default), type=kind, help=text, **options)

    add("--arrivals", "closed", "closed loop or open loop (Poisson arrivals)", choices=["closed", "open"])
    add("--rate", 1.0, "open loop: requests per second of one user")
    add("--shape", "steady", "the number of users over time", choices=["steady", "ramp", "soak"])
    add("--mix", "", "weights of the workloads, such as completion=3,cancelled=1; empty: the default mix")
    add("--model", "", "name of the model; empty: the first one that the server lists")
    add("--max-tokens", 96, "maximum tokens of an answer")
    add("--seed", 0, "seed of prompts and arrivals")
    add("--api-key", "", "sent as Authorization: Bearer KEY", is_secret=True)


@functools.cache
def model_name(host: str, key: str) -> str:
    answer = requests.get(f"{host}/v1/models", headers=headers(key), timeout=30)
    answer.raise_for_status()
    return str(answer.json()["data"][0]["id"])


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


class StreamingUser(User):
    """Sends requests from the mix and reads their streams."""

    abstract = True

    def on_start(self) -> None:
        options: Namespace = self.environment.parsed_options
        self.random = Random(f"{options.seed} {next(started_users)}")
        self.mix = Mix.parse(options.mix, options.max_tokens)
        self.session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=MAX_OUTSTANDING)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        self.session.headers.update(headers(options.api_key))
        self.model = options.model or model_name(self.host, options.api_key)

    def send(self) -> None:
        """Draw a request, send it, and read it to its last token."""
        request = self.mix.draw(self.random, self.model)
        started = monotonic()
        timing, error = None, None
        try:
            answer = self.session.post(self.host + request.path, json=request.body, stream=True, timeout=(10, 300))
            timing = read_stream(answer, started, monotonic, request.stop_after_tokens)
        except (RefusedError, CutShortError, requests.RequestException) as caught:
            error = caught
        seconds = monotonic() - started
        self.report("total", request.workload, seconds, 0 if timing is None else timing.num_tokens, error)
        if timing is not None and timing.first_token is not None:
            self.report("TTFT", request.workload, timing.first_token)
            for gap in timing.between_tokens:
                self.report("ITL", request.workload, gap)

    def report(self, kind: str, name: str, seconds: float, length: int = 0, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1000 * seconds,
            response_length=length,
            exception=error,
            context={},
        )


class ClosedLoopUser(StreamingUser):
    """Reads an answer to its end, pauses, and asks again."""

    wait_time = between(0.0, 0.5)

    @task
    def ask(self) -> None:
        self.send()


class OpenLoopUser(StreamingUser):
    """Sends requests like many independent people: at a rate that does not depend on the answers."""

    wait_time = constant(0)

    def on_start(self) -> None:
        super().on_start()
        self.outstanding = Pool(MAX_OUTSTANDING)

    @task
    def arrive(self) -> None:
        gevent.sleep(self.random.expovariate(self.environment.parsed_options.rate))
        if self.outstanding.free_count() > 0:
            self.outstanding.spawn(self.send)
        else:
            self.report("total", "not sent", 0.0, error=RuntimeError(f"{MAX_OUTSTANDING} requests are outstanding"))

    def on_stop(self) -> None:
        self.outstanding.join(timeout=30)
        self.outstanding.kill()


@events.init.add_listener
def choose_users(environment: Any, **_: Any) -> None:
    is_open = environment.parsed_options.arrivals == "open"
    environment.user_classes = [OpenLoopUser if is_open else ClosedLoopUser]


class Shape(LoadTestShape):
    """The number of users over time.

    `steady`: all users at once. `ramp`: eight equal steps up to all users, to show the saturation point. `soak`: users
    arrive over half a minute and stay to the end, possibly for hours.
    """

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options: Namespace = self.runner.environment.parsed_options
        seconds = self.get_run_time()
        users, run_time = int(options.num_users or 1), options.run_time
        if run_time is not None and seconds >= run_time:
            return None
        if options.shape == "ramp" and run_time is not None:
            step = min(int(seconds / run_time * RAMP_STEPS) + 1, RAMP_STEPS)
            return max(1, round(users * step / RAMP_STEPS)), float(users)
        if options.shape == "soak":
            return users, max(users / SOAK_WARM_UP_SECONDS, 0.1)
        return users, float(options.spawn_rate or users)
