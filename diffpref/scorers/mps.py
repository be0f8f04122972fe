"""MPS, overall preference (Zhang et al., CVPR 2024, arXiv:2405.14705): ViT-H/14 CLIP whose image tokens attend to the prompt.

    mps = exp(logit_scale) * cos(text feature at the end of the prompt, first token of cross_model(image tokens, text tokens))

An image token sees a text token only if a word of the fixed condition is near it: the highest similarity of the text token to
a token of the condition, divided by the highest in the prompt, has to exceed 0.01.

Differs from the release: the division is by the maximum of the prompt, not of the batch, so that a score does not depend on
its neighbours; float32 instead of half precision. The released checkpoint is a pickled module, which is refused; conversions
of its state dict to safetensors are read. The scripts that evaluate MPS upstream use a threshold of 0.3; its model has 0.01.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpref.scorers.clip_towers import TRANSFORMERS_FILES, VIT_H, VIT_H_REPO, ClipTowers, load_clip_model, load_towers
from diffpref.scorers.preprocessing import ShortestSideCrop
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import WeightSource, fill, read_state_dict, sha256, under

REPO = "RE-N-Y/mpsv1"
"""A conversion on the hub; the authors' own file is on Google Drive."""
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.01
# Names in the release, below layers.<i>., and here.
_KEYS = {
    "0.fn.norm": "cross_norm",
    "0.fn.to_q": "cross_query",
    "0.fn.to_kv": "cross_key_value",
    "0.fn.to_out": "cross_out",
    "0.fn.ff.0": "cross_ff_in",
    "0.fn.ff.2": "cross_ff_out",
    "1.fn.norm": "self_norm",
    "1.fn.fused_attn_ff_proj": "self_in",
    "1.fn.attn_out": "self_out",
    "1.fn.ff_out.1": "self_ff_out",
}


class CrossLayer(nn.Module):
    """Attention to the text beside a SwiGLU layer, then self-attention with rotary positions beside another one.

    Queries have many heads, keys and values one that all share. width: of the tokens; inner: all heads together.
    """

    def __init__(self, width: int, inner: int, head_width: int, feed_forward: int) -> None:
        super().__init__()
        self.head_width, self.feed_forward = head_width, feed_forward
        self.cross_norm, self.self_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_query = nn.Linear(width, inner, bias=False)
        self.cross_key_value = nn.Linear(width, 2 * head_width, bias=False)
        self.cross_out = nn.Linear(inner, width, bias=False)
        self.cross_ff_in = nn.Linear(width, 2 * feed_forward, bias=False)
        self.cross_ff_out = nn.Linear(feed_forward, width, bias=False)
        self.self_in = nn.Linear(width, inner + 2 * head_width + 2 * feed_forward, bias=False)
        self.self_out = nn.Linear(inner, width, bias=False)
        self.self_ff_out = nn.Linear(feed_forward, width, bias=False)

    def forward(self, tokens: Tensor, context: Tensor, visible: Tensor) -> Tensor:
        """tokens (N, L, D), context (N, M, D), visible bool (N, 1, 1, M): True where attention may go. To (N, L, D)."""
        x = self.cross_norm(tokens)
        key, value = self.cross_key_value(context).chunk(2, -1)
        attended = self._attend(self._heads(self.cross_query(x)), key, value, visible)
        tokens = tokens + self.cross_out(attended) + self.cross_ff_out(_swiglu(self.cross_ff_in(x)))

        inner = self.self_out.in_features
        parts = [inner, self.head_width, self.head_width, 2 * self.feed_forward]
        query, key, value, hidden = self.self_in(self.self_norm(tokens)).split(parts, -1)
        attended = self._attend(_rotate(self._heads(query)), _rotate(key), value, None)
        return tokens + self.self_out(attended) + self.self_ff_out(_swiglu(hidden))

    def _heads(self, query: Tensor) -> Tensor:
        return query.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        shape = (*query.shape[:2], -1, -1)
        key, value = (x[:, None].expand(shape) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)


def _swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.silu(gate)


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on (..., L, D), feature i paired with i + D / 2."""
    length, width = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def near_condition(states: Tensor, condition: Tensor) -> Tensor:
    """Which tokens of P prompts (P, L, D) an image may attend to, given the tokens of the condition (M, D): bool (P, L)."""
    nearest = (states @ condition.T).amax(-1)  # (P, L)
    return nearest / nearest.amax(-1, keepdim=True) > THRESHOLD


@dataclass(frozen=True)
class ConditionedPreference:
    """The towers and the cross-attention layers on top of them."""

    towers: ClipTowers
    layers: nn.ModuleList

    def reward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Normalised (N, 3, S, S) and N prompts to (N,)."""
        model = self.towers.model
        distinct = list(dict.fromkeys(prompts))
        states, pooled = self._text([*distinct, CONDITION])
        visible = near_condition(states[:-1], states[-1])

        rows = [distinct.index(p) for p in prompts]
        tokens = model.visual_projection(model.vision_model(pixel_values=pixels).last_hidden_state)
        for layer in self.layers:
            tokens = layer(tokens, states[rows], visible[rows][:, None, None])
        return self.towers.scale * F.cosine_similarity(pooled[rows], tokens[:, 0])

    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected states of all tokens, padding included, (P, L, D), and of the last token of the text, (P, D)."""
        model = self.towers.model
        out = model.text_model(input_ids=self.towers.token_ids(prompts, "max_length"))
        return model.text_projection(out.last_hidden_state), model.text_projection(out.pooler_output)


def load_mps(weights: str | None = None, device: torch.device | str = "cpu") -> Scorer:
    """MPS from a conversion on the hub, a folder with model.safetensors, or the file.

    Names as in the released module, model.* and cross_model.layers.*, with or without a leading "mps.". Raises ValueError for
    files that are missing, pickled or do not fit.
    """
    source = WeightSource("mps", weights, REPO)
    path = source.weights(TRANSFORMERS_FILES)
    state = read_state_dict(path)
    state = under(state, "mps.") or state
    model = load_clip_model(source, path, VIT_H, under(state, "model."))
    layers = _load_layers(under(state, "cross_model.layers."), f"mps: {path}").to(device)
    towers = load_towers(source, model, VIT_H_REPO, device)
    return Scorer(
        name="mps",
        version="overall v1",
        convention="exp(logit_scale) * cosine, mask 0.01 per prompt; Pillow bicubic resize of the shorter side, centre crop; float32",
        checksum=sha256(path),
        preprocessing=ShortestSideCrop(towers.image_size),
        reward=ConditionedPreference(towers, layers).reward,
        device=torch.device(device),
    )


def _load_layers(state: dict[str, Tensor], what: str) -> nn.ModuleList:
    renamed = {}
    for name, value in state.items():
        index, _, rest = name.partition(".")
        stem, _, kind = rest.rpartition(".")
        renamed[f"{index}.{_KEYS.get(stem, stem)}.{kind}"] = value
    if "0.cross_key_value.weight" not in renamed or "0.cross_query.weight" not in renamed:
        raise ValueError(f"{what} has no cross_model.layers.0.0.fn.to_q: it is not MPS in its released layout")
    inner, width = renamed["0.cross_query.weight"].shape
    head_width = renamed["0.cross_key_value.weight"].shape[0] // 2
    count = 1 + max(int(found[0]) for name in renamed if (found := re.match(r"\d+", name)))
    with torch.device("meta"):
        layers = nn.ModuleList(CrossLayer(width, inner, head_width, 4 * width) for _ in range(count))
    fill(layers, renamed, what)
    return layers
