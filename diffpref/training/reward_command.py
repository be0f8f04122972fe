"""`diffpref train-reward-model` and `diffpref train-step-aware-scorer`: settings from flags and YAML, then the run.

Heavy imports follow when the settings are good.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.settings import build, help_text, names_of, parse_flags, read_yaml
from diffpref.training.step_aware_config import PUBLISHED, StepAwareConfig


def train_step_aware_scorer(argv: Sequence[str]) -> int:
    """Fit a step-aware preference model; returns the exit code. Raises ValueError for whatever the user can mend."""
    known = [*names_of(RewardModelConfig), *names_of(StepAwareConfig)]
    flags = parse_flags(argv, [*known, "config", "help"])
    if "help" in flags:
        print(f"usage: diffpref train-step-aware-scorer [--config FILE.yaml] [--setting value ...]\n{help_text(StepAwareConfig)}")
        print(f"{help_text(RewardModelConfig)}\n\nOther defaults here: {', '.join(f'{n} {v}' for n, v in PUBLISHED.items())}")
        return 0
    path = flags.pop("config", None)
    settings = PUBLISHED | (read_yaml(path, known) if path else {}) | flags
    own = build(StepAwareConfig, {name: settings.pop(name) for name in names_of(StepAwareConfig) if name in settings})
    return _fit(build(RewardModelConfig, settings), own)


def train_reward_model(argv: Sequence[str]) -> int:
    """Fit a reward model; returns the exit code. Raises ValueError for whatever the user can mend."""
    known = names_of(RewardModelConfig)
    flags = parse_flags(argv, [*known, "config", "help"])
    if "help" in flags:
        print(f"usage: diffpref train-reward-model [--config FILE.yaml] [--setting value ...]\n{help_text(RewardModelConfig)}")
        return 0
    path = flags.pop("config", None)
    return _fit(build(RewardModelConfig, (read_yaml(path, known) if path else {}) | flags))


def _fit(config: RewardModelConfig, step_aware: StepAwareConfig | None = None) -> int:
    import diffusers
    import transformers

    from diffpref.training.reward_loop import fit
    from diffpref.training.stopping import Ended, say_end

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        fitted = fit(config, step_aware)
    except Ended as end:
        return say_end(end)
    if fitted.is_main_process:
        held_out = "" if fitted.accuracy is None else f", held-out accuracy {fitted.accuracy:.3f}"
        print(f"reward model of step {fitted.step}{held_out}: use it as {'spm' if step_aware else 'pickscore'}={fitted.folder}")
    return 0
