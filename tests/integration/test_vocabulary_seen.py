"""Which way a pair's vocabularies go is seen by clients and by Prometheus."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import change_vocabulary, write_hub_drafter
from tests.integration.api_server import embedded_app, post, serving


@pytest.mark.parametrize(
    ("kind", "relation", "overlap"),
    [(None, "identical", 1.0), ("partial", "overlapping", 171 / 257), ("byte-names", "disjoint", 1 / 257)],
)
def test_the_way_between_two_vocabularies_is_in_models_and_metrics(
    tmp_path: Path, tiny_target: Path, kind: str | None, relation: str, overlap: float
) -> None:
    write_hub_drafter(tmp_path, "sdar")
    if kind is not None:
        change_vocabulary(tmp_path, kind)  # type: ignore[arg-type]
    with serving(embedded_app(tiny_target, tmp_path)) as url:
        (card,) = httpx.get(f"{url}/v1/models", timeout=120).json()["data"]
        assert f"diffusion (SDAR, block_causal, 0.0M, {relation} vocabulary)" in card["drafter"]
        body: dict[str, Any] = {"model": card["id"], "prompt": "abcabc", "max_tokens": 12, "temperature": 0}
        drafted, plain = post(url, **body), post(url, **body, speculative={"enabled": False})
        assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
        metrics = httpx.get(f"{url}/metrics", timeout=120).text
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("diffuspec_vocabulary"))
    info = next(name for name in lines if name.startswith("diffuspec_vocabulary_info"))
    assert f'relation="{relation}"' in info
    ratio = next(value for name, value in lines.items() if name.startswith("diffuspec_vocabulary_overlap_ratio"))
    assert float(ratio) == pytest.approx(overlap)
