"""Published checkpoints in the forms they come in, with random weights: opened on their base, drawn, set beside the paper."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpref.inference.checkpoints import kind_of, open_candidate, parse_candidates
from diffpref.inference.verify import VerifyConfig, as_text, published, verify
from diffpref.models.backbone import load_backbone
from diffpref.models.lora import add_lora, save_lora, trainable_state

ENTRY = "diffusion-dpo-sd15/spo-paper"


def brightness(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """A scorer between 0 and 1."""
    return np.array([np.asarray(image).mean() / 255 for image in images])


@pytest.fixture(scope="module")
def checkpoints(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same changed UNet as pipeline, UNet-only folder, UNet inside a folder, unet.pth and .safetensors; and a LoRA."""
    place = tmp_path_factory.mktemp("published")
    pipeline = place / "pipeline"
    shutil.copytree(sd_folder, pipeline)
    file = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    changed = {name: x + 0.3 if name == "conv_out.bias" else x for name, x in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    shutil.copytree(pipeline / "unet", place / "unet-only")
    shutil.copytree(pipeline / "unet", place / "with-unet" / "unet")
    torch.save(changed, place / "unet.pth")
    save_file(changed, place / "unet.safetensors")
    backbone = load_backbone(str(sd_folder))
    add_lora(backbone.denoiser, rank=2, alpha=2, targets="attention", seed=0)
    with torch.no_grad():
        for name, p in trainable_state(backbone.denoiser).items():
            p.add_(0.5 if "lora_B" in name else 0)
    save_lora(backbone.pipeline, place / "lora")
    names = {"pipeline": "pipeline", "unet_folder": "unet-only", "unet_inside": "with-unet", "unet_pth": "unet.pth"}
    return {key: place / name for key, name in {**names, "unet_file": "unet.safetensors", "lora": "lora"}.items()}


@pytest.mark.parametrize("form", ["pipeline", "unet_folder", "unet_inside", "unet_pth", "unet_file"])
def test_every_form_of_a_checkpoint_is_the_same_model(form: str, checkpoints: dict[str, Path], sd_folder: Path) -> None:
    source = checkpoints[form]
    assert kind_of(str(source)) == ("pipeline" if form == "pipeline" else "unet")
    (candidate,) = parse_candidates([f"model={source}"], (1.0,))
    opened, base = (open_candidate(str(sd_folder), None, None, c) for c in (candidate, type(candidate)("base", None)))
    assert torch.allclose(opened.unet.conv_out.bias, base.unet.conv_out.bias + 0.3)
    others = [n for n, p in base.unet.named_parameters() if not torch.equal(p, opened.unet.get_parameter(n))]
    assert others == ["conv_out.bias"]


def test_a_lora_is_opened_at_every_strength(checkpoints: dict[str, Path], sd_folder: Path) -> None:
    candidates = parse_candidates([f"mine={checkpoints['lora']}"], (0.0, 1.0, 2.0))
    assert [c.name for c in candidates] == ["mine x0", "mine x1", "mine x2"]
    weights = [open_candidate(str(sd_folder), None, None, c).unet.state_dict() for c in candidates]
    (name, *_) = (n for n in weights[0] if not torch.equal(weights[0][n], weights[1][n]))
    torch.testing.assert_close(weights[2][name] - weights[0][name], 2 * (weights[1][name] - weights[0][name]))


@pytest.mark.parametrize("form", ["pipeline", "unet_pth", "lora"])
def test_our_numbers_stand_beside_the_papers(form: str, checkpoints: dict[str, Path], sd_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue ring\n\n a green cross\n")
    config = VerifyConfig(
        entry=ENTRY,
        aligned=str(checkpoints[form]),
        pretrained_model_name_or_path=str(sd_folder),
        prompt_set=str(tmp_path / "prompts.txt"),
        num_inference_steps=1,
        output_dir=str(tmp_path / "out"),
    )
    found = verify(config, {"pickscore": brightness, "hpsv2": brightness}, str(sd_folder))
    assert found == json.loads((tmp_path / "out" / "verify.json").read_text())
    paper = published()[ENTRY]
    rows = found["figures"]
    assert rows["pickscore"]["published"] == paper["scores"]["pickscore"]
    assert rows["aesthetic"]["ours"] is None
    assert rows["hpsv2"]["ours"] == pytest.approx(100 * rows["pickscore"]["ours"])  # papers print HPS times 100
    assert rows["hpsv2"]["ours_difference"][0] == pytest.approx(rows["hpsv2"]["ours"] - rows["hpsv2"]["ours_base"])
    assert rows["pickscore"]["ours"] != rows["pickscore"]["ours_base"]
    assert found["settings"]["sampler"] == paper["sampler"]
    assert found["settings"]["guidance_scale"] == paper["guidance_scale"]
    assert found["num_prompts"] == 3
    assert not found["all_prompts"]
    text = as_text(found)
    assert "not comparable with 3" in text
    assert f"{paper['scores']['hpsv2']:.4g}" in text
    assert str(tmp_path) not in json.dumps({name: value for name, value in found.items() if name != "settings"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"entry": "spo"}, "entry is 'spo'; accepted: diffusion-dpo-sdxl"),
        ({"aligned": None}, "aligned is not given"),
        ({"entry": "mapo-sdxl"}, "prompt_set is not given"),
    ],
)
def test_what_is_missing_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VerifyConfig(**({"entry": ENTRY, "aligned": "a", "pretrained_model_name_or_path": "b"} | change))


def test_every_published_entry_is_complete() -> None:
    fields = {"checkpoint", "base", "family", "source", "prompt_set", "num_prompts", "sampler", "statistic", "scores", "base_scores"}
    for name, entry in published().items():
        assert fields <= entry.keys(), name
        assert entry["scores"], name
        assert "arXiv" in entry["source"] or "card" in entry["source"] or "poster" in entry["source"] or "table" in entry["source"], name


@pytest.mark.parametrize(("name", "said"), [("nowhere", "does not exist"), ("empty", "holds no model"), ("base=x", "cannot name a model")])
def test_what_is_no_checkpoint_is_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=said):
        parse_candidates([name if "=" in name else f"model={tmp_path / name}"], (1.0,))
