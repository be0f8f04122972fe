"""Bytes and FLOPs counted without memory are those of the real pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffpref.models.attention import KERNELS, DispatchedAttention
from diffpref.models.backbone import Backbone, load_backbone
from diffpref.models.execution import set_recompute
from diffpref.training.config import TrainConfig
from diffpref.training.models import make_trainable
from diffpref.training.step_cost import Counter, step_cost, upper_bound, vae_bytes, without_memory

MB = 2**20


def loaded(folder: Path, **settings: Any) -> tuple[Backbone, nn.Module]:
    """A backbone and its trained module."""
    backbone, module = make_trainable(TrainConfig(rank=2, **settings), load_backbone(str(folder)))
    return backbone, module.eval()


def test_bytes_are_counted_while_they_live() -> None:
    x = torch.zeros(MB // 4)
    with Counter() as counter:
        y = x + 1  # 1 MB
        z = torch.cat([y, y])  # 2 MB beside it
        view = z[: MB // 4]
        assert (counter.live, counter.peak) == (3 * MB, 3 * MB)
        del y, z
        assert counter.live == 2 * MB  # the view holds all of it
        del view
        w = x * 2
        assert (counter.live, counter.peak) == (MB, 3 * MB)
        w @ w
    assert counter.flops == 0  # of a product of vectors torch counts nothing
    with Counter() as counter:
        torch.ones(3, 4) @ torch.ones(4, 5)
    assert counter.flops == 2 * 3 * 4 * 5


def test_what_was_there_before_is_not_counted() -> None:
    layer = nn.Linear(16, 16)
    with Counter(layer) as counter:
        layer(torch.zeros(1, 16)).sum().backward()
    assert counter.peak < 3 * 4 * 16 * 17  # the gradients and little more
    with Counter() as counter:
        layer.weight.t()
    assert counter.peak == 4 * 16 * 16


FORMS = [("sd", {"tune": "lora"}), ("sd", {"tune": "full"}), ("sdxl", {"tune": "lora"}), ("sdxl", {"train_text_encoder": True})]


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize(("family", "settings"), FORMS)
def test_the_count_is_that_of_a_real_pass(family: str, settings: dict[str, Any], recompute: Any, request: pytest.FixtureRequest) -> None:
    backbone, module = loaded(request.getfixturevalue(f"{family}_folder"), gradient_checkpointing=recompute, **settings)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    cost = step_cost(backbone, module, (3, 2), 32, autocast=False, recompute=recompute, on_gpu=False)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not backbone.denoiser.is_gradient_checkpointing
    set_recompute(backbone.denoiser, recompute)
    null = backbone.encode_prompts(["a", "b", "c"]).map(lambda x: x.expand(-1, 2, *x.shape[2:]))
    cond = replace(null, time_ids=torch.zeros(3, 2, 6) if family == "sdxl" else None)
    x_t, timesteps = torch.randn(3, 2, 4, 8, 8), torch.zeros(3, 2, dtype=torch.int64)
    predict = backbone.predictor(module)
    with Counter(module) as counter:
        (predict(x_t, timesteps, cond) - x_t).pow(2).mean().backward()
    gradients = sum(4 * p.numel() for p in module.parameters() if p.grad is not None)
    assert gradients > 0
    assert cost.activations == pytest.approx(counter.peak - gradients, rel=0.1)  # kernels choose layouts, and so copies, by themselves
    assert cost.flops == counter.flops > 1.7 * cost.forward_flops
    with FlopCounterMode(display=False) as flops, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # as products that torch counts
        predict(x_t, timesteps, cond)
    assert cost.forward_flops == flops.get_total_flops()


def test_gradients_of_earlier_micro_batches_take_their_room(sd_folder: Path) -> None:
    """The real second micro-batch of an update, all weights trained."""
    backbone, module = loaded(sd_folder, tune="full")
    cost = step_cost(backbone, module, (3, 2), 32, autocast=False, recompute="off", on_gpu=False, accumulates=True)
    first = step_cost(backbone, module, (3, 2), 32, autocast=False, recompute="off", on_gpu=False)
    cond = backbone.encode_prompts(["a", "b", "c"]).map(lambda x: x.expand(-1, 2, *x.shape[2:]))
    x_t, timesteps = torch.randn(3, 2, 4, 8, 8), torch.zeros(3, 2, dtype=torch.int64)
    predict = backbone.predictor(module)
    predict(x_t, timesteps, cond).mean().backward()
    with Counter(module) as counter:
        (predict(x_t, timesteps, cond) - x_t).pow(2).mean().backward()
    assert cost.activations == pytest.approx(counter.peak, rel=0.1)
    assert cost.activations > first.activations
    assert cost.kept == first.kept
    assert cost.flops == first.flops


def test_checkpointing_saves_memory_and_costs_arithmetic(sdxl_folder: Path) -> None:
    backbone, module = loaded(sdxl_folder)
    plain, again = (step_cost(backbone, module, (8, 2), 64, autocast=False, recompute=how, on_gpu=False) for how in ("off", "full"))
    assert again.activations < 0.7 * plain.activations
    assert again.forward_flops == plain.forward_flops
    assert plain.flops < again.flops < plain.flops + plain.forward_flops


def test_autocast_halves_activations_and_gpus_normalise_in_float32(sd_folder: Path) -> None:
    backbone, module = loaded(sd_folder)
    single = step_cost(backbone, module, (8, 2), 64, autocast=False, recompute="off", on_gpu=False)
    half = step_cost(backbone, module, (8, 2), 64, autocast=True, recompute="off", on_gpu=False)
    on_gpu = step_cost(backbone, module, (8, 2), 64, autocast=True, recompute="off", on_gpu=True)
    assert 0.4 * single.activations < half.activations < 0.7 * single.activations
    assert 1.2 * half.activations < on_gpu.activations < single.activations
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_kernels_and_dtypes_of_gpus_are_counted_on_any_machine(sd_folder: Path) -> None:
    how = {"autocast": True, "recompute": "off", "on_gpu": False}
    backbone, module = loaded(sd_folder)
    expected = step_cost(backbone, module, (2, 2), 32, **how)
    backbone.denoiser.set_attn_processor(DispatchedAttention(KERNELS["xformers"]))
    assert step_cost(backbone, module, (2, 2), 32, **how) == expected
    assert {x._attention_backend for x in backbone.denoiser.attn_processors.values()} == {KERNELS["xformers"]}
    costs = []
    for dtype in (torch.bfloat16, torch.float16):
        for p in module.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)
        costs.append(step_cost(backbone, module, (2, 2), 32, **how))
    assert costs[0] == costs[1]
    assert costs[0].activations < expected.activations  # no casts of the frozen weights


@pytest.mark.parametrize("decode", [False, True])
def test_the_autoencoder_is_counted_as_it_works(decode: bool, sd_folder: Path) -> None:
    vae = load_backbone(str(sd_folder)).pipeline.vae
    pixels = torch.zeros(5, 3, 32, 32)
    with torch.no_grad(), Counter(vae) as counter:
        latent = vae.encode(pixels).latent_dist.mean
        if decode:
            counter.peak = counter.live
            vae.decode(latent)
    assert vae_bytes(vae, 5, 32, decode) == counter.peak > pixels.nbytes


def test_a_copy_without_memory_shares_nothing(sd_folder: Path) -> None:
    _, unet = loaded(sd_folder)
    copied = without_memory(unet)
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in copied.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in unet.named_parameters()
    ]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in unet.modules()}
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in unet.parameters()}


@pytest.mark.parametrize(("family", "settings"), FORMS)
def test_the_upper_bound_is_above_everything(family: str, settings: dict[str, Any], request: pytest.FixtureRequest) -> None:
    backbone, module = loaded(request.getfixturevalue(f"{family}_folder"), **settings)
    vae = backbone.pipeline.vae
    for pairs, side in ((1, 16), (4, 128)):
        bound = upper_bound(backbone, module, 2 * pairs, side)
        cost = step_cost(backbone, module, (pairs, 2), side, autocast=False, recompute="off", on_gpu=False)
        assert bound > 1.4 * max(cost.activations, vae_bytes(vae, 2 * pairs, side), vae_bytes(vae, 2 * pairs, side, decode=True))
