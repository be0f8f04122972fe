"""Original one-file layout: there and back without a difference, in the names that other tools read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffpref.models.single_file import to_original_layout

DOWN, CROSS = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
Make = Callable[..., DiffusionPipeline]

KINDS = ("sd1", "sd2", "sdxl", "refiner")


def weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Every weight by part and name."""
    parts = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module)}
    return {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_back_through_diffusers_without_a_difference(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(kind)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    state = to_original_layout(pipeline)
    save_file(state, tmp_path / "model.safetensors")
    back = type(pipeline).from_single_file(str(tmp_path / "model.safetensors"), config=str(folder))
    expected, found = weights(pipeline), weights(back)
    assert found.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(x, found[name])] == []
    assert sum(x.numel() for x in state.values()) == sum(x.numel() for x in expected.values())


REAL: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "xl_base": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (DOWN[0], CROSS[0], CROSS[0]),
            "up_block_types": (CROSS[1], CROSS[1], DOWN[1]),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"hidden_size": 1280, "projection_dim": 1280, "num_hidden_layers": 32, "hidden_act": "gelu"},
        1680,
    ),
    "xl_refiner": (
        {
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": (DOWN[0], CROSS[0], CROSS[0], DOWN[0]),
            "up_block_types": (DOWN[1], CROSS[1], CROSS[1], DOWN[1]),
            "transformer_layers_per_block": 4,
            "cross_attention_dim": 1280,
            "attention_head_dim": (6, 12, 24, 24),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        {"hidden_size": 1280, "projection_dim": 1280, "num_hidden_layers": 32, "hidden_act": "gelu"},
        1220,
    ),
    "v1": ({"cross_attention_dim": 768}, {"hidden_size": 768, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}, 686),
    "v2": (
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        {"hidden_size": 1024, "num_hidden_layers": 23, "hidden_act": "gelu"},
        686,
    ),
}
"""Options of the published models, and how many tensors their UNets have."""
SAMPLERS = {
    "xl_base": ("2.2", "5.2"),
    "xl_refiner": ("2.1", "5.2", "8.2"),
    "v1": ("2.1", "5.2", "8.2"),
    "v2": ("2.1", "5.2", "8.2"),
}
"""Where the up-samplers are: behind the attention, if there is one."""


@pytest.mark.parametrize("kind", REAL)
def test_names_of_full_size_models_are_the_published_ones(kind: str, new_pipeline: Make) -> None:
    unet, text, count = REAL[kind]
    with torch.device("meta"):
        encoder = (CLIPTextModelWithProjection if kind.startswith("xl") else CLIPTextModel)(CLIPTextConfig(**text))
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        parts = {"vae": vae, "unet": UNet2DConditionModel(**unet)}
        if kind == "xl_base":
            parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, hidden_act="quick_gelu"))
        parts["text_encoder_2" if kind.startswith("xl") else "text_encoder"] = encoder
    pipeline = new_pipeline({"xl_base": "sdxl", "xl_refiner": "refiner", "v1": "sd1", "v2": "sd2"}[kind])
    pipeline.register_modules(**parts)
    state = to_original_layout(pipeline)
    assert infer_diffusers_model_type(state) == kind
    assert sum(name.startswith("model.diffusion_model.") for name in state) == count
    assert sum(name.startswith("first_stage_model.") for name in state) == 248
    samplers = {n.removeprefix("model.diffusion_model.") for n in state if re.search(r"output_blocks\.\d+\.\d\.conv\.weight$", n)}
    assert samplers == {f"output_blocks.{place}.conv.weight" for place in SAMPLERS[kind]}
    if kind == "xl_base":  # the published file has two more: CLIP's position_ids and OpenCLIP's logit_scale
        assert len(state) == 2513
        assert state["conditioner.embedders.1.model.text_projection"].shape == (1280, 1280)
        assert state["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
        assert state["first_stage_model.decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
        assert state["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
    ],
)
def test_markers_say_what_the_scheduler_says(options: dict[str, Any], expected: set[str], new_pipeline: Make) -> None:
    state = to_original_layout(new_pipeline("sdxl", **options))
    assert {name for name in state if "." not in name} == expected


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_adapters_must_be_merged_first(part: str, new_pipeline: Make) -> None:
    pipeline = new_pipeline("sd1")
    targets = {"unet": ["to_q"], "text_encoder": ["q_proj"]}[part]
    getattr(pipeline, part).add_adapter(LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match="merge adapters first"):
        to_original_layout(pipeline)


def test_other_unets_are_refused(new_pipeline: Make) -> None:
    pipeline = new_pipeline("sd1")
    pipeline.unet.register_to_config(layers_per_block=[1, 2, 2])
    with pytest.raises(ValueError, match=r"layers_per_block \[1, 2, 2\]"):
        to_original_layout(pipeline)
