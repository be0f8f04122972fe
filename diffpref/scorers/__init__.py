"""Reward models: (images, prompts) -> scores (N,), higher is better."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

import torch

from diffpref.scorers.aesthetic import load_aesthetic
from diffpref.scorers.clip_score import load_clip_vith, load_clip_vitl
from diffpref.scorers.cycle_reward import load_cycle_reward
from diffpref.scorers.hps import load_hps
from diffpref.scorers.image_reward import load_image_reward
from diffpref.scorers.mps import load_mps
from diffpref.scorers.pickscore import load_pickscore
from diffpref.scorers.scorer import Scorer
from diffpref.scorers.step_aware import load_spm

# Each is called as loader(weights, device): weights is a hub id, a folder, a file, or None for the released repository.
SCORERS: dict[str, Callable[[str | None, torch.device | str], Scorer]] = {
    "aesthetic": load_aesthetic,
    "clip_vith_cos": load_clip_vith,
    "clip_vitl_cos": load_clip_vitl,
    "clipscore": partial(load_clip_vitl, rectified=True),
    "cycle_reward": partial(load_cycle_reward, "combo"),
    "cycle_reward_i2t": partial(load_cycle_reward, "i2t"),
    "cycle_reward_t2i": partial(load_cycle_reward, "t2i"),
    "hpsv2": partial(load_hps, "2.0"),
    "hpsv2.1": partial(load_hps, "2.1"),
    "hpsv2.1_no_antialias": partial(load_hps, "2.1", antialias=False),
    "hpsv2_no_antialias": partial(load_hps, "2.0", antialias=False),
    "image_reward": load_image_reward,
    "mps": load_mps,
    "pickscore": load_pickscore,
    "pickscore_cos": partial(load_pickscore, scaled=False),
    "spm_sd15": partial(load_spm, "spm_sd15"),
    "spm_sdxl": partial(load_spm, "spm_sdxl"),
}


def scorer_from(spec: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer that a name of SCORERS stands for; "name=place" takes its weights from a file, a folder or a hub id.

    Raises ValueError with the nearest name for an unknown one, for a device that is not there, and for files that are missing
    or do not fit.
    """
    name, separator, place = spec.partition("=")
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1, cutoff=0.5)
        raise ValueError(f"scorer {name!r} is unknown{f', nearest: {near[0]}' if near else ''}; accepted: {', '.join(SCORERS)}")
    if separator and not place:
        raise ValueError(f"scorer {spec!r} names no place after '='; give a file, a folder or a hub id, or leave '=' out")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}, which cannot be used here: {reason}") from error
    return SCORERS[name](place or None, device)
