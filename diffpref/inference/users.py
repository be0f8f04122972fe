"""Encoders of users, and user weights on disk: shared by training, the pipelines and `diffpref generate`.

A folder of user weights holds
    user_config.json              how the branch and its projector are built, and which encoder made the embeddings
    user_weights.safetensors      "unet.<layer>..." and "projector...."
    user_embeds.safetensors       an embedding (L, D) of each known user, by name
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpref.core.policy import adapters_off
from diffpref.core.process import DdpmProcess
from diffpref.core.random import normal
from diffpref.data.images import decode_image
from diffpref.data.schema import PairRow
from diffpref.models.backbone import FAMILIES, vae_factor
from diffpref.models.family import family_of_config
from diffpref.models.user_attention import add_user_attention, user_layers
from diffpref.models.user_lora import add_user_lora, user_updates
from diffpref.scorers.clip_towers import VIT_H, VIT_H_REPO, image_features, load_clip_model, load_towers
from diffpref.scorers.preprocessing import ShortestSideCrop, normalise
from diffpref.scorers.vlm_judge import load_vlm_judge
from diffpref.scorers.weights import WeightSource, sha256
from diffpref.users.examples import Example, UserEncoder
from diffpref.users.features import FeatureEncoder
from diffpref.users.projectors import new_projector
from diffpref.users.stored import EMBEDS_FILE
from diffpref.users.vlm import DEFAULT_MODEL, VlmEncoder

CONFIG_FILE, WEIGHTS_FILE = "user_config.json", "user_weights.safetensors"
CLIP_REPO = "yuvalkirstain/PickScore_v1"
NOISE_LEVEL = 60
"""Timestep at which the model's own UNet looks at pictures."""
Settings = Mapping[str, Any]


def new_encoder(settings: Settings, pipeline: DiffusionPipeline, device: torch.device | str) -> UserEncoder | None:
    """The encoder that `settings` names (user_encoder and its options); None for a table, whose users are numbers.

    Raises ValueError for weights that are missing or do not fit.
    """
    kind, weights = settings["user_encoder"], settings.get("user_encoder_weights")
    if kind == "vlm":
        judge = load_vlm_judge(weights or DEFAULT_MODEL, device)
        options = {"num_tokens": settings["user_tokens"], "layer": settings["vlm_layer"], "pooling": settings["vlm_pooling"]}
        return VlmEncoder(judge.model, judge.processor, judge.version, judge.checksum, **options)
    if kind == "clip":
        return _clip_encoder(weights, device)
    return _unet_encoder(pipeline, device) if kind == "unet" else None


def _clip_encoder(weights: str | None, device: torch.device | str) -> FeatureEncoder:
    """Unit vectors of both CLIP towers, from PickScore or any model in its layout."""
    source = WeightSource("user_encoder clip", weights, CLIP_REPO)
    path = source.weights(("model.safetensors", "pytorch_model.bin"))
    towers = load_towers(source, load_clip_model(source, path, VIT_H), VIT_H_REPO, device)
    crop = ShortestSideCrop(towers.image_size)

    def pictures(images: Sequence[Image.Image]) -> Tensor:
        return image_features(towers.model, normalise(torch.stack([crop.image(image) for image in images])).to(device))

    return FeatureEncoder(pictures, towers.text_features, {"encoder": "clip", "version": weights or CLIP_REPO, "checksum": sha256(path)})


def _unet_encoder(pipeline: DiffusionPipeline, device: torch.device | str) -> FeatureEncoder:
    """What the base model itself sees in a picture that is slightly noised, pooled over places: needs no other model.

    Mean, maximum and standard deviation of the outputs of the middle block and the first block on the way up, without a prompt, the user
    branch and adapters; of prompts the mean state of the text encoders.
    """
    family, vae, unet = FAMILIES[_family(pipeline)], pipeline.vae, pipeline.unet
    side = int(unet.config.sample_size) * vae_factor(pipeline)
    crop, process = ShortestSideCrop(side), DdpmProcess.from_betas(pipeline.scheduler.betas, pipeline.scheduler.config.prediction_type)
    predict = family.predictor(unet)

    def pictures(images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([crop.image(image) for image in images]).to(device).float() / 127.5 - 1
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mean[:, None].float() * vae.config.scaling_factor
        t = torch.full(latents.shape[:2], NOISE_LEVEL, device=device)
        noise = normal(latents.shape[2:], 0, "user_features").to(latents)
        cond = family.null_prompt(pipeline).map(lambda x: x.to(device).expand(len(latents), *x.shape[1:]))
        times = torch.tensor([side, side, 0, 0, side, side], device=device).float().expand(len(latents), 1, -1)
        cond = dataclasses.replace(cond, time_ids=times if unet.config.addition_embed_type else None)
        with adapters_off(unet), _inner_maps(unet) as maps:
            predict(process.add_noise(latents, noise.expand_as(latents), t).to(unet.dtype), t, cond)
        pooled = [part for x in maps for part in (x.mean((2, 3)), x.amax((2, 3)), x.std((2, 3)))]
        return torch.cat(pooled, 1)

    def prompts(texts: Sequence[str]) -> Tensor:
        states = family.encode_prompts(pipeline, texts).prompt_embeds
        assert states is not None
        return states[:, 0].float().mean(1)

    return FeatureEncoder(pictures, prompts, {"encoder": "unet", "side": side, "noise_level": NOISE_LEVEL})


@contextmanager
def _inner_maps(unet: Any) -> Iterator[list[Tensor]]:
    """Within the block, a list of what the middle block and the first block on the way up give, (N, C, h, w) in float32."""
    seen: list[Tensor] = []
    blocks = (unet.mid_block, unet.up_blocks[0])
    hooks = [block.register_forward_hook(lambda _, given, out: seen.append(out.float())) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def as_example(row: PairRow) -> Example:
    """A decided pair as an example. Raises ValueError for pictures that cannot be decoded."""
    pictures = [decode_image(data) for data in (row.image_0, row.image_1)]
    preferred, rejected = pictures if row.p0 > 0.5 else pictures[::-1]
    return Example(row.prompt, preferred, rejected, row.pair_id)


def _family(pipeline: DiffusionPipeline) -> str:
    pooled = getattr(pipeline, "text_encoder_2", None)
    return family_of_config(pipeline.unet.config, pooled.config.projection_dim if pooled is not None else 0, "the pipeline")


def branch_state(unet: nn.Module, projector: nn.Module) -> dict[str, Tensor]:
    """Everything that a folder of user weights keeps, by name; buffers of the projector too."""
    layers = {f"unet.{name}.{key}": x for name, layer in user_layers(unet).items() for key, x in layer.state_dict().items()}
    layers |= {f"unet.{name}.user_lora.{key}": x for name, update in user_updates(unet).items() for key, x in update.state_dict().items()}
    return layers | {f"projector.{key}": x for key, x in projector.state_dict().items()}


def save_user_weights(folder: Path, unet: nn.Module, projector: nn.Module, config: Settings, embeds: Mapping[str, Tensor]) -> None:
    """Write a folder of user weights. config: projector (its name), sizes, width, user_rank, encoder (settings of `new_encoder`)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().cpu().contiguous() for name, x in branch_state(unet, projector).items()}
    for name, tensors in ((WEIGHTS_FILE, state), (EMBEDS_FILE, {user: x.contiguous() for user, x in embeds.items()})):
        draft = folder / f".{name}.{os.getpid()}"
        save_file(tensors, draft, metadata={"format": "pt"})
        draft.replace(folder / name)
    (folder / CONFIG_FILE).write_text(json.dumps({"format": 1, **config}, indent=1))


def attach_user_weights(pipeline: DiffusionPipeline, folder: Path) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    """Give a pipeline's UNet the user branch in `folder`; (projector, config, embeddings of the known users).

    Raises ValueError for a folder without user weights, and for weights of another model.
    """
    path = folder / CONFIG_FILE
    if not path.exists() or not (folder / WEIGHTS_FILE).exists():
        raise ValueError(f"user_weights {str(folder)!r} has no {CONFIG_FILE} with {WEIGHTS_FILE}; give the output_dir of a PPD run")
    config = json.loads(path.read_text())
    unet, width = pipeline.unet, int(pipeline.unet.config.cross_attention_dim)
    if config["width"] != width:
        raise ValueError(
            f"user_weights {str(folder)!r} belong to a model whose cross-attention is {config['width']} wide, this one's is {width}; "
            "load the model that they were trained for"
        )
    projector = new_projector(config["projector"], **config["sizes"])
    if not user_layers(unet):
        add_user_attention(unet, width, 0)
        if config.get("user_rank"):
            add_user_lora(unet, width, config["user_rank"], 0)
    state, own = load_file(folder / WEIGHTS_FILE), branch_state(unet, projector)
    wrong = [name for name in {**state, **own} if name not in own or name not in state or own[name].shape != state[name].shape]
    if wrong:
        raise ValueError(f"user_weights {str(folder)!r} do not fit this model ({wrong[0]} and {len(wrong) - 1} more); load the right one")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(state[name])  # state dicts share memory with their modules
    device = next(unet.parameters()).device
    for layer in (*user_layers(unet).values(), *user_updates(unet).values()):
        layer.to(device, unet.dtype).requires_grad_(False)
    embeds = load_file(folder / EMBEDS_FILE) if (folder / EMBEDS_FILE).exists() else {}
    return projector.to(device).eval().requires_grad_(False), config, embeds
