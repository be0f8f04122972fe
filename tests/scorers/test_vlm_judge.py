"""The judge on a tiny model of a real class, and with answers that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from diffpref.core.random import uniform
from diffpref.scorers.vlm_judge import VlmJudge, load_vlm_judge
from diffpref.scorers.weights import sha256

SENTENCE = ("Picture", "Which", "picture", "is", "better", "Answer", "red", "circle", "the", "caption", ":", "?", ".")
WORDS = ["<unk>", "<image>", "<pad>", "<s>", "A", "B", *SENTENCE]
TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}Answer :"
)
RED, BLUE = (Image.new("RGB", size, colour) for size, colour in (((40, 30), "red"), ((20, 50), "blue")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved LLaVA of a few thousand parameters."""
    from tests.scorers.test_preprocessing import clip_processor

    path = tmp_path_factory.mktemp("llava")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])  # the template has one already
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", additional_special_tokens=["<image>"]
    )
    LlavaProcessor(
        image_processor=clip_processor(16),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=LlamaConfig(**sizes, vocab_size=len(WORDS), pad_token_id=2, bos_token_id=3, eos_token_id=None),
            image_token_index=1,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> VlmJudge:
    return load_vlm_judge(str(folder), min_answer_mass=0.0)


def straight_answer(folder: Path, prompt: str, first: Image.Image, second: Image.Image) -> float:
    """P(A) / (P(A) + P(B)) by hand: token ids spelled out, image tokens repeated, the model called on them."""
    processor = AutoProcessor.from_pretrained(folder)
    text = (
        "Two pictures were made for the caption below. Judge which one a person would prefer: first by how faithfully it shows what the "
        f"caption asks for, then by how well it is made. Caption: {prompt} Picture A: @ Picture B: @ "
        "Which picture is better? Answer with the single letter A or B. Answer :"
    )
    ids = [3]
    for word in text.split():
        ids += [1] * 4 if word == "@" else [WORDS.index(word) if word in WORDS else 0]
    pixels = torch.cat([processor.image_processor(image, return_tensors="pt").pixel_values for image in (first, second)])
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels, attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    a, b = logits[0, -1, [4, 5]].softmax(-1)
    return float(a / (a + b))


def test_probability_is_that_of_the_letters_in_both_orders(folder: Path, judge: VlmJudge) -> None:
    first = straight_answer(folder, "red circle", RED, BLUE)
    second = straight_answer(folder, "red circle", BLUE, RED)
    assert abs(first + second - 1) > 1e-4, "this model has no favourite position: the two orders test nothing"
    assert judge.probability("red circle", RED, BLUE, "pair") == pytest.approx((first + 1 - second) / 2, abs=1e-6)


def test_drawn_order_is_a_function_of_seed_and_pair(folder: Path, judge: VlmJudge) -> None:
    once = replace(judge, orders="random")
    wanted = {False: straight_answer(folder, "red circle", RED, BLUE), True: 1 - straight_answer(folder, "red circle", BLUE, RED)}
    swaps = set()
    for pair in "fgh":
        swap = uniform(0, "vlm_order", "red circle", pair) < 0.5
        swaps.add(swap)
        assert once.probability("red circle", RED, BLUE, pair) == pytest.approx(wanted[swap], abs=1e-6)
    assert swaps == {False, True}


def test_image_order_does_not_matter_when_both_orders_are_asked(judge: VlmJudge) -> None:
    assert judge.probability("red circle", RED, BLUE, "p") == pytest.approx(1 - judge.probability("red circle", BLUE, RED, "p"), abs=1e-6)
    assert judge("red circle", RED, RED, "p") == 0.5


def test_loading_twice_gives_the_same_and_the_record_says_how(folder: Path, judge: VlmJudge) -> None:
    again = load_vlm_judge(str(folder), min_answer_mass=0.0)
    assert again.probability("red circle", RED, BLUE, "p") == judge.probability("red circle", RED, BLUE, "p")
    assert again.record["checksum"] == sha256(folder / "model.safetensors")
    assert again.record["version"] == str(folder)
    assert "both orders" in again.record["convention"]
    assert "seed 7" in replace(again, orders="random", seed=7).record["convention"]


class Answers:
    """A model that gives the picture shown first, or the red one, the probability `p`, and other words the rest."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, likes: str, p: float, q: float) -> None:
        self.likes, self.p, self.q = likes, p, q

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        first_is_red = bool(inputs["pixel_values"][0, 0].mean() > inputs["pixel_values"][1, 0].mean())
        chances = torch.full((len(WORDS),), (1 - self.p - self.q) / (len(WORDS) - 2))
        a_wins = self.likes == "first" or first_is_red
        chances[4], chances[5] = (self.p, self.q) if a_wins else (self.q, self.p)
        return SimpleNamespace(logits=chances.log()[None, None])


@pytest.mark.parametrize(
    ("likes", "p", "q", "verdict"),
    [
        ("red", 0.7, 0.2, 1.0),
        ("red", 0.2, 0.7, 0.0),
        ("first", 0.9, 0.05, 0.5),  # the two orders disagree
        ("red", 0.3, 0.1, 0.5),  # other words are likelier than both letters
        ("red", 0.4, 0.4, 0.5),
    ],
)
def test_verdict(likes: str, p: float, q: float, verdict: float, judge: VlmJudge) -> None:
    sure = replace(judge, model=Answers(likes, p, q), min_answer_mass=0.5)
    assert sure("red circle", RED, BLUE, "pair") == verdict
    assert sure("red circle", BLUE, RED, "pair") == 1 - verdict


@pytest.mark.parametrize(
    ("prompt", "image", "message"),
    [
        (" ", RED, "prompt is ' '"),
        ("an <image> tag", RED, "contains <image>"),
        ("red circle", None, "image 0 cannot be judged: it is a NoneType"),
        ("red circle", Image.new("I;16", (4, 4)), "image 0 cannot be judged: its mode is I;16"),
    ],
)
def test_what_cannot_be_judged_is_refused(prompt: str, image: Image.Image, message: str, judge: VlmJudge) -> None:
    with pytest.raises(ValueError, match=message):
        judge(prompt, image, BLUE, "pair")


def test_models_that_cannot_judge_are_refused(folder: Path, judge: VlmJudge, tmp_path: Path, sd_folder: Path) -> None:
    with pytest.raises(ValueError, match="orders is 'once'; accepted: both, random"):
        load_vlm_judge(str(folder), orders="once")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_answer_mass is 2"):
        load_vlm_judge(str(folder), min_answer_mass=2)
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        load_vlm_judge(str(tmp_path))
    with pytest.raises(ValueError, match="neither a local folder nor in the hub cache"):
        load_vlm_judge("nobody/no-model")
    with pytest.raises(ValueError, match="cannot be loaded as an image-text-to-text model"):
        load_vlm_judge(str(sd_folder / "text_encoder"))
    mute = replace(judge, processor=_without_letters(judge.processor))
    with pytest.raises(ValueError, match="no single tokens for the answers A and B"):
        mute("red circle", RED, BLUE, "pair")


def _without_letters(processor: Callable[..., object]) -> object:
    class Mute:
        """Every word is unknown to it."""

        tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [0], bos_token=None)

        def __getattr__(self, name: str) -> object:
            return getattr(processor, name)

        def __call__(self, **inputs: object) -> object:
            return processor(**inputs)

    return Mute()
