"""Whose command is it? Flags and defaults of the published scripts, in our own settings.

Salesforce's train.py and the two scripts of diffusers share most flag names but not their defaults: a Salesforce command
relies on fp16, resuming, 20 % empty prompts and a rate of 1e-8 times the batch, a diffusers command on LoRA and a constant
rate. The scripts of later methods grew out of these two and are based on one of them. A command is read as one of theirs when
it holds flags that only that family has, or by --preset; everything that came from a family is said, and stored in the run's
manifest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

from diffpref.training.foreign_flags import CHECKED, MEANING, ONLY, RENAMED, TRAINED, VALUES, WITHOUT_EFFECT
from diffpref.training.settings import Settings

AVERAGED_EVERY = 20
"""Updates of the Diffusion-KTO script from one moving average to the next."""

VALIDATION_PROMPTS = (
    "a lighthouse on a cliff at dusk, waves below",
    "portrait of an old fisherman, window light",
    "a bowl of oranges on a blue table cloth",
    "a fox reading a newspaper in a train compartment",
)
"""What --run_validation of the diffusers scripts draws when no prompts are given; theirs are not copied."""


@dataclass(frozen=True)
class Family:
    """Defaults of a script, and the sets of flags that give its commands away."""

    title: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    sdxl_defaults: Mapping[str, object] = field(default_factory=dict)
    signatures: tuple[frozenset[str], ...] = ()
    based_on: str | None = None  # the family whose flags and defaults it shares, for its own `methods`
    methods: tuple[str, ...] = ()


def _any_of(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset({name}) for name in names)


FAMILIES: Mapping[str, Family] = {
    "diffpref": Family("our own"),
    "salesforce": Family(
        "Salesforce's train.py",
        {
            "tune": "full",
            "beta": 5000.0,
            "learning_rate": 1e-8,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 500,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_train_steps": 2000,
            "mixed_precision": "fp16",
            "proportion_empty_prompts": 0.2,
            "flip_mode": "independent",
            "resume_from_checkpoint": "latest",
            "report_to": "tensorboard",
            "tracker_project_name": "tuning",
            "output_dir": "sd-model-finetuned",
        },
        {"optimizer": "adafactor", "gradient_checkpointing": True},
        (*_any_of("sdxl", "use_adafactor", "sft", "hard_skip_resume", "image_column"), frozenset({"beta_dpo", "scale_lr"})),
    ),
    "diffusers": Family(
        "the diffusers scripts",
        {
            "tune": "lora",
            "rank": 4,
            "beta": 5000.0,
            "learning_rate": 5e-4,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1,
            "split": "validation",
            "report_to": "tensorboard",
            "tracker_project_name": "diffusion-dpo-lora",
            "output_dir": "diffusion-dpo-lora",
        },
        {"tracker_project_name": "diffusion-dpo-lora-sdxl"},
        _any_of(
            *("use_8bit_adam", "run_validation", "dataset_split_name", "tracker_name"),
            *("prior_generation_precision", "enable_xformers_memory_efficient_attention"),
        ),
    ),
    "mapo": Family(
        "the MaPO scripts",
        {"tune": "full", "beta": 0.1, "tracker_project_name": "mapo", "output_dir": "mapo"},
        {},
        _any_of("beta_mapo", "snr_value", "remove_ties"),
        "diffusers",
        ("mapo",),
    ),
    "diffusion_kto": Family(
        "the Diffusion-KTO script",
        {
            "tune": "full",
            "beta": 2000.0,
            "desirable_share": 0.5,
            "split": "train",
            "proportion_empty_prompts": 0.2,
            "tracker_project_name": "diffusion-kto",
        },
        {},
        _any_of(
            *("positive_ratio", "halo", "bce_offset", "lambda_d_kto", "lambda_u_kto", "pick_split", "reference_ema"),
            *("reference_ema_momentum", "ema_momentum", "loss", "policy", "dataloader", "fixed_noise", "use_lora", "track_score"),
            *("eval_metrics", "h_pos", "h_neg"),
        ),
        "diffusers",
        ("diffusion_kto",),
    ),
    "inversion_dpo": Family(
        "Inversion-DPO's train_ddim.py",
        {"num_steps": 40, "proportion_empty_prompts": 0.0},
        {},
        _any_of("num_inference_steps", "cache_dir_model"),
        "salesforce",
        ("inversion_dpo",),
    ),
    "diffusion_sdpo": Family(
        "Diffusion-SDPO's train.py",
        {},
        {},
        _any_of("train_method", "use_winner_preserving", "winner_preserving_mu", "dmpo_alpha"),
        "salesforce",
    ),
}
"""Whose defaults --preset chooses."""


def detect(names: Iterable[str], method: str | None = None) -> str:
    """The family that a command's flags belong to, "diffpref" unless they give another away.

    A script that is based on another one has that one's flags, too; `method` tells them apart where no flag does. Raises ValueError
    when flags of two families meet.
    """
    present = set(names)
    found = {name: next(iter(sorted(s))) for name, family in FAMILIES.items() for s in family.signatures if s <= present}
    for name in list(found):
        found.pop(FAMILIES[name].based_on or "", None)
    own = next((name for name, family in FAMILIES.items() if method in family.methods and family.based_on in found), None)
    if own is not None:
        found[own] = found.pop(str(FAMILIES[own].based_on))
    if len(found) > 1:
        flags = ", ".join(f"--{flag} is {FAMILIES[name].title}'s" for name, flag in found.items())
        raise ValueError(f"flags of two families meet ({flags}); add --preset {' or '.join(FAMILIES)} to say whose defaults are meant")
    return next(iter(found), "diffpref")


def merged(file: Settings, flags: Settings) -> Settings:
    """The file's settings under those of the command line, which win also over another name of the same setting."""
    return {name: value for name, value in file.items() if _meant(name) not in {_meant(flag) for flag in flags}} | flags


def _meant(name: str) -> str:
    return MEANING[name][0] if name in MEANING else RENAMED.get(name, name)


@dataclass(frozen=True)
class Translated:
    """Settings in our own names, and what has to be said about them."""

    settings: Settings
    preset: str
    notes: list[str]


def what_is_trained(given: Settings) -> Settings:
    """The same flags with the method and guards that other scripts' flags choose. Raises ValueError for a method that is not here."""
    found = dict(given)
    for flag, methods in TRAINED.items():
        if flag not in given:
            continue
        if given[flag] not in methods:
            raise ValueError(f"{flag} is {given[flag]!r}; accepted: {', '.join(methods)}")
        method = methods[str(given[flag])]
        if found.get("method", method) != method and flag == "train_method":
            raise ValueError(f"--train_method {given[flag]} and --method {found['method']} are both given; drop one of them")
        found["method"] = method
    if _is_on(given, "use_winner_preserving"):
        guards = found.get("guards", ())
        found["guards"] = [*(guards if isinstance(guards, list | tuple) else [guards]), "sdpo"]
        found.setdefault("scope", "microbatch")
        if "mu" not in found:
            found.setdefault("winner_preserving_mu", 0.0)  # that script's default
    elif "winner_preserving_mu" in found:
        del found["winner_preserving_mu"]
    if _is_on(given, "sft"):
        found.setdefault("method", "sft")
    return found


def translate(
    given: Settings, preset: str | None, fields: Iterable[str], model_family: Callable[[Settings], str], method: str | None = None
) -> Translated:
    """A command's settings in our own names, with the defaults of its family below them.

    `given` holds the YAML file's and the command line's values under the names they were given; `fields` are the settings that
    the chosen method and the run have (a family's default for anything else is left out); `model_family(settings)` tells "sd"
    from "sdxl" and is asked only for commands of another family. Raises ValueError for a preset, a pair of flags or a model
    that does not fit.
    """
    if preset is not None and preset not in FAMILIES:
        raise ValueError(f"preset is {preset!r}; accepted: {', '.join(FAMILIES)}")
    name = preset or detect(given, method)
    family, settings, notes = FAMILIES[name], _renamed(given), []
    notes += [f"--{flag} needs nothing here: {why}" for flag, why in WITHOUT_EFFECT.items() if flag in given]
    is_sdxl = _is_sdxl(given, settings, name, model_family)
    if name == "diffpref":
        if "num_train_epochs" in settings and "max_train_steps" in settings:
            raise ValueError(
                f"num_train_epochs is {settings['num_train_epochs']} and max_train_steps is {settings['max_train_steps']}; give one of them"
            )
        if "beta_dpo" in given:
            notes.append("--beta_dpo is read as --beta, with our own defaults for the rest (--preset salesforce or diffusers for theirs)")
        return Translated(settings, name, notes)
    root = family.based_on or name
    notes += _halved_beta(given, settings, name, is_sdxl)
    notes += _steps_and_validation(given, settings, root)
    known, base = set(fields), FAMILIES[root]
    notes += _idle(settings, name, known)
    defaults = {**base.defaults, **(base.sdxl_defaults if is_sdxl else {}), **family.defaults, **(family.sdxl_defaults if is_sdxl else {})}
    if settings.get("tune", defaults["tune"]) == "full":
        defaults.pop("rank", None)
    if settings.get("max_train_steps") is not None:
        defaults.pop("num_train_epochs", None)
    added = {key: value for key, value in defaults.items() if key in known and key not in settings}
    why = "asked for by --preset" if preset else "recognised by its flags"
    notes.insert(0, f"command of {family.title}, {why}; --preset diffpref takes our own defaults")
    settings = {**added, **settings}
    notes += _possible_here(settings, set(added))
    notes.append("from its defaults: " + ", ".join(f"{key} {settings[key]}" for key in added))
    return Translated(settings, name, notes)


def _renamed(given: Settings) -> Settings:
    """Our names for everything that has one; switches that are off and empty texts are as if not given."""
    settings: Settings = {}
    origin: dict[str, str] = {}
    for name, value in given.items():
        if name in ONLY and value != ONLY[name][0]:
            raise ValueError(f"{name} is {value!r}, which is not here; accepted: {ONLY[name][0]}. {ONLY[name][1]}")
        if name in WITHOUT_EFFECT or name in CHECKED or value == "" or (name in MEANING and not _is_on(given, name)):
            continue
        ours, meant = MEANING.get(name, (RENAMED.get(name, name), _value(name, value)))
        if ours in settings and (settings[ours] != meant or name not in MEANING):
            raise ValueError(f"--{origin[ours]} and --{name} both set {ours} ({settings[ours]} and {meant}); give one of them")
        settings[ours], origin[ours] = meant, name
    return settings


def _value(flag: str, value: object) -> object:
    """Our name of a value of another script's flag. Raises ValueError for one that has no counterpart."""
    if flag not in VALUES or value in VALUES[flag].values():
        return value
    if str(value) not in VALUES[flag]:
        raise ValueError(f"{flag} is {value!r}, which is not here; accepted: {', '.join(VALUES[flag])} (our {RENAMED[flag]})")
    return VALUES[flag][str(value)]


def _is_sdxl(given: Settings, settings: Settings, name: str, model_family: Callable[[Settings], str]) -> bool:
    """Whether the model is of the SDXL family; only looked up when something depends on it."""
    wanted = _is_on(given, "sdxl")
    if not wanted and name == "diffpref":
        return False
    kind = model_family(settings)
    if wanted and not kind.startswith("sdxl"):
        model = settings.get("pretrained_model_name_or_path")
        raise ValueError(f"--sdxl is given, but {model!r} is of the {kind} family; leave it out or give an SDXL model")
    return kind.startswith("sdxl")


def _is_on(given: Settings, switch: str) -> bool:
    return str(given.get(switch, False)).lower() in ("true", "yes", "1")


def _halved_beta(given: Settings, settings: Settings, name: str, is_sdxl: bool) -> list[str]:
    """The SD script of diffusers and the KTO script multiply the whole difference of errors by beta, everyone else half of it."""
    if not (name == "diffusion_kto" or (name == "diffusers" and not is_sdxl)) or "beta_dpo" not in given:
        return []
    try:
        settings["beta"] = 2 * float(str(given["beta_dpo"]))
    except ValueError:
        return []  # the check of types names it
    script = "SD" if name == "diffusers" else "KTO"
    return [f"beta_dpo {given['beta_dpo']} of the {script} script is beta {settings['beta']:g} here: that script leaves the factor 1/2 out"]


def _idle(settings: Settings, name: str, known: Container[str]) -> list[str]:
    """Settings that the later scripts accept and do not use, left out with a note; and which of their scripts is meant."""
    notes = []
    for extra in ("noise_offset", "input_perturbation"):
        if extra in settings and extra not in known and str(settings[extra]) in ("0", "0.0"):
            del settings[extra]
            notes.append(f"{extra} 0 is left out: this method adds no noise that it would change")
    if name == "mapo" and "rank" in settings:
        settings.setdefault("tune", "lora")  # its LoRA script shares all flags with the other one
    if name == "diffusion_kto":
        if settings.get("train_data_dir") and settings.pop("dataset_name", None) is not None:
            notes.append("dataset_name is left out: train_data_dir is what that script reads")
        if settings.get("tune") != "lora" and settings.pop("rank", None) is not None:
            notes.append("rank is left out: without --use_lora that script trains all weights")
        for switch, share, usual in (("use_ema", "ema_decay", 0.998), ("reference_update_steps", "reference_decay", 0.999)):
            if settings.get(switch):
                settings.setdefault(share, usual)
                if switch == "use_ema":
                    notes.append(_every_update(settings, share))
                else:
                    notes.append(
                        f"{share} {settings[share]} holds from the start here; that script's reference begins as a copy and slows down"
                    )
            elif settings.pop(share, None) is not None:
                notes.append(f"{share} is left out: nothing is averaged")
    return notes


def _every_update(settings: Settings, share: str) -> str:
    """That script averages at every 20th update, we at every one: the share that forgets as fast."""
    theirs = settings[share]
    settings[share] = float(str(theirs)) ** (1 / AVERAGED_EVERY)
    return f"{share} {theirs} at every {AVERAGED_EVERY}th update of that script is {settings[share]:.6g} at every update here"


def _steps_and_validation(given: Settings, settings: Settings, name: str) -> list[str]:
    notes = []
    if "num_train_epochs" in settings and (name == "salesforce" or "max_train_steps" in settings):
        del settings["num_train_epochs"]
        notes.append("num_train_epochs is left out: max_train_steps decides, as in that script")
    if name == "diffusers":
        if _is_on(given, "run_validation"):
            settings.setdefault("validation_steps", 200)
            settings.setdefault("validation_prompts", list(VALIDATION_PROMPTS))
        elif settings.pop("validation_steps", None) is not None:
            notes.append("validation_steps is left out: without --run_validation that script validates nothing")
    return notes


def _possible_here(settings: Settings, added: set[str]) -> list[str]:
    """Take back what another script's command relies on and this machine lacks, and say so."""
    import torch

    notes = []
    on_gpu = torch.cuda.is_available()
    if settings.get("mixed_precision") == "fp16" and not on_gpu:
        settings["mixed_precision"] = "no"
        notes.append("mixed_precision fp16 needs a GPU, and there is none: no is used")
    if str(settings.get("allow_tf32", False)).lower() == "true" and not on_gpu:
        settings["allow_tf32"] = False
        notes.append("allow_tf32 is about GPUs, and there is none: it is left out")
    if "report_to" in added and importlib.util.find_spec("tensorboard") is None:
        settings["report_to"] = "none"
        notes.append("tensorboard is not installed: metrics.jsonl only (pip install diffpref[trackers])")
    return notes
