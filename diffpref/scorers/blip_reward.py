"""A reward from BLIP's image-grounded text encoder, the architecture of ImageReward and of CycleReward.

    reward = head(h),   h = state of [CLS] after the text encoder has attended to the image tokens at every layer

The vision tower is a ViT-L/16, the text encoder a BERT with cross-attention. Sizes are read from the weights; attention heads
are 64 wide, as in every BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpref.scorers.reward_head import load_head
from diffpref.scorers.weights import WeightSource, fill, read_state_dict, under

TOKENIZER_REPO = "google-bert/bert-base-uncased"
_HEAD_WIDTH = 64
_VISION_KEYS = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"(blocks\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"(blocks\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"(blocks\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"blocks\.", "encoder.layers."),
)


@dataclass(frozen=True)
class BlipReward:
    """Vision tower, text encoder and head of one release."""

    vision: nn.Module
    text: nn.Module
    head: nn.Module
    tokenizer: Any
    max_length: int
    """Tokens of a prompt that are read."""

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower takes."""
        return int(self.vision.config.image_size)  # type: ignore[union-attr, arg-type]

    def reward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Normalised (N, 3, S, S) and N prompts to (N,)."""
        tokens = self.vision(pixel_values=pixels).last_hidden_state
        # The releases pad to max_length; padding is masked, so the longest prompt of the batch is as good and quicker.
        text = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        states = self.text(
            input_ids=text.input_ids.to(pixels.device),
            attention_mask=text.attention_mask.to(pixels.device),
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=pixels.device),
            is_decoder=False,
        )
        return self.head(states.last_hidden_state[:, 0])[:, 0]


def load_blip_reward(source: WeightSource, path: Path, max_length: int, device: torch.device | str, *, gelu: bool) -> BlipReward:
    """The reward model of a released checkpoint with the prefixes blip.visual_encoder., blip.text_encoder. and mlp.layers.

    BLIP's contrastive projections in it are not used. gelu: see load_head. Raises ValueError for files that are missing or do
    not fit.
    """
    what = f"{source.scorer}: {path}"
    state = read_state_dict(path)
    head = load_head(under(state, "mlp.layers."), what, gelu=gelu)
    vision = _load_vision(under(state, "blip.visual_encoder."), what)
    text = _load_text(under(state, "blip.text_encoder."), what)
    tokenizer = _load_tokenizer(source)
    expected = text.config.vocab_size
    if len(tokenizer) != expected:
        raise ValueError(
            f"{source.scorer}: the tokenizer has {len(tokenizer)} tokens and the text encoder {expected}; "
            f"put vocab.txt of {TOKENIZER_REPO} beside the weights"
        )
    return BlipReward(vision.to(device), text.to(device), head.to(device), tokenizer, max_length)


def _load_vision(state: Mapping[str, Tensor], what: str) -> Any:
    from transformers import BlipVisionConfig, BlipVisionModel

    positions, width = _shape(state, "pos_embed", what)[1:]
    patch = _shape(state, "patch_embed.proj.weight", what)[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(state, "blocks.0.mlp.fc1.weight", what)[0],
        num_hidden_layers=_count(state, r"blocks\.(\d+)\."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # not the default of the class
    )
    with torch.device("meta"):
        model = BlipVisionModel(config)
    return fill(model, {_renamed(name): value for name, value in state.items()}, what)


def _load_text(state: Mapping[str, Tensor], what: str) -> Any:
    from transformers import BlipTextConfig, BlipTextModel

    vocabulary, width = _shape(state, "embeddings.word_embeddings.weight", what)
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=_shape(state, "encoder.layer.0.crossattention.self.key.weight", what)[1],
        intermediate_size=_shape(state, "encoder.layer.0.intermediate.dense.weight", what)[0],
        num_hidden_layers=_count(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        max_position_embeddings=_shape(state, "embeddings.position_embeddings.weight", what)[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    with torch.device("meta"):
        model = BlipTextModel(config, add_pooling_layer=False)
    return fill(model, state, what)


def _load_tokenizer(source: WeightSource) -> Any:
    """BERT's tokenizer with BLIP's two extra tokens; the text still starts with [CLS]."""
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(source.companion(["vocab.txt"], TOKENIZER_REPO).parent)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


def _renamed(name: str) -> str:
    for pattern, replacement in _VISION_KEYS:
        name = re.sub(rf"^{pattern}", replacement, name)
    return name


def _shape(state: Mapping[str, Tensor], name: str, what: str) -> torch.Size:
    if name not in state:
        raise ValueError(f"{what} has no {name}: it is not a BLIP reward model in its released layout")
    return state[name].shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks: one more than the highest index that `pattern` finds."""
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))
