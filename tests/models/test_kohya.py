"""kohya files: diffusers reads them back without a difference, and their names are those that other front ends look for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from diffpref.models.kohya import kohya_metadata, kohya_state, lora_layers, unet_layer_namer
from diffpref.models.lora import TARGETS

FolderOf = Callable[[str], Path]
ATTENTION = [*TARGETS["attention"]]
ALL = [
    "to_q",
    "to_k",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "time_emb_proj",
    "conv_shortcut",
    "conv",
]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def add(pipeline: DiffusionPipeline, text: bool = False, **options: Any) -> None:
    """Trained adapters on the UNet and, if asked for, on the text encoders."""
    pipeline.unet.add_adapter(LoraConfig(**({"r": 4, "target_modules": ATTENTION} | options)))
    parts = [pipeline.unet]
    if text:
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, name, None) is not None:
                parts.append(getattr(pipeline, name))
                parts[-1].add_adapter(LoraConfig(**(options | {"r": 4, "target_modules": TEXT})))
    maker = torch.Generator().manual_seed(5)
    for part in parts:
        for name, p in part.named_parameters():
            if "lora_" in name:
                p.data = 0.2 * torch.randn(p.shape, generator=maker)


@torch.no_grad()
def predict(pipeline: DiffusionPipeline) -> Tensor:
    """The UNet's output for an encoded prompt.

    Weights are copied first: torch rounds differently in the 7th digit where a tensor lies unaligned in a mapped file.
    """
    for p in pipeline.unet.parameters():
        p.data = p.data.clone()
    encoded = pipeline.encode_prompt("a red circle", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = None
    if pipeline.unet.config.addition_embed_type:
        added = {"text_embeds": encoded[2], "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline.unet(x_t, torch.tensor([500]), encoded[0], added_cond_kwargs=added).sample


CASES: dict[str, dict[str, Any]] = {
    "attention": {"lora_alpha": 10},
    "all": {"lora_alpha": 1, "target_modules": ALL},
    "rslora": {"lora_alpha": 3, "use_rslora": True, "target_modules": ALL},
    "text": {"lora_alpha": 6, "text": True},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [("sdxl", "attention"), ("sd1", "all"), ("sd2", "all"), ("sdxl", "all"), ("sdxl", "rslora"), ("sd1", "text"), ("sdxl", "text")],
)
def test_diffusers_reads_the_file_without_a_difference(kind: str, case: str, folder_of: FolderOf, tmp_path: Path) -> None:
    trained = DiffusionPipeline.from_pretrained(folder_of(kind))
    before = predict(trained)
    add(trained, **CASES[case])
    save_file(kohya_state(trained), tmp_path / "kohya.safetensors")
    fresh = DiffusionPipeline.from_pretrained(folder_of(kind))
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert torch.equal(predict(fresh), predict(trained))
    assert not torch.allclose(predict(fresh), before, atol=1e-2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_per_layer(use_rslora: bool, folder_of: FolderOf, tmp_path: Path) -> None:
    trained = DiffusionPipeline.from_pretrained(folder_of("sdxl"))
    patterns = {"rank_pattern": {"to_q": 2, "conv1": 8}, "alpha_pattern": {"to_k": 5, "ff.net.2": 0}}
    add(trained, lora_alpha=3, use_rslora=use_rslora, target_modules=ALL, **patterns)
    state = kohya_state(trained)
    save_file(state, tmp_path / "kohya.safetensors")
    fresh = DiffusionPipeline.from_pretrained(folder_of("sdxl"))
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    torch.testing.assert_close(predict(fresh), predict(trained), rtol=1e-5, atol=1e-6)
    assert kohya_metadata(trained, state, "x")["ss_network_dim"] == "Dynamic"
    for name, w in lora_layers(trained.unet):  # what any front end computes from the file
        key = unet_layer_namer(trained.unet)(name)
        down, up, alpha = (state[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert float(alpha) != 0  # sd-scripts reads 0 as "the rank"
        torch.testing.assert_close(up * alpha / len(down), w.up * w.scale)
        assert torch.equal(down, w.down)


def test_a_file_goes_in_and_comes_out_unchanged(folder_of: FolderOf, tmp_path: Path) -> None:
    trained = DiffusionPipeline.from_pretrained(folder_of("sdxl"))
    add(trained, lora_alpha=10, text=True, target_modules=ALL)
    state = kohya_state(trained)
    save_file(state, tmp_path / "kohya.safetensors")
    fresh = DiffusionPipeline.from_pretrained(folder_of("sdxl"))
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="default")
    again = kohya_state(fresh)
    assert again.keys() == state.keys()
    assert [name for name, x in state.items() if not torch.equal(x, again[name])] == []


def test_shapes_and_scalars(folder_of: FolderOf) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder_of("sd1"))
    add(pipeline, lora_alpha=3, r=8, use_rslora=True, text=True, target_modules=ALL)
    state = kohya_state(pipeline)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert state[f"{name}.lora_down.weight"].shape == (8, 8, 3, 3)
    assert state[f"{name}.lora_up.weight"].shape == (8, 8, 1, 1)
    assert state[f"{name}.alpha"].shape == ()
    assert float(state[f"{name}.alpha"]) == pytest.approx(3 * math.sqrt(8))
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight" in state
    assert len(state) % 3 == 0


def test_both_text_encoders_of_sdxl_have_their_prefix(folder_of: FolderOf) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder_of("sdxl"))
    add(pipeline, text=True)
    names = {name.split(".")[0] for name in kohya_state(pipeline)}
    for prefix, layers in (("lora_te1", 2), ("lora_te2", 3)):
        linear = [*(f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
        wanted = {f"{prefix}_text_model_encoder_layers_{i}_{x}" for i in range(layers) for x in linear}
        assert {name for name in names if name.startswith(prefix)} == wanted


SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def full_size(parameters: int, **options: Any) -> UNet2DConditionModel:
    """A published UNet without its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**options)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    return unet


def layers_of(unet: UNet2DConditionModel) -> list[str]:
    """The layers that the target "all" reaches."""
    return [name for name, _ in unet.named_modules() if any(name.endswith("." + target) for target in TARGETS["all"])]


def transformer(place: str, depth: int) -> set[str]:
    """The linear layers of a spatial transformer of `depth` blocks."""
    attention = [f"attn{a}_to_{x}" for a in (1, 2) for x in ("q", "k", "v", "out_0")]
    blocks = {f"{place}_transformer_blocks_{d}_{x}" for d in range(depth) for x in (*attention, "ff_net_0_proj", "ff_net_2")}
    return {f"{place}_proj_in", f"{place}_proj_out"} | blocks


def test_names_of_the_full_size_sdxl() -> None:
    unet = full_size(2_567_463_684, **SDXL)
    layers = layers_of(unet)
    names = {unet_layer_namer(unet)(layer): layer for layer in layers}
    places = {4: 2, 5: 2, 7: 10, 8: 10}
    expected = set().union(*(transformer(f"lora_unet_input_blocks_{i}_1", depth) for i, depth in places.items()))
    expected |= transformer("lora_unet_middle_block_1", 10)
    expected |= set().union(*(transformer(f"lora_unet_output_blocks_{i}_1", 10 if i < 3 else 2) for i in range(6)))
    assert len(expected) == 722  # the modules that sd-scripts trains
    residual = [f"input_blocks_{i}_0" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block_0", "middle_block_2"]
    residual += [f"output_blocks_{i}_0" for i in range(9)]
    expected |= {f"lora_unet_{r}_{x}" for r in residual for x in ("in_layers_2", "out_layers_3", "emb_layers_1")}
    assert names.keys() == expected
    assert len(names) == len(layers)
    state = {f"{name}.lora_down.weight": layer for name, layer in names.items()}
    back = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    for name, layer in back.items():
        assert plain(_convert_unet_lora_key(name)) == layer


def test_names_of_the_full_size_sd() -> None:
    unet = full_size(859_520_964, cross_attention_dim=768)
    layers = layers_of(unet)
    names = {unet_layer_namer(unet)(layer): layer for layer in layers}
    places = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)] + ["mid_block_attentions_0"]
    places += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    expected = set().union(*(transformer(f"lora_unet_{place}", 1) for place in places))
    assert len(expected) == 192  # the modules that sd-scripts trains
    residual = [f"down_blocks_{i}_resnets_{j}" for i in range(4) for j in range(2)] + [f"mid_block_resnets_{j}" for j in range(2)]
    residual += [f"up_blocks_{i}_resnets_{j}" for i in range(4) for j in range(3)]
    expected |= {f"lora_unet_{r}_{x}" for r in residual for x in ("conv1", "conv2", "time_emb_proj")}
    assert names.keys() == expected
    assert len(names) == len(layers)
    for name, layer in names.items():
        assert plain(_convert_unet_lora_key(f"{name}.lora_down.weight")) == layer


def plain(converted: str) -> str:
    """diffusers' older name of a LoRA weight as the name of its layer."""
    name = converted.split(".lora.down")[0].split("_lora.down")[0].replace(".processor.", ".")
    return name + ".0" if name.endswith("to_out") else name


@pytest.mark.parametrize(
    ("options", "prediction_type", "version", "architecture"),
    [
        (SDXL, "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ({"cross_attention_dim": 768}, "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ({"cross_attention_dim": 1024}, "v_prediction", "sd_v2", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_metadata_names_the_published_models(
    options: dict[str, Any], prediction_type: str, version: str, architecture: str, new_pipeline: Callable[..., DiffusionPipeline]
) -> None:
    pipeline = new_pipeline("sdxl" if options is SDXL else "sd1", prediction_type=prediction_type)
    with torch.device("meta"):
        pipeline.register_modules(unet=UNet2DConditionModel(**options))
    state = {"a.lora_down.weight": torch.ones(4, 2), "a.alpha": torch.tensor(2.5)}
    metadata = kohya_metadata(pipeline, state, "aligned")
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == ("v" if prediction_type == "v_prediction" else "epsilon")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.5")
    assert metadata["ss_output_name"] == metadata["modelspec.title"] == "aligned"
    assert all(isinstance(value, str) for value in metadata.values())


def test_other_sizes_name_no_published_model(new_pipeline: Callable[..., DiffusionPipeline]) -> None:
    pipeline = new_pipeline("sdxl")
    metadata = kohya_metadata(pipeline, {}, "aligned")
    assert not {name for name in metadata if "version" in name or "architecture" in name}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA.*--format single_file"),
        ({"lora_bias": True, "init_lora_weights": True}, "biases"),
        ({"target_modules": ["conv_norm_out"]}, "no adapter"),
    ],
)
def test_what_the_form_cannot_carry_is_refused(
    options: dict[str, Any], reason: str, new_pipeline: Callable[..., DiffusionPipeline]
) -> None:
    pipeline = new_pipeline("sd1")
    if options.get("target_modules") is None:
        pipeline.unet.add_adapter(LoraConfig(**({"r": 2, "target_modules": ["conv1"]} | options)))
    with pytest.raises(ValueError, match=reason):
        kohya_state(pipeline)
