"""Loading a checkpoint needs no second copy of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_hub_drafter

SCRIPT = """
import resource, sys, threading, time
from pathlib import Path
import torch
from transformer.model import Transformer

def anonymous_bytes():  # without the pages of the mapped file: the system may drop them at any time
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
before = anonymous_bytes()
peak, done = before, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = Transformer.load(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
done = True
watcher.join()
print(peak - before, anonymous_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_while_loading_is_little_more_than_the_weights(tmp_path: Path, dtype: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_hub_drafter(tmp_path, "sdar", layers=16, dtype=torch.bfloat16, max_shard_size="10MB", head_dim=64, **sizes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, kept = (int(number) for number in result.stdout.split())
    size = stored * (2 if dtype == "float32" else 1)
    assert kept > 0.9 * size  # otherwise the measurement proves nothing
    assert peak < kept + 0.5 * size
