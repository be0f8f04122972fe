"""Flags of other scripts: which are settings of ours under another name, and which need nothing here (docs/migrate.md)."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "beta_dpo": "beta",
    "dataset_split_name": "split",
    "tracker_name": "tracker_project_name",
    "lora_rank": "rank",
    "validation_prompt": "validation_prompts",
    "beta_mapo": "beta",
    "snr_value": "snr",
    "num_inference_steps": "num_steps",
    "positive_ratio": "desirable_share",
    "lambda_d_kto": "desirable_weight",
    "lambda_u_kto": "undesirable_weight",
    "halo": "value_function",
    "bce_offset": "reference_point",
    "pick_split": "split",
    "ema_momentum": "ema_decay",
    "reference_ema_momentum": "reference_decay",
    "winner_preserving_mu": "mu",
    "dmpo_alpha": "alpha",
}
"""Other scripts' names for our settings."""

VALUES: Mapping[str, Mapping[str, str]] = {
    "halo": {"sigmoid": "sigmoid", "loss_averse": "loss_averse", "risk_seeking_3": "risk_seeking"},
    "bce_offset": {"none": "mean", "sigmoid": "class_means"},
}
"""Their values, where those have other names here; others of that flag are refused: they have no counterpart."""

MEANING: Mapping[str, tuple[str, str]] = {
    "use_8bit_adam": ("optimizer", "adamw_8bit"),
    "use_adafactor": ("optimizer", "adafactor"),
    "enable_xformers_memory_efficient_attention": ("attention", "xformers"),
    "sft": ("method", "sft"),
    "use_lora": ("tune", "lora"),
    "reference_ema": ("reference_update_steps", "20"),
}
"""Switches of other scripts as (our setting, its value)."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "local_rank": "the launcher's environment says it",
    "hard_skip_resume": "resuming reads no batch twice",
    "prior_generation_precision": "no prior images are generated",
    "image_column": "a pair has two image columns, image_0_column and image_1_column",
    "remove_ties": "ties are dropped unless tie_policy says otherwise (the MaPO script reads any word after it as true)",
    "cache_dir_model": "models lie in the hub's own cache, whose place is HF_HOME",
    "policy": "pictures that were preferred at least once are good, as its gt_label_wi_l has it",
    "dataloader": "the form of the data is recognised",
    "fixed_noise": "validation pictures keep their noise anyway",
    "track_score": "validation_scorer scores the validation pictures",
    "eval_metrics": "validation_scorer scores the validation pictures",
    "h_pos": "that script does not use it",
    "h_neg": "that script does not use it",
}
"""Flags that are accepted and need nothing, with the reason."""

ONLY: Mapping[str, tuple[str, str]] = {
    "policy": (
        "gt_label_wi_l",
        "For another rule, give single pictures with labels of your own (form labelled in docs/data.md) and leave it out",
    ),
}
"""Flags without effect whose one value describes what we do: (the value, the way to anything else, which is refused)."""

CHECKED = ("sdxl", "run_validation", "train_method", "use_winner_preserving", "loss")
"""Flags that are looked at here and are no settings of ours."""

TRAINED: Mapping[str, Mapping[str, str]] = {
    "train_method": {"diffusion-dpo": "diffusion_dpo", "dspo": "dspo", "dmpo": "dmpo", "sft": "sft"},
    "loss": {"kto": "diffusion_kto", "dpo": "diffusion_dpo", "sft": "sft"},
}
"""Flags of other scripts that choose the method."""

FOREIGN: tuple[str, ...] = (*RENAMED, *MEANING, *WITHOUT_EFFECT, *CHECKED)
"""Every accepted flag that is no setting of ours."""
