"""What holds for every scorer: the record, determinism, independence of the batch, gradients, and clear refusals."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffpref.scorers import SCORERS, scorer_from
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.weights import sha256

Released = Callable[[str], Path]
Pictures = tuple[Image.Image, ...]
NAMES = list(SCORERS)


@pytest.fixture(scope="module")
def load(released: Released) -> Callable[[str], Scorer]:
    """load(name) -> the scorer; one for the whole file."""
    loaded: dict[str, Scorer] = {}

    def make(name: str) -> Scorer:
        if name not in loaded:
            loaded[name] = scorer_from(f"{name}={released(name)}")
        return loaded[name]

    return make


def prompts_for(pictures: Sequence[object]) -> list[str]:
    return [("a red circle", "a large green square on a blue background")[i % 2] for i in range(len(pictures))]


@pytest.mark.parametrize("name", NAMES)
def test_returns_float32_on_the_cpu_and_the_same_every_time(
    name: str, load: Callable[[str], Scorer], pictures: Pictures, released: Released
) -> None:
    scorer = load(name)
    scores = scorer(pictures, prompts_for(pictures))
    assert scores.dtype == torch.float32
    assert scores.shape == (len(pictures),)
    assert scores.device.type == "cpu"
    assert not scores.requires_grad
    again = scorer_from(f"{name}={released(name)}")(pictures, prompts_for(pictures))
    assert torch.equal(scores, again)


@pytest.mark.parametrize("name", NAMES)
def test_record_names_scorer_version_convention_and_files(name: str, load: Callable[[str], Scorer], released: Released) -> None:
    record = load(name).record
    assert record.keys() == {"name", "version", "convention", "checksum"}
    assert record["name"] == name
    assert all(record.values())
    weights = [p for p in released(name).iterdir() if p.suffix in {".pt", ".pth", ".bin", ".safetensors"}]
    assert set(record["checksum"].split("+")) == {sha256(path) for path in weights}


@pytest.mark.parametrize("name", NAMES)
def test_score_depends_on_its_own_picture_and_prompt_only(name: str, load: Callable[[str], Scorer], pictures: Pictures) -> None:
    scorer, prompts = load(name), prompts_for(pictures)
    whole = scorer(pictures, prompts)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = replace(scorer, batch_size=4, num_workers=3)([pictures[i] for i in order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-5, atol=1e-5)
    single = torch.cat([scorer([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)])
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_matters_unless_the_scorer_says_otherwise(name: str, load: Callable[[str], Scorer], pictures: Pictures) -> None:
    scorer = load(name)
    first, second = (scorer(pictures, [prompt] * len(pictures)) for prompt in ("a red circle", "two large squares"))
    assert torch.equal(first, second) != scorer.uses_prompts


@pytest.mark.parametrize("name", NAMES)
def test_model_is_frozen_and_in_eval_mode(name: str, load: Callable[[str], Scorer]) -> None:
    modules = [m for m in _reachable(load(name).reward) if isinstance(m, torch.nn.Module)]
    assert modules
    assert not any(part.training for module in modules for part in module.modules())
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def _reachable(thing: object, depth: int = 4) -> list[object]:
    """What a reward function holds: closures, bound objects and their fields."""
    inner = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    inner += [thing.__self__] if hasattr(thing, "__self__") else []
    if not isinstance(thing, torch.nn.Module):
        inner += list(getattr(thing, "__dict__", {}).values())
    return [thing, *(found for part in inner if depth for found in _reachable(part, depth - 1))]


@pytest.mark.parametrize("name", NAMES)
def test_pixel_variant_has_gradients_and_agrees_with_the_images(name: str, load: Callable[[str], Scorer]) -> None:
    scorer = load(name)
    smooth = np.random.default_rng(3).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    images = [Image.fromarray(x).resize((60, 72), Image.Resampling.BICUBIC) for x in smooth]
    pixels = torch.stack([torch.tensor(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
    pixels.requires_grad_()
    prompts = ["a large green square", "a red circle"]
    scores = scorer.score_pixels(pixels, prompts)
    wanted = scorer(images, prompts)
    # Random weights; the resize to 8 bits is off by half a grey level at most.
    exact = name.startswith("hps") or name == "clip_vith_cos"
    torch.testing.assert_close(scores.detach(), wanted, rtol=1e-4 if exact else 0.05, atol=1e-4 if exact else 0.05)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.isfinite().all()
    if name != "clipscore" or (wanted > 0).all():
        assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_array_is_scored_like_images(load: Callable[[str], Scorer]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 33, 3), dtype=np.uint8)
    prompts = prompts_for(pictures)
    assert torch.equal(load("pickscore")(pictures, prompts), load("pickscore")([Image.fromarray(p) for p in pictures], prompts))


def test_no_pictures_have_no_scores(load: Callable[[str], Scorer]) -> None:
    assert load("pickscore")([], []).shape == (0,)


def test_autocast_of_the_caller_does_not_round(load: Callable[[str], Scorer], pictures: Pictures) -> None:
    prompts = prompts_for(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = load("hpsv2.1")(pictures, prompts)
    assert torch.equal(rounded, load("hpsv2.1")(pictures, prompts))


def test_scores_carry_no_graph(load: Callable[[str], Scorer], pictures: Pictures) -> None:
    weight = torch.ones((), requires_grad=True)
    learned = replace(load("pickscore"), reward=lambda pixels, prompts: weight * pixels.mean((1, 2, 3)))
    assert not learned(pictures, prompts_for(pictures)).requires_grad
    assert learned.score_pixels(torch.zeros(1, 3, 8, 8), ["a red circle"]).requires_grad


class Files(Sequence[Image.Image]):
    """Opened when asked for, as a lazy caller would."""

    def __init__(self, files: list[bytes]) -> None:
        self.files, self.threads = files, set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        self.threads.add(threading.get_ident())
        return Image.open(io.BytesIO(self.files[index]))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_lazy_sequence_is_opened_in_the_workers(load: Callable[[str], Scorer], pictures: Pictures) -> None:
    files = Files([png(image) for image in pictures])
    scores = load("pickscore")(files, prompts_for(pictures))
    assert torch.equal(scores, load("pickscore")(pictures, prompts_for(pictures)))
    assert threading.get_ident() not in files.threads


def test_one_unread_image_may_stand_many_times_in_a_list(load: Callable[[str], Scorer]) -> None:
    large = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)))
    for _ in range(5):
        image = Image.open(io.BytesIO(large))
        scores = replace(load("pickscore"), num_workers=8)([image] * 16, ["a red circle"] * 16)
        assert scores.std() < 1e-5


HUGE = Image.new("1", (2**14, 2**13))
BAD_IMAGES = {
    "missing": (None, "image 2 .* NoneType; accepted: PIL images"),
    "tensor": (torch.zeros(3, 8, 8), "image 2 .* Tensor; accepted: PIL images"),
    "huge": (HUGE, "image 2 .* 16384 x 8192 pixels; accepted"),
    "empty": (Image.new("RGB", (0, 4)), "image 2 .* 0 x 4 pixels; accepted"),
    "16 bits": (Image.new("I;16", (8, 8)), "image 2 .* mode is I;16; accepted"),
    "thread": (Image.new("L", (1, 90_000)), "image 2 .* 1 x 90000 is too long and narrow"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_refused_with_its_index(kind: str, load: Callable[[str], Scorer], pictures: Pictures) -> None:
    image, message = BAD_IMAGES[kind]
    with pytest.raises(ValueError, match=message):
        load("pickscore")([*pictures[:2], image, pictures[0]], ["a red circle"] * 4)


def test_truncated_file_is_refused_with_its_index(load: Callable[[str], Scorer], pictures: Pictures) -> None:
    whole = png(pictures[0])
    with pytest.raises(ValueError, match="pickscore: image 1 cannot be scored"):
        load("pickscore")(Files([whole, whole[: len(whole) // 2], whole]), ["a red circle"] * 3)
    with pytest.raises(ValueError, match="pickscore: image 0 cannot be scored"):
        load("pickscore")(Files([b"not an image"]), ["a red circle"])


@pytest.mark.parametrize("prompt", ["", " \n", None])
def test_empty_prompt_is_refused_with_its_index(prompt: str, load: Callable[[str], Scorer], pictures: Pictures) -> None:
    with pytest.raises(ValueError, match="prompt 1 is"):
        load("pickscore")(pictures[:2], ["a red circle", prompt])
    assert load("aesthetic")(pictures[:2], ["a red circle", prompt]).shape == (2,)


def test_counts_have_to_match(load: Callable[[str], Scorer], pictures: Pictures) -> None:
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        load("aesthetic")(pictures[:2], ["a red circle"])
    with pytest.raises(ValueError, match="prompts is one string"):
        load("pickscore")(pictures[:2], "a red circle")
    with pytest.raises(ValueError, match="images is one Image"):
        load("pickscore")(pictures[0], ["a red circle"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\)"):
        load("pickscore")(np.zeros((1, 8, 8, 3)), ["a red circle"])
    with pytest.raises(ValueError, match=r"accepted: floating point \(N, 3, H, W\)"):
        load("pickscore").score_pixels(torch.zeros(1, 8, 8, 3), ["a red circle"])
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        load("pickscore").score_pixels(torch.zeros(1, 3, 8, 8), ["a red circle"] * 2)


@pytest.mark.parametrize("setting", ["batch_size", "num_workers"])
def test_batches_and_workers_number_at_least_one(setting: str, load: Callable[[str], Scorer]) -> None:
    with pytest.raises(ValueError, match=f"{setting} is 0; accepted: 1 or more"):
        replace(load("pickscore"), **{setting: 0})


def test_score_that_is_not_finite_is_refused(load: Callable[[str], Scorer], pictures: Pictures) -> None:
    broken = replace(load("pickscore"), reward=lambda pixels, prompts: torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="score of image 1 is nan"):
        broken(pictures[:2], ["a red circle"] * 2)


def test_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"scorer 'hpsv2\.2' is unknown, nearest: hpsv2\.1"):
        scorer_from("hpsv2.2")
    with pytest.raises(ValueError, match="names no place after '='"):
        scorer_from("pickscore=")


def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'nonsense'"):
        scorer_from("pickscore", "nonsense")


def test_importing_the_registry_loads_no_model_library() -> None:
    code = "import sys, diffpref.scorers; assert not {'transformers', 'diffusers', 'huggingface_hub', 'ftfy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
