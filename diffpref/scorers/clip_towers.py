"""CLIP's two towers from a released file, in transformers' key layout or in open_clip's.

Both code bases compute the same function, so one class serves every CLIP-based scorer and open_clip is not needed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.scorers.weights import WeightSource, fill, read_json, read_state_dict

VIT_H_REPO, VIT_L_REPO = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Tower sizes where no config.json comes with the weights. `eos_token_id` 2 makes transformers pool at the token with the
# highest id, the end of the text, as CLIP does; the released configurations hold the same number.
VIT_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"hidden_act": "gelu", "projection_dim": 1024, "eos_token_id": 2},
    },
    "vision_config": {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
        **{"hidden_act": "gelu", "projection_dim": 1024, "patch_size": 14},
    },
}
VIT_L: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        **{"hidden_act": "quick_gelu", "projection_dim": 768, "eos_token_id": 2},
    },
    "vision_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"hidden_act": "quick_gelu", "projection_dim": 768, "patch_size": 14},
    },
}

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}


@dataclass(frozen=True)
class ClipTowers:
    """The towers of one release and the tokenizer in front of them."""

    model: Any
    """transformers' CLIPModel, frozen, float32."""
    tokenizer: Any
    clean: Callable[[str], str] = str
    """Applied to a prompt before the tokenizer."""

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower takes."""
        return int(self.model.config.vision_config.image_size)

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature, about 100."""
        return self.model.logit_scale.exp()

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D); a prompt that comes more than once is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        pooled = self.model.text_model(input_ids=self.token_ids(distinct, "longest")).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)[[distinct.index(p) for p in prompts]]

    def token_ids(self, prompts: Sequence[str], padding: str) -> Tensor:
        """(N, L) ids, cut at the tower's length. Padding stands behind the end, where the causal tower does not look."""
        length = self.model.config.text_config.max_position_embeddings
        cleaned = [self.clean(prompt) for prompt in prompts]
        encoded = self.tokenizer(cleaned, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        return encoded.input_ids.to(self.model.logit_scale.device)

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each image with its own prompt, (N,)."""
        return (image_features(self.model, pixels) * self.text_features(prompts)).sum(-1)


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """Normalised (N, 3, S, S) to the unit vectors (N, D) of a CLIPModel."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def load_clip_model(source: WeightSource, path: Path, released: Mapping[str, Any], state: dict[str, Tensor] | None = None) -> Any:
    """A CLIPModel from the weight file `path`, frozen, float32, on the CPU.

    released: the sizes to assume when no config.json with towers lies beside the weights. state: the tensors, if the file has
    been read already. Raises ValueError for a file that is broken or of another size.
    """
    from transformers import CLIPConfig, CLIPModel

    beside = source.beside(["config.json"])
    config = CLIPConfig(**released)
    if beside and "vision_config" in (found := read_json(beside)):
        config = CLIPConfig.from_dict(found)
    with torch.device("meta"):
        model = CLIPModel(config)
    return fill(model, transformers_keys(read_state_dict(path) if state is None else state), f"{source.scorer}: {path}")


def load_towers(
    source: WeightSource,
    model: Any,
    tokenizer_repo: str,
    device: torch.device | str,
    clean: Callable[[str], str] = str,
) -> ClipTowers:
    """A CLIPModel with its tokenizer, on `device`. Raises ValueError if the tokenizer is missing or another model's."""
    tokenizer = load_clip_tokenizer(source, tokenizer_repo)
    expected = model.config.text_config.vocab_size
    if len(tokenizer) != expected:
        raise ValueError(
            f"{source.scorer}: the tokenizer has {len(tokenizer)} tokens and the text tower {expected}; "
            f"put the tokenizer files of {tokenizer_repo} beside the weights"
        )
    return ClipTowers(model.to(device), tokenizer, clean)


def load_clip_tokenizer(source: WeightSource, repo: str) -> Any:
    """CLIP's byte-pair tokenizer from tokenizer.json, or vocab.json and merges.txt, beside the weights, else from the hub."""
    from transformers import CLIPTokenizerFast

    found = source.beside(["tokenizer.json"])
    if found is None:
        found = source.companion(["vocab.json"], repo)
        source.companion(["merges.txt"], repo)
    return CLIPTokenizerFast.from_pretrained(found.parent)


def transformers_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in transformers' layout; one that is in open_clip's is renamed, its fused attention split in three."""
    if "visual.conv1.weight" not in state:
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if block:
            tower = "vision_model" if block[1] else "text_model"
            renamed |= _block(f"{tower}.encoder.layers.{block[2]}", block[3], value)
        elif name in ("visual.proj", "text_projection"):
            renamed["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T.contiguous()
        else:
            renamed[_OPEN_CLIP.get(name, name)] = value
    return renamed


def _block(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of a transformer block under its new names."""
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{part}.{kind}": tensor.contiguous() for part, tensor in parts}
    stem, _, kind = name.rpartition(".")
    return {f"{prefix}.{_BLOCK.get(stem, stem)}.{kind}": value}


def open_clip_text(scorer: str) -> Callable[[str], str]:
    """The text repair in front of open_clip's tokenizer: broken encodings, curly quotes, HTML entities, runs of white space.

    Raises ValueError if ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ValueError(f"{scorer} repairs prompts with ftfy as its release does; install it: pip install 'diffpref[eval]'") from error

    def clean(text: str) -> str:
        repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
        return " ".join(repaired.split()).lower()

    return clean
