"""The noise process against printed values, its own identities, and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffpref.core.process import DdpmProcess, like

# alpha squared of SD1.5 and SDXL, computed in float64.
TABLE = {
    0: 0.9991500000,
    1: 0.9982960278,
    100: 0.8942234776,
    101: 0.8929805371,
    201: 0.7521434016,
    250: 0.6737926252,
    401: 0.4228815243,
    500: 0.2763326838,
    501: 0.2749990669,
    701: 0.0819167135,
    751: 0.0557190293,
    801: 0.0365465246,
    901: 0.0140048979,
    951: 0.0081550046,
    999: 0.0046600985,
}
LEVELS = torch.tensor([[0, 0], [1, 250], [999, 500]])


def process(prediction_type: str = "epsilon") -> DdpmProcess:
    """The schedule of SD in float64."""
    return DdpmProcess.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, prediction_type)


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x_0 and noise (3, 2, 4, 5, 6)."""
    maker = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 2, 4, 5, 6, generator=maker, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("t", TABLE)
def test_alpha_table(t: int) -> None:
    made = process()
    at = torch.tensor([t])
    assert made.num_timesteps == 1000
    assert float(made.alpha(at) ** 2) == pytest.approx(TABLE[t], abs=1e-10)
    assert float(made.sigma(at) ** 2) == pytest.approx(1 - TABLE[t], abs=1e-10)
    assert made.alpha(at).dtype == made.sigma(at).dtype == torch.float64


def test_x_t_is_the_formula() -> None:
    x_0, noise = draw()
    made = process().add_noise(x_0, noise, LEVELS)
    for g in range(3):
        for k in range(2):
            alpha = process().alphas_cumprod[LEVELS[g, k]]
            torch.testing.assert_close(made[g, k], alpha.sqrt() * x_0[g, k] + (1 - alpha).sqrt() * noise[g, k], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_implies_the_noise(kind: str) -> None:
    x_0, noise = draw()
    made = process(kind)
    x_t, target = made.add_noise(x_0, noise, LEVELS), made.target(x_0, noise, LEVELS)
    torch.testing.assert_close(made.epsilon(x_t, target, LEVELS), noise, rtol=1e-12, atol=1e-12)


def test_v_is_orthogonal_to_x_t_and_as_long() -> None:
    x_0, noise = draw()
    made = process("v_prediction")
    x_t, v = made.add_noise(x_0, noise, LEVELS), made.target(x_0, noise, LEVELS)
    torch.testing.assert_close(x_t**2 + v**2, x_0**2 + noise**2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_agrees_with_diffusers(kind: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    made = DdpmProcess.from_betas(scheduler.betas, kind)
    x_0, noise = draw(torch.float32)
    flat = (x_0.flatten(0, 1), noise.flatten(0, 1), LEVELS.flatten())
    torch.testing.assert_close(made.add_noise(x_0, noise, LEVELS).flatten(0, 1), scheduler.add_noise(*flat), rtol=1e-5, atol=2e-5)
    expected = flat[1] if kind == "epsilon" else scheduler.get_velocity(*flat)
    torch.testing.assert_close(made.target(x_0, noise, LEVELS).flatten(0, 1), expected, rtol=1e-5, atol=2e-5)


def test_float32_stays_float32_and_close_to_float64() -> None:
    exact = process().add_noise(*draw(), LEVELS)
    x_t = process().add_noise(*draw(torch.float32), LEVELS)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), exact, rtol=1e-6, atol=1e-6)


def test_like_appends_axes() -> None:
    assert like(torch.zeros(2, 3), torch.zeros(2, 3, 4, 5)).shape == (2, 3, 1, 1)


def test_other_parameterisations_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        process("sample")
