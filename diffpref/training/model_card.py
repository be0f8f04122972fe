"""README.md of a run folder: what the model is, how it was made, how good it is, how to load it. Written from the folder's own files."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffpref.locations import asset
from diffpref.methods import METHODS
from diffpref.methods.recipes import RECIPES
from diffpref.models.lora import LORA_FILE
from diffpref.training.config import TrainConfig
from diffpref.training.export import INDEX
from diffpref.training.run_folder import CONFIG_FILE, MANIFEST_FILE
from diffpref.training.settings import names_of

CARD_FILE = "README.md"
PICTURE = "side_by_side.png"
Settings = Mapping[str, Any]

SHOWN = (
    *("tune", "rank", "lora_alpha", "lora_targets", "use_dora", "use_rslora", "train_text_encoder", "use_ema", "ema_decay"),
    *("unet_init", "start_lora", "start_lora_as", "pretrained_vae_model_name_or_path", "prediction_type", "is_turbo"),
    *("optimizer", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "max_grad_norm", "max_train_steps"),
    *("resolution", "aspect_ratio_buckets", "random_crop", "no_hflip", "proportion_empty_prompts", "label_noise_prob", "tie_policy"),
    *("choice_model", "mixed_precision", "seed"),
)
"""Settings of the table beside the method's own, where they say something."""
LORA_ONLY = ("rank", "lora_alpha", "lora_targets", "use_dora", "use_rslora")


def write_card(folder: Path, repository: str | None = None) -> Path:
    """Write or refresh README.md of a finished run; `repository` is the hub id that it is uploaded to.

    Scores are those of report.json, if an evaluation has been written into the folder.
    """
    path = folder / CARD_FILE
    hidden = path.with_name(f".{CARD_FILE}.{os.getpid()}")
    hidden.write_text(model_card(folder, repository), encoding="utf-8")
    hidden.replace(path)
    return path


def model_card(folder: Path, repository: str | None = None) -> str:
    """The card as Markdown with a YAML header, without any path of this machine."""
    settings = yaml.safe_load((folder / CONFIG_FILE).read_text())
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    name = (repository or folder.resolve().name).split("/")[-1]
    sections = (
        f"---\n{yaml.safe_dump(header(settings, manifest, folder), sort_keys=False)}---\n\n# {name}",
        summary(settings, manifest),
        f"## Use\n\n```python\n{loading_code(settings, folder, repository)}```\n\n{loading_notes(settings, folder)}",
        scores(folder),
        method_text(settings["method"]),
        f"## Training\n\n{data_text(settings, manifest)}\n\n{settings_table(settings, manifest)}",
        f"## Licence\n\n{LICENCE}",
        versions_text(manifest),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


LICENCE = "None is stated here: it follows from the licences of the base model and of the preference data. Add it as `license:` at the top."


def header(settings: Settings, manifest: Settings, folder: Path) -> dict[str, Any]:
    """The fields that the hub reads. base_model and datasets are hub ids; local ones have none and are named in the text."""
    family = "stable-diffusion" if manifest["model_family"] == "sd" else "stable-diffusion-xl"
    tags = ["diffusers", "text-to-image", family, "preference-alignment", settings["method"].replace("_", "-")]
    is_lora = (folder / LORA_FILE).exists()
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    base, is_hub_id = public_name(settings["pretrained_model_name_or_path"])
    if is_hub_id:
        fields |= {"base_model": base, "base_model_relation": "adapter" if is_lora else "finetune"}
    data, is_hub_id = public_name(settings.get("dataset_name") or "")
    if is_hub_id and not settings.get("train_data_dir"):
        fields["datasets"] = [data]
    return fields | {"tags": [*tags, "lora"] if is_lora else tags}


def public_name(source: str) -> tuple[str, bool]:
    """A model or data set without its place on this machine, and whether the name is a hub id."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not Path(source).exists()
    return (source, True) if is_hub_id else (Path(source).name, False)


def summary(settings: Settings, manifest: Settings) -> str:
    """What this is, in two sentences."""
    source = settings["pretrained_model_name_or_path"]
    base, is_hub_id = public_name(source)
    base = f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"`{base}`"
    if Path(source) == asset("testbed", "pipeline"):
        base = "the small model of diffpref's testbed"
    kind = "a LoRA adapter for" if settings["tune"] == "lora" else "all UNet weights of"
    text = f"Preference-aligned text-to-image model: {kind} {base}, trained with {method_title(settings['method'])} on pairs of pictures "
    text += f"of which one was preferred. Made with diffpref {manifest['versions'].get('diffpref', '')}".rstrip() + "."
    if settings.get("use_ema"):
        text += " The weights are the moving average over the training."
    return text


def method_title(name: str) -> str:
    """Name and source of a method as its file begins, and the recipe where it is one of several; the bare name of one's own method."""
    if name not in RECIPES:
        return name
    title = _paragraphs(name)[0].split("\n")[0].split("): ")[0].rstrip(".")
    title += ")" * (title.count("(") - title.count(")"))
    return title if RECIPES[name].method == name else f"{title}, recipe {name},"


def method_text(name: str) -> str:
    """The method's own statement of its equation, and links to its papers; empty for a method from elsewhere."""
    if name not in RECIPES:
        return ""
    head, *rest = _paragraphs(name)
    parts = ["## Method", head]
    if rest and "=" in rest[0]:
        parts.append(f"```\n{textwrap.dedent(rest[0])}\n```")
    papers = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", head))
    parts += [f"Paper: [arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers]
    return "\n\n".join(parts)


def _paragraphs(recipe: str) -> list[str]:
    """What stands at the beginning of the file of a recipe's method."""
    module = sys.modules[METHODS[RECIPES[recipe].method].__module__]
    return inspect.cleandoc(module.__doc__ or recipe).split("\n\n")


def loading_code(settings: Settings, folder: Path, repository: str | None) -> str:
    """Python that draws a picture; local folders stand by their names."""
    base, _ = public_name(settings["pretrained_model_name_or_path"])
    place = repository or folder.resolve().name
    lines = ["from diffusers import DiffusionPipeline", ""]
    if (folder / INDEX).exists():
        lines.append(f'pipeline = DiffusionPipeline.from_pretrained("{place}")')
    else:
        lines.append(f'pipeline = DiffusionPipeline.from_pretrained("{base}")')
        lines.append(f'pipeline.load_lora_weights("{place}", weight_name="{LORA_FILE}")')
    return "\n".join([*lines, 'image = pipeline("a lighthouse at dusk").images[0]', ""])


def loading_notes(settings: Settings, folder: Path) -> str:
    """What the code needs, and the way to other programs."""
    if not (folder / LORA_FILE).exists():
        return "For programs that read single files: `diffpref export --aligned FOLDER --format single_file --output model.safetensors`."
    notes = ["The LoRA needs diffusers 0.35 or newer, which takes its scale from the file's metadata."]
    form = "single_file" if settings.get("use_dora") else "kohya"
    notes.append(f"For other programs: `diffpref export --lora FOLDER --format {form} --output model.safetensors`.")
    changed = [name for name in ("unet_init", "start_lora") if settings.get(name)]
    if "start_lora" in changed and settings.get("start_lora_as") == "adapter":
        changed.remove("start_lora")
    if changed and not (folder / INDEX).exists():
        names = " and ".join(f"`{public_name(settings[name])[0]}` ({name})" for name in changed)
        notes.append(
            f"Before training, the base model was changed by {names}; change it in the same way before loading the LoRA. "
            "`diffpref export --lora FOLDER --format pipeline` writes a model that needs neither."
        )
    return " ".join(notes)


def scores(folder: Path) -> str:
    """The evaluation that lies in the folder, and the last held-out accuracy; empty if there is neither."""
    lines = []
    r = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else {}
    if "win_rate" in r:
        lines.append(
            f"| win rate against the base | {_percent(r['win_rate'])} (95 % interval {_percent(r['win_rate_low'])} to "
            f"{_percent(r['win_rate_high'])}, {r['num_prompts']} prompts, judged by the {r['score_name']}) |"
        )
        lines.append(
            f"| mean {r['score_name']} | {r['score_base']:.4g} -> {r['score_aligned']:.4g} ({r['score_difference']:+.3g}, 95 % interval "
            f"{r['score_difference_low']:+.3g} to {r['score_difference_high']:+.3g}) |"
        )
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    held_out = [row for row in rows if row.get("eval/implicit_accuracy") is not None]
    if held_out:
        accuracy, pairs = held_out[-1]["eval/implicit_accuracy"], held_out[-1].get("eval/num_pairs")
        of = f" of {pairs:g} held-out pairs" if pairs else " of the held-out pairs"
        lines.append(f"| implicit accuracy | {_percent(accuracy)}{of} are ordered as their labels say |")
    if not lines:
        return ""
    picture = f"\n\n![base above, aligned below]({PICTURE})" if (folder / PICTURE).exists() else ""
    return "## Scores\n\n| score | value |\n|---|---|\n" + "\n".join(lines) + picture


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def data_text(settings: Settings, manifest: Settings) -> str:
    """Where the pairs came from and how many were used."""
    name, is_hub_id = public_name(settings.get("train_data_dir") or settings.get("dataset_name") or "")
    source = f"[{name}](https://huggingface.co/datasets/{name})" if is_hub_id and not settings.get("train_data_dir") else f"`{name}`"
    data = manifest["data"]
    if "prompts" in data:
        judge = data["step_scorer"]["name"]
        text = f"Data: pairs that the model sampled itself for {data['prompts']} prompts of `{public_name(data['prompt_set'])[0]}`"
        return f"{text}, judged by `{judge}`; fingerprint of the prompts `{data['fingerprint']}`."
    counts = f"{data['pairs']} pairs for training, {data['ties']} ties, {data['rejected']} rows rejected"
    return f"Data: {source}, split {settings['split']}: {counts}; fingerprint of the pairs `{data['fingerprint']}`."


def settings_table(settings: Settings, manifest: Settings) -> str:
    """The method's hyper-parameters, the numbers that are usually hidden, and the settings that say something."""
    own = [name for name in settings if name not in names_of(TrainConfig)]
    skip = LORA_ONLY if settings["tune"] == "full" else ()
    rows = {name: settings.get(name) for name in (*own, *SHOWN) if name not in skip}
    if not settings.get("use_ema"):
        rows.pop("ema_decay", None)
    if not settings.get("start_lora"):
        rows.pop("start_lora_as", None)
    counted = {
        "parts": ", ".join(manifest["objective"]),
        "pairs per update": manifest["pairs_per_update"],
        "learning rate as used": manifest["effective_learning_rate"],
    }
    shown = {name: value for name, value in (rows | counted).items() if value is not None and value is not False}
    lines = [f"| {name} | {_cell(value)} |" for name, value in shown.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = public_name(value)[0] if isinstance(value, str) and "/" in value else f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def versions_text(manifest: Settings) -> str:
    """The libraries behind the numbers, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return f"<sub>{versions}, Python {manifest['python']}.</sub>"
