"""What a machine cannot compute is refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffpref.models import attention
from diffpref.training.config import TrainConfig
from diffpref.training.device import check_precision
from diffpref.training.run import Run


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU from before bf16 and TF32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")


@pytest.mark.usefixtures("old_card")
def test_an_old_card_takes_fp16_and_refuses_what_it_emulates() -> None:
    for precision in ("fp16", "no"):
        check_precision(TrainConfig(), precision, on_cpu=False)
    with pytest.raises(ValueError, match="mixed_precision is bf16, which Tesla T4 only emulates; use fp16"):
        check_precision(TrainConfig(), "bf16", on_cpu=False)
    with pytest.raises(ValueError, match="allow_tf32 is true, but Tesla T4 has no TF32"):
        check_precision(TrainConfig(allow_tf32=True), "no", on_cpu=False)


def test_a_new_card_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    for precision in ("no", "fp16", "bf16"):
        check_precision(TrainConfig(allow_tf32=True), precision, on_cpu=False)


def test_a_cpu_takes_neither_fp16_nor_tf32() -> None:
    check_precision(TrainConfig(), "bf16", on_cpu=True)
    with pytest.raises(ValueError, match="mixed_precision is fp16, which needs a GPU"):
        check_precision(TrainConfig(), "fp16", on_cpu=True)
    with pytest.raises(ValueError, match="allow_tf32 is true, but there is no GPU"):
        check_precision(TrainConfig(allow_tf32=True), "no", on_cpu=True)


def test_a_run_sets_tf32_itself(prepare: Callable[..., Run]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    prepare("run")
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_xformers_needs_a_gpu(prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="attention is xformers, which needs a GPU; use attention sdpa"):
        prepare("run", attention="xformers")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors asked for on a GPU are made on the CPU."""
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **options: ones(*size, **options))


@pytest.mark.usefixtures("pretended_gpu")
def test_xformers_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"attention is xformers, which cannot be imported .*pip install diffpref\[xformers\]"):
        attention.check_xformers(torch.float16)

    def broken(*args: Any) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs ...")

    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=broken))
    with pytest.raises(ValueError, match=r"does not run on this machine with this torch \(No operator found .* sdpa") as caught:
        attention.check_xformers(torch.float16)
    assert "\n" not in str(caught.value)

    def forward_only(query: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return query.detach()

    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=forward_only))
    with pytest.raises(ValueError, match="does not run on this machine"):  # without a backward pass it cannot train
        attention.check_xformers(torch.float32)
    seen = []
    works = SimpleNamespace(memory_efficient_attention=lambda q, k, v: seen.append(q.dtype) or q * k * v)
    monkeypatch.setitem(sys.modules, "xformers.ops", works)
    attention.check_xformers(torch.bfloat16)
    assert seen == [torch.bfloat16]


@pytest.mark.gpu
def test_xformers_computes_what_torch_computes(sd_unet: UNet2DConditionModel) -> None:
    pytest.importorskip("xformers")
    attention.check_xformers(torch.float32)
    maker = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, 4, 8, 8, generator=maker).cuda(), torch.randn(2, 5, 16, generator=maker).cuda()
    unet, t = sd_unet.cuda(), torch.tensor([10, 900]).cuda()
    with torch.no_grad():
        expected = unet(x_t, t, text).sample
        attention.use_xformers(unet)
        torch.testing.assert_close(unet(x_t, t, text).sample, expected, rtol=1e-3, atol=1e-3)
