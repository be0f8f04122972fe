"""The public configurations give the released models' sizes, names and shapes, and pipelines in their layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from diffpref.models import configs
from diffpref.models.backbone import load_backbone
from diffpref.models.configs import FAMILIES, PARAMETERS, new_part, new_pipeline, public_config, shapes

each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
def test_every_part_has_the_released_number_of_parameters(family: str) -> None:
    networks = {part for part, options in public_config(family).items() if part not in ("pipeline", "scheduler")}
    assert networks == set(PARAMETERS[family])
    for part, number in PARAMETERS[family].items():
        network = new_part(family, part, device="meta")
        assert sum(p.numel() for p in network.parameters()) == number, part
        assert all(p.is_meta and p.dtype == torch.float32 for p in network.parameters())
        assert not network.training


def test_names_and_shapes_are_those_of_the_released_files() -> None:
    """Weights that everybody who has opened these files knows by name."""
    sd, xl = shapes("sd15", "unet"), shapes("sdxl", "unet")
    assert (len(sd), len(xl)) == (686, 1680)
    assert sd["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert sd["down_blocks.0.attentions.0.proj_in.weight"] == (320, 320, 1, 1)
    assert xl["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
    assert xl["down_blocks.1.attentions.0.proj_in.weight"] == (640, 640)
    assert xl["add_embedding.linear_1.weight"] == (1280, 2816)
    assert shapes("sdxl", "vae")["decoder.conv_in.weight"] == (512, 4, 3, 3)
    assert shapes("sdxl", "text_encoder_2")["text_projection.weight"] == (1280, 1280)


def test_scale_and_schedule_of_the_families() -> None:
    assert public_config("sd15")["vae"]["scaling_factor"] == 0.18215
    assert public_config("sdxl")["vae"]["scaling_factor"] == 0.13025
    for family in FAMILIES:
        schedule = public_config(family)["scheduler"]
        assert (schedule["beta_start"], schedule["beta_end"], schedule["prediction_type"]) == (0.00085, 0.012, "epsilon")


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="'sd3' is not known; use sd15 or sdxl"):
        public_config("sd3")


@each_family
def test_a_pipeline_of_a_family_is_written_in_the_released_layout(
    family: str, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "unet": {"block_out_channels": [32] * len(public_config(family)["unet"]["block_out_channels"]), "attention_head_dim": 4},
        "vae": {"block_out_channels": [32, 32, 32, 32]},
        "text_encoder": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
        "text_encoder_2": {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "projection_dim": 16},
    }
    widths = {"cross_attention_dim": 16 if family == "sd15" else 32}
    if family == "sdxl":
        widths |= {"projection_class_embeddings_input_dim": 6 * 256 + 16}

    def reduced(name: str) -> dict[str, dict[str, object]]:
        found = public_config(name)
        return {part: options | small.get(part, {}) | (widths if part == "unet" else {}) for part, options in found.items()}

    monkeypatch.setattr(configs, "public_config", reduced)
    given = dict(zip(("tokenizer", "tokenizer_2"), tokenizers[: 1 + (family == "sdxl")], strict=False))
    first, again = (new_pipeline(family, given, torch.bfloat16, seed=3) for _ in range(2))
    assert {x.dtype for x in first.unet.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(first.unet.parameters(), again.unet.parameters(), strict=True))
    first.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(loaded) is type(first)
    backbone = load_backbone(str(tmp_path))
    assert backbone.family == {"sd15": "sd", "sdxl": "sdxl"}[family]
    assert backbone.default_resolution == {"sd15": 512, "sdxl": 1024}[family]
    assert torch.get_default_dtype() == torch.float32
