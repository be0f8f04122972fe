"""Drawing for users: reload without a difference, known, new and mixed users, axes, and clear errors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import find_pipeline_class
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpref.inference.checkpoints import parse_candidates
from diffpref.inference.evaluate import EvaluateConfig, evaluate
from diffpref.inference.pictures import picture_path
from diffpref.inference.sample import SampleConfig, load
from diffpref.inference.user_pipelines import UserStableDiffusionPipeline, UserStableDiffusionXLPipeline, as_user_pipeline, read_examples
from diffpref.inference.users import WEIGHTS_FILE, branch_state, save_user_weights
from diffpref.models.backbone import load_pipeline
from diffpref.models.user_attention import add_user_attention, user_layers
from diffpref.models.user_lora import add_user_lora, user_updates
from diffpref.users.projectors import new_projector
from tests.conftest import TEXT_WIDTH

ROOT = Path(__file__).parents[2]
ENCODER = {"user_encoder": "unet", "num_examples": 2, "user_tokens": 2, "user_encoder_weights": None}


def write_weights(model: Path, folder: Path, kind: str, sizes: dict[str, int], embeds: dict[str, Tensor]) -> Path:
    """User weights with random numbers for a saved pipeline."""
    pipeline = load_pipeline(str(model))
    width = int(pipeline.unet.config.cross_attention_dim)
    add_user_attention(pipeline.unet, width, 0)
    for i, layer in enumerate(user_layers(pipeline.unet).values()):
        nn.init.normal_(layer.user_v.weight, generator=torch.Generator().manual_seed(i))
    add_user_lora(pipeline.unet, width, 2, 0)
    for i, update in enumerate(user_updates(pipeline.unet).values()):
        nn.init.normal_(update.up.weight, std=0.3, generator=torch.Generator().manual_seed(i))
    projector = new_projector(kind, width=width, **sizes)
    config = {"projector": kind, "sizes": {"width": width, **sizes}, "width": width, "user_rank": 2, "encoder": ENCODER}
    save_user_weights(folder, pipeline.unet, projector, config, embeds)
    return folder


@pytest.fixture(scope="module")
def weights(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the SDXL model: examples of its own UNet's features, three users."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"picture": 3 * (16 + 16), "prompt": 2 * TEXT_WIDTH, "num_tokens": 2, "dim": 8}
    draw = torch.Generator().manual_seed(0)
    embeds = {name: torch.randn(2, 2 * 96 + 2 * TEXT_WIDTH, generator=draw) for name in ("anna", "ben", "carl")}
    return write_weights(sdxl_folder, folder, "examples", sizes, embeds)


@pytest.fixture(scope="module")
def pipeline(sdxl_folder: Path, weights: Path) -> UserStableDiffusionXLPipeline:
    made = as_user_pipeline(load_pipeline(str(sdxl_folder)), weights)
    assert isinstance(made, UserStableDiffusionXLPipeline)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, **settings: Any) -> np.ndarray:
    """Two pictures as floats."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)  # for a sampler that adds some on the way
    out = pipeline(prompt=["a red ring", "a cat"], latents=latents, generator=noise, num_inference_steps=2, output_type="np", **settings)
    images: np.ndarray = out.images
    return images


def test_nobody_is_the_base_model(pipeline: Any, sdxl_folder: Path) -> None:
    base = load_pipeline(str(sdxl_folder))
    base.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipeline), draw(base))
    assert np.array_equal(draw(pipeline, users="anna", user_scale=0.0), draw(base))
    assert np.array_equal(draw(pipeline, user_embeds=torch.zeros(2, 224)), draw(base))
    assert np.abs(draw(pipeline, users="anna") - draw(base)).max() > 0.01
    assert np.array_equal(draw(pipeline), draw(base))  # the user of one call does not stay


def test_saved_weights_reload_without_a_difference(pipeline: Any, sdxl_folder: Path, weights: Path, tmp_path: Path) -> None:
    save_user_weights(tmp_path, pipeline.unet, pipeline._user_projector, pipeline._user_config, pipeline._user_embeds)
    again = as_user_pipeline(load_pipeline(str(sdxl_folder)), tmp_path)
    again.set_progress_bar_config(disable=True)
    theirs, own = (branch_state(p.unet, p._user_projector) for p in (again, pipeline))
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], x) for name, x in own.items())
    assert np.array_equal(draw(again, users="ben"), draw(pipeline, users="ben"))


@pytest.mark.parametrize(("file", "wanted"), [("sd_user", UserStableDiffusionPipeline), ("sdxl_user", UserStableDiffusionXLPipeline)])
def test_custom_pipeline_files(file: str, wanted: type) -> None:
    """What from_pretrained(custom_pipeline=FILE) does with the file, without its flag for code from elsewhere."""
    spec = importlib.util.spec_from_file_location(file, ROOT / "pipelines" / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert find_pipeline_class(module) is wanted


def test_mixing(pipeline: Any) -> None:
    ends = [draw(pipeline, users=name) for name in ("anna", "ben")]
    for mixing in ("embeddings", "branches"):
        np.testing.assert_allclose(draw(pipeline, users={"anna": 1.0, "ben": 0.0}, user_mixing=mixing), ends[0], atol=1e-5)
        half = draw(pipeline, users={"anna": 0.5, "ben": 0.5}, user_mixing=mixing)
        assert min(np.abs(half - end).max() for end in ends) > 1e-3
    one_way = draw(pipeline, users="anna", user_passes="conditional")
    assert np.abs(one_way - ends[0]).max() > 1e-3
    assert np.array_equal(
        draw(pipeline, users="anna", user_passes="conditional", guidance_scale=1.0), draw(pipeline, users="anna", guidance_scale=1.0)
    )


def test_keys_and_values_once_per_run(pipeline: Any) -> None:
    calls: list[int] = []
    once = [*(layer.user_k for layer in user_layers(pipeline.unet).values()), *(x.gate for x in user_updates(pipeline.unet).values())]
    hooks = [module.register_forward_hook(lambda *_: calls.append(0)) for module in once]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline("a cat", latents=latents, num_inference_steps=4, users="anna", output_type="latent")
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(hooks)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory, pair_columns: dict[str, list[object]]) -> Callable[[int], Path]:
    """choices(number) -> a folder of that many decided pairs, and a tie."""

    def write(number: int) -> Path:
        folder = tmp_path_factory.mktemp("choices")
        columns = {name: list(values[: number + 1]) for name, values in pair_columns.items()}
        columns["label_0"][-1] = columns["label_1"][-1] = 0.5
        pq.write_table(pa.table(columns), folder / "train-0.parquet")
        return folder

    return write


def test_a_new_user_by_examples(pipeline: Any, choices: Callable[[int], Path]) -> None:
    folder = choices(3)
    examples = read_examples(folder)
    assert len(examples) == 3
    embeds = pipeline.encode_user(folder)
    assert embeds.shape == (3, 2 * 96 + 2 * TEXT_WIDTH)
    pipeline.set_user("anna")  # the encoder's UNet must not see a user
    assert torch.equal(pipeline.encode_user(examples), embeds)
    pipeline.set_user()
    assert np.array_equal(draw(pipeline, user_examples=folder), draw(pipeline, user_embeds=embeds))
    with pytest.raises(ValueError, match="has 1 decided pairs, but the model was trained with 2"):
        pipeline.encode_user(choices(1))


def test_axes_and_their_guidance(sd_folder: Path, tmp_path: Path) -> None:
    eye = torch.eye(2)[:, None]
    write_weights(sd_folder, tmp_path, "axes", {"num_axes": 2}, {"+size": eye[0], "-size": -eye[0], "+hue": eye[1]})
    pipeline = as_user_pipeline(load_pipeline(str(sd_folder)), tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    base, more = draw(pipeline), draw(pipeline, users="+size")
    np.testing.assert_allclose(draw(pipeline, axis_guidance={"+size": 1.0}), more, atol=1e-5)
    np.testing.assert_allclose(draw(pipeline, axis_guidance={"+size": 0.0}), base, atol=1e-5)
    assert np.abs(draw(pipeline, axis_guidance={"+size": 1.0, "+hue": 1.0}) - more).max() > 1e-3
    assert np.array_equal(draw(pipeline), base)  # the UNet is itself again


def test_generate_draws_for_a_user(pipeline: Any, sdxl_folder: Path, weights: Path, choices: Callable[[int], Path]) -> None:
    common = {"pretrained_model_name_or_path": str(sdxl_folder), "prompts": ("a cat",), "user_weights": str(weights)}
    loaded: Any = load(SampleConfig(**common, user=("anna=0.25", "ben=0.75")))
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded), draw(pipeline, users={"anna": 0.25, "ben": 0.75}))
    new: Any = load(SampleConfig(**common, user_examples=str(choices(2))))
    new.set_progress_bar_config(disable=True)
    assert np.abs(draw(new) - draw(loaded)).max() > 1e-3
    for wrong, message in (({"user": ("anna=x",)}, "anna=x"), ({"user": ("zoe",)}, "'zoe' is unknown; known: anna, ben, carl")):
        with pytest.raises(ValueError, match=message):
            load(SampleConfig(**common, **wrong))
    with pytest.raises(ValueError, match="user_weights"):
        SampleConfig(prompts=("a cat",), user=("anna",))


def test_evaluation_takes_every_user_as_a_model(pipeline: Any, sdxl_folder: Path, weights: Path, tmp_path: Path) -> None:
    settings = {"prompts": ("a red ring", "a cat"), "scorers": ("bright",), "num_inference_steps": 2, "guidance_scale": 1.0}
    config = EvaluateConfig(aligned=(f"ppd={weights}",), users=("anna", "ben"), output_dir=str(tmp_path), **settings)
    report = evaluate(config, {"bright": lambda images, prompts: [float(np.asarray(i).mean()) for i in images]}, str(sdxl_folder))
    assert report is not None
    assert list(report.measured) == ["base", "ppd for anna", "ppd for ben"]
    assert report.models["ppd for ben"]["user"] == "ben"
    shown = [np.asarray(Image.open(picture_path(tmp_path, name, 0, 0))).astype(int) for name in report.measured]
    assert min(np.abs(shown[a] - shown[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 2
    with pytest.raises(ValueError, match="draws for users; name them with --users"):
        parse_candidates([f"ppd={weights}"], (1.0,))
    with pytest.raises(ValueError, match="users is anna, but none of the aligned models draws for users"):
        parse_candidates([str(sdxl_folder)], (1.0,), ("anna",))


def test_clear_errors(pipeline: Any, sd_folder: Path, sdxl_folder: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another encoder"):
        pipeline.set_user(user_embeds=torch.zeros(2, 7))
    with pytest.raises(ValueError, match="twice"):
        pipeline.set_user("anna", torch.zeros(2, 224))
    with pytest.raises(ValueError, match="user_mixing is 'x'"):
        pipeline.set_user("anna", user_mixing="x")
    bare = UserStableDiffusionXLPipeline(**load_pipeline(str(sdxl_folder)).components)
    with pytest.raises(ValueError, match="call load_user_weights"):
        bare("a cat", users="anna")
    with pytest.raises(ValueError, match=r"has no user_config\.json"):
        as_user_pipeline(load_pipeline(str(sdxl_folder)), tmp_path)
    with pytest.raises(ValueError, match="32 wide, this one's is 16"):
        as_user_pipeline(load_pipeline(str(sd_folder)), weights)
    for name in ("user_config.json", "user_embeds.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    save_file({"unet.x": torch.zeros(1)} | load_file(weights / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="do not fit this model"):
        as_user_pipeline(load_pipeline(str(sdxl_folder)), tmp_path)
