"""Start-up measures what verification costs."""

import time
from pathlib import Path

from service.engine.calibration import measure_verify_seconds
from transformer.model import Transformer
from verifiers.torch_lm import TorchVerifier


def test_passes_are_measured_by_rows_and_by_requests_as_far_as_there_are_slots(tiny_target: Path) -> None:
    model = Transformer.load(tiny_target)
    num_tokens = model.config.vocabulary_size
    measured = measure_verify_seconds(TorchVerifier(model, 4, 64, num_tokens), 31, time.perf_counter, 60.0)
    assert list(measured.by_rows) == [1, 2, 4, 8, 16, 32, 64]
    assert list(measured.by_requests) == [1, 4]
    assert measured.by_requests[1] == measured.by_rows[1] > 0


class SlowClock:
    """Every look at it takes ten seconds, as if each pass did."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def test_however_slow_the_target_is_the_cost_of_a_draft_is_known(tiny_target: Path) -> None:
    model = Transformer.load(tiny_target)
    verifier = TorchVerifier(model, 4, 64, model.config.vocabulary_size)
    measured = measure_verify_seconds(verifier, 31, SlowClock())
    assert list(measured.by_rows) == [1, 2, 4, 8, 16]
    assert list(measured.by_requests) == [1]
