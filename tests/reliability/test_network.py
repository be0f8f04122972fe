"""A hub that is down, slow or breaks off: tried again, then one line that says what to do; half a download is never used."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from diffpref.models.hub_access import PAUSES, TIMEOUT
from tests.reliability.harness import Outcome, any_script
from tests.reliability.hub_stub import Hub, serving

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
FAULTS = {  # (what the hub does, for how many requests of a file), and what the command then ends with
    "busy twice": ("503", 2, 0),
    "busy": ("503", 10**6, 2),
    "silent": ("hang", 10**6, 2),
    "breaks off once": ("cut", 1, 0),
    "breaks off": ("cut", 10**6, 2),
    "unknown": ("", 0, 2),
}


def begin(hub: Hub, name: str, home: Path, settings: dict[str, Any]) -> Outcome:
    """One step of training with a model of this hub and an empty cache."""
    given = settings | {"pretrained_model_name_or_path": "someone/model", "max_train_steps": 1, "lr_warmup_steps": 0}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))]
    address = "http://hub.invalid" if name == "unknown" else hub.address
    environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"}
    home.mkdir(exist_ok=True)
    trainer = any_script([str(SCRIPT), *words, "--output_dir", "{folder}"], 1, 1, "{folder}/x", home, environment)
    return trainer.run(home / "run")


@pytest.mark.reliability_full("H1")
def test_a_hub_in_trouble(sd_folder: Path, settings: dict[str, Any], tmp_path: Path, tried: Callable[[str, int], None]) -> None:
    """All at once, for most of it is waiting."""
    with ExitStack() as stack, ThreadPoolExecutor(len(FAULTS)) as pool:
        hubs = {name: stack.enter_context(serving(sd_folder, *fault[:2])) for name, fault in FAULTS.items()}
        begun = {name: pool.submit(begin, hub, name, tmp_path / name, settings) for name, hub in hubs.items()}
        outcomes = {name: done.result() for name, done in begun.items()}
        assert not any((tmp_path / name / "run").exists() for name, outcome in outcomes.items() if outcome.code)
        hubs["breaks off"].times = 0
        outcomes["whole again"] = begin(hubs["breaks off"], "breaks off", tmp_path / "breaks off", settings)
    for name, outcome in outcomes.items():
        assert outcome.code == (FAULTS[name][2] if name in FAULTS else 0), (name, outcome.errors)
        if outcome.code:
            assert "HF_HUB_OFFLINE=1" in outcome.last_line, name
            assert outcome.seconds < 60 + sum(PAUSES) + TIMEOUT * (len(PAUSES) + 1)
        tried("H1", 0)
    assert "did not answer in 5 tries (status 503)" in outcomes["busy"].last_line
