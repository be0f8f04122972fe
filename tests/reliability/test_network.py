"""A hub that is down, slow or breaks off: tried again, then one line that says what to do; half a download is never used."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from diffpref.models.hub_access import PAUSES, TIMEOUT
from tests.reliability.conftest import EVERY
from tests.reliability.harness import Outcome, any_script, final_state
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


def started(settings: dict[str, Any], home: Path, environment: dict[str, str]) -> Outcome:
    """The script in a process of its own, with an empty cache of the hub; its run is home/run."""
    words = [
        word for key, value in settings.items() for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    given = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hub"), "HF_HUB_DISABLE_XET": "1"} | environment
    home.mkdir(exist_ok=True)
    return any_script([str(SCRIPT), *words, "--output_dir", "{folder}"], 1, 1, "{folder}/x", home, given).run(home / "run")


def begin(hub: Hub, name: str, home: Path, settings: dict[str, Any]) -> Outcome:
    """One step of training with a model of this hub."""
    given = settings | {"pretrained_model_name_or_path": "someone/model", "max_train_steps": 1, "lr_warmup_steps": 0}
    return started(given, home, {"HF_ENDPOINT": "http://hub.invalid" if name == "unknown" else hub.address})


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


TOKEN = "hf_canary_of_the_fault_matrix"


@pytest.mark.reliability_full("H2", "S9")
def test_an_upload_that_is_refused(sd_folder: Path, settings: dict[str, Any], whole: str, tmp_path: Path) -> None:
    """The repository can be created, and takes nothing: the run is done, says so, and the token is in nothing that it wrote."""
    with serving(sd_folder) as hub:
        given = settings | {"push_to_hub": True, "hub_model_id": "mine", "checkpointing_steps": EVERY}
        outcome = started(given, tmp_path, {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN})
        assert hub.asked["/api/repos/create"] == 1
        assert sum(count for path, count in hub.asked.items() if "preupload" in path) >= 1
        assert hub.tokens == {f"Bearer {TOKEN}"}
    assert outcome.code == 0, outcome.errors
    assert "hf upload someone/mine" in outcome.last_line
    assert '"not uploaded"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert final_state(tmp_path / "run") == whole
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".err", ".out"} <= {path.suffix for path in written}
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


CLIENT = """import os
import urllib.request

class Run:
    def log(self, values, step=None):
        urllib.request.urlopen(os.environ["TRACKER"], timeout=5).read()

    def finish(self):
        pass

class config:
    update = staticmethod(lambda *values, **options: None)

def init(**options):
    return Run()
"""
"""A tracker's client as accelerate uses it, which asks a server each time."""


@pytest.mark.reliability_full("H2")
def test_a_tracker_whose_server_goes_away(sd_folder: Path, settings: dict[str, Any], whole: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    (packages / "wandb-0.19.dist-info").mkdir(parents=True)
    (packages / "wandb-0.19.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.19\n")
    (packages / "wandb").mkdir()
    (packages / "wandb" / "__init__.py").write_text(CLIENT)
    with serving(sd_folder, "gone", 5) as hub:
        given = settings | {"report_to": "wandb", "checkpointing_steps": EVERY}
        outcome = started(given, tmp_path / "home", {"PYTHONPATH": str(packages), "TRACKER": f"{hub.address}/api/models/log"})
        assert hub.asked["/api/models/log"] == 6
    assert outcome.code == 0, outcome.errors
    (lost,) = [json.loads(x) for x in (tmp_path / "home" / "run" / "events.jsonl").read_text().splitlines() if "tracker lost" in x]
    assert (lost["step"], "the tracker wandb failed (HTTPError" in lost["text"]) == (6, True)
    assert final_state(tmp_path / "home" / "run") == whole
