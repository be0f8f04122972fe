"""What `diffpref train --help` prints."""

from __future__ import annotations

from diffpref.guards import GUARDS
from diffpref.methods import METHODS
from diffpref.methods.recipes import RECIPES
from diffpref.paths import PATHS
from diffpref.sources import SOURCES
from diffpref.training.conditioning import CONDITIONINGS
from diffpref.training.config import TrainConfig
from diffpref.training.families import FAMILIES
from diffpref.training.foreign_flags import FOREIGN
from diffpref.training.settings import help_text


def train_help() -> str:
    """Usage, every setting, and the names of methods, paths, guards and presets."""
    parts = (*METHODS.values(), *PATHS.values(), *SOURCES.values(), *GUARDS.values(), *CONDITIONINGS.values())
    return (
        f"usage: diffpref train [--config FILE.yaml] [--setting value ...]\n{help_text(TrainConfig, *parts)}\n\n"
        "  --num_eval_prompts  (int, default 200)\n      Testbed only: test prompts of the report.\n"
        f"  --preset  ({', '.join(FAMILIES)})\n      Whose defaults are meant; the flags tell when not given (docs/migrate.md).\n"
        f"  --path  ({', '.join(PATHS)})\n      How x_t is reached; the method's own when not given.\n"
        f"  --guards  (any of {', '.join(GUARDS)})\n      Guards to wear beside the method's own.\n\n"
        f"Methods: {', '.join(RECIPES)}\n\n"
        f"Flags of other scripts that are understood: {', '.join(f'--{name}' for name in FOREIGN)}"
    )
