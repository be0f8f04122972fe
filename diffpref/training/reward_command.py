"""`diffpref train-reward-model`: settings from flags and YAML, then the run. Heavy imports follow when the settings are good."""

from __future__ import annotations

from collections.abc import Sequence

from diffpref.training.reward_config import RewardModelConfig
from diffpref.training.settings import build, help_text, names_of, parse_flags, read_yaml


def train_reward_model(argv: Sequence[str]) -> int:
    """Fit a reward model; returns the exit code. Raises ValueError for whatever the user can mend."""
    known = names_of(RewardModelConfig)
    flags = parse_flags(argv, [*known, "config", "help"])
    if "help" in flags:
        print(f"usage: diffpref train-reward-model [--config FILE.yaml] [--setting value ...]\n{help_text(RewardModelConfig)}")
        return 0
    path = flags.pop("config", None)
    config = build(RewardModelConfig, (read_yaml(path, known) if path else {}) | flags)
    import transformers

    from diffpref.training.reward_loop import fit
    from diffpref.training.stopping import Ended, say_end

    transformers.utils.logging.disable_progress_bar()
    try:
        fitted = fit(config)
    except Ended as end:
        return say_end(end)
    if fitted.is_main_process:
        held_out = "" if fitted.accuracy is None else f", held-out accuracy {fitted.accuracy:.3f}"
        print(f"reward model of step {fitted.step}{held_out}: use it as pickscore={fitted.folder}")
    return 0
