"""What a machine cannot compute is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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


def test_an_attention_that_does_not_run_here_is_replaced_and_said(prepare: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = prepare("run", attention="flash_3")
    assert "attention flash_3 cannot be used here (" in capsys.readouterr().err
    assert not any(hasattr(x, "_attention_backend") for x in run.backbone.denoiser.attn_processors.values())


@pytest.mark.parametrize(("name", "reason"), [("fast", "unknown; accepted: sdpa"), ("sage", "draws pictures only")])
def test_an_attention_that_cannot_train_is_refused(name: str, reason: str, prepare: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match=reason):
        prepare("run", attention=name)
