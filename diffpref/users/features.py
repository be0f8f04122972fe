"""What the light encoder reads of an example: features of both pictures and of the prompt, from encoders that arrive as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from diffpref.users.examples import Example

PicturesEncoder = Callable[[Sequence[Image.Image]], Tensor]
"""N pictures to float32 (N, F)."""
PromptsEncoder = Callable[[Sequence[str]], Tensor]
"""N prompts to float32 (N, P)."""


@dataclass
class FeatureEncoder:
    """Examples to rows of features: preferred, rejected, prompt. A UserEncoder, in front of projectors.ExampleEncoder."""

    pictures: PicturesEncoder
    prompts: PromptsEncoder
    facts: Mapping[str, str | int | float | None]
    at_once: int = 32
    known: dict[str, Tensor] = field(default_factory=dict)  # by pair id, of examples that have one

    def encode(self, examples: Sequence[Example]) -> Tensor:
        """(N, F + F + P) of N examples."""
        new = [example for example in examples if example.pair_id is None or example.pair_id not in self.known]
        found = dict(zip(map(id, new), self._rows(new), strict=True))
        for example in new:
            if example.pair_id is not None:
                self.known[example.pair_id] = found[id(example)]
        return torch.stack([found[id(e)] if id(e) in found else self.known[str(e.pair_id)] for e in examples])

    @torch.no_grad()
    def _rows(self, examples: Sequence[Example]) -> list[Tensor]:
        rows: list[Tensor] = []
        for start in range(0, len(examples), self.at_once):
            part = examples[start : start + self.at_once]
            pictures = self.pictures([picture for example in part for picture in (example.preferred, example.rejected)])
            prompts = self.prompts([example.prompt for example in part])
            rows += torch.cat([pictures.unflatten(0, (-1, 2)).flatten(1), prompts], 1).float().cpu()
        return rows
