"""What runs start from, through the command: single files, LoRA, other weights, Turbo, the refiner, and input that cannot work."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpref import cli
from diffpref.models.backbone import load_pipeline
from diffpref.models.lora import LORA_FILE, add_lora, add_text_lora, save_lora, trainable_state
from diffpref.models.lora_file import merge_lora
from diffpref.models.single_file import to_original_layout
from diffpref.training.run import Run

Settings = dict[str, Any]
Prepare = Callable[..., Run]


def flags(settings: Settings) -> list[str]:
    """Settings as command line."""
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Every weight by name, without PEFT's level of names."""
    return {name.replace(".base_layer", ""): x for name, x in module.state_dict().items() if "lora_" not in name}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="session")
def sd_file(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD1.5 as a single file."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(to_original_layout(load_pipeline(str(sd_folder))), path)
    return path


def write_lora(folder: Path, target: Path, text: bool = False) -> Path:
    """A LoRA of an SD model, with random weights, on the UNet and with `text` on the text encoder."""
    pipeline = copy.deepcopy(load_pipeline(str(folder)))
    maker = torch.Generator().manual_seed(5)
    for part in (pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(False)
    add_lora(pipeline.unet, 3, 5, "to_q,to_v", seed=0)
    if text:
        add_text_lora([pipeline.text_encoder], [2], rank=3, alpha=5, seed=0)
    for part in (pipeline.unet, pipeline.text_encoder):
        for p in trainable_state(part).values():
            p.data.add_(0.2 * torch.randn(p.shape, generator=maker))
    save_lora(pipeline, target)
    return target


@pytest.fixture(scope="session")
def sd_lora(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the SD model: rank 3, alpha 5, on to_q and to_v."""
    return write_lora(sd_folder, tmp_path_factory.mktemp("lora"))


@torch.no_grad()
def answer(run: Run, who: str) -> Tensor:
    """What policy or reference predicts at a fixed place."""
    batch = next(run.source)
    (step,) = run.objective.path(batch, run.process, batch.random(0))
    predict = run.policy if who == "policy" else run.reference
    assert predict is not None
    return predict(step.x_t, step.timesteps, batch.cond)


def test_a_single_file_trains_as_its_folder_does(
    sd_file: Path, sd_folder: Path, run_training: Callable[..., Path], read_state: Any
) -> None:
    folder = run_training("folder", max_train_steps=2)
    file = run_training("file", max_train_steps=2, pretrained_model_name_or_path=str(sd_file), single_file_config=str(sd_folder))
    assert_same(read_state(file, 2), read_state(folder, 2))


def test_policy_and_reference_start_from_other_weights(prepare: Prepare, sd_folder: Path, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(7)
    state = {name: x + 0.05 * torch.randn_like(x) for name, x in load_pipeline(str(sd_folder)).unet.state_dict().items()}
    torch.save({f"module.{name}": x for name, x in state.items()}, tmp_path / "unet.pth")
    run = prepare("lora", unet_init=str(tmp_path / "unet.pth"))
    assert_same(weights(run.backbone.denoiser), state)
    assert "unet.pth in it; --merge_lora" in capsys.readouterr().err
    full = prepare("full", unet_init=str(tmp_path / "unet.pth"), tune="full")
    assert_same(weights(full.backbone.denoiser), state)
    assert full.reference is not None
    expected = answer(prepare("again", unet_init=str(tmp_path / "unet.pth")), "reference")
    assert torch.equal(answer(run, "policy"), expected)
    assert torch.equal(answer(full, "reference"), expected)


def test_a_lora_as_base_is_in_policy_and_reference(prepare: Prepare, sd_folder: Path, sd_lora: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(sd_folder))
    merge_lora(pipeline, str(sd_lora), "lora")
    pipeline.save_pretrained(tmp_path / "model")
    run, merged = prepare("run", start_lora=str(sd_lora)), prepare("merged", pretrained_model_name_or_path=str(tmp_path / "model"))
    expected = answer(merged, "reference")
    assert not torch.equal(answer(prepare("plain"), "reference"), expected)
    assert torch.equal(answer(run, "reference"), expected)
    assert torch.equal(answer(prepare("once more", start_lora=str(sd_lora)), "policy"), expected)


def test_a_lora_as_adapter_is_in_the_policy_alone(
    prepare: Prepare, run_training: Callable[..., Path], read_state: Any, sd_lora: Path, capsys: Any
) -> None:
    options = {"start_lora": str(sd_lora / LORA_FILE), "start_lora_as": "adapter"}
    base = answer(prepare("plain"), "reference")
    run = prepare("run", rank=3, **options)
    assert "rank 3, lora_alpha 5" in capsys.readouterr().err
    assert torch.equal(answer(run, "reference"), base)
    assert not torch.equal(answer(prepare("again", rank=3, **options), "policy"), base)
    stored = load_file(sd_lora / LORA_FILE)
    trained = {f"unet.{name.replace('.default', '')}": x.detach() for name, x in run.trainable.items()}
    assert_same(trained, stored)
    parts = run_training("parts", max_train_steps=2, rank=3, **options)
    assert "started from an adapter" in capsys.readouterr().err
    run_training("parts", max_train_steps=4, rank=3, resume_from_checkpoint="latest", **options)
    whole = run_training("whole", max_train_steps=4, rank=3, **options)
    assert_same(read_state(parts, 4), read_state(whole, 4))


@pytest.mark.parametrize("text", [True, False])
def test_an_adapter_with_and_without_layers_of_the_text_encoder(
    text: bool, prepare: Prepare, run_training: Callable[..., Path], sd_folder: Path, tmp_path: Path
) -> None:
    lora = write_lora(sd_folder, tmp_path / "lora", text)
    options = {"start_lora": str(lora), "start_lora_as": "adapter", "rank": 3, "train_text_encoder": True}
    run = prepare("run", **options)
    stored = load_file(lora / LORA_FILE)
    trained = {name.replace(".default", ""): x.detach() for name, x in run.trainable.items()}
    encoder = {name.split("text_encoder.")[1]: x for name, x in trained.items() if "text_encoder." in name}
    assert len(encoder) == 2 * 2 * 4  # two layers of four matrices each
    for name, x in encoder.items():
        bare = name.removeprefix("text_model.")
        assert torch.equal(x, stored[f"text_encoder.text_model.{bare}"]) if text else bool("lora_A" in name or (x == 0).all())
    pictures = {"validation_steps": 1, "validation_prompts": ("a red circle",)}
    plain, warm = prepare("plain", **pictures), prepare("warm", **options, **pictures)
    assert plain.validation is not None
    assert warm.validation is not None
    assert (plain.validation.base_pictures == warm.validation.base_pictures).all()
    folder = run_training("trained", max_train_steps=1, **options)
    assert (folder / "checkpoint-1").is_dir()


def test_base_pictures_show_the_base_of_an_adapter(prepare: Prepare, sd_lora: Path) -> None:
    options = {"validation_steps": 1, "validation_prompts": ("a red circle",)}
    plain = prepare("plain", **options)
    warm = prepare("warm", start_lora=str(sd_lora), start_lora_as="adapter", rank=3, **options)
    assert plain.validation is not None
    assert warm.validation is not None
    assert (plain.validation.base_pictures == warm.validation.base_pictures).all()


def test_v_prediction_on_a_schedule_that_ends_in_pure_noise(base_settings: Settings, sd_folder: Path, tmp_path: Path) -> None:
    more = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "true", "tune": "full", "output_dir": tmp_path / "run"}
    more |= {"validation_steps": 2, "validation_prompts": "a red circle", "max_train_steps": 2}
    settings = {name: value for name, value in base_settings.items() if name != "rank"}
    assert cli.main(["train", *flags(settings | more)]) == 0
    stored = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert (stored["prediction_type"], stored["rescale_betas_zero_snr"], stored["timestep_spacing"]) == ("v_prediction", True, "trailing")
    assert json.loads((tmp_path / "run" / "run_manifest.json").read_text())["prediction_type"] == "v_prediction"
    assert (tmp_path / "run" / "validation" / "step_2.png").is_file()


def test_turbo_says_where_it_trains(base_settings: Settings, sdxl_folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = {"pretrained_model_name_or_path": sdxl_folder, "is_turbo": "true", "max_train_steps": 2, "held_out_pairs": 4}
    assert cli.main(["train", *flags(base_settings | more | {"validation_steps": 2, "output_dir": tmp_path / "run"})]) == 0
    assert "timesteps 249, 499, 749 " in capsys.readouterr().err


@pytest.fixture(scope="session")
def refiner_folder(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner made of the parts of the SDXL model."""
    parts = DiffusionPipeline.from_pretrained(sdxl_folder).components
    config = dict(parts["unet"].config) | {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 4 + 16}
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(config)
    parts = {**parts, "unet": unet, "text_encoder": None, "tokenizer": None}
    folder = tmp_path_factory.mktemp("models") / "refiner"
    pipeline = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(folder)
    return folder


def test_the_refiner_trains_and_is_exported(base_settings: Settings, refiner_folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = {"pretrained_model_name_or_path": refiner_folder, "max_train_steps": 2, "held_out_pairs": 4, "validation_steps": 2}
    assert cli.main(["train", *flags(base_settings | more | {"output_dir": tmp_path / "run", "merge_lora": "true"})]) == 0
    assert json.loads((tmp_path / "run" / "run_manifest.json").read_text())["model_family"] == "sdxl_refiner"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/implicit_accuracy" in line for line in lines)
    assert not (tmp_path / "run" / "validation").exists()
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(tuned, StableDiffusionXLImg2ImgPipeline)
    assert tuned.config.requires_aesthetics_score is True
    tuned.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (32, 32), "gray")
    assert tuned("a red circle", image=picture, num_inference_steps=4, strength=0.5).images[0].size == (32, 32)


def lora_folder(folders: dict[str, Path], target: Path) -> Settings:
    """A LoRA folder given as a base."""
    return {"pretrained_model_name_or_path": write_lora(folders["sd"], target / "lora")}


def strange_vae(folders: dict[str, Path], target: Path) -> Settings:
    """An autoencoder of SD's scale for SDXL's."""
    config = json.loads((folders["sdxl"] / "vae" / "config.json").read_text()) | {"scaling_factor": 0.18215}
    AutoencoderKL.from_config(config).save_pretrained(target / "vae")
    return {"pretrained_model_name_or_path": folders["sdxl"], "pretrained_vae_model_name_or_path": target / "vae"}


def sixteen_channels(folders: dict[str, Path], target: Path) -> Settings:
    """An autoencoder of a newer family."""
    config = json.loads((folders["sd"] / "vae" / "config.json").read_text()) | {"latent_channels": 16}
    AutoencoderKL.from_config(config).save_pretrained(target / "vae")
    return {"pretrained_vae_model_name_or_path": target / "vae"}


def lora_of_sd_on_sdxl(folders: dict[str, Path], target: Path) -> Settings:
    """Another family's LoRA."""
    lora = write_lora(folders["sd"], target / "lora")
    return {"pretrained_model_name_or_path": folders["sdxl"], "start_lora": lora}


def no_encoder(folders: dict[str, Path], target: Path) -> Settings:
    """A copy that lacks a part."""
    shutil.copytree(folders["sd"], target / "model")
    shutil.rmtree(target / "model" / "text_encoder")
    return {"pretrained_model_name_or_path": target / "model"}


def damaged(keep: int) -> Callable[[dict[str, Path], Path], Settings]:
    """A UNet of which only the first bytes are there."""

    def write(folders: dict[str, Path], target: Path) -> Settings:
        shutil.copytree(folders["sd"], target / "model")
        path = target / "model" / "unet" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        return {"pretrained_model_name_or_path": target / "model"}

    return write


def overflow(folders: dict[str, Path], target: Path) -> Settings:
    """An autoencoder with a weight that did not fit into fp16."""
    vae = AutoencoderKL.from_pretrained(folders["sd"] / "vae")
    vae.encoder.conv_in.weight.data[0] = 1e6
    vae.half().save_pretrained(target / "vae")
    return {"pretrained_vae_model_name_or_path": target / "vae"}


def pickled_model(folders: dict[str, Path], target: Path) -> Settings:
    """A checkpoint of the old kind."""
    torch.save({"state_dict": {}}, target / "model.ckpt")
    return {"pretrained_model_name_or_path": target / "model.ckpt"}


def text_layers(folders: dict[str, Path], target: Path) -> Settings:
    """An adapter with more than is trained."""
    return {"start_lora": write_lora(folders["sd"], target / "lora", text=True), "start_lora_as": "adapter", "rank": 3}


def adapter(**more: Any) -> Callable[[dict[str, Path], Path], Settings]:
    """An adapter to go on from, with settings that contradict it."""

    def write(folders: dict[str, Path], target: Path) -> Settings:
        lora = write_lora(folders["sd"], target / "lora")
        return {"start_lora": lora, "start_lora_as": "adapter", "rank": 3} | more

    return write


BAD: dict[str, tuple[Callable[[dict[str, Path], Path], Settings], list[str]]] = {
    "LoRA folder as base": (lora_folder, ["is the folder of a LoRA", "start_lora"]),
    "autoencoder of another scale": (strange_vae, ["scaling_factor 0.18215", "0.7", "config.json"]),
    "autoencoder of other channels": (sixteen_channels, ["latents of 16 channels", "takes 4"]),
    "LoRA of another family": (lora_of_sd_on_sdxl, ["start_lora", "does not fit the model", "another family"]),
    "missing text encoder": (no_encoder, ["names text_encoder (CLIPTextModel)", "no folder text_encoder"]),
    "truncated weights": (damaged(-500), ["no complete safetensors file", "fetch it again"]),
    "half a header": (damaged(300), ["no complete safetensors file", "fetch it again"]),
    "overflow in fp16": (overflow, ["autoencoder", "not finite", "overflowed in fp16"]),
    "pickle": (pickled_model, ["is a pickle", ".safetensors"]),
    "rank of the adapter": (adapter(rank=8), ["rank is 8, but start_lora", "has 3", "leave rank out"]),
    "alpha of the adapter": (adapter(lora_alpha=3), ["lora_alpha is 3.0", "has 5"]),
    "layers of the adapter": (adapter(lora_targets="to_q"), ["lora_targets is 'to_q'", "leave lora_targets out"]),
    "variant of the adapter": (adapter(use_dora="true"), ["use_dora is True", "has False"]),
    "text layers of the adapter": (text_layers, ["layers of the text encoders", "add train_text_encoder"]),
    "adapter without a file": (adapter(start_lora=None), ["start_lora_as is adapter", "no start_lora"]),
    "adapter of a full run": (adapter(tune="full", rank=None), ["start_lora_as is adapter", "tune is full"]),
    "noise from pure noise": (lambda f, t: {"rescale_betas_zero_snr": "true"}, ["predicts noise", "v_prediction"]),
    "Turbo of SD": (lambda f, t: {"is_turbo": "true"}, ["is_turbo is true", "of the sd family"]),
    "Turbo with another schedule": (lambda f, t: {"is_turbo": "true", "rescale_betas_zero_snr": "true"}, ["is_turbo brings the schedule"]),
    "configs of no file": (lambda f, t: {"single_file_config": "x"}, ["single_file_config is 'x'", "leave it out"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_ends_before_training(
    case: str, base_settings: Settings, sd_folder: Path, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = BAD[case]
    settings = base_settings | {"output_dir": tmp_path / "run"} | make({"sd": sd_folder, "sdxl": sdxl_folder}, tmp_path)
    assert cli.main(["train", *flags(settings)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:]
    for text in expected:
        assert text in errors[0]
    assert not (tmp_path / "run").exists()


def test_validation_prompts_of_a_refiner(base_settings: Settings, refiner_folder: Path, tmp_path: Path, capsys: Any) -> None:
    more = {"pretrained_model_name_or_path": refiner_folder, "validation_steps": 2, "validation_prompts": "a red circle"}
    assert cli.main(["train", *flags(base_settings | more | {"output_dir": tmp_path / "run"})]) == 2
    assert "improves pictures" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
