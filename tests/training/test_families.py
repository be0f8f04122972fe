"""Commands of the published scripts in our own settings: who wrote them, whose defaults, and what is said about it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffpref import cli
from diffpref.methods.diffusion_dpo import DiffusionDPO
from diffpref.paths.forward import ForwardNoising
from diffpref.training.config import TrainConfig
from diffpref.training.families import FAMILIES, Translated, detect, merged, translate
from diffpref.training.foreign_flags import FOREIGN, MEANING, RENAMED, WITHOUT_EFFECT
from diffpref.training.objective import all_names
from diffpref.training.settings import names_of

FIELDS = names_of(TrainConfig, DiffusionDPO, ForwardNoising)
Settings = dict[str, Any]


def translated(given: Settings, family: str = "sd", preset: str | None = None) -> Translated:
    """As the command line does it, for a model of `family`."""
    return translate({"pretrained_model_name_or_path": "model", **given}, preset, FIELDS, lambda settings: family)


@pytest.mark.parametrize(
    ("flags", "family"),
    [
        ({"learning_rate", "beta"}, "diffpref"),
        ({"beta_dpo"}, "diffpref"),
        ({"scale_lr"}, "diffpref"),
        ({"beta_dpo", "scale_lr"}, "salesforce"),
        ({"sdxl"}, "salesforce"),
        ({"use_adafactor", "learning_rate"}, "salesforce"),
        ({"run_validation", "rank"}, "diffusers"),
        ({"use_8bit_adam", "beta_dpo"}, "diffusers"),
        ({"dataset_split_name"}, "diffusers"),
    ],
)
def test_flags_give_the_family_away(flags: set[str], family: str) -> None:
    assert detect(flags) == family


def test_flags_of_two_families_need_a_word() -> None:
    with pytest.raises(ValueError, match=r"--sdxl is Salesforce.*--run_validation is the diffusers.*--preset"):
        detect({"sdxl", "run_validation"})


def test_no_name_of_ours_is_called_foreign() -> None:
    assert not set(FOREIGN) & {*FIELDS, *all_names()}
    everything = {*names_of(TrainConfig), *all_names()}
    assert {ours for ours, _ in MEANING.values()} | set(RENAMED.values()) <= everything
    for family in FAMILIES.values():
        assert {*family.defaults, *family.sdxl_defaults} <= everything
        assert family.based_on is None or FAMILIES[family.based_on].based_on is None


def test_defaults_of_a_family_lie_below_what_is_given() -> None:
    found = translated({"beta_dpo": "2000", "scale_lr": True, "train_batch_size": "3"})
    assert found.preset == "salesforce"
    assert found.settings["beta"] == "2000"
    assert found.settings["train_batch_size"] == "3"
    assert found.settings["learning_rate"] == 1e-8
    assert found.settings["tune"] == "full"
    assert found.settings["proportion_empty_prompts"] == 0.2
    said = found.notes[-1]
    assert "learning_rate 1e-08" in said
    assert "train_batch_size" not in said
    assert "optimizer" not in found.settings
    assert translated({"sdxl": True, "scale_lr": True}, "sdxl").settings["optimizer"] == "adafactor"


def test_beta_of_the_sd_script_of_diffusers_is_doubled() -> None:
    given = {"beta_dpo": "2500", "use_8bit_adam": True}
    found = translated(given, "sd")
    assert found.settings["beta"] == 5000.0
    assert any("leaves the factor 1/2 out" in note for note in found.notes)
    assert translated(given, "sdxl").settings["beta"] == "2500"
    assert translated({"use_8bit_adam": True}, "sd").settings["beta"] == 5000.0
    assert translated({"beta_dpo": "2500", "scale_lr": True}, "sd").settings["beta"] == "2500"


def test_switches_mean_settings() -> None:
    found = translated({"use_8bit_adam": True, "enable_xformers_memory_efficient_attention": False, "local_rank": "-1", "lora_rank": "8"})
    assert found.settings["optimizer"] == "adamw_8bit"
    assert found.settings["rank"] == "8"
    assert "attention" not in found.settings
    assert not set(found.settings) & set(FOREIGN)
    assert any("--local_rank needs nothing here" in note for note in found.notes)
    assert {"local_rank", "hard_skip_resume", "prior_generation_precision", "image_column"} <= set(WITHOUT_EFFECT)
    assert len(WITHOUT_EFFECT) == 13


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, "both set optimizer"),
        ({"optimizer": "adamw", "use_adafactor": True}, "--optimizer and --use_adafactor both set optimizer"),
        ({"beta": 1, "beta_dpo": 2}, "--beta and --beta_dpo both set beta"),
        ({"max_train_steps": 5, "num_train_epochs": 1}, "give one of them"),
        ({"sdxl": True}, "of the sd family"),
        ({"run_validation": True, "sdxl": True}, "add --preset"),
    ],
)
def test_contradictions_are_errors(given: Settings, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        translated(given)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="preset is 'sales'; accepted: diffpref, salesforce, diffusers"):
        translated({}, preset="sales")


def test_a_preset_takes_part_without_its_flags() -> None:
    assert translated({}, preset="diffusers").settings["split"] == "validation"
    ours = translated({"use_8bit_adam": True}, preset="diffpref")
    assert ours.settings == {"pretrained_model_name_or_path": "model", "optimizer": "adamw_8bit"}
    assert translated({"beta_dpo": "7"}).notes == [
        "--beta_dpo is read as --beta, with our own defaults for the rest (--preset salesforce or diffusers for theirs)"
    ]


def test_validation_of_the_diffusers_scripts() -> None:
    on = translated({"run_validation": True})
    assert on.settings["validation_steps"] == 200
    assert len(on.settings["validation_prompts"]) == 4
    off = translated({"dataset_split_name": "train", "validation_steps": "50"})
    assert "validation_steps" not in off.settings
    assert any("without --run_validation" in note for note in off.notes)


def test_steps_win_over_epochs_as_in_those_scripts() -> None:
    found = translated({"use_8bit_adam": True, "max_train_steps": "9", "num_train_epochs": "3"})
    assert "num_train_epochs" not in found.settings
    assert translated({"use_8bit_adam": True}).settings["num_train_epochs"] == 1
    assert "max_train_steps" not in translated({"use_8bit_adam": True}).settings


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do what this machine cannot")
def test_what_the_machine_lacks_is_taken_back_and_said() -> None:
    found = translated({"mixed_precision": "fp16", "enable_xformers_memory_efficient_attention": True})
    assert found.settings["mixed_precision"] == "no"
    assert found.settings["attention"] == "xformers"  # which is tried when the model is there, and replaced with a reason
    assert any("fp16 needs a GPU" in note for note in found.notes)


DOCUMENTED = {
    "salesforce": """--train_batch_size=1 --dataloader_num_workers=2 --gradient_accumulation_steps=2 --max_train_steps=2
        --lr_scheduler="constant_with_warmup" --lr_warmup_steps=1 --learning_rate=1e-8 --scale_lr
        --checkpointing_steps 2 --beta_dpo 5000""",
    "salesforce sdxl": """--train_batch_size=1 --gradient_accumulation_steps=2 --max_train_steps=2 --lr_scheduler="constant_with_warmup"
        --lr_warmup_steps=1 --learning_rate=1e-8 --scale_lr --checkpointing_steps 2 --beta_dpo 5000 --sdxl""",
    "diffusers": """--mixed_precision="fp16" --resolution=32 --train_batch_size=2 --gradient_accumulation_steps=2
        --gradient_checkpointing --rank=8 --learning_rate=1e-5 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=2
        --checkpointing_steps=2 --run_validation --validation_steps=2 --seed="0" --dataset_split_name train""",
    "diffusers sdxl": """--mixed_precision="fp16" --resolution=32 --train_batch_size=2 --gradient_accumulation_steps=2
        --gradient_checkpointing --rank=8 --learning_rate=1e-5 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=2
        --checkpointing_steps=2 --run_validation --validation_steps=2 --seed="0" --dataset_split_name train
        --enable_xformers_memory_efficient_attention""",
}
"""The published commands, shortened in steps and batch only; model, data and output folder are added by the test."""


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_commands_run(
    name: str,
    request: pytest.FixtureRequest,
    pairs_file: Path,
    table_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    read_metrics: Callable[[Path], list[Settings]],
) -> None:
    model = request.getfixturevalue("sdxl_folder" if "sdxl" in name else "sd_folder")
    words = [word.replace('"', "") for word in DOCUMENTED[name].split()]
    place = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(pairs_file), "--cache_dir", str(table_cache)]
    code = cli.main(["train", *place, "--output_dir", str(tmp_path / "run"), *words])
    errors = capsys.readouterr().err
    assert code == 0, errors
    family = name.split()[0]
    assert f"command of {FAMILIES[family].title}, recognised by its flags" in errors
    settings = yaml.safe_load((tmp_path / "run" / "diffpref_config.yaml").read_text())
    assert settings["beta"] == 5000.0
    assert settings["tune"] == ("full" if family == "salesforce" else "lora")
    manifest = json.loads((tmp_path / "run" / "run_manifest.json").read_text())
    assert f"command of {FAMILIES[family].title}" in manifest["notes"][0]
    assert manifest["pairs_per_update"] == (2 if family == "salesforce" else 4)
    assert manifest["effective_learning_rate"] == pytest.approx(2e-8 if family == "salesforce" else 1e-5)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    if family == "diffusers":
        assert (tmp_path / "run" / "validation" / "step_2.png").is_file()
        assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    else:
        assert settings["proportion_empty_prompts"] == 0.2
        assert (tmp_path / "run" / "model_index.json").is_file()
    if not torch.cuda.is_available():
        assert ("attention xformers cannot be used here (" in errors) == ("xformers" in DOCUMENTED[name])
    if importlib.util.find_spec("tensorboard") is None:
        assert settings["report_to"] == "none"


def test_a_flag_wins_over_the_file_whatever_the_name() -> None:
    assert merged({"beta": 1, "rank": 4}, {"beta_dpo": "2"}) == {"rank": 4, "beta_dpo": "2"}
    assert merged({"beta_dpo": 1, "use_8bit_adam": True}, {"beta": "2", "optimizer": "adamw"}) == {"beta": "2", "optimizer": "adamw"}


def test_a_config_file_may_hold_other_scripts_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("pretrained_model_name_or_path: nowhere\ntrain_data_dir: nowhere\nbeta_dpo: 2000\nbeta: 1000\n")
    assert cli.main(["train", "--config", str(path)]) == 2
    assert "--beta_dpo and --beta both set beta (2000 and 1000); give one of them" in capsys.readouterr().err


def test_every_setting_has_a_text() -> None:
    from diffpref.training.settings import field_docs

    assert [f.name for f in dataclasses.fields(TrainConfig) if not field_docs(TrainConfig).get(f.name)] == []


UNION = [
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "revision",
    "variant",
    "unet_init",
    "dataset_name",
    "dataset_config_name",
    "split",
    "dataset_split_name",
    "train_data_dir",
    "cache_dir",
    "image_column",
    "caption_column",
    "max_train_samples",
    "dreamlike_pairs_only",
    "choice_model",
    "proportion_empty_prompts",
    "resolution",
    "random_crop",
    "no_hflip",
    "vae_encode_batch_size",
    "output_dir",
    "logging_dir",
    "seed",
    "train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "use_adafactor",
    "use_8bit_adam",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "allow_tf32",
    "mixed_precision",
    "prior_generation_precision",
    "dataloader_num_workers",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "hard_skip_resume",
    "run_validation",
    "validation_steps",
    "report_to",
    "tracker_project_name",
    "tracker_name",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "local_rank",
    "enable_xformers_memory_efficient_attention",
    "rank",
    "beta_dpo",
    "sft",
    "sdxl",
    "is_turbo",
    "input_perturbation",
    "noise_offset",
]
"""Every flag of the three scripts, but for loss_type, which is the method's."""


def test_every_flag_of_the_scripts_is_known() -> None:
    assert [name for name in UNION if name not in {*FIELDS, *FOREIGN}] == []


def test_the_page_explains_every_flag_that_means_something_else() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "migrate.md").read_text()
    assert [name for name in FOREIGN if f"`--{name}`" not in page] == []
