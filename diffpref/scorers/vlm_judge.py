"""A vision-language model as the judge of a pair: which of two pictures for one prompt is better?

    p = P("A") / (P("A") + P("B"))    of the next token after the question, where A is the picture shown first

Such models favour a position, so a judge either asks in both orders, and a disagreement is a tie, or asks once in an order
drawn by the key of the pair. A model that would answer neither letter is undecided, which is a tie too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from diffpref.core.random import uniform
from diffpref.scorers.scorer import decoded
from diffpref.scorers.weights import sha256

_TASK = (
    "Two pictures were made for the caption below. Judge which one a person would prefer: first by how faithfully it shows what "
    "the caption asks for, then by how well it is made.\nCaption: {caption}\nPicture A:"
)
_SECOND, _QUESTION = "Picture B:", "Which picture is better? Answer with the single letter A or B."


@dataclass(frozen=True, kw_only=True)
class VlmJudge:
    """A chat model that takes several pictures, and how it is asked."""

    version: str
    """The folder or hub id of the model."""
    checksum: str
    """SHA-256 of its weight files."""
    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    orders: Literal["both", "random"] = "both"
    """Ask twice, with either picture first, or once in an order drawn from seed and pair."""
    seed: int = 0
    """Of the drawn order."""
    min_answer_mass: float = 0.5
    """Probability that "A" and "B" must have together; below it the model is undecided. Raising it makes more ties."""

    name: ClassVar[str] = "vlm_judge"

    @property
    def convention(self) -> str:
        """What a verdict is and depends on."""
        order = "both orders, disagreement is a tie" if self.orders == "both" else f"one order drawn with seed {self.seed}"
        return f"P(A) against P(B) of the next token; {order}; undecided below an answer mass of {self.min_answer_mass}"

    @property
    def record(self) -> dict[str, str]:
        """What has to stand beside every verdict of this judge."""
        return {"name": self.name, "version": self.version, "convention": self.convention, "checksum": self.checksum}

    def __call__(self, prompt: str, image_0: Image.Image, image_1: Image.Image, pair_id: str) -> float:
        """The verdict: 1.0 if image 0 is better, 0.0 if image 1 is, 0.5 for a tie.

        pair_id: the key of the drawn order; without effect when both orders are asked. Raises ValueError for an empty prompt
        and for what is not an image.
        """
        verdicts = {(p > 0.5) + 0.5 * (p == 0.5) for p in self._answers(prompt, image_0, image_1, pair_id)}
        return verdicts.pop() if len(verdicts) == 1 else 0.5

    def probability(self, prompt: str, image_0: Image.Image, image_1: Image.Image, pair_id: str) -> float:
        """The probability in [0, 1] that image 0 is better, averaged over the orders asked; raises as the verdict does."""
        answers = self._answers(prompt, image_0, image_1, pair_id)
        return sum(answers) / len(answers)

    def _answers(self, prompt: str, image_0: Any, image_1: Any, pair_id: str) -> list[float]:
        """P(image 0 is better) for each order asked; 0.5 where the model is undecided."""
        if not prompt.strip():
            raise ValueError(f"vlm_judge: prompt is {prompt!r}; accepted: text")
        token = getattr(self.processor, "image_token", None)
        if token and token in prompt:
            raise ValueError(f"vlm_judge: prompt {prompt!r} contains {token}, which stands for a picture; remove it")
        images = [_rgb(image, i) for i, image in enumerate((image_0, image_1))]
        swaps = [False, True] if self.orders == "both" else [uniform(self.seed, "vlm_order", prompt, pair_id) < 0.5]
        first = [self._first_is_better(prompt, images[::-1] if swap else images) for swap in swaps]
        return [1 - p if swap else p for p, swap in zip(first, swaps, strict=True)]

    @torch.no_grad()
    def _first_is_better(self, prompt: str, images: Sequence[Image.Image]) -> float:
        parts = [_TASK.format(caption=prompt), None, _SECOND, None, _QUESTION]
        content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        start = self.processor.tokenizer.bos_token
        special = not (start and text.startswith(start))  # most templates write the start token themselves
        inputs = self.processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=special)
        chances = self.model(**inputs.to(self.model.device, dtype=self.model.dtype)).logits[0, -1].float().softmax(-1)
        a, b = (float(chances[list(ids)].sum()) for ids in self._letters())
        return a / (a + b) if a + b >= self.min_answer_mass else 0.5

    def _letters(self) -> tuple[list[int], list[int]]:
        """Ids of the single tokens that spell A, and B, with and without a space before."""
        encode = self.processor.tokenizer.encode
        spelled = [{i[0] for s in (x, f" {x}") if len(i := encode(s, add_special_tokens=False)) == 1} for x in "AB"]
        if not all(spelled) or spelled[0] & spelled[1]:
            raise ValueError(f"vlm_judge: the tokenizer of {self.version} has no single tokens for the answers A and B; use another model")
        return sorted(spelled[0]), sorted(spelled[1])


def load_vlm_judge(
    weights: str,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    orders: Literal["both", "random"] = "both",
    seed: int = 0,
    min_answer_mass: float = 0.5,
) -> VlmJudge:
    """A judge from a local folder or a hub id of any image-text-to-text model of transformers with a chat template.

    Weights have to be safetensors, and the model's code has to be part of transformers. dtype: of the model; bfloat16 halves
    the memory. orders, seed, min_answer_mass: see VlmJudge. Raises ValueError for models that are missing, broken, or need code
    from the hub, and for values that are not accepted.
    """
    if orders not in ("both", "random"):
        raise ValueError(f"vlm_judge: orders is {orders!r}; accepted: both, random")
    if not 0 <= min_answer_mass <= 1:
        raise ValueError(f"vlm_judge: min_answer_mass is {min_answer_mass}; accepted: 0 to 1")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = _folder(weights)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"vlm_judge: {folder} has no *.safetensors; download the model's folder and pass it, or pass a hub id")
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"vlm_judge: {weights} cannot be loaded as an image-text-to-text model of transformers: {error}") from error
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"vlm_judge: {weights} has no chat template; use a model that was tuned to answer questions")
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return VlmJudge(
        version=weights,
        checksum=sha256(*files),
        model=model,
        processor=processor,
        orders=orders,
        seed=seed,
        min_answer_mass=min_answer_mass,
    )


def _folder(weights: str) -> Path:
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(weights, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"vlm_judge: {weights!r} is neither a local folder nor in the hub cache, and could not be downloaded. Put config.json, "
            f"*.safetensors and the files of the processor from https://huggingface.co/{weights} into a folder and pass it"
        ) from error


def _rgb(image: Any, index: int) -> Image.Image:
    try:
        return decoded(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"vlm_judge: image {index} cannot be judged: {error}") from error
