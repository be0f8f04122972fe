"""The model card: readable by the hub, true about the run, its code runs, and nothing of the machine is in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffpref import cli
from diffpref.locations import asset
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.methods.recipes import RECIPES
from diffpref.training.align import Aligned, align, refresh_card
from diffpref.training.config import TrainConfig
from diffpref.training.model_card import method_text, method_title, model_card, public_name, write_card
from diffpref.training.objective import as_objective

Settings = dict[str, Any]
Finished = Callable[..., Path]


@pytest.fixture
def finished(base_settings: Settings, tmp_path: Path) -> Finished:
    """finished(**settings) -> the folder of a run of one step, through its end."""

    def go(**settings: Any) -> Path:
        given = base_settings | {"max_train_steps": 1, "output_dir": str(tmp_path / "my-run")} | settings
        return align(TrainConfig(**given), DiffusionDPO()).folder

    return go


def split(card: str) -> tuple[Settings, str]:
    """The header as YAML, and the text."""
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def table(text: str) -> dict[str, str]:
    """The rows of all tables of two columns."""
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))


def test_a_lora_run(finished: Finished, sd_folder: Path, tmp_path: Path) -> None:
    folder = finished(rank=2, lora_alpha=3.0, held_out_pairs=4, validation_steps=1, validation_prompts=("a",), num_validation_images=1)
    head, text = split((folder / "README.md").read_text())
    assert head["library_name"] == "diffusers"
    assert {"diffusers", "text-to-image", "stable-diffusion", "lora", "diffusion-dpo"} <= set(head["tags"])
    assert not {"base_model", "datasets", "license"} & head.keys()  # all local: there is no id to name, and no licence to guess
    assert f"`{sd_folder.name}`" in text
    rows = table(text)
    assert (rows["rank"], rows["lora_alpha"], rows["beta"]) == ("2", "3", "5000")
    assert rows["pairs per update"] == "2"
    assert rows["learning rate as used"] == "0.01"
    manifest = json.loads((folder / "run_manifest.json").read_text())
    assert manifest["data"]["fingerprint"] in text
    assert f"{manifest['data']['pairs']} pairs for training, 0 ties, 0 rows rejected" in text
    assert "[arXiv:2311.12908](https://arxiv.org/abs/2311.12908)" in text
    assert "loss = -log sigmoid(z)" in text
    assert "of 4 held-out pairs" in rows["implicit accuracy"]
    assert f"torch {manifest['versions']['torch']}" in text
    assert str(tmp_path) not in text
    assert str(sd_folder.parent) not in text


@pytest.mark.parametrize("settings", [{}, {"merge_lora": True}, {"tune": "full"}], ids=str)
def test_the_code_on_the_card_runs(
    settings: Settings, finished: Finished, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(**settings)
    os.symlink(sd_folder, tmp_path / sd_folder.name)
    monkeypatch.chdir(tmp_path)
    card = (folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 1
    names: dict[str, Any] = {}
    quick = code[0].replace('"a lighthouse at dusk"', '"a lighthouse at dusk", num_inference_steps=1, height=32, width=32')
    exec(quick, names)
    assert isinstance(names["image"], Image.Image)
    assert ("load_lora_weights" in code[0]) == (settings == {})
    assert ("lora" in split(card)[0]["tags"]) == (settings.get("tune") != "full")
    assert ("rank" in table(card)) == (settings.get("tune") != "full")


def change(folder: Path, **settings: Any) -> str:
    """The card as if the run had had these settings."""
    stored = folder / "diffpref_config.yaml"
    before = stored.read_text()
    stored.write_text(yaml.safe_dump(yaml.safe_load(before) | settings))
    try:
        return model_card(folder)
    finally:
        stored.write_text(before)


def test_hub_ids_and_changed_bases(finished: Finished) -> None:
    folder = finished()
    head, text = split(change(folder, pretrained_model_name_or_path="someone/model", dataset_name="someone/pairs", train_data_dir=None))
    assert (head["base_model"], head["base_model_relation"], head["datasets"]) == ("someone/model", "adapter", ["someone/pairs"])
    assert "https://huggingface.co/datasets/someone/pairs" in text
    assert 'from_pretrained("someone/model")' in text
    text = change(folder, unet_init="/deep/place/other.safetensors", start_lora="/deep/place/first")
    assert "`other.safetensors` (unet_init) and `first` (start_lora)" in text
    assert "/deep" not in text
    assert "changed by" not in change(folder, start_lora="first", start_lora_as="adapter")
    assert "--format single_file" in change(folder, use_dora=True)
    assert "--format kohya" in change(folder)
    assert "the small model of diffpref's testbed" in change(folder, pretrained_model_name_or_path=str(asset("testbed", "pipeline")))
    assert "moving average" in change(folder, use_ema=True)
    assert table(change(folder, validation_prompts=["x"], choice_model="a|b"))["choice_model"] == "a\\|b"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stabilityai/sdxl-base-1.0", ("stabilityai/sdxl-base-1.0", True)),
        ("/deep/place/model", ("model", False)),
        ("./outputs/run", ("run", False)),
        ("../run", ("run", False)),
        ("models/model.v1.safetensors/x", ("x", False)),
        ("model", ("model", False)),
    ],
)
def test_public_names(source: str, expected: tuple[str, bool]) -> None:
    assert public_name(source) == expected


def test_a_relative_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert public_name("models/mine") == ("mine", False)


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_says_what_it_is(method: str) -> None:
    text = method_text(method)
    assert method_title(method).split(", recipe")[0] in text
    assert "https://arxiv.org/abs/" in text or "openreview" in text
    assert "```" in text


def test_recipes_and_methods_of_ones_own(finished: Finished) -> None:
    folder = finished()
    head, text = split(change(folder, method="inpo", num_steps=10))
    assert "inpo" in head["tags"]
    assert "trained with Diffusion-DPO (Wallace et al., 2023, arXiv:2311.12908, Eq. 14), recipe inpo," in text
    assert (table(text)["num_steps"], table(text)["parts"]) == ("10", "DiffusionDPO, ForwardNoising")
    text = change(folder, method="my_method", strength=3)
    assert "trained with my_method on pairs" in text
    assert "## Method" not in text
    assert table(text)["strength"] == "3"


REPORT: Settings = {
    "score_name": "structural reward",
    "win_rate": 0.9333,
    "win_rate_low": 0.9,
    "win_rate_high": 0.95,
    "num_prompts": 500,
    "score_base": 2.961,
    "score_aligned": 4.26,
    "score_difference": 1.3,
    "score_difference_low": 1.2,
    "score_difference_high": 1.4,
}


def test_scores_come_from_the_report(finished: Finished) -> None:
    folder = finished()
    assert "## Scores" not in (folder / "README.md").read_text()
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "side_by_side.png").write_bytes(b"")
    refresh_card(Aligned(folder, True, None, False, {}), TrainConfig())
    text = (folder / "README.md").read_text()
    assert "93.3 % (95 % interval 90.0 % to 95.0 %, 500 prompts, judged by the structural reward)" in text
    assert "2.961 -> 4.26 (+1.3, 95 % interval +1.2 to +1.4)" in text
    assert "(side_by_side.png)" in text
    assert not [p for p in folder.iterdir() if p.name.startswith(".README")]


def test_unknown_scores_are_said_to_be_unknown(finished: Finished) -> None:
    folder = finished()
    (folder / "report.json").write_text(json.dumps(REPORT | {"win_rate_low": None}))
    assert "95 % interval unknown to 95.0 %" in write_card(folder).read_text()
    (folder / "report.json").write_text(json.dumps({"models": []}))  # an evaluation of several models
    assert "## Scores" not in write_card(folder).read_text()


def test_the_testbed_refreshes_the_card(base_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(folder: Path, timings: dict[str, float], num_eval_prompts: int) -> None:
        (folder / "report.json").write_text(json.dumps(REPORT))

    monkeypatch.setattr("diffpref.testbed.demo.report_run", report)
    config = TrainConfig(**base_settings | {"max_train_steps": 1, "output_dir": str(tmp_path / "run")})
    assert cli._run(config, as_objective(DiffusionDPO()), 8, []) == 0
    assert "93.3 %" in (tmp_path / "run" / "README.md").read_text()


def test_a_moved_run_folder_writes_its_card_again(finished: Finished, tmp_path: Path) -> None:
    folder = finished()
    before = (folder / "README.md").read_text()
    moved = tmp_path / "elsewhere" / "my-run"
    shutil.copytree(folder, moved)
    (moved / "README.md").unlink()
    assert write_card(moved).read_text() == before
