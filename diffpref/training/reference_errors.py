"""The reference's errors, computed once: a run that reads them asks no reference, and full training holds no second network.

    (seed, pair, visit) -> error of each picture of the group, mean over (C, h, w) in float32

What the reference says at a visit depends on nothing that is trained: x_t comes from keyed draws. So one pass over the visits of a
run serves every later run with the same draws, whatever its method's loss, beta, rate or adapters. At the batch shape of
the pass the errors are those of the run bit for bit on a CPU; at another shape they agree to rounding.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffpref.core.policy import guided
from diffpref.core.random import moved
from diffpref.core.rewards import mean_squared_error
from diffpref.core.types import PreferenceBatch
from diffpref.data.cache import Key, Places, as_int64, crc, differences, key, read_manifest
from diffpref.models.backbone import text_encoders
from diffpref.paths.forward import ForwardNoising
from diffpref.training.latent_cache import fingerprint
from diffpref.training.settings import to_flat

if TYPE_CHECKING:  # which imports this file
    from diffpref.training.config import TrainConfig
    from diffpref.training.objective import Objective
    from diffpref.training.run import Run

_DECIDES = (
    *("seed", "train_batch_size", "resolution", "random_crop", "no_hflip", "flip_mode", "aspect_ratio_buckets", "bucket_step"),
    *("proportion_empty_prompts", "base_dtype", "allow_tf32", "prediction_type", "rescale_betas_zero_snr", "is_turbo"),
    *("attention", "channels_last", "compile", "compile_backend", "caption_column", "image_0_column", "image_1_column", "label_column"),
    *("user_column", "train_text_encoder", "pack_weights"),
)
"""Settings of which the errors are made, beside model, data and path."""


@dataclass(frozen=True, eq=False)
class ReferenceErrors:
    """Errors by (seed, pair, visit)."""

    path: Path
    places: Places
    values: Tensor  # (N, K) float32, in the order of the file

    def attach(self, batch: PreferenceBatch, seed: int) -> PreferenceBatch:
        """The batch with the errors of its visits. Raises ValueError for a visit that was not computed."""
        at = self.places.find(visit_keys(batch, seed))[:, 1]
        if (at < 0).any():
            raise ValueError(
                f"reference_errors {str(self.path)!r} has no errors for visit {max(batch.visits)} of its pairs with seed {seed}: it was "
                "made for fewer steps, or the run went back to a checkpoint and draws anew; delete the file to have it made again, or "
                "leave reference_errors out"
            )
        return replace(batch, reference_error=moved(self.values[at.tolist()], batch.latents.device))


def visit_keys(batch: PreferenceBatch, seed: int) -> list[Key]:
    """What the errors of a batch's groups are called."""
    return [key("reference", seed, pair_id, visit) for pair_id, visit in zip(batch.pair_ids, batch.visits, strict=True)]


def check_reference_errors(config: TrainConfig, objective: Objective) -> None:
    """Raises ValueError where errors cannot be known beforehand, or do not suffice."""
    if config.reference_errors is None:
        return
    where = f"reference_errors is {config.reference_errors!r}, but "
    if not objective.needs_reference:
        raise ValueError(f"{where}method {config.method} has no reference; leave it out")
    if objective.method.needs_reference_prediction:
        raise ValueError(f"{where}method {config.method} needs what the reference predicts, not only its error; leave it out")
    if not isinstance(objective.path, ForwardNoising):
        raise ValueError(f"{where}on path {type(objective.path).__name__} x_t depends on the policy; use path forward, or leave it out")
    if config.reference_update_steps is not None:
        raise ValueError(f"{where}reference_update_steps is {config.reference_update_steps}, which moves the reference; drop one of them")


def described(run: Run) -> dict[str, Any]:
    """What the errors of a run depend on. The weights are those before the first step: a resumed run has left them behind."""
    config = run.config
    found = {name: getattr(config, name) for name in _DECIDES}
    found |= {"path": type(run.objective.path).__name__, **to_flat(run.objective.path), "data": run.data}
    if run.objective.conditioning:
        found |= to_flat(run.objective.conditioning)
    found["mixed_precision"] = run.accelerator.mixed_precision
    if run.first_step == 0:
        found["model"] = fingerprint([run.backbone.denoiser])
        found["autoencoder"] = fingerprint([run.backbone.pipeline.vae])
        found["text_encoders"] = fingerprint(text_encoders(run.backbone))
    if config.latent_cache:
        found["stored_dtype"] = (read_manifest(Path(config.latent_cache)) or {}).get("stored_dtype")
    return found


def open_or_compute(run: Run, source: Callable[[], Iterator[PreferenceBatch]]) -> ReferenceErrors:
    """The errors of run.config.reference_errors; computed with the run's reference and written there if the file is not there.

    source: gives this rank's micro-batches of the whole run. Every rank has to call this. Raises ValueError for a file that belongs to
    other settings, with both values.
    """
    path = Path(str(run.config.reference_errors))
    wanted = described(run)
    if run.agree(int(not path.exists())):
        _compute(run, source(), path, wanted)
    try:
        with safe_open(path, "pt") as file:
            made_with, wanted_sum = json.loads(file.metadata()["made_with"]), int(file.metadata()["sum"])
            made_with.setdefault("pack_weights", False)  # files from before there were packed weights
            names, values = file.get_tensor("key"), file.get_tensor("error")
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"reference_errors {str(path)!r} cannot be read ({error}); delete it, or name another file") from error
    if crc((names, values)) != wanted_sum:
        raise ValueError(
            f"reference_errors {str(path)!r} is damaged: its bytes are not those that were written; delete it, or name another"
        )
    if run.first_step:
        for name in ("model", "autoencoder", "text_encoders"):
            made_with.pop(name, None)
    found = [text.replace("in the cache", "in the file") for text in differences(made_with, wanted)]
    if found:
        raise ValueError(f"reference_errors {str(path)!r} was made with other settings: {', '.join(found)}; name another file")
    rows = torch.stack([torch.zeros(len(values), dtype=torch.int32), torch.arange(len(values), dtype=torch.int32)], 1)
    return ReferenceErrors(path, Places(names.numpy(), rows.numpy()), values)


@torch.no_grad()
def _compute(run: Run, batches: Iterator[PreferenceBatch], path: Path, wanted: dict[str, Any]) -> None:
    """Ask the reference at every visit of the run, micro-batch by micro-batch as the run will."""
    if run.first_step:
        raise ValueError(f"reference_errors {str(path)!r} is gone, and the run goes on from step {run.first_step}; bring it back")
    accelerator, objective, seed, reference = run.accelerator, run.objective, run.config.seed, run.reference
    assert reference is not None
    found: dict[Key, Tensor] = {}
    count = run.config.max_train_steps * run.config.gradient_accumulation_steps
    for _ in tqdm(range(count), "reference", disable=None if accelerator.is_main_process else True, leave=False):
        batch = next(batches).first(objective.images_per_group)
        with accelerator.autocast():
            (step,) = objective.path(batch, run.process, batch.random(seed), run.policy, reference, run.null)
            prediction = guided(reference, run.null, step.guidance_scale)(step.x_t, step.timesteps, batch.cond)
        found.update(zip(visit_keys(batch, seed), mean_squared_error(prediction, step.target).float().cpu(), strict=True))
    parts = gather_object([found]) if accelerator.num_processes > 1 else [found]
    if accelerator.is_main_process:
        joined: dict[Key, Tensor] = {name: error for part in parts for name, error in part.items()}
        names = sorted(joined)
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {"key": as_int64(names), "error": torch.stack([joined[n] for n in names])}
        save_file(tensors, hidden, {"made_with": json.dumps(wanted), "sum": str(crc(tensors.values()))})
        hidden.chmod(0o644)
        hidden.replace(path)
        print(f"reference: errors of {len(names)} visits written to {path}", file=sys.stderr)
    accelerator.wait_for_everyone()


def with_errors(batches: Iterator[PreferenceBatch], errors: ReferenceErrors, seed: int) -> Iterator[PreferenceBatch]:
    """The same batches with the reference's errors."""
    return (errors.attach(batch, seed) for batch in batches)
