"""The guard's pauses; tests/vllm has the guard inside vLLM."""

import numpy as np

from service.engine.vllm.guard import DraftGuard


def test_the_pause_grows_while_the_drafter_fails_and_ends_with_success() -> None:
    class Broken:
        is_broken = True

        def propose(self, *arguments: object, slot_mappings: object = None) -> list[list[int]]:
            if self.is_broken:
                raise OSError("disk")
            return [[1]]

    now = [0.0]
    broken = Broken()
    guard = DraftGuard(broken, 10, 4, 100, 2.0, lambda: now[0])
    arguments = ([[1]], np.array([5], np.int32), np.zeros((1, 9), np.int32))
    pauses = []
    for _ in range(8):
        assert guard.propose(*arguments) == [[]]
        pauses.append(guard.backoff.seconds)
        now[0] += guard.backoff.seconds - 0.5
        assert not guard.is_up
        now[0] += 0.5
        assert guard.is_up
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    broken.is_broken = False
    assert guard.propose(*arguments) == [[1]]
    broken.is_broken = True
    guard.propose(*arguments)
    assert guard.backoff.seconds == 1
    assert not guard.is_up
