"""Images per second of PickScore against the loop its authors publish: transformers' processor and model, one image at a time.

    python benchmarks/scoring.py [--weights FOLDER] [--num_images 400] [--image_side 512] [--images_per_prompt 4]

Same weights, same files, same process; the two take turns (A B, B A, A B, ...), and the best of `--rounds` counts for each, so that
what else runs on the machine meets both alike. Without --weights the model is a small random ViT, so that what lies around the model
shows too. The scores of both have to agree. Processor time stands beside wall time: it shows what is saved, wall time also what is
done at the same time on a second core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffpref.scorers import scorer_from
from diffpref.scorers.scorer import Scorer
from diffpref.testbed.tokenizer import write_tokenizer
from diffpref.testbed.world import COLOURS, SHAPES
from diffpref.training.run_folder import versions

Score = Callable[[Any, list[str]], Tensor]


class ImageFiles(Sequence[Image.Image]):
    """Images on disk, opened when they are asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override]
        return Image.open(self.paths[index])


def small_pickscore(folder: Path) -> Path:
    """A random CLIP of 6 + 6 layers on 224 pixels in patches of 32, in the layout of PickScore's release."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = write_tokenizer(folder, "<|endoftext|>")
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 3, "hidden_size": 192, "intermediate_size": 768, "projection_dim": 128}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, "eos_token_id": 2}
    vision = {**sizes, "image_size": 224, "patch_size": 32}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(projection_dim=128, text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


def write_images(folder: Path, num: int, side: int) -> ImageFiles:
    """Smooth random JPEG files."""
    paths = []
    for i in range(num):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        paths.append(folder / f"{i:05d}.jpg")
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    return ImageFiles(paths)


def published_loop(folder: Path, device: str) -> Score:
    """(images, prompts) -> scores as the model card of PickScore computes them, for one image after another."""
    from transformers import CLIPModel, CLIPTokenizerFast

    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor
    model = CLIPModel.from_pretrained(folder).eval().to(device)
    tokenizer, process = CLIPTokenizerFast.from_pretrained(folder), ImageProcessor()
    length = model.config.text_config.max_position_embeddings

    def unit(output: Any) -> Tensor:
        features = getattr(output, "pooler_output", output)  # releases of transformers differ in what they return
        return features / features.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def score(images: ImageFiles, prompts: list[str]) -> Tensor:
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            pixels = process(images=image, return_tensors="pt").to(device)
            tokens = tokenizer([prompt], padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
            image_feature, text_feature = unit(model.get_image_features(**pixels)), unit(model.get_text_features(**tokens))
            found.append((model.logit_scale.exp() * (text_feature @ image_feature.T))[0].cpu())
        return torch.cat(found)

    return score


def measure(scorer: Scorer, loop: Score, images: ImageFiles, prompts: list[str], rounds: int) -> dict[str, float]:
    """Images per second and CPU milliseconds per image of both ways. Raises ValueError if their scores differ."""
    ways: dict[str, Score] = {"loop": loop, "batched": scorer}
    wall, cpu = (dict.fromkeys(ways, float("inf")) for _ in range(2))
    scores = {}
    for way in ways.values():
        way(ImageFiles(images.paths[:2]), prompts[:2])  # warm up
    for turn in range(rounds):
        for name, way in list(ways.items())[:: 1 if turn % 2 == 0 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            scores[name] = way(images, prompts)
            wall[name] = min(wall[name], time.perf_counter() - start)
            cpu[name] = min(cpu[name], time.process_time() - start_cpu)
    difference = float((scores["loop"] - scores["batched"]).abs().max() / scores["loop"].abs().max())
    if difference > 1e-4:
        raise ValueError(f"the two ways disagree by {difference:.1e} of the largest score; nothing was measured")
    return {
        "ratio": wall["loop"] / wall["batched"],
        "ratio_of_cpu_time": cpu["loop"] / cpu["batched"],
        **{f"{name}_images_per_second": len(images) / seconds for name, seconds in wall.items()},
        **{f"{name}_cpu_ms_per_image": 1000 * seconds / len(images) for name, seconds in cpu.items()},
        "largest_difference": difference,
    }


def main() -> None:
    """Parse the flags, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with PickScore's release; default: a small random model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_images", type=int, default=400)
    parser.add_argument("--image_side", type=int, default=512)
    parser.add_argument("--images_per_prompt", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = args.weights or small_pickscore(folder / "weights")
        scorer = replace(scorer_from(f"pickscore={weights}", args.device), batch_size=args.batch_size, num_workers=args.num_workers)
        images = write_images(folder, args.num_images, args.image_side)
        prompts = [
            f"a {COLOURS[(i // args.images_per_prompt) % len(COLOURS)]} {SHAPES[(i // args.images_per_prompt) % len(SHAPES)]}, a photo"
            for i in range(args.num_images)
        ]
        found = measure(scorer, published_loop(weights, args.device), images, prompts, args.rounds)
    machine = {"date": time.strftime("%Y-%m-%d"), "torch_threads": torch.get_num_threads(), "cpus": os.cpu_count(), "cpu": cpu_name()}
    print(json.dumps({**vars(args), **scorer.record, **machine, "versions": versions(), **found}, indent=1, default=str))


def cpu_name() -> str:
    """What the kernel calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
