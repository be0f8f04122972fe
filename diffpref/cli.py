"""The `diffpref` command. Scripts are its subcommands under names of their own.

Heavy imports happen inside the functions, so that a mistake in a setting is reported before a second has passed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

USAGE = """usage: diffpref COMMAND [--setting value ...]

  train      align a model with preference pairs; without model and data it uses the embedded testbed
  generate   pictures from prompts and seeds, with a base, aligned or LoRA checkpoint
  evaluate   compare an aligned testbed model with its base: report.html, report.json
  testbed    rebuild the testbed: vae, base, pairs, ruler, or run its results table

diffpref COMMAND --help lists the settings of a command."""


QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Environment of the libraries below us, so that the run's own lines can be seen; values already set win."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 2 for a mistake of the user, 3 after non-finite updates, 130/143 after a signal."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    commands: dict[str, Callable[[list[str]], int]] = {"train": train, "generate": generate, "evaluate": evaluate, "testbed": testbed}
    if words[0] not in commands:
        return _fail(f"{words[0]!r} is not a command; use {', '.join(commands)}")
    try:
        return commands[words[0]](words[1:])
    except ValueError as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def train(argv: list[str]) -> int:
    """Train, export, and on the testbed also compare with the base and write the report."""
    _die_with_launcher()
    from diffpref.methods import METHODS
    from diffpref.training.config import TrainConfig
    from diffpref.training.settings import ALIASES, build, help_text, names_of, parse_flags, read_yaml

    extra = ("config", "help", *EVALUATION_SETTINGS)
    known = [*dict.fromkeys([*names_of(TrainConfig, *METHODS.values()), *extra])]
    flags = parse_flags(argv, known)
    if flags.pop("help", False):
        print(f"usage: diffpref train [--config FILE.yaml] [--setting value ...]\n{help_text(TrainConfig, *METHODS.values())}")
        print(f"\nAlso accepted: {', '.join(f'--{a} for --{b}' for a, b in ALIASES.items())}")
        return 0
    path = flags.pop("config", None)
    settings = (read_yaml(path, known) if path else {}) | flags
    on_testbed = settings.get("pretrained_model_name_or_path") is None and not (
        settings.get("train_data_dir") or settings.get("dataset_name")
    )
    if on_testbed:
        settings = _testbed_settings(settings, known)
        print(f"No model and no data given: using the embedded testbed, method {settings['method']}.", flush=True)
    _check_model_and_data(settings)
    evaluation = {name: settings.pop(name) for name in EVALUATION_SETTINGS if name in settings}
    if evaluation and not on_testbed:
        raise ValueError(f"{next(iter(evaluation))} belongs to the testbed's report; leave it out when model and data are given")
    method_name = settings.get("method", TrainConfig.method)
    if method_name not in METHODS:
        raise ValueError(f"method is {method_name!r}; accepted: {', '.join(METHODS)}")
    settings.setdefault("output_dir", f"outputs/{method_name}-{time.strftime('%Y%m%d-%H%M%S')}")
    mine = names_of(METHODS[method_name])
    foreign = [n for n in settings if n not in names_of(TrainConfig) and n not in mine]
    if foreign:
        owned = ", ".join(mine) or "none of its own"
        raise ValueError(f"{foreign[0]} is {settings[foreign[0]]!r}, but it is no setting of method {method_name}; it has {owned}")
    config = build(TrainConfig, {n: v for n, v in settings.items() if n not in mine})
    return _run(config, build(METHODS[method_name], {n: v for n, v in settings.items() if n in mine}), on_testbed, evaluation)


EVALUATION_SETTINGS = ("num_eval_prompts", "eval_batch_size")
"""Settings of the comparison that follows a run on the testbed."""


def _testbed_settings(settings: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """The testbed's settings for the chosen method, overridden by `settings`."""
    from diffpref.locations import asset, config_file
    from diffpref.training.settings import read_yaml

    method = settings.get("method", "diffusion_dpo")
    defaults = read_yaml(config_file("testbed", f"{method}.yaml"), known)
    if settings.get("tune") == "full" and defaults.get("tune") == "lora":
        defaults = read_yaml(config_file("testbed", f"{method}_full.yaml"), known)
    places = {
        "pretrained_model_name_or_path": str(asset("testbed", "pipeline")),
        "train_data_dir": str(asset("testbed", "pairs")),
    }
    return defaults | {n: v for n, v in settings.items() if v is not None or n not in places} | places


def _check_model_and_data(settings: dict[str, Any]) -> None:
    has_model = settings.get("pretrained_model_name_or_path") is not None
    has_data = bool(settings.get("train_data_dir") or settings.get("dataset_name"))
    if has_model and not has_data:
        raise ValueError(
            "a model is given but no data: add --train_data_dir FOLDER or --dataset_name HUB_ID (or give neither, for the testbed)"
        )
    if has_data and not has_model:
        raise ValueError(
            "data is given but no model: add --pretrained_model_name_or_path FOLDER_OR_HUB_ID (or give neither, for the testbed)"
        )


def _run(config: Any, method: Any, on_testbed: bool, evaluation: dict[str, Any]) -> int:
    from diffpref.training.export import export
    from diffpref.training.loop import train as run_loop
    from diffpref.training.run import prepare_run
    from diffpref.training.stopping import NotFinite, Stopped

    start = time.perf_counter()
    run = prepare_run(config, method)
    prepared = time.perf_counter()
    try:
        run_loop(run)
    except Stopped as stop:
        run.say(str(stop))
        return stop.code
    except NotFinite as problem:
        run.say(f"error: {problem}")
        return 3
    finally:
        run.log.close()
    timings = {"loading": prepared - start, "training": time.perf_counter() - prepared}
    if run.accelerator.is_main_process:
        export(run.backbone.pipeline, run.folder, config.tune, config.merge_lora)
        if on_testbed:
            from diffpref.testbed.demo import report_run

            report_run(run.folder, timings, **evaluation)
        else:
            print(f"aligned model: {run.folder}")
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return 0


def generate(argv: list[str]) -> int:
    """Pictures from prompts and seeds; see diffpref/evaluation/sample.py."""
    from diffpref.inference.sample import SampleConfig, sample

    config = _configured(SampleConfig, argv, "generate")
    return 0 if config is None else sample(config)


def evaluate(argv: list[str]) -> int:
    """Compare two testbed models."""
    from diffpref.testbed.demo import CompareConfig, compare_models

    config = _configured(CompareConfig, argv, "evaluate")
    return 0 if config is None else compare_models(config)


def testbed(argv: list[str]) -> int:
    """Rebuild parts of the testbed, or run its results table."""
    from diffpref.testbed.build import PARTS

    if not argv or argv[0] not in PARTS:
        raise ValueError(f"testbed {argv[0] if argv else ''!r}: give one of {', '.join(PARTS)}")
    config_class, work = PARTS[argv[0]]
    config = _configured(config_class, argv[1:], f"testbed {argv[0]}")
    if config is not None:
        work(config)
    return 0


def _configured(cls: type[Any], argv: list[str], command: str) -> Any:
    """Settings of a command from flags; None after printing its help."""
    from diffpref.training.settings import build, help_text, names_of, parse_flags

    flags = parse_flags(argv, [*names_of(cls), "help"])
    if flags.pop("help", False):
        print(f"usage: diffpref {command} [--setting value ...]\n{help_text(cls)}")
        return None
    return build(cls, flags)


def _die_with_launcher() -> None:
    """Under a launcher, ask the kernel for SIGTERM when it dies: accelerate launch does not pass signals on."""
    if sys.platform == "linux" and ("ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def script(command: str, *fixed: str) -> int:
    """Entry of the files in scripts/: a subcommand with fixed leading settings."""
    return main([command, *fixed, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
