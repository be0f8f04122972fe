"""The page at the end of a testbed run: the aligned model beside its base, with controls. Also `diffpref testbed compare`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffpref.data.images import decode_image
from diffpref.data.pairs import load_pairs, split_held_out
from diffpref.evaluation.generate import contact_sheet
from diffpref.evaluation.report import THIS_RUN, Control, ImplicitAccuracy, Picture, Report, three_lines, write_report
from diffpref.evaluation.stats import count_wins, wilson_interval
from diffpref.locations import asset
from diffpref.models.lora import LORA_FILE
from diffpref.testbed.measure import Measured, apply_filter, comparison, fingerprint, measure, seeds_for, shipped_ruler
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.reward import WEIGHTS, reward
from diffpref.testbed.sampling import GUIDANCE, STEPS, Sampler

REWARD_NAME = "structural reward"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `diffpref testbed compare`."""

    aligned: str
    """Folder of the aligned model: a pipeline, or a LoRA file."""
    base: str | None = None
    """Folder of the base pipeline; the embedded testbed model when not given."""
    output_dir: str | None = None
    """Where report.html and report.json go; the folder of the aligned model when not given."""
    num_eval_prompts: int = 200
    """Test prompts, one picture of each model per prompt."""
    num_inference_steps: int = STEPS
    """Denoising steps of both models."""
    guidance_scale: float = GUIDANCE
    """Classifier-free guidance of both models."""
    best_of_n_samples: int = 16
    """Base samples per prompt for the best-of-N equivalent, if no stored ruler fits; 0 leaves it out."""


def compare_models(config: CompareConfig) -> int:
    """Generate, score, write the report, print the result."""
    folder = Path(config.aligned)
    if not folder.is_dir():
        raise ValueError(f"aligned is {config.aligned!r}, which is no folder; give the output_dir of a run")
    base = config.base or str(asset("testbed", "pipeline"))
    if config.num_eval_prompts < 1:
        raise ValueError(f"num_eval_prompts is {config.num_eval_prompts}; it must be at least 1")
    reference = Sampler(base, None, config.num_inference_steps, config.guidance_scale)
    report = make_report(reference, aligned_sampler(reference, folder), config.num_eval_prompts, config.best_of_n_samples, folder, {})
    _finish(report, Path(config.output_dir or folder))
    return 0


def report_run(folder: Path, timings: dict[str, float], num_eval_prompts: int) -> None:
    """Compare the model that a run just exported with the testbed's base."""
    reference = Sampler(str(asset("testbed", "pipeline")))
    _finish(make_report(reference, aligned_sampler(reference, folder), num_eval_prompts, 0, folder, timings), folder)


def aligned_sampler(base: Sampler, folder: Path) -> Sampler:
    """The pipeline in `folder`, or the base with the LoRA file in it. Raises ValueError when there is neither."""
    if (folder / "model_index.json").exists():
        return dataclasses.replace(base, model=str(folder))
    if (folder / LORA_FILE).exists():
        return dataclasses.replace(base, lora=str(folder))
    raise ValueError(f"aligned is {str(folder)!r}, which holds neither model_index.json nor {LORA_FILE}")


def _finish(report: Report, folder: Path) -> None:
    page = write_report(report, folder)
    shown = report.pictures[:12]
    contact_sheet([np.stack([p.base for p in shown]), np.stack([p.aligned for p in shown])], 2).save(folder / "side_by_side.png")
    print(f"\n{three_lines(report)}\nreport: {page}", flush=True)


def make_report(base: Sampler, aligned: Sampler, num_prompts: int, ruler_samples: int, folder: Path, timings: dict[str, float]) -> Report:
    """Everything that the page shows, measured now; controls that need their own training come from the results file."""
    prompts = draw_prompts("test", num_prompts).texts
    seeds = seeds_for(num_prompts)
    start = time.perf_counter()
    before, after = measure(base(prompts, seeds), prompts), measure(aligned(prompts, seeds), prompts)
    ruler = _ruler(base, prompts, ruler_samples)
    numbers = {"best_of_n_equivalent": math.nan, "best_of_n_reached": True, "best_of_n_samples": 0} | comparison(before, after, ruler)
    controls = [*_live_controls(base, before), *_stored_controls(base)]
    run = _run_details(folder)
    return Report(
        title="Diffusion preference alignment on the embedded testbed",
        summary=run["summary"],
        score_name=REWARD_NAME,
        controls=controls,
        implicit_accuracy=run["implicit_accuracy"],
        settings=run["settings"]
        | {
            "reward": " + ".join(f"{w:g} {name}" for name, w in WEIGHTS.items()),
            "sampling": f"{base.steps} DDIM steps, guidance {base.guidance:g}, same prompt, seed and starting latents for both",
        },
        timings=timings | {"evaluation": time.perf_counter() - start},
        pictures=_pictures(before, after, seeds),
        pictures_note="The first 18 test prompts, in order; none was selected. Seed and starting noise are the same left and right.",
        curves=run["curves"],
        **numbers,  # type: ignore[arg-type]
    )


def _ruler(base: Sampler, prompts: list[str], num_samples: int) -> np.ndarray | None:
    """Base scores (P, M) of the prompts: the stored ones if they belong to this model and sampling, else sampled now."""
    stored = shipped_ruler(base.model, base.steps, base.guidance, len(prompts))
    if stored is not None or num_samples < 1:
        return stored
    columns = [reward(base(prompts, seeds_for(len(prompts), 1 + m)), prompts) for m in range(num_samples)]
    return np.stack(columns, 1)


def _live_controls(base: Sampler, before: Measured) -> list[Control]:
    """The best untrained tricks, chosen on the validation prompts and applied to these."""
    path = asset("testbed") / "results.json"
    if not path.exists():
        return []
    chosen = json.loads(path.read_text())["untrained"]
    filtered = measure(apply_filter(chosen["filter"], before.images), before.prompts)
    return [
        _control(f"pixel filter: {chosen['filter']}", before, filtered, "best of the filter chains on the validation prompts, no training")
    ]


def _control(name: str, before: Measured, after: Measured, note: str) -> Control:
    wins, n = count_wins(before.score, after.score)
    low, high = wilson_interval(wins, n)
    return Control(name, wins / n, low, high, n, THIS_RUN, note)


def _stored_controls(base: Sampler) -> list[Control]:
    """Controls with a training of their own, measured by `diffpref testbed results` and shipped with their date."""
    path = asset("testbed") / "results.json"
    if not path.exists():
        return []
    stored = json.loads(path.read_text())
    if stored["model"] != fingerprint(Path(base.model)):
        return []
    return [
        Control(measured=f"{stored['date']}, {c['runs']} runs, docs/results.md", **{k: v for k, v in c.items() if k != "runs"})
        for c in stored["controls"]
    ]


def _pictures(before: Measured, after: Measured, seeds: list[int], count: int = 18) -> list[Picture]:
    rows = range(min(count, len(seeds)))
    return [
        Picture(before.prompts[i], seeds[i], before.images[i], after.images[i], float(before.score[i]), float(after.score[i])) for i in rows
    ]


def _run_details(folder: Path) -> dict[str, Any]:
    """Settings, curves and held-out accuracy of the run in `folder`; empty for a model that we did not train."""
    settings_file, metrics_file = folder / "diffpref_config.yaml", folder / "metrics.jsonl"
    details: dict[str, Any] = {
        "summary": f"The model in {folder.name} against its base.",
        "settings": {},
        "curves": {},
        "implicit_accuracy": None,
    }
    if not (settings_file.exists() and metrics_file.exists()):
        return details
    settings = yaml.safe_load(settings_file.read_text())
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    shown = (
        "method",
        "beta",
        "tune",
        "rank",
        "lora_targets",
        "learning_rate",
        "lr_scheduler",
        "train_batch_size",
        "max_train_steps",
        "seed",
        "label_noise_prob",
    )
    details["settings"] = {
        n: settings[n] for n in shown if settings.get(n) is not None and not (settings["tune"] == "full" and n in ("rank", "lora_targets"))
    }
    details["curves"] = _curves(rows)
    held_out = [row for row in rows if "eval/implicit_accuracy" in row]
    pairs = None
    if held_out:
        details["implicit_accuracy"], pairs = _implicit_accuracy(held_out[-1], settings)
    details["summary"] = (
        f"A small SDXL-format model was trained with {settings['method']} for {settings['max_train_steps']} steps"
        + (f" on {pairs} pairs of its own pictures" if pairs else "")
        + ", labelled by a noisy judge who likes objects upper left and upright, with their companion on the right."
    )
    return details


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    panels = {
        "Loss": {"loss": "loss"},
        "Implicit accuracy": {"training pairs": "rewards/accuracies", "held-out pairs": "eval/implicit_accuracy"},
        "Policy error minus reference error": {"chosen": "chosen", "rejected": "rejected"},
    }
    for row in rows:
        for side in ("chosen", "rejected"):
            if row.get(f"error/reference_{side}") is not None and row[f"error/policy_{side}"] is not None:
                row[side] = row[f"error/policy_{side}"] - row[f"error/reference_{side}"]
    found = {}
    for panel, lines in panels.items():
        series = {label: _smoothed([(r["step"], r[key]) for r in rows if r.get(key) is not None]) for label, key in lines.items()}
        series = {label: points for label, points in series.items() if points}
        if series:
            found[panel] = series
    return found


def _smoothed(points: list[tuple[float, float]], bins: int = 60) -> list[tuple[float, float]]:
    """Means over about `bins` stretches, so that a noisy curve can be read."""
    width = max(1, len(points) // bins)
    chunks = [points[i : i + width] for i in range(0, len(points), width)]
    return [(chunk[-1][0], sum(v for _, v in chunk) / len(chunk)) for chunk in chunks]


def _implicit_accuracy(row: dict[str, Any], settings: dict[str, Any]) -> tuple[ImplicitAccuracy, int]:
    """Held-out accuracy beside the share of the held-out labels that agree with the true reward; and the number of training pairs."""
    pairs = load_pairs(settings["train_data_dir"], settings["split"], max_samples=settings["max_train_samples"], check_images=False)
    train, held_out = split_held_out(pairs, settings["held_out_pairs"], settings["seed"])
    rows = [held_out.row(i) for i in range(len(held_out))]
    scores = [
        reward(np.stack([np.asarray(decode_image(getattr(r, image))) for r in rows]), held_out.prompts) for image in ("image_0", "image_1")
    ]
    ceiling = float((np.sign(scores[0] - scores[1]) == np.sign(held_out.p0 - 0.5)).mean())
    buckets = row["eval/implicit_accuracy_by_noise"]
    edges = [round(1000 * i / len(buckets)) for i in range(len(buckets) + 1)]
    by_noise = [(f"{low} to {high - 1}", share) for low, high, share in zip(edges, edges[1:], buckets, strict=False)]
    return ImplicitAccuracy(row["eval/implicit_accuracy"], ceiling, row["eval/num_pairs"], by_noise), len(train)
