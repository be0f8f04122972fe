"""docs/journey.md, command by command, with smaller numbers: prompts become pairs, pairs a LoRA, the LoRA a file for others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from diffpref import cli
from diffpref.locations import asset
from diffpref.models.backbone import load_pipeline

PAGE = Path(__file__).resolve().parents[1] / "docs" / "journey.md"
COMMANDS = {"label_pairs.py": ["label"], "train_diffusion_dpo.py": ["train"], "export.py": ["export"]}
SMALLER = {
    "--num_images_per_prompt 4": "--num_images_per_prompt 2",
    "--num_inference_steps 16": "--num_inference_steps 2",
    "--max_train_steps 260": "--max_train_steps 2",
    "--train_batch_size 64": "--train_batch_size 2",
}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_journey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, *commands = re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(commands) == 3
    text = "\0".join(commands)
    for whole, part in SMALLER.items():
        assert whole in text
        text = text.replace(whole, part)
    text = text.replace("assets/testbed/pipeline", str(asset("testbed", "pipeline")))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(prompts)
    for command in text.split("\0"):
        words = shlex.split(command.replace("\\\n", " "))
        script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        assert cli.main([*COMMANDS[Path(words[script]).name], *words[script + 1 :]]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    names = load_file("journey/my-lora.safetensors")
    assert all(name.startswith("lora_unet_") for name in names)
    assert any("input_blocks" in name for name in names)
    plain = load_pipeline(str(asset("testbed", "pipeline")))
    before = {name: x.clone() for name, x in plain.unet.state_dict().items()}
    plain.load_lora_weights("journey/my-lora.safetensors")
    plain.fuse_lora()
    plain.unload_lora_weights()
    assert any(not torch.equal(x, before[name]) for name, x in plain.unet.state_dict().items())
