"""The `diffpref` command. Scripts are its subcommands under names of their own.

Heavy imports happen inside the functions, so that a mistake in a setting is reported before a second has passed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from diffpref.training.launcher import die_with_launcher, ending_on_signals, leave_processes, use_all_cores

USAGE = """usage: diffpref COMMAND [--setting value ...]

  train      align a model with preference pairs; without model and data it uses the embedded testbed
  cache      encode a run's pictures and prompts once; runs with --latent_cache then start at once
  generate   pictures from prompts and seeds, with a base, aligned or LoRA checkpoint
  export     a run's result for another program: kohya LoRA, merged pipeline, single file
  inspect    what preference data holds: broken rows, duplicates, sizes, labels, scores, annotators
  label      pairs from a model's pictures, judged by scorers; or scores and labels for existing pairs
  evaluate   aligned models against their base, judged by scorers: report.html, report.json, scores.parquet
  benchmark  pictures in the layouts of GenEval, DPG-Bench, T2I-CompBench and HPDv2, and their results
  verify     a published checkpoint: our figures beside the paper's
  testbed    compare with the base and its controls, rebuild parts of the testbed, or run its results table
  train-reward-model       fit a scorer to preference pairs, saved in PickScore's layout
  train-step-aware-scorer  fit SPO's judge of half-denoised pictures to preference pairs

diffpref COMMAND --help lists the settings of a command."""


QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Environment of the libraries below us, so that the run's own lines can be seen; values already set win."""


SHARED_WORK = ("train", "train-reward-model", "generate", "label", "evaluate", "verify", "benchmark")
"""Commands that run on several processes; none of them outlives its launcher, or it would work beside the next start."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 2 for a mistake of the user, others as in docs/reliability.md."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] in SHARED_WORK:
        die_with_launcher()
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "cache": cache,
        "generate": generate,
        "export": export,
        "label": label,
        "inspect": inspect,
        "evaluate": evaluate,
        "verify": verify,
        "benchmark": benchmark,
        "testbed": testbed,
        "train-reward-model": train_reward_model,
        "train-step-aware-scorer": lambda argv: train_reward_model(argv, is_step_aware=True),
    }
    if words[0] not in commands:
        return _fail(f"{words[0]!r} is not a command; use {', '.join(commands)}")
    try:
        with ending_on_signals():
            code = commands[words[0]](words[1:])
    except ValueError as error:
        return _fail(str(error))
    leave_processes(code)
    return code


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def train(argv: list[str]) -> int:
    """Train, export, and on the testbed also compare with the base and write the report."""
    use_all_cores()
    from diffpref.training.config import TrainConfig
    from diffpref.training.settings import build, convert, names_of

    found = _train_settings(argv)
    if found is None:
        return 0
    settings, objective, notes = found
    num_prompts = convert("num_eval_prompts", settings.pop("num_eval_prompts", None), int | None)
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_eval_prompts is {num_prompts}; it must be at least 1")
    config = build(TrainConfig, {name: value for name, value in settings.items() if name in names_of(TrainConfig)})
    return _run(config, objective, num_prompts, notes)


def cache(argv: list[str]) -> int:
    """Encode the pictures and prompts of a run into its latent_cache; see diffpref/training/latent_cache.py."""
    use_all_cores()
    from diffpref.training.cache_config import CacheConfig
    from diffpref.training.config import TrainConfig
    from diffpref.training.settings import build, help_text, names_of, parse_flags, split_flags

    own_flags, rest = split_flags(argv, names_of(CacheConfig))
    own = build(CacheConfig, parse_flags(own_flags, names_of(CacheConfig)))
    found = _train_settings(rest)
    if found is None:
        print(f"\nusage: diffpref cache --latent_cache FOLDER [the settings above] [--setting value ...]\n{help_text(CacheConfig)}")
        return 0
    config = build(TrainConfig, {name: value for name, value in found[0].items() if name in names_of(TrainConfig)})
    if config.latent_cache is None:
        raise ValueError("latent_cache is not given; name the folder to make: --latent_cache FOLDER")
    from diffpref.training.cache_command import build_cache

    build_cache(config, own, found[1].groups)
    return 0


def _train_settings(argv: list[str]) -> tuple[dict[str, Any], Any, list[str]] | None:
    """(settings of the run, objective, what to say about their origin) of a training command; None after --help."""
    from diffpref.training.config import TrainConfig
    from diffpref.training.families import merged, translate, what_is_trained
    from diffpref.training.foreign_flags import FOREIGN
    from diffpref.training.help import train_help
    from diffpref.training.objective import all_names, build_objective, objective_names
    from diffpref.training.settings import convert, names_of, parse_flags, read_yaml

    extra = ("config", "help", "preset", "num_eval_prompts", "path", "guards")
    known = [*dict.fromkeys([*names_of(TrainConfig), *all_names(), *FOREIGN, *extra])]
    flags = parse_flags(argv, known)
    if flags.pop("help", False):
        print(train_help())
        return None
    path = flags.pop("config", None)
    given = merged(read_yaml(path, known) if path else {}, flags)
    preset, way = given.pop("preset", None), given.pop("path", None)
    given = what_is_trained(given)
    guards = convert("guards", given.pop("guards", ()), tuple[str, ...])
    name = given.get("method", TrainConfig.method)
    owned = objective_names(name, way, guards)
    on_testbed = not any(given.get(source) for source in SOURCES)
    if on_testbed and preset:
        raise ValueError(f"preset is {preset!r}, which belongs to runs with a model and data; leave it out on the testbed")
    if not on_testbed:
        _check_model_and_data(given, samples="step_scorer" in owned)
        if "num_eval_prompts" in given:
            raise ValueError(
                f"num_eval_prompts is {given['num_eval_prompts']}; it belongs to the testbed: leave it out with a model and data"
            )
    ask = (lambda _: "sdxl") if on_testbed else _model_family
    done = translate(given, "diffpref" if on_testbed else preset, [*names_of(TrainConfig), *owned], ask, name)
    _check_used(done.settings, names_of(TrainConfig), owned)
    settings, notes = done.settings, done.notes
    if on_testbed:
        print(f"No model and no data given: using the embedded testbed, method {name}.", flush=True)
        settings, notes = _testbed_settings(settings | {"method": name}), []
    return settings, build_objective(name, settings, way, guards), notes


def _model_family(settings: dict[str, Any]) -> str:
    from diffpref.models.backbone import model_family

    return model_family(str(settings["pretrained_model_name_or_path"]), settings.get("revision"))


SOURCES = ("pretrained_model_name_or_path", "train_data_dir", "dataset_name")
"""Without any of these a run uses the testbed."""
LORA_SETTINGS = ("rank", "lora_alpha", "lora_targets", "merge_lora")


def _check_used(settings: dict[str, Any], common: list[str], owned: list[str]) -> None:
    """Raises ValueError for a setting that the method, or full tuning, would ignore."""
    for name, value in settings.items():
        if name not in (*common, *owned, "num_eval_prompts"):
            known = ", ".join(owned) or "none of its own"
            raise ValueError(f"{name} is {value}, but it is no setting of method {settings.get('method')}; it has {known}. Leave it out")
        if settings.get("tune") == "full" and name in LORA_SETTINGS:
            raise ValueError(f"{name} is {value}, but tune is full, which has no adapter; leave it out or use tune lora")


def _testbed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The testbed's settings for the chosen method and tuning, overridden by `settings`."""
    from diffpref.methods.recipes import RECIPES
    from diffpref.testbed.recipe import read_recipe, scored_pairs

    method = settings.get("method", "diffusion_dpo")
    if RECIPES[method].conditioning:
        raise ValueError(f"method is {method}, but the embedded pairs have no users; run diffpref testbed users, or give a model and data")
    found = {"num_eval_prompts": 200} | read_recipe(f"{method}_full" if settings.get("tune") == "full" else method) | settings
    return found | ({"train_data_dir": str(scored_pairs())} if found.get("score") == "testbed_pickscore" else {})


def _check_model_and_data(settings: dict[str, Any], samples: bool) -> None:
    has_model = settings.get("pretrained_model_name_or_path") is not None
    data = settings.get("train_data_dir") or settings.get("dataset_name")
    if has_model and not data and not samples:
        raise ValueError(
            f"pretrained_model_name_or_path is {settings['pretrained_model_name_or_path']!r} but no data is given: "
            "add --train_data_dir FOLDER or --dataset_name HUB_ID (or give neither, for the testbed)"
        )
    if data and not has_model:
        raise ValueError(
            f"data {data!r} is given but no model: add --pretrained_model_name_or_path FOLDER_OR_HUB_ID (or give neither, for the testbed)"
        )


def _run(config: Any, objective: Any, num_eval_prompts: int | None, notes: list[str]) -> int:
    """Align, and with num_eval_prompts compare with the testbed's base. `notes` say where settings came from."""
    from diffpref.testbed.step_scorers import testbed_step_scorer
    from diffpref.training.align import align, refresh_card
    from diffpref.training.stopping import Ended, say_end

    _no_loading_bars()
    try:
        aligned = align(config, objective, notes, testbed_step_scorer(objective))
    except Ended as end:
        return say_end(end)
    if aligned.is_main_process and num_eval_prompts:
        from diffpref.testbed.demo import report_run

        report_run(aligned.folder, aligned.timings, num_eval_prompts)
        refresh_card(aligned, config)
    elif aligned.is_main_process:
        print(f"aligned model: {aligned.folder}")
    return 0


def generate(argv: list[str]) -> int:
    """Pictures from prompts and seeds; see diffpref/inference/sample.py."""
    from diffpref.inference.sample import SampleConfig, sample

    config = _configured(SampleConfig, argv, "generate")
    _no_loading_bars()
    return 0 if config is None else sample(config)


def export(argv: list[str]) -> int:
    """A LoRA or pipeline in another form; see diffpref/inference/export.py."""
    from diffpref.inference.export import ExportConfig
    from diffpref.inference.export import export as run

    config = _configured(ExportConfig, argv, "export")
    _no_loading_bars()
    return 0 if config is None else run(config)


def label(argv: list[str]) -> int:
    """Pairs from scorers; see diffpref/labelling/command.py."""
    from diffpref.evaluation.scoring import load_scorers
    from diffpref.labelling import command

    config = _configured(command.LabelConfig, argv, "label")
    _no_loading_bars()
    return 0 if config is None else command.label(config, load_scorers(config.scorers, _scorer_of(config)))


def _scorer_of(config: Any) -> Callable[[str], Callable[..., Any]]:
    """The scorer that a name or name=weights stands for; those of the testbed are known here and not to the library."""

    def load(spec: str) -> Callable[..., Any]:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        name, _, place = spec.partition("=")
        if spec == "testbed":
            from diffpref.testbed.reward import TrueReward

            return TrueReward()
        if spec == "testbed_pickscore":
            from diffpref.testbed.scorer import shipped_scorer

            return shipped_scorer()
        if name == "implicit":
            from diffpref.inference.score import load_implicit_scorer
            from diffpref.locations import asset

            if not place:
                raise ValueError(f"scorer {spec!r} names no run; give implicit=FOLDER, the output_dir of a run or another aligned model")
            return load_implicit_scorer(config.pretrained_model_name_or_path or str(asset("testbed", "pipeline")), place, device=device)
        from diffpref.scorers import scorer_from

        return scorer_from(spec, device)

    return load


def train_reward_model(argv: list[str], is_step_aware: bool = False) -> int:
    """Fit a reward model, or a step-aware one, to pairs; see diffpref/training/reward_command.py."""
    use_all_cores()
    from diffpref.training import reward_command

    return reward_command.train_step_aware_scorer(argv) if is_step_aware else reward_command.train_reward_model(argv)


def inspect(argv: list[str]) -> int:
    """What preference data holds; see diffpref/labelling/inspection.py."""
    from diffpref.labelling.inspection import InspectConfig, inspect

    config = _configured(InspectConfig, argv, "inspect")
    return 0 if config is None else inspect(config)


def evaluate(argv: list[str]) -> int:
    """Aligned models against their base; see diffpref/inference/evaluate.py."""
    from diffpref.evaluation.scoring import load_scorers
    from diffpref.inference.evaluate import EvaluateConfig, evaluate
    from diffpref.locations import asset
    from diffpref.testbed.recipe import TESTBED_EVALUATION, evaluation_prompts

    config = _configured(EvaluateConfig, argv, "evaluate", TESTBED_EVALUATION)
    if config is None:
        return 0
    _no_loading_bars()
    on_testbed = config.pretrained_model_name_or_path is None
    prompts = evaluation_prompts(config.max_prompts) if on_testbed and not (config.prompts or config.prompt_set) else None
    base = str(asset("testbed", "pipeline")) if on_testbed else config.pretrained_model_name_or_path
    report = evaluate(config, load_scorers(config.scorers, _scorer_of(config)), base, prompts)
    if report is not None:
        print(report.as_markdown())
        print(f"report: {config.output_dir}/report.html")
    return 0


def benchmark(argv: list[str]) -> int:
    """Layouts and results of public benchmarks; see diffpref/inference/benchmark.py."""
    from diffpref.inference.benchmark import BenchmarkConfig, ResultsConfig, draw, read

    parts: dict[str, tuple[type[Any], Callable[[Any], int]]] = {"draw": (BenchmarkConfig, draw), "read": (ResultsConfig, read)}
    if not argv or argv[0] not in parts:
        raise ValueError(f"benchmark {argv[0] if argv else ''!r}: give one of {', '.join(parts)}")
    config_class, work = parts[argv[0]]
    config = _configured(config_class, argv[1:], f"benchmark {argv[0]}")
    _no_loading_bars()
    return 0 if config is None else work(config)


def verify(argv: list[str]) -> int:
    """A published checkpoint against the published figures; see diffpref/inference/verify.py."""
    from diffpref.evaluation.scoring import load_scorers
    from diffpref.inference.verify import VerifyConfig, as_evaluation, as_text, verify

    config = _configured(VerifyConfig, argv, "verify")
    if config is None:
        return 0
    _no_loading_bars()
    found = verify(config, load_scorers(as_evaluation(config).scorers, _scorer_of(config)), config.pretrained_model_name_or_path)
    if found is not None:
        print(as_text(found))
        print(f"to share: {config.output_dir}/verify.json")
    return 0


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


def _configured(cls: type[Any], argv: list[str], command: str, testbed: dict[str, Any] | None = None) -> Any:
    """Settings of a command from flags, with the testbed's below them when no model is named; None after printing its help."""
    from diffpref.training.settings import build, help_text, names_of, parse_flags

    flags = parse_flags(argv, [*names_of(cls), "help"])
    if flags.pop("help", False):
        print(f"usage: diffpref {command} [--setting value ...]\n{help_text(cls)}")
        return None
    return build(cls, flags if "pretrained_model_name_or_path" in flags else (testbed or {}) | flags)


def _no_loading_bars() -> None:
    """Hide the bars of models that load or are saved in a second; the libraries have no environment variable for them."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def script(command: str, *fixed: str) -> int:
    """Entry of the files in scripts/: a subcommand with fixed leading settings."""
    return main([command, *fixed, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
