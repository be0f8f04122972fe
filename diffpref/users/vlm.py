"""User embeddings by a vision-language model that reads a user's examples (PPD's encoder; LLaVA-OneVision by default).

The model is frozen and any image-text-to-text model of transformers with a chat template. Order of the examples is the caller's; which
picture of an example stands first is drawn, and the text says which one was preferred, so that position says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffpref.core.random import uniform
from diffpref.users.examples import Example

DEFAULT_MODEL = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
_OPENING = "One person looked at pairs of pictures and chose the better one of each. These are the choices."
_REQUEST = "The request was: {prompt}\nFirst picture:"
_SECOND, _CHOICE = "Second picture:", "This person chose the {which} picture."
_CLOSING = "In short, what this person likes in pictures:"


@dataclass
class VlmEncoder:
    """Hidden states of one layer at the end of the examples, or their means, as a user embedding. A UserEncoder."""

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    version: str
    """The folder or hub id of the model."""
    checksum: str
    """SHA-256 of its weight files."""
    num_tokens: int = 4
    layer: int | None = None
    """Hidden state that is taken: 0 is the input of the first layer, L the output of the last; three quarters up when None."""
    pooling: Literal["last", "mean"] = "last"
    """last: the last num_tokens states, which have read everything; mean: the sequence in num_tokens parts, a mean of each."""
    seed: int = 0
    """Of the order of the two pictures of an example."""

    def __post_init__(self) -> None:
        depth = self.model.config.get_text_config().num_hidden_layers
        if self.layer is None:
            self.layer = max(1, round(0.75 * depth))
        if not 0 <= self.layer <= depth:
            raise ValueError(f"vlm_layer is {self.layer}; {self.version} has {depth} layers: give 0 to {depth}")

    @property
    def facts(self) -> Mapping[str, str | int | float | None]:
        """Model and reading, for the manifest of stored embeddings."""
        how = {"layer": self.layer, "pooling": self.pooling, "num_tokens": self.num_tokens, "order_seed": self.seed}
        return {"encoder": "vlm", "version": self.version, "checksum": self.checksum, **how}

    def messages(self, examples: Sequence[Example]) -> tuple[list[dict[str, str]], list[Image.Image]]:
        """The content of the question, and its pictures in the order of their places."""
        content, pictures = [_text(_OPENING)], []
        for i, example in enumerate(examples):
            swap = uniform(self.seed, "vlm_picture_order", example.pair_id or example.prompt, i) < 0.5
            pair = [example.preferred, example.rejected]
            pictures += pair[::-1] if swap else pair
            content += [_text(_REQUEST.format(prompt=example.prompt)), {"type": "image"}, _text(_SECOND), {"type": "image"}]
            content.append(_text(_CHOICE.format(which="second" if swap else "first")))
        return [*content, _text(_CLOSING)], pictures

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Tensor:
        """(num_tokens, d) of one user's examples. Raises ValueError for a prompt with the model's own mark for pictures."""
        mark = getattr(self.processor, "image_token", None)
        for example in examples:
            if mark and mark in example.prompt:
                raise ValueError(f"prompt {example.prompt!r} contains {mark}, which stands for a picture in {self.version}; remove it")
        content, pictures = self.messages(examples)
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=False, tokenize=False)
        start = self.processor.tokenizer.bos_token
        special = not (start and text.startswith(start))
        inputs = self.processor(text=[text], images=[p.convert("RGB") for p in pictures], return_tensors="pt", add_special_tokens=special)
        out = self.model(**inputs.to(self.model.device, dtype=self.model.dtype), output_hidden_states=True)
        states = out.hidden_states[self.layer][0].float().cpu()
        if len(states) < self.num_tokens:
            raise ValueError(f"user_tokens is {self.num_tokens}, but the question has {len(states)} tokens; lower user_tokens")
        if self.pooling == "last":
            return states[-self.num_tokens :].clone()
        return torch.stack([part.mean(0) for part in states.tensor_split(self.num_tokens)])


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
