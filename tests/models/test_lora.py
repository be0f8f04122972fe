"""LoRA: starts as the base, switches off exactly, and travels through diffusers' own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpref.core.policy import adapters_off
from diffpref.core.types import Conditioning
from diffpref.models.backbone import Backbone, load_backbone
from diffpref.models.lora import TARGETS, LeanLinear, add_lora, merged_copy, save_lora, trainable_state
from diffpref.training.step_cost import Counter

VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_dora": True, "use_rslora": True},
}
LEVELS = torch.tensor([[10, 10], [800, 800]])


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Conditioning]:
    """x_t, t and conditioning of two pairs."""
    maker = torch.Generator().manual_seed(0)
    width = backbone.denoiser.config.cross_attention_dim
    cond = Conditioning(torch.randn(2, 2, 5, width, generator=maker))
    if backbone.uses_time_ids:
        cond = Conditioning(cond.prompt_embeds, torch.randn(2, 2, 16, generator=maker), torch.full((2, 2, 6), 32.0))
    return torch.randn(2, 2, 4, 8, 8, generator=maker), LEVELS, cond


@torch.no_grad()
def predict(backbone: Backbone) -> Tensor:
    """The UNet's prediction as it is now."""
    return backbone.predictor(backbone.denoiser)(*inputs(backbone))


def perturb(denoiser: nn.Module) -> None:
    """As if the adapter had been trained."""
    maker = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainable_state(denoiser).values():
            p.add_(0.2 * torch.randn(p.shape, generator=maker))


@pytest.mark.parametrize(
    ("targets", "variant"), [("attention", "plain"), ("to_q, to_v", "plain"), *(("all", variant) for variant in VARIANTS)]
)
def test_a_new_adapter_does_not_change_the_model(targets: str, variant: str, sd_folder: Path) -> None:
    backbone = load_backbone(str(sd_folder))
    before = predict(backbone)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    add_lora(backbone.denoiser, rank=2, alpha=2, targets=targets, seed=0, **VARIANTS[variant])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(predict(backbone), before)
    trained = trainable_state(backbone.denoiser)
    assert trained
    assert all("lora_" in name for name in trained)
    perturb(backbone.denoiser)
    assert not torch.allclose(predict(backbone), before, atol=1e-3)
    with adapters_off(backbone.denoiser):
        assert torch.equal(predict(backbone), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_adapter_does_not_change_half_precision_either(variant: str, sdxl_folder: Path) -> None:
    backbone = load_backbone(str(sdxl_folder))
    add_lora(backbone.denoiser, rank=2, alpha=2, targets="all", seed=0, **VARIANTS[variant])
    with torch.autocast("cpu", torch.bfloat16):
        policy = predict(backbone)
        with adapters_off(backbone.denoiser):
            assert torch.equal(predict(backbone), policy)  # a magnitude rounded to half precision would move it by 0.4 %


def test_the_scale_of_rslora_shrinks_with_the_root_of_the_rank(sd_unet: UNet2DConditionModel) -> None:
    add_lora(sd_unet, rank=4, alpha=6, targets="to_q", seed=0, use_rslora=True)
    assert {m.scaling["default"] for m in sd_unet.modules() if hasattr(m, "scaling")} == {6 / 2}


def test_the_seed_decides_the_start(sd_folder: Path) -> None:
    starts = []
    for seed in (0, 0, 1):
        denoiser = load_backbone(str(sd_folder)).denoiser
        add_lora(denoiser, rank=2, alpha=2, targets="attention", seed=seed)
        starts.append(torch.cat([p.detach().flatten() for p in trainable_state(denoiser).values()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_named_sets_reach_the_layers_they_promise(sd_unet: UNet2DConditionModel) -> None:
    add_lora(sd_unet, rank=2, alpha=2, targets="all", seed=0)
    layers = {name.split(".lora_")[0] for name in trainable_state(sd_unet)}
    for target in TARGETS["all"]:
        assert any(layer == target or layer.endswith("." + target) for layer in layers), target


@pytest.mark.parametrize(
    ("family", "alpha", "targets", "variant"),
    [
        ("sd", 4, "attention", "plain"),
        ("sdxl", 4, "attention", "dora"),
        ("sd", 10, "all", "rslora"),
        ("sdxl", 1, "all", "plain"),
        ("sd", 10, "all", "dora"),
        ("sdxl", 10, "all", "both"),
    ],
)
def test_saved_adapters_load_into_a_fresh_pipeline(
    family: str, alpha: float, targets: str, variant: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(f"{family}_folder"))
    trained = load_backbone(folder)
    before = predict(trained)
    add_lora(trained.denoiser, rank=4, alpha=alpha, targets=targets, seed=0, **VARIANTS[variant])
    perturb(trained.denoiser)
    save_lora(trained.pipeline, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = load_backbone(folder)
    fresh.pipeline.load_lora_weights(tmp_path)
    assert torch.equal(predict(fresh), predict(trained))
    assert not torch.allclose(predict(fresh), before, atol=1e-3)


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_a_merged_copy_computes_the_same_without_an_adapter(variant: str, sdxl_folder: Path, tmp_path: Path) -> None:
    trained = load_backbone(str(sdxl_folder))
    add_lora(trained.denoiser, rank=4, alpha=6, targets="all", seed=0, **VARIANTS[variant])
    perturb(trained.denoiser)
    expected, unet = predict(trained), merged_copy(trained.denoiser)
    assert torch.equal(predict(trained), expected)  # the original keeps its adapter
    assert not [name for name, _ in unet.named_parameters() if "lora" in name]
    unet.save_pretrained(tmp_path)
    trained.pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(trained), expected, rtol=1e-4, atol=1e-4)


def test_the_file_holds_every_trained_tensor_and_its_scale(sd_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(sd_folder))
    add_lora(backbone.denoiser, rank=4, alpha=10, targets="attention", seed=0)
    perturb(backbone.denoiser)
    save_lora(backbone.pipeline, tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    stored = load_file(path)
    weights = {name: x for name, x in stored.items() if x.ndim > 1}
    assert len(weights) == len(trainable_state(backbone.denoiser))
    assert sum(float(x.sum()) for x in weights.values()) == pytest.approx(
        sum(float(x.detach().sum()) for x in trainable_state(backbone.denoiser).values()), rel=1e-5
    )
    with safe_open(path, "pt") as file:
        assert '"unet.lora_alpha": 10' in (file.metadata() or {}).get("lora_adapter_metadata", "")


@pytest.mark.parametrize("targets", ["to_q,to_nothing", "attentoin", " , "])
def test_unknown_targets_are_the_users_error(targets: str, sd_unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="lora_targets") as caught:
        add_lora(sd_unet, rank=2, alpha=2, targets=targets, seed=0)
    assert repr(targets) in str(caught.value)
    assert not trainable_state(sd_unet)


def test_trained_tensors_are_the_parameters_themselves(sd_unet: UNet2DConditionModel) -> None:
    add_lora(sd_unet, rank=2, alpha=2, targets="to_q", seed=0)
    named = dict(sd_unet.named_parameters())
    assert all(p is named[name] for name, p in trainable_state(sd_unet).items())
    assert isinstance(sd_unet, nn.Module)
    assert not isinstance(sd_unet, DiffusionPipeline)


@pytest.mark.parametrize(("alpha", "fewer"), [(2.0, 2), (3.0, 1)])
def test_adapters_neither_cast_to_and_fro_nor_multiply_by_one(sd_unet: UNet2DConditionModel, alpha: float, fewer: int) -> None:
    """Under autocast peft's cast of the input is undone at once: the same numbers without it, with fewer kernels and less memory."""
    add_lora(sd_unet, 2, alpha, "attention", seed=0)
    for name, p in sd_unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    layers = [m for m in sd_unet.modules() if isinstance(m, BaseTunerLayer)]
    x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    found = []
    for cast in (False, True):
        assert all(layer.cast_input_dtype_enabled is False for layer in layers) or cast
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
            layer.__class__ = lora.Linear if cast else LeanLinear
        with Counter(sd_unet) as counter, torch.autocast("cpu", torch.bfloat16):
            out = sd_unet(x_t, torch.tensor([10, 900]), text).sample
        kept, kernels = counter.live, counter.kernels
        out.float().pow(2).mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in sd_unet.parameters() if p.grad is not None], kept, kernels))
        sd_unet.zero_grad()
    (ours, slopes, kept, kernels), (theirs, others, more, further) = found
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(slopes, others, strict=True))
    assert kept < more
    assert kernels <= further - fewer * len(layers)


def test_what_is_more_than_one_plain_adapter_is_left_to_peft(sd_unet: UNet2DConditionModel) -> None:
    add_lora(sd_unet, 2, 2.0, "to_q", seed=0)
    layer = next(m for m in sd_unet.modules() if isinstance(m, LeanLinear))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 3, layer.in_features)
    base, plain = layer.base_layer(x), layer(x)
    torch.testing.assert_close(plain - base, x @ (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T)
    with adapters_off(sd_unet):
        assert torch.equal(layer(x), base)
    sd_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="second")
    sd_unet.set_adapter(["default", "second"])
    second = (layer.lora_B["second"].weight @ layer.lora_A["second"].weight).T * layer.scaling["second"]
    torch.testing.assert_close(layer(x), plain + x @ second)
    sd_unet.set_adapter("default")
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert torch.equal(layer.eval()(x), plain)
    assert not torch.equal(layer.train()(x), plain)
    layer.eval().merge()
    torch.testing.assert_close(layer(x), plain)
    layer.unmerge()
    sd_unet.delete_adapters(["default", "second"])
    torch.testing.assert_close(layer(x), base)
