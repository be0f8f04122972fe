"""A latent cache that is half built, damaged, or of other settings: never trained on, and mended by the command that the refusal names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.reliability.conftest import EVERY
from tests.reliability.faults import Fault
from tests.reliability.harness import Trainer, diffpref


@pytest.fixture(scope="session")
def cached(settings: dict[str, Any], trainer: Trainer, whole: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent cache whose building was killed at its second file, at the index, and then went on. A run from it is the run without."""
    home = tmp_path_factory.mktemp("cached")
    given = settings | {"latent_cache": home / "latents"}
    build = diffpref(given, EVERY, home, command="cache")
    for place in (Fault("SIGKILL", "os.rename", r"/prompts-"), Fault("SIGKILL", "os.rename", r"/index")):
        assert build.run(home / "unused", place).code == -9
        begun = diffpref(given, EVERY, home).run(home / "too early")
        assert begun.code == 2, begun.errors
        assert "is not complete; build it" in begun.last_line
    outcome = build.run(home / "unused")
    assert outcome.code == 0, outcome.errors
    assert "to encode: 0 pictures" in outcome.errors
    assert diffpref(given, EVERY, home).run(home / "run").code == 0
    assert trainer.result(home / "run") == whole
    return home / "latents"


@pytest.mark.reliability_full("D12")
@pytest.mark.parametrize("damage", ["cut", "gone", "one bit"])
def test_a_damaged_cache_is_never_trained_on(
    damage: str, cached: Path, settings: dict[str, Any], trainer: Trainer, whole: str, tmp_path: Path
) -> None:
    """Noticed, and mended by the command that the message names."""
    folder = Path(shutil.copytree(cached, tmp_path / "latents"))
    (latents,) = folder.glob("latents-*")
    data = bytearray(latents.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        latents.unlink()
    else:
        latents.write_bytes(data if damage == "one bit" else data[:-1])
    given = settings | {"latent_cache": folder}
    outcome = diffpref(given, EVERY, tmp_path).run(tmp_path / "run")
    assert outcome.code == 2, outcome.errors
    assert latents.name in outcome.last_line
    checked = {"check_sums": True} if damage == "one bit" else {}
    assert diffpref(given | checked, EVERY, tmp_path, command="cache").run(tmp_path / "unused").code == 0
    assert diffpref(given, EVERY, tmp_path).run(tmp_path / "again").code == 0
    assert trainer.result(tmp_path / "again") == whole


@pytest.mark.reliability_full("D12")
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"resolution": 48}, "resolution is 32 in the cache and 48 in this run"),
        ({"aspect_ratio_buckets": True, "bucket_step": 16}, "aspect_ratio_buckets is False in the cache and True in this run"),
    ],
    ids=["size", "buckets"],
)
def test_a_cache_of_other_settings_is_refused(
    change: dict[str, Any], word: str, cached: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    outcome = diffpref(settings | {"latent_cache": cached} | change, EVERY, tmp_path).run(tmp_path / "run")
    assert outcome.code == 2, outcome.errors
    assert word in outcome.last_line


@pytest.mark.reliability_full("N3")
def test_latents_that_are_not_finite_are_never_kept(settings: dict[str, Any], sd_folder: Path, tmp_path: Path) -> None:
    """The weights of the autoencoder are finite, and what comes out of them is not."""
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    (path,) = (model / "vae").glob("*.safetensors")
    weights = load_file(path)
    weights["quant_conv.weight"].fill_(3e38)
    save_file(weights, path, {"format": "pt"})
    given = settings | {"pretrained_model_name_or_path": model, "latent_cache": tmp_path / "latents"}
    outcome = diffpref(given, EVERY, tmp_path, command="cache").run(tmp_path / "unused")
    assert outcome.code == 2, outcome.errors
    assert "finite" in outcome.last_line
    assert not list((tmp_path / "latents").glob("*.safetensors"))
