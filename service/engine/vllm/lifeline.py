"""Ends vLLM's processes when the service is gone: killed outright, it can tell nobody, and they would keep the device.

vLLM's workers notice the death of its engine process, but that one does not notice the death of ours.
"""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0


def hold_lifeline() -> None:
    """Watch, from a worker or from vLLM's engine process. Nothing happens where vLLM runs in the service's process."""
    name = multiprocessing.current_process().name
    if multiprocessing.parent_process() is None:
        return
    core = os.getpid() if name.startswith("EngineCore") else os.getppid()
    service = parent_of(core)
    if service is not None and service > 1:
        threading.Thread(target=_watch, args=(core, service), name="lifeline", daemon=True).start()


def parent_of(pid: int) -> int | None:
    """None if there is no such process, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def _watch(core: int, service: int) -> None:
    while parent_of(core) == service:
        time.sleep(POLL_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if parent_of(core) is not None:
            os.kill(core, number)
            time.sleep(GRACE_SECONDS)
    os._exit(1)
