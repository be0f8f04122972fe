"""The published commands of MaPO, InPO, SmPO, Inversion-DPO, Diffusion-KTO and Diffusion-SDPO in our settings.

Word for word but for variables, which are filled in, and folders that are empty or belong to the authors' machines.

Revisions: MaPO 374b3d3 (README), InPO a9cfc4d and SmPO 8922d54 (examples/sd15.sh), Inversion-DPO 3e2af58 (sdxl.sh), Diffusion-KTO
226bbd0 (exps/example.sh), Diffusion-SDPO 84fb241 (scripts/train/sd15_dmpo.sh); the launcher's own flags stand before the script.
"""

from __future__ import annotations

import shlex
from typing import Any

import pyarrow as pa
import pytest

from diffpref import cli
from diffpref.data.pairs import load_pairs
from diffpref.training.config import TrainConfig
from diffpref.training.families import detect
from diffpref.training.foreign_flags import FOREIGN, RENAMED
from diffpref.training.objective import Objective, all_names, build_objective, fitted
from diffpref.training.settings import build, names_of

MAPO = (
    "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 "
    '--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --output_dir="mapo" --mixed_precision="fp16" '
    "--dataset_name=kashif/pickascore --train_batch_size=8 --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam "
    '--learning_rate=1e-5 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=2000 --checkpointing_steps=500 --seed="0"'
)
INPO = (
    "--pretrained_model_name_or_path=checkpoints/stable-diffusion-v1-5 --dataset_name=datasets/pickapic_v2 "
    '--unet_init="checkpoints/sd15-sft" '
    "--train_batch_size=1 --dataloader_num_workers=16 --gradient_accumulation_steps=128 --max_train_steps=400 "
    '--lr_scheduler="constant_with_warmup" --lr_warmup_steps=200 --learning_rate=1e-8 --scale_lr --checkpointing_steps 50 '
    '--beta_dpo 2000 --output_dir="ddiminpo-sd15"'
)
SMPO = (
    INPO.replace("max_train_steps=400", "max_train_steps=200").replace("warmup_steps=200", "warmup_steps=100").replace("ddiminpo", "smpo")
)
INVERSION = (
    '--pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0" --dataset_name=yuvalkirstain/pickapic_v2 '
    "--train_batch_size=1 --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --dataloader_num_workers=0 "
    '--gradient_accumulation_steps=1 --max_train_steps=2000 --lr_scheduler="constant_with_warmup" --lr_warmup_steps=1000 '
    "--learning_rate=1e-8 --scale_lr --cache_dir=datasets --cache_dir_model=models --checkpointing_steps=200 --beta_dpo=2000 "
    '--variant="fp16" --resolution=1024 --sdxl --gradient_checkpointing --num_inference_steps=80 --output_dir="tmp-sdxl"'
)
KTO = (
    "--resolution 512 --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --train_data_dir=pick --pick_split train "
    '--output_dir=out --mixed_precision="fp16" --dataset_name=kashif/pickascore --train_batch_size=2 --gradient_accumulation_steps=1 '
    '--gradient_checkpointing --use_8bit_adam --rank=8 --report_to="wandb" --lr_scheduler="constant" --learning_rate=1e-07 '
    '--lr_scheduler="constant_with_warmup" --lr_warmup_steps=200 --max_train_steps=20000 --checkpointing_steps=5000 --run_validation '
    '--validation_steps=50 --seed="0" --report_to="wandb" --checkpoints_total_limit 4 --policy gt_label_wi_l --dataloader pick --loss kto '
    "--halo sigmoid --positive_ratio 0.8 --enable_xformers_memory_efficient_attention --fixed_noise"
)
SDPO = (
    "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name=yuvalkirstain/pickapic_v2 "
    "--train_batch_size=8 --dataloader_num_workers=16 --gradient_accumulation_steps=32 --max_train_steps=2000 "
    "--lr_scheduler='constant_with_warmup' --lr_warmup_steps=500 --learning_rate=1e-8 --scale_lr --checkpointing_steps 500 "
    "--mixed_precision bf16 --allow_tf32 --output_dir output/sd15-dmpo --train_method dmpo --beta_dpo 2000 --dmpo_alpha 0.01 "
    "--use_winner_preserving --winner_preserving_mu 0.9"
)
FLAGS = {
    "mapo": "beta_mapo label_noise_prob snr_value remove_ties lora_rank push_to_hub tracker_name run_validation",
    "inversion_dpo": "cache_dir_model num_inference_steps variant choice_model dreamlike_pairs_only unet_init use_adafactor noise_offset",
    "inpo": "input_perturbation unet_init use_adafactor hard_skip_resume dreamlike_pairs_only image_column caption_column noise_offset",
    "smpo": "input_perturbation unet_init use_adafactor hard_skip_resume dreamlike_pairs_only image_column caption_column noise_offset",
    "diffusion_sdpo": "use_winner_preserving winner_preserving_mu dmpo_alpha train_method choice_model",
    "diffusion_kto": "use_ema reference_ema reference_ema_momentum ema_momentum use_lora lambda_d_kto lambda_u_kto hub_token eval_metrics "
    "prior_generation_precision rank dataloader policy positive_ratio halo loss bce_offset fixed_noise pick_split track_score h_pos h_neg "
    "validation_prompt proportion_empty_prompts lr_num_cycles local_rank dataset_split_name",
}
"""Flags that the script has beyond those of Salesforce's and diffusers' scripts, and some that it shares with one of them."""


SHARED = (
    *("revision", "cache_dir", "max_train_samples", "resolution", "random_crop", "no_hflip", "logging_dir", "num_train_epochs"),
    *("resume_from_checkpoint", "adam_beta1", "adam_weight_decay", "max_grad_norm", "report_to", "hub_model_id", "local_rank"),
)
"""Flags of all these scripts."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """read(method of the script, family of the model, command) -> (settings, objective, notes)."""

    def run(method: str, family: str, command: str) -> tuple[TrainConfig, Objective, list[str]]:
        monkeypatch.setattr(cli, "_model_family", lambda settings: family)
        found = cli._train_settings(["--method", method, *shlex.split(command)])
        assert found is not None
        settings, objective, notes = found
        return build(TrainConfig, {n: x for n, x in settings.items() if n in names_of(TrainConfig)}), objective, notes

    return run


def test_mapo(read: Any) -> None:
    config, objective, notes = read("mapo", "sdxl", MAPO)
    assert notes[0].startswith("command of the MaPO scripts")
    assert (config.tune, config.split, config.optimizer, config.lr_scheduler) == ("full", "validation", "adamw_8bit", "constant")
    assert (objective.method.beta, objective.method.snr, config.learning_rate) == (0.1, 0.5, 1e-5)
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.flip_mode) == (8, 2, "shared")
    lora, _, _ = read("mapo", "sdxl", MAPO + " --lora_rank=8")
    assert (lora.tune, lora.rank) == ("lora", 8)
    _, other, notes = read("mapo", "sdxl", MAPO + " --beta_mapo 0.2 --snr_value 1 --remove_ties True")
    assert (other.method.beta, other.method.snr) == (0.2, 1.0)
    assert any("remove_ties needs nothing here" in note for note in notes)


@pytest.mark.parametrize("script", list(FLAGS))
def test_every_flag_of_the_script_is_known(script: str) -> None:
    known = {*names_of(TrainConfig), *all_names(), *FOREIGN}
    assert [flag for flag in FLAGS[script].split() if flag not in known] == []


@pytest.mark.parametrize("script", list(FLAGS))
def test_no_flag_of_the_script_belongs_to_other_methods_only(script: str, read: Any) -> None:
    method = {"diffusion_sdpo": "dmpo"}.get(script, script)
    command = {"mapo": MAPO, "inversion_dpo": INVERSION, "inpo": INPO, "smpo": SMPO, "diffusion_sdpo": SDPO, "diffusion_kto": KTO}[script]
    refused = {}
    for flag in dict.fromkeys((*SHARED, *FLAGS[script].split())):
        try:
            read(method, "sdxl" if "xl" in command else "sd", f"{command} --{flag}=0")
        except ValueError as error:  # 0 is not for every flag; what is refused is named, and neither unknown nor foreign
            refused[flag] = str(error)
    for flag, said in refused.items():
        assert flag in said or RENAMED.get(flag, flag) in said
        assert "is not a setting" not in said
        assert "is no setting" not in said


@pytest.mark.parametrize("method", ["inpo", "smpo", "inversion_dpo"])
@pytest.mark.parametrize("flag", ["noise_offset", "input_perturbation"])
def test_noise_that_inversion_would_not_use_is_refused(flag: str, method: str, read: Any) -> None:
    command = INVERSION if method == "inversion_dpo" else INPO
    _, _, notes = read(method, "sdxl", f"{command} --sdxl --{flag} 0")
    assert any(note.startswith(f"{flag} 0 is left out") for note in notes)
    with pytest.raises(ValueError, match=rf"{flag} is 0\.1, but it is no setting of method {method}.*\. Leave it out"):
        read(method, "sdxl", f"{command} --sdxl --{flag} 0.1")


@pytest.mark.parametrize("method", ["inpo", "smpo"])
def test_inpo_and_smpo_are_commands_of_the_salesforce_family(method: str, read: Any) -> None:
    config, objective, notes = read(method, "sd", {"inpo": INPO, "smpo": SMPO}[method])
    assert "Salesforce" in notes[0]
    assert (config.tune, config.unet_init, config.scale_lr, config.learning_rate) == ("full", "checkpoints/sd15-sft", True, 1e-8)
    assert config.proportion_empty_prompts == 0.2
    assert (config.lr_warmup_steps, config.max_train_steps) == {"inpo": (200, 400), "smpo": (100, 200)}[method]
    assert objective.method.beta == 2000
    assert objective.path.num_steps == {"inpo": 10, "smpo": 5}[method]
    sdxl, _, _ = read(method, "sdxl", INPO.replace("2000", "5000") + " --sdxl")
    assert (sdxl.optimizer, sdxl.gradient_checkpointing) == ("adafactor", "full")


def test_inversion_dpo(read: Any) -> None:
    config, objective, notes = read("inversion_dpo", "sdxl", INVERSION)
    assert "Inversion-DPO's train_ddim.py" in notes[0]
    assert (objective.path.num_steps, objective.path.guidance_scale, objective.path.eval_point) == (80, 2.0, "denoise")
    assert (objective.method.beta, objective.method.sign) == (2000, "paper")
    assert (config.proportion_empty_prompts, config.optimizer, config.variant) == (0.0, "adafactor", "fp16")
    _, short, _ = read("inversion_dpo", "sdxl", INVERSION.replace("--num_inference_steps=80", ""))
    assert short.path.num_steps == 40


def test_diffusion_kto(read: Any) -> None:
    config, objective, notes = read("diffusion_kto", "sd", KTO)
    assert "the Diffusion-KTO script" in notes[0]
    assert (config.tune, config.desirable_share, config.split, config.dataset_name) == ("full", 0.8, "train", None)
    assert (objective.method.beta, objective.method.value_function, objective.groups) == (2000, "sigmoid", "images")
    assert (config.lr_scheduler, config.proportion_empty_prompts, config.learning_rate) == ("constant_with_warmup", 0.2, 1e-7)
    assert any(note.startswith("rank is left out") for note in notes)
    config, objective, notes = read("diffusion_kto", "sd", KTO + " --beta_dpo 500 --use_lora --reference_ema --lambda_u_kto 2")
    assert (config.tune, config.rank, config.reference_update_steps, config.reference_decay) == ("lora", 8, 20, 0.999)
    assert any(note.startswith("reference_decay 0.999 holds from the start here") for note in notes)
    assert (objective.method.beta, objective.method.undesirable_weight) == (1000, 2.0)
    config, objective, notes = read(
        "diffusion_kto", "sd", KTO.replace("halo sigmoid", "halo risk_seeking_3") + " --use_ema --bce_offset sigmoid"
    )
    assert (objective.method.value_function, objective.method.reference_point) == ("risk_seeking", "class_means")
    assert config.ema_decay**20 == pytest.approx(0.998, rel=1e-12)
    assert "ema_decay 0.998 at every 20th update of that script is 0.9999 at every update here" in notes
    assert read("diffusion_kto", "sd", KTO + " --bce_offset none")[1].method.reference_point == "mean"
    with pytest.raises(ValueError, match=r"bce_offset is 'original', which is not here; accepted: none, sigmoid \(our reference_point\)"):
        read("diffusion_kto", "sd", KTO + " --bce_offset original")
    with pytest.raises(ValueError, match=r"halo is 'risk_seeking_1', which is not here; accepted: sigmoid, loss_averse, risk_seeking_3"):
        read("diffusion_kto", "sd", KTO.replace("halo sigmoid", "halo risk_seeking_1"))
    with pytest.raises(ValueError, match=r"policy is 'gt_label_w_l', which is not here; accepted: gt_label_wi_l\. For another rule"):
        read("diffusion_kto", "sd", KTO.replace("gt_label_wi_l", "gt_label_w_l"))
    without = KTO.replace("--loss kto", "--loss sft").replace("--positive_ratio 0.8", "").replace("--halo sigmoid", "")
    _, plain, _ = read("diffusion_kto", "sd", without)
    assert plain.recipe == "sft"
    with pytest.raises(ValueError, match="loss is 'kto_gp'; accepted: kto, dpo, sft"):
        read("diffusion_kto", "sd", KTO.replace("--loss kto", "--loss kto_gp"))


def test_diffusion_sdpo(read: Any) -> None:
    words = "--pretrained_model_name_or_path m --train_data_dir d --train_method dmpo --dmpo_alpha 0.01 --beta_dpo 2000 --scale_lr "
    _, objective, notes = read("dmpo", "sd", SDPO)
    assert "Diffusion-SDPO" in notes[0]
    assert (objective.method.alpha, objective.guards[0].mu, objective.guards[0].scope) == (0.01, 0.9, "microbatch")
    _, bare, _ = read("dmpo", "sd", words + "--winner_preserving_mu 0.6")
    assert bare.guards == ()
    with pytest.raises(ValueError, match="--train_method dmpo and --method dspo"):
        read("dspo", "sd", words)
    with pytest.raises(ValueError, match="train_method is 'spin'; accepted: diffusion-dpo"):
        read("dmpo", "sd", words.replace("dmpo --dmpo", "spin --dmpo"))


def test_a_family_that_is_based_on_another_one_wins() -> None:
    assert detect({"beta_mapo", "use_8bit_adam"}) == "mapo"
    assert detect({"use_8bit_adam"}, "mapo") == "mapo"
    assert detect({"use_8bit_adam"}, "diffusion_dpo") == "diffusers"
    assert detect({"sdxl", "num_inference_steps"}) == "inversion_dpo"
    assert detect({"learning_rate"}, "mapo") == "diffpref"
    for flag in ("loss", "policy", "dataloader", "fixed_noise", "use_lora", "ema_momentum", "track_score", "eval_metrics", "h_pos"):
        assert detect({flag, "beta_dpo", "use_8bit_adam"}) == "diffusion_kto"
    with pytest.raises(ValueError, match="two families"):
        detect({"beta_mapo", "num_inference_steps"})


def test_the_columns_of_smpo_are_found(pair_columns: dict[str, list[Any]]) -> None:
    count = len(pair_columns["caption"])
    table = pa.table(pair_columns | {"ps_score_0": [[0.2 + i / 100] for i in range(count)], "ps_score_1": [[0.1]] * count})
    objective, pairs = fitted(build_objective("smpo", {}), load_pairs(table))
    assert (objective.method.score_min, objective.method.score_max) == pytest.approx((0.1, 0.43))
    assert pairs.scores["pickscore"].shape == (count, 2)
