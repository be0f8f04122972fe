"""`diffpref cache`: encode the pictures and prompts of a run once, into a folder that later runs read (data/cache.py)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from tqdm import tqdm

from diffpref.data import cache
from diffpref.data.cache import Key, LatentStore
from diffpref.data.groups import Grouping
from diffpref.data.loader import PairPixels
from diffpref.models.backbone import Backbone, check_finite, text_encoders
from diffpref.sources.dataset import Encoder
from diffpref.sources.stored import contents, missing_prompts, owed, picture_keys, store_latents, store_prompts
from diffpref.training import machine
from diffpref.training.cache_config import CacheConfig
from diffpref.training.config import TrainConfig
from diffpref.training.device import new_accelerator
from diffpref.training.latent_cache import differences, identity
from diffpref.training.memory import words
from diffpref.training.pairs import load_run_pairs
from diffpref.training.run_folder import write_json
from diffpref.training.sources import held_out_pixels, new_encoder, new_pixels
from diffpref.training.start import DTYPES, load_base


def build_cache(config: TrainConfig, own: CacheConfig, grouping: Grouping) -> None:
    """Encode what is not stored yet and complete the folder; on several processes each encodes its share.

    grouping: what the method compares.

    Raises ValueError for whatever the user can mend: other settings than those of an existing folder, no room, damaged pictures.
    """
    folder = Path(str(config.latent_cache))
    start, accelerator = time.perf_counter(), new_accelerator(config)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # of models that load in a second
    pairs, held_out = load_run_pairs(config, accelerator.is_main_process, grouping)
    backbone = load_base(config)
    backbone.pipeline.vae.to(accelerator.device)
    for part in text_encoders(backbone):
        part.to(accelerator.device)
    check_finite(backbone, str(config.pretrained_model_name_or_path))
    sets = [new_pixels(config, pairs, backbone, grouping, accelerator.is_main_process)]
    if held_out is not None:  # mirrored as well: another run may train on them
        sets.append(dataclasses.replace(held_out_pixels(config, held_out, grouping, backbone), flip_probability=sets[0].flip_probability))
    encoder = new_encoder(dataclasses.replace(config, latent_cache=None), backbone, accelerator.device, sets[0].num_pictures)
    lock = _prepare_folder(folder, _manifest(config, own, backbone, encoder, sets[0].num_pictures), own.check_sums, accelerator)
    try:
        keys = [_all_contents(pixels, accelerator) for pixels in sets]
        _encode(folder, config, own, sets, keys, encoder, accelerator)
        if accelerator.is_main_process:
            pictures: dict[Key, Key] = {}
            for pixels, found in zip(sets, keys, strict=True):
                pictures |= zip(picture_keys(pixels), itertools.chain.from_iterable(found), strict=True)
            cache.write_index(folder, pictures)
            _report(folder, time.perf_counter() - start)
    except OSError as error:
        raise ValueError(f"latent_cache {str(folder)!r} cannot be written ({error.strerror}); choose another folder or disk") from error
    finally:
        if lock:
            lock.release()
    accelerator.wait_for_everyone()


def _manifest(config: TrainConfig, own: CacheConfig, backbone: Backbone, encoder: Encoder, pictures: int) -> dict[str, Any]:
    return {
        "format": cache.VERSION,
        "made_with": identity(config, backbone, pictures) | {"mirrored": not config.no_hflip},
        "model": config.pretrained_model_name_or_path,
        "revision": config.revision,
        "vae": config.pretrained_vae_model_name_or_path,
        "stored_dtype": own.stored_dtype,
        "pictures_at_once": encoder.pictures_at_once,
        "prompts_at_once": encoder.prompts_at_once,
        "prompt_fields": sorted(cache.fields_of(encoder.null_prompt)),
        "device": str(encoder.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers", "Pillow")},
    }


def _prepare_folder(folder: Path, manifest: dict[str, Any], check_sums: bool, accelerator: Accelerator) -> FileLock | None:
    """Write the manifest, or compare with the one that is there, and remove what an interrupted build has left; the lock on rank 0."""
    lock = None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            lock.acquire(timeout=0)
            _claim(folder, manifest)
            for name in cache.damaged(folder, check_sums):
                print(f"{name} has changed since it was written: made again", file=sys.stderr)
                (folder / name).unlink()
        except Timeout:
            raise ValueError(
                f"latent_cache {str(folder)!r} is being built by another process; wait for it, or use another folder"
            ) from None
        except OSError as error:
            raise ValueError(f"latent_cache {str(folder)!r} cannot be written ({error.strerror}); choose another folder") from error
    accelerator.wait_for_everyone()
    return lock


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises ValueError when the folder has another manifest, or none and other files."""
    found = cache.read_manifest(folder)
    if found is None:
        others = [p.name for p in folder.iterdir() if p.name != ".lock"]
        if others:
            raise ValueError(f"latent_cache {str(folder)!r} is not empty and no cache (it has {sorted(others)[0]}); choose another folder")
        write_json(folder / cache.MANIFEST, manifest)
        return
    compared = [{**m["made_with"], **{n: m[n] for n in ("stored_dtype", "pictures_at_once", "prompts_at_once")}} for m in (found, manifest)]
    if apart := differences(*compared):
        raise ValueError(
            f"latent_cache {str(folder)!r} was begun with other settings: {', '.join(apart)}. Use its settings, or another folder"
        )
    for part in folder.glob(".*.part"):  # of a build that was killed
        part.unlink()


def _all_contents(pixels: PairPixels, accelerator: Accelerator) -> list[list[Key]]:
    """Content keys of all pairs; each rank reads its share."""
    rank, world = accelerator.process_index, accelerator.num_processes
    bar = tqdm(range(rank, len(pixels), world), "reading pictures", disable=rank > 0 or None, delay=2, leave=False)
    mine = [contents(pixels, index) for index in bar]
    if world == 1:
        return mine
    shares = gather_object([mine])
    return [shares[index % world][index // world] for index in range(len(pixels))]


def _encode(
    folder: Path,
    config: TrainConfig,
    own: CacheConfig,
    sets: Sequence[PairPixels],
    keys: Sequence[Sequence[Sequence[Key]]],
    encoder: Encoder,
    accelerator: Accelerator,
) -> None:
    """This rank's share of what is not stored."""
    rank, world, dtype = accelerator.process_index, accelerator.num_processes, DTYPES[own.stored_dtype]
    known = set(cache.stored(folder, cache.LATENTS))
    work = [owed(pixels, found, known) for pixels, found in zip(sets, keys, strict=True)]
    texts = itertools.chain([""], (p for pixels in sets for i in range(len(pixels)) for p in pixels.prompts(i)))
    prompts = missing_prompts(texts, set(cache.stored(folder, cache.PROMPTS)))
    accelerator.wait_for_everyone()  # all have looked before anybody writes
    if accelerator.is_main_process:
        _check_room(folder, sets[0], sum(len(group.keys) for part in work for group in part), len(prompts), encoder, dtype)
    mine = [part[rank * len(part) // world : (rank + 1) * len(part) // world] for part in work]
    share = prompts[rank * len(prompts) // world : (rank + 1) * len(prompts) // world]
    total = sum(len(group.keys) for part in mine for group in part) + len(share)
    with tqdm(total=total, desc="encoding", unit="items", disable=rank > 0 or None) as bar:
        for pixels, part in zip(sets, mine, strict=True):
            store_latents(folder, pixels, part, encoder, dtype, config.dataloader_num_workers, bar.update)
        store_prompts(folder, share, encoder, None if own.stored_dtype == "fp32" else dtype, bar.update)
    accelerator.wait_for_everyone()


def _check_room(folder: Path, pixels: PairPixels, pictures: int, prompts: int, encoder: Encoder, dtype: torch.dtype) -> None:
    """Raises ValueError when the disk is too small for what will be written."""
    views = 2 if pixels.flip_probability else 1
    probe = encoder.encode_moments(torch.zeros(1, 3, pixels.resolution, pixels.resolution))
    text = sum(x.numel() for x in cache.fields_of(encoder.null_prompt).values())
    needed, free = (pictures * views * probe.numel() + prompts * text) * dtype.itemsize, machine.free_disk(folder)
    print(f"to encode: {pictures} pictures and {prompts} prompts, about {words(needed)}; {words(free)} free", file=sys.stderr)
    if needed > free:
        raise ValueError(
            f"latent_cache {str(folder)!r} would take {words(needed)} and there are {words(free)}: use another disk, or stored_dtype bf16"
        )


def _report(folder: Path, seconds: float) -> None:
    store = LatentStore.open(folder)
    size = sum((folder / name).stat().st_size for name in store.files)
    shown = f"{len(store.pictures.key)} pictures and {len(store.prompts.key)} prompts in {len(store.files)} files of {words(size)}"
    print(f"cache: {folder}, {shown}, {seconds:.1f} s; train with --latent_cache {folder}")
