"""Latents from a folder train exactly as those that are encoded on the way, and a folder that does not fit is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffpref.data import cache
from diffpref.data.cache import LatentStore
from diffpref.data.groups import Grouping
from diffpref.models.outlines import is_outline
from diffpref.sources import stored
from diffpref.training.cache_command import build_cache
from diffpref.training.cache_config import CacheConfig
from diffpref.training.config import TrainConfig
from diffpref.training.export import export
from diffpref.training.loop import train
from diffpref.training.run import Run
from diffpref.training.sources import new_encoder

ROOT = Path(__file__).resolve().parents[2]
Settings = dict[str, Any]
Go = Callable[..., Path]
SIZES = [(48, 32), (32, 32), (32, 48)]


@pytest.fixture(scope="session")
def shaped_file(tmp_path_factory: pytest.TempPathFactory, pair_columns: dict[str, list[Any]]) -> Path:
    """Twelve pairs with scores and repeated pictures, of which every third is wide or tall."""

    def resized(data: bytes, size: tuple[int, int]) -> bytes:
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).resize(size).save(out, "PNG")
        return out.getvalue()

    columns = {name: values[:12] for name, values in pair_columns.items()}
    for name in ("jpg_0", "jpg_1"):
        columns[name] = [resized(data, SIZES[i // 2 % 3]) for i, data in enumerate(columns[name])]
    columns["jpg_0"][6] = columns["jpg_1"][0]  # both pairs are of the first size
    columns["clip_0"] = [0.1 * i for i in range(12)]
    columns["clip_1"] = [0.5] * 12
    path = tmp_path_factory.mktemp("shaped") / "pairs.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def make_cache(base_settings: Settings, tmp_path: Path) -> Callable[..., Path]:
    """make_cache(folder name, CacheConfig or None, **settings of the run) -> the folder."""

    def make(name: str, own: CacheConfig | None = None, grouping: Grouping = "pairs", **settings: Any) -> Path:
        folder = tmp_path / name
        given = base_settings | {"output_dir": str(tmp_path / "unused"), "latent_cache": str(folder)} | settings
        build_cache(TrainConfig(**given), own or CacheConfig(), grouping)
        return folder

    return make


CASES: dict[str, Settings] = {
    "mirrored and dropped prompts": {},
    "each picture mirrored alone": {"flip_mode": "independent", "train_batch_size": 3},
    "buckets": {"aspect_ratio_buckets": True, "bucket_step": 16},
    "noisy labels and held-out pairs": {"label_noise_prob": 0.5, "held_out_pairs": 4, "validation_steps": 3, "num_validation_images": 1},
    "sdxl": {"family": "sdxl", "no_hflip": True},
}


@pytest.mark.parametrize("case", CASES)
def test_training_from_a_folder_is_training(
    case: str, make_cache: Callable[..., Path], run_training: Go, shaped_file: Path, sdxl_folder: Path
) -> None:
    settings = {"train_data_dir": str(shaped_file), "max_train_steps": 3} | CASES[case]
    if settings.pop("family", None):
        settings["pretrained_model_name_or_path"] = str(sdxl_folder)
    folder = make_cache("cache", **{name: x for name, x in settings.items() if name != "label_noise_prob"})
    online, from_folder = run_training("online", **settings), run_training("stored", **settings, latent_cache=str(folder))
    a, b = (load_file(run / "checkpoint-3" / "weights.safetensors") for run in (online, from_folder))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (online, from_folder)]
    for one, other in zip(*lines, strict=True):
        assert {n: x for n, x in one.items() if "time" not in n} == {n: x for n, x in other.items() if "time" not in n}


def test_nothing_is_encoded_while_training(make_cache: Callable[..., Path], prepare: Callable[..., Run], shaped_file: Path) -> None:
    folder = make_cache("cache", train_data_dir=str(shaped_file))
    run = prepare("run", train_data_dir=str(shaped_file), latent_cache=str(folder), proportion_empty_prompts=0.0)
    run.backbone.pipeline.vae.encode = run.backbone.pipeline.text_encoder.forward = None  # would fail
    assert next(run.source).latents.shape == (2, 2, 4, 8, 8)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_encoders_are_not_loaded_before_somebody_needs_them(
    family: str, make_cache: Callable[..., Path], prepare: Callable[..., Run], request: pytest.FixtureRequest
) -> None:
    model = str(request.getfixturevalue(f"{family}_folder"))
    settings = {"pretrained_model_name_or_path": model, "max_train_steps": 2, "tune": "full", "proportion_empty_prompts": 0.5}
    folder = make_cache("cache", **settings)
    run = prepare("run", **settings, latent_cache=str(folder))
    left_out = {name for name, part in run.backbone.pipeline.components.items() if is_outline(part)}
    assert left_out == {"vae", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    unet = sum(p.numel() * p.element_size() for p in run.backbone.denoiser.parameters())
    assert run.preflight is not None
    assert run.preflight.found["memory"]["weights"] == unet
    train(run)
    assert all(is_outline(run.backbone.pipeline.components[name]) for name in left_out)
    with run.exported():
        export(run.backbone.pipeline, run.folder, "full", merge_lora=False)
    original, result = DiffusionPipeline.from_pretrained(model), DiffusionPipeline.from_pretrained(run.folder)
    for name in left_out:
        expected, found = (getattr(pipeline, name).state_dict() for pipeline in (original, result))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[weight], x) for weight, x in expected.items())


def test_encoders_are_loaded_where_something_has_to_be_encoded(make_cache: Callable[..., Path], prepare: Callable[..., Run]) -> None:
    folder = make_cache("cache")
    drawn = prepare("drawn", latent_cache=str(folder), validation_steps=3, validation_prompts=("a",), num_validation_images=1)
    assert not any(is_outline(part) for part in drawn.backbone.pipeline.components.values())
    assert not any(is_outline(part) for part in prepare("plain").backbone.pipeline.components.values())


def test_scores_and_order_are_those_of_the_data(make_cache: Callable[..., Path], prepare: Callable[..., Run], shaped_file: Path) -> None:
    folder = make_cache("cache", train_data_dir=str(shaped_file))
    for noise in (0.0, 1.0):
        settings = {"train_data_dir": str(shaped_file), "label_noise_prob": noise, "train_batch_size": 6, "rarity_score": "clip"}
        fresh, kept = (next(prepare(f"{name}-{noise}", **settings, latent_cache=name and str(folder)).source) for name in (None, "stored"))
        assert torch.equal(fresh.latents, kept.latents)
        assert fresh.weight is not None
        assert kept.weight is not None
        assert torch.equal(fresh.weight, kept.weight)
        assert fresh.scores.keys() == kept.scores.keys()
        assert all(torch.equal(x, kept.scores[name]) for name, x in fresh.scores.items())


def test_trained_text_encoders_encode_their_own_prompts(make_cache: Callable[..., Path], prepare: Callable[..., Run]) -> None:
    run, store = prepare("run"), LatentStore.open(make_cache("cache"))
    for trained in (False, True):
        config = dataclasses.replace(run.config, train_text_encoder=trained, latent_cache=str(store.folder))
        assert (new_encoder(config, run.backbone, torch.device("cpu")).stored_prompt is None) == trained


def test_pictures_and_prompts_that_repeat_are_stored_once(make_cache: Callable[..., Path], shaped_file: Path) -> None:
    store = LatentStore.open(make_cache("cache", train_data_dir=str(shaped_file)))
    assert len(store.pictures.key) == 24
    assert len(cache.stored(store.folder, cache.LATENTS)) == 23
    assert len(store.prompts.key) == len(cache.stored(store.folder, cache.PROMPTS)) == 7  # with the empty one


@pytest.mark.reliability("D12")
def test_an_interrupted_build_goes_on_and_new_pairs_are_added(
    make_cache: Callable[..., Path], shaped_file: Path, monkeypatch: pytest.MonkeyPatch, run_training: Go
) -> None:
    settings: Settings = {"train_data_dir": str(shaped_file)}
    whole = make_cache("whole", **settings)
    monkeypatch.setattr(stored, "SHARD_BYTES", 5 * 2 * 2 * 4 * 8 * 8 * 4)
    monkeypatch.setattr(stored, "GROUPS_AT_ONCE", 2)
    write, written = cache.write_shard, []

    def die_at_the_third(folder: Path, *rest: Any) -> str:
        if len(written) == 2:
            (folder / ".latents-1.part").write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(write(folder, *rest))
        return written[-1]

    monkeypatch.setattr(cache, "write_shard", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_cache("parts", **settings, max_train_samples=8)
    with pytest.raises(ValueError, match=r"is not complete; build it: diffpref cache"):
        LatentStore.open(whole.parent / "parts")
    monkeypatch.setattr(cache, "write_shard", write)
    kept = {name: (whole.parent / "parts" / name).stat().st_mtime_ns for name in written}
    assert len(kept) == 2
    parts = make_cache("parts", **settings, max_train_samples=8)
    assert not list(parts.glob("*.part"))
    with pytest.raises(ValueError, match=r"lacks 4 of 12 pairs, the first is \w+; add it: diffpref cache"):
        run_training("too-few", **settings, latent_cache=str(parts))
    make_cache("parts", **settings)
    assert {name: (parts / name).stat().st_mtime_ns for name in written} == kept
    runs = [run_training(f"run-{f.name}", **settings, latent_cache=str(f)) for f in (whole, parts)]
    a, b = (load_file(run / "checkpoint-6" / "weights.safetensors") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


MISMATCHES: dict[str, tuple[Settings, str]] = {
    "size": ({"resolution": 48}, "resolution is 32 in the cache and 48 in this run"),
    "buckets": ({"aspect_ratio_buckets": True, "bucket_step": 16}, "aspect_ratio_buckets is False in the cache and True in this run"),
    "autoencoder": ({"pretrained_model_name_or_path": "sdxl"}, r"autoencoder is \w+ in the cache and \w+ in this run"),
    "mirrored pictures": ({"no_hflip": False}, r"mirrored is False in the cache and True in this run \(no_hflip is false\)"),
}


@pytest.mark.reliability("D12")
def test_other_settings_are_refused_with_both_values(
    make_cache: Callable[..., Path], prepare: Callable[..., Run], sdxl_folder: Path
) -> None:
    folder = make_cache("cache", no_hflip=True)
    for settings, message in MISMATCHES.values():
        given = {name: str(sdxl_folder) if x == "sdxl" else x for name, x in settings.items()}
        with pytest.raises(ValueError, match=f"latent_cache .*cache' was made with other settings: .*{message}"):
            prepare("run", latent_cache=str(folder), **{"no_hflip": True} | given)
    with pytest.raises(ValueError, match="was begun with other settings: resolution is 32 in the cache and 48 in this run"):
        make_cache("cache", no_hflip=True, resolution=48)


@pytest.mark.reliability("D12")
def test_text_encoders_in_another_dtype_are_said_by_their_setting(make_cache: Callable[..., Path], prepare: Callable[..., Run]) -> None:
    folder, half = make_cache("cache"), {"base_dtype": "bf16", "mixed_precision": "bf16"}
    with pytest.raises(ValueError, match="other settings: base_dtype is fp32 in the cache and bf16 in this run, "):
        prepare("run", latent_cache=str(folder), **half)
    with pytest.raises(ValueError, match="was begun with other settings: base_dtype is fp32 in the cache and bf16 in this run, "):
        make_cache("cache", **half)


def test_a_cache_from_before_the_dtype_was_noted_is_read_and_added_to(make_cache: Callable[..., Path], prepare: Callable[..., Run]) -> None:
    folder = make_cache("cache")
    manifest = json.loads((folder / cache.MANIFEST).read_text())
    assert manifest["made_with"].pop("base_dtype") == "fp32"
    (folder / cache.MANIFEST).write_text(json.dumps(manifest))
    make_cache("cache")
    prepare("run", latent_cache=str(folder))
    with pytest.raises(ValueError, match=r"other settings: text_encoders is \w+ in the cache"):
        prepare("other", latent_cache=str(folder), base_dtype="bf16", mixed_precision="bf16")


@pytest.mark.reliability("D12")
def test_other_pictures_under_the_same_names_are_noticed(
    make_cache: Callable[..., Path], prepare: Callable[..., Run], pair_columns: dict[str, list[Any]], tmp_path: Path
) -> None:
    folder = make_cache("cache")
    turned = pair_columns | {"jpg_0": pair_columns["jpg_0"][1:] + pair_columns["jpg_0"][:1]}
    pq.write_table(pa.table(turned), tmp_path / "turned.parquet")
    with pytest.raises(ValueError, match=r"has other pictures for pair \w+ than the data"):
        prepare("run", train_data_dir=str(tmp_path / "turned.parquet"), latent_cache=str(folder))


@pytest.mark.reliability("N3")
def test_latents_that_are_not_finite_are_never_kept(
    make_cache: Callable[..., Path], prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpref.sources.dataset import Encoder

    moments = Encoder.moments
    monkeypatch.setattr(Encoder, "moments", lambda self, pixels: moments(self, pixels).mul(float("inf")))
    with pytest.raises(ValueError, match=r"the latents of \d+ of \d+ pictures are not finite, the first is of pair \w+"):
        make_cache("cache")
    with pytest.raises(ValueError, match=r"latents of \d+ of \d+ pictures are not finite"):
        prepare("run", cache_latents=True)


@pytest.mark.reliability("D12")
def test_damage_is_found_and_mended(make_cache: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_cache("cache")
    (latents,) = folder.glob("latents-*")
    good = latents.read_bytes()
    latents.write_bytes(good[:-8])
    with pytest.raises(ValueError, match=r"is missing or does not have its \d+ bytes"):
        LatentStore.open(folder)
    flipped = bytearray(good)
    latents.write_bytes(good)
    moments = load_file(latents)["moments"][2, 0].contiguous()
    flipped[good.index(moments.view(torch.uint8).numpy().tobytes()) + 100] ^= 1
    latents.write_bytes(flipped)
    store = LatentStore.open(folder)
    places = np.array([[0, row] for row in range(5)])
    assert len(store.moments(places[[0, 1, 3, 4]], [0] * 4)[0]) == 4
    with pytest.raises(ValueError, match=r"latents-\w+\.safetensors is damaged at row 2; mend it: diffpref cache.*--check_sums true"):
        store.moments(places, [0] * 5)
    assert cache.damaged(folder) == [latents.name]
    make_cache("cache", CacheConfig(check_sums=True))
    assert latents.name in capsys.readouterr().err
    assert latents.read_bytes() == good


@pytest.mark.reliability("D12")
def test_a_damaged_index_is_found_and_made_anew(make_cache: Callable[..., Path]) -> None:
    folder = make_cache("cache")
    index = folder / cache.INDEX
    good = index.read_bytes()
    for bad in (good[:-8] + bytes([good[-8] ^ 1]) + good[-7:], good[:-1]):
        index.write_bytes(bad)
        with pytest.raises(ValueError, match=r"index\.safetensors is damaged; delete this file, and diffpref cache makes it anew"):
            LatentStore.open(folder)
    index.unlink()
    make_cache("cache")
    assert len(LatentStore.open(folder).pictures.key) == 48


def test_half_the_bytes_at_half_the_precision(make_cache: Callable[..., Path], prepare: Callable[..., Run]) -> None:
    full, half = make_cache("full"), make_cache("half", CacheConfig(stored_dtype="bf16"))
    sizes = [sum(p.stat().st_size for p in folder.glob("latents-*")) for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    a, b = (next(prepare(f"run-{folder.name}", latent_cache=str(folder)).source) for folder in (full, half))
    assert a.latents.dtype == b.latents.dtype == torch.float32
    assert a.cond.prompt_embeds.dtype == b.cond.prompt_embeds.dtype
    torch.testing.assert_close(b.latents, a.latents, rtol=0.01, atol=0.02)
    assert not torch.equal(a.latents, b.latents)


def test_a_folder_with_other_files_is_left_alone(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("once")
    with pytest.raises(ValueError, match=r"not empty and no cache \(it has novel.txt\)"):
        make_cache("mine")
    assert [p.name for p in (tmp_path / "mine").iterdir() if p.name != ".lock"] == ["novel.txt"]


def test_the_folder_can_be_moved(make_cache: Callable[..., Path], prepare: Callable[..., Run], tmp_path: Path) -> None:
    shutil.move(make_cache("cache"), tmp_path / "elsewhere")
    next(prepare("run", latent_cache=str(tmp_path / "elsewhere")).source)


def test_settings_that_contradict_a_cache_are_refused(prepare: Callable[..., Run], make_cache: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="latent_cache is x together with random_crop"):
        prepare("run", latent_cache="x", random_crop=True)
    with pytest.raises(ValueError, match="latent_cache 'x' is no cache of latents; build it"):
        prepare("run", latent_cache="x")
    folder = make_cache("cache")
    with pytest.raises(ValueError, match="dataloader_num_workers is 2, but latent_cache"):
        prepare("run", latent_cache=str(folder), dataloader_num_workers=2)


def test_a_run_from_a_folder_is_resumed_where_it_stopped(make_cache: Callable[..., Path], run_training: Go) -> None:
    settings = {"latent_cache": str(make_cache("cache")), "checkpointing_steps": 2}
    whole = run_training("whole", **settings, max_train_steps=5)
    run_training("parts", **settings, max_train_steps=2)
    parts = run_training("parts", **settings, max_train_steps=5, resume_from_checkpoint="latest")
    a, b = (load_file(run / "checkpoint-5" / "weights.safetensors") for run in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_build_what_one_builds(
    make_cache: Callable[..., Path], base_settings: Settings, shaped_file: Path, tmp_path: Path
) -> None:
    one, two = make_cache("one", train_data_dir=str(shaped_file)), tmp_path / "two"
    given = {"pretrained_model_name_or_path": base_settings["pretrained_model_name_or_path"], "train_data_dir": shaped_file}
    given |= {"resolution": base_settings["resolution"], "latent_cache": two}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    script = str(ROOT / "scripts" / "cache_latents.py")
    done = subprocess.run([*launcher, script, *words], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    def rows(folder: Path, kind: str) -> dict[cache.Key, dict[str, torch.Tensor]]:
        found = {}
        for name, (file, row) in cache.stored(folder, kind).items():
            found[name] = {field: x[row] for field, x in load_file(folder / file).items() if field != "key"}
        return found

    for kind in (cache.LATENTS, cache.PROMPTS):
        expected, found = rows(one, kind), rows(two, kind)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name][field], x) for name, row in expected.items() for field, x in row.items())
        assert len(list(two.glob(f"{kind}-*.safetensors"))) == 2  # one of each process
