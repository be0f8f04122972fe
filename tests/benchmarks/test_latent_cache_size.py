"""Reading from a latent cache costs as much per pair, and as little memory, when the cache is a hundred times as large."""

from __future__ import annotations

from pathlib import Path

import latent_cache
import pytest


@pytest.mark.slow
def test_cost_per_pair_and_memory_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "READS", 4000)
    found = []
    for pairs in (1000, 100_000):
        latent_cache.build(tmp_path / str(pairs), pairs)
        found.append(latent_cache.measure(tmp_path / str(pairs), pairs))
    small, large = found
    assert large["own_memory_growth_mb"] < 5
    assert large["read_pairs_per_cpu_s"] > 0.5 * small["read_pairs_per_cpu_s"]
    assert large["open_cpu_s"] < 1
