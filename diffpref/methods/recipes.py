"""The published systems as combinations: a method, the path its x_t are reached by, and the guards it wears.

Names and settings only; a run looks them up in METHODS, PATHS, SOURCES and GUARDS. Settings that are not named keep their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Settings = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Recipe:
    """One line of the table below."""

    method: str
    path: str = "forward"
    settings: Settings = field(default_factory=dict)  # of the method
    path_settings: Settings = field(default_factory=dict)
    guards: Mapping[str, Settings] = field(default_factory=dict)
    conditioning: str | None = None  # what the policy reads besides its prompt: "users" or "axes" (training/conditioning.py)
    source: str | None = None  # who samples its pairs; None for stored ones
    source_settings: Settings = field(default_factory=dict)
    provisional: str = ""  # what the paper does not say, and is therefore our choice
    groups: Literal["pairs", "captioned", "captions", "images", "lists"] = "pairs"  # what is compared, see data/groups.py


RECIPES: dict[str, Recipe] = {
    "dense_reward": Recipe(
        "dense_reward",
        "recorded",
        source="stepwise",
        source_settings={
            **{"num_steps": 50, "guidance_scale": 7.5, "first_branch": 0, "num_inner_step": 49, "num_candidates": 5, "threshold": 0.0},
            **{"sampled_steps": 1, "discount": 0.9},
        },
        provisional="visits_per_rollout, and best and worst of one starting noise in place of two of five trajectories",
    ),
    "diffusion_dpo": Recipe("diffusion_dpo"),
    "diffusion_kto": Recipe("diffusion_kto", groups="images"),
    "diffusion_sdpo": Recipe("diffusion_dpo", guards={"sdpo": {"mu": 0.9}}),
    "dcpo": Recipe("diffusion_dpo", settings={"beta": 500.0}, groups="captioned"),
    "dmpo": Recipe("dmpo"),
    "dpop": Recipe("dpop", provisional="beta and penalty for diffusion models"),
    "dro": Recipe("dro", guards={"sdpo": {"mu": 0.6}}),
    "dspo": Recipe("dspo"),
    "inpo": Recipe("diffusion_dpo", "inversion", {"beta": 2000.0}, {"num_steps": 10}),
    "inversion_dpo": Recipe("inversion_dpo", "trajectory"),
    "lcpo": Recipe("lcpo", provisional="first reliability and its moving average; beta for diffusion models"),
    "lipo": Recipe("lipo", provisional="beta for diffusion models", groups="lists"),
    "list_mle": Recipe("lipo", settings={"list_loss": "list_mle"}, provisional="beta for diffusion models", groups="lists"),
    "mapo": Recipe("mapo"),
    "mcdpo": Recipe("diffusion_dpo", conditioning="axes", provisional="where the axes enter, both dropout rates, beta"),
    "odpo": Recipe("odpo", provisional="alpha and beta for diffusion models"),
    "ppd": Recipe("diffusion_dpo", conditioning="users", provisional="beta, user dropout, projector and initialisation"),
    "rank_dpo": Recipe("rank_dpo", path_settings={"shared_noise": False}, provisional="beta and learning rate", groups="lists"),
    "sft": Recipe("sft"),
    "smpo": Recipe("smpo", "inversion", path_settings={"num_steps": 5, "renoise_iterations": 1}),
    "smpo_pickscore": Recipe(  # the score range hard-coded by the authors; cosine of PickScore, without its logit scale
        "smpo",
        "inversion",
        {"score": "pickscore", "score_min": 0.11543526500463486, "score_max": 0.28201571106910706},
        {"num_steps": 5, "renoise_iterations": 1},
    ),
    "spo": Recipe("spo", "recorded", source="stepwise"),
    "spo_sdxl": Recipe(
        "spo",
        "recorded",
        source="stepwise",
        source_settings={"num_candidates": 2, "num_inner_step": 3, "threshold": 0.4, "prompts_per_rollout": 8},
    ),
    "tailor_po": Recipe(
        "spo",
        "recorded",
        {"clip_range": 0.0},
        source="stepwise",
        source_settings={"num_candidates": 2, "threshold": 0.0, "first_branch": 0},
        provisional="beta, the range of steps, and all settings of the optimizer",
    ),
    "tdpo": Recipe(
        "diffusion_dpo",
        guards={"sdpo": {"mu": 0.9}, "winner_anchor": {"anchor_weight": 1.0}},
        provisional="beta, and the clip on the negative term, for which the guards stand",
        groups="captions",
    ),
    "tkto": Recipe("diffusion_kto", provisional="beta", groups="captions"),
}
"""Every method of METHODS has the recipe of its own name."""
