"""`diffpref verify`: a published checkpoint against its base, our numbers beside the paper's, as a file that can be shared.

Papers differ in prompts, samplers and scorer versions. The published settings are used where the paper states them, ours where
it does not; both stand in the file, so that a difference can be traced.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffpref.evaluation.model_report import ModelReport
from diffpref.evaluation.score_table import Comparison
from diffpref.evaluation.scoring import Score
from diffpref.evaluation.work import write_text
from diffpref.inference.evaluate import EvaluateConfig, evaluate
from diffpref.locations import asset

IN_HUNDREDTHS = ("hpsv2", "hpsv2.1", "clip_vith_cos", "clip_vitl_cos")
"""Scorers whose means papers print times 100; both columns of the comparison are."""
MODEL = "checkpoint"
"""Name of the verified model in the evaluation."""


def published() -> dict[str, dict[str, Any]]:
    """The published figures by entry, from assets/published/figures.json."""
    entries: dict[str, dict[str, Any]] = json.loads(asset("published", "figures.json").read_text())["entries"]
    return entries


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Settings of `diffpref verify`."""

    entry: str | None = None
    """Which published figures; the error names them all."""
    aligned: str | None = None
    """The checkpoint: a pipeline, a UNet-only folder, a UNet state dict such as unet.pth, or a LoRA."""
    pretrained_model_name_or_path: str | None = None
    """Its base model."""
    variant: str | None = None
    """Weight variant of the base's files, such as fp16."""
    scorers: tuple[str, ...] = ()
    """Scorers as name or name=weights; those of the published figures when not given."""
    prompt_set: str | None = None
    """Prompts; the published set when not given (name=path for a local copy)."""
    max_prompts: int | None = None
    """Use only the first prompts; the result then says so."""
    num_images_per_prompt: int = 1
    """Pictures per prompt and model."""
    seed: int = 0
    """First seed."""
    num_inference_steps: int | None = None
    """Denoising steps; the paper's, or 50."""
    guidance_scale: float | None = None
    """Guidance; the paper's, or 7.5 for SD 1.5 and 5 for SDXL."""
    batch_size: int = 8
    """Pictures per forward pass."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Dtype of the networks."""
    output_dir: str = "outputs/verify"
    """Folder of the evaluation and of verify.json."""

    def __post_init__(self) -> None:
        entries = published()
        if self.entry not in entries:
            raise ValueError(f"entry is {self.entry!r}; accepted: {', '.join(entries)}")
        for name in ("aligned", "pretrained_model_name_or_path"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is not given; name the {'checkpoint' if name == 'aligned' else 'base model'} on this machine or the hub"
                )
        if self.prompt_set is None and entries[self.entry]["prompt_set"] is None:
            raise ValueError(f"prompt_set is not given, and the source of {self.entry} does not state its prompts; choose a set")


def as_evaluation(config: VerifyConfig) -> EvaluateConfig:
    """The evaluation that the published figures ask for."""
    entry = published()[str(config.entry)]
    ours = 7.5 if entry["family"] == "sd" else 5.0
    return EvaluateConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        variant=config.variant,
        aligned=(f"{MODEL}={config.aligned}",),
        prompt_set=config.prompt_set or entry["prompt_set"],
        max_prompts=config.max_prompts,
        num_images_per_prompt=config.num_images_per_prompt,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps or entry["num_inference_steps"] or 50,
        guidance_scale=config.guidance_scale or entry["guidance_scale"] or ours,
        sampler=entry["sampler"] or "checkpoint",
        batch_size=config.batch_size,
        precision=config.precision,
        scorers=config.scorers or tuple(entry["scores"]),
        output_dir=config.output_dir,
    )


def verify(config: VerifyConfig, scorers: Mapping[str, Score], base: str) -> dict[str, Any] | None:
    """Evaluate, write verify.json, return it on the main process. Raises ValueError as `evaluate` does."""
    report = evaluate(as_evaluation(config), scorers, base)
    if report is None:
        return None
    found = beside_the_paper(report, str(config.entry))
    write_text(Path(config.output_dir) / "verify.json", json.dumps(found, indent=1))
    return found


def beside_the_paper(report: ModelReport, name: str) -> dict[str, Any]:
    """Our figures and the published ones, scorer by scorer; a scorer that only one side has stands alone."""
    entry = published()[name]
    measured = {c.scorer: c for c in report.comparisons}
    rows = {}
    for scorer in dict.fromkeys([*entry["scores"], *measured]):
        c = measured.get(scorer)
        if c is not None and scorer in IN_HUNDREDTHS:
            c = _times_100(c)
        rows[scorer] = {
            "published": entry["scores"].get(scorer),
            "ours": None if c is None else _statistic(c, entry["statistic"], "mean", "median"),
            "published_base": entry["base_scores"].get(scorer),
            "ours_base": None
            if c is None or entry["statistic"] == "win_rate"
            else _statistic(c, entry["statistic"], "mean_base", "median_base"),
            "ours_difference": None if c is None else [c.difference, c.difference_low, c.difference_high],
            "ours_win_rate": None if c is None else [c.win_rate, c.win_rate_low, c.win_rate_high],
        }
    full = report.as_json()
    return {
        "entry": name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "published": {key: value for key, value in entry.items() if key not in ("scores", "base_scores")},
        "statistic": entry["statistic"],
        "figures": rows,
        "num_prompts": len(report.prompts.texts),
        "all_prompts": entry["num_prompts"] in (None, len(report.prompts.texts)),
        "settings": full["settings"],
        "scorers": full["scorers"],
        "models": full["models"],
    }


def _times_100(c: Comparison) -> Comparison:
    names = ("mean_base", "mean", "median_base", "median", "difference", "difference_low", "difference_high")
    return replace(c, **{name: 100 * getattr(c, name) for name in names})


def _statistic(c: Comparison, statistic: str, mean: str, median: str) -> float:
    if statistic == "win_rate":
        return 100 * c.win_rate
    return float(getattr(c, median if statistic == "median" else mean))


def as_text(found: Mapping[str, Any]) -> str:
    """The comparison as lines for a terminal."""
    origin = found["published"]
    lines = [f"{origin['checkpoint']}: {found['statistic']} of {found['num_prompts']} prompts; published: {origin['source']}"]
    lines.append(f"{'scorer':<16}{'base, paper':>13}{'base, ours':>13}{'paper':>10}{'ours':>10}")
    for scorer, row in found["figures"].items():
        cells = [row["published_base"], row["ours_base"], row["published"], row["ours"]]
        text = ["-" if x is None else f"{x:.4g}" for x in cells]
        lines.append(f"{scorer:<16}{text[0]:>13}{text[1]:>13}{text[2]:>10}{text[3]:>10}")
    if not found["all_prompts"]:
        lines.append(
            f"the published figures are of {found['published']['num_prompts']} prompts: not comparable with {found['num_prompts']}"
        )
    return "\n".join(lines)
