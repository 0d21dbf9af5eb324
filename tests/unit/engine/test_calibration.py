"""Start-up measures the verifier's passes."""

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


def test_without_time_only_a_plain_step_is_measured(tiny_target: Path) -> None:
    model = Transformer.load(tiny_target)
    verifier = TorchVerifier(model, 4, 64, model.config.vocabulary_size)
    measured = measure_verify_seconds(verifier, 31, time.perf_counter, 0.0)
    assert list(measured.by_rows) == list(measured.by_requests) == [1]
