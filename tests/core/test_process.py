"""The noise process against printed values, its own identities, and diffusers."""

from __future__ import annotations

import dataclasses

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


@pytest.mark.parametrize(
    ("t", "p", "std", "noise_factor"),
    [
        (751, 701, 0.557616, -0.399047),
        (501, 451, 0.429321, -0.268818),
        (301, 251, 0.314408, -0.206574),
        (201, 151, 0.250868, -0.189184),
        (101, 51, 0.167295, -0.190926),
        (51, 1, 0.040597, -0.220477),
        (1, 0, 0.020648, -0.020714),
    ],
)
def test_transition_table(t: int, p: int, std: float, noise_factor: float) -> None:
    made = process()
    a, b, found = made.transition(torch.tensor([t]), torch.tensor([p]), 1.0)
    assert (float(found), float(b)) == pytest.approx((std, noise_factor), abs=1e-6)
    assert float(a) == pytest.approx(float((made.alphas_cumprod[p] / made.alphas_cumprod[t]).sqrt()), rel=1e-12)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_transition_of_v_is_that_of_the_noise_it_implies(eta: float) -> None:
    x, noise = draw()
    t, p = torch.tensor([[3, 20], [751, 500], [999, 1]]), torch.tensor([[0, 19], [701, 499], [0, 0]])
    v_process = process("v_prediction")
    (a, b, std), (a_v, b_v, std_v) = process().transition(t, p, eta), v_process.transition(t, p, eta)
    v = v_process.implied(x, noise, t)
    torch.testing.assert_close(like(a_v, x) * x + like(b_v, x) * v, like(a, x) * x + like(b, x) * noise, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(std_v, std, rtol=1e-14, atol=0)


def test_transition_becomes_the_deterministic_move() -> None:
    x, noise = draw()
    t, p = torch.full((3, 2), 600), torch.full((3, 2), 401)
    a, b, std = process().transition(t, p, 1e-6)
    torch.testing.assert_close(process().ddim_move(x, noise, t, p), like(a, x) * x + like(b, x) * noise, rtol=1e-9, atol=1e-9)
    assert float(std.max()) < 1e-6


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.5, float("nan")])
def test_a_step_without_density_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta is {eta}"):
        process().transition(torch.tensor([5]), torch.tensor([1]), eta)
    for p in (5, 6):
        with pytest.raises(ValueError, match="some p is not below its t"):
            process().transition(torch.tensor([9, 5]), torch.tensor([1, p]), 1.0)


def test_ddim_move_is_its_formula_and_returns() -> None:
    x, noise = draw()
    made, target = process(), torch.tensor([[0, 999], [500, 0], [1, 501]])
    x_0 = (x - like(made.sigma(LEVELS), x) * noise) / like(made.alpha(LEVELS), x)
    moved = made.ddim_move(x, noise, LEVELS, target)
    torch.testing.assert_close(moved, made.add_noise(x_0, noise, target), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(made.ddim_move(moved, noise, target, LEVELS), x, rtol=1e-10, atol=1e-10)
    assert torch.equal(made.ddim_move(x, noise, LEVELS, LEVELS), x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_implied_is_the_inverse_of_epsilon_and_noise_slope_its_derivative(kind: str) -> None:
    x, noise = draw()
    made = process(kind)
    torch.testing.assert_close(made.epsilon(x, made.implied(x, noise, LEVELS), LEVELS), noise, rtol=1e-12, atol=1e-12)
    step = made.epsilon(x, noise + 1, LEVELS) - made.epsilon(x, noise, LEVELS)
    torch.testing.assert_close(step, like(made.noise_slope(LEVELS), x).expand_as(x), rtol=1e-10, atol=1e-12)


def test_log_snr() -> None:
    a = process().alphas_cumprod[LEVELS]
    torch.testing.assert_close(process().log_snr(LEVELS), (a / (1 - a)).log(), rtol=1e-12, atol=1e-12)


def test_rescaling_to_zero_terminal_snr_is_the_formula() -> None:
    """SDXL Turbo's schedule, computed in float64."""
    made = process().with_zero_terminal_snr()
    for t, expected in {249: 0.654189007, 499: 0.242359167, 749: 0.033171483}.items():
        assert float(made.alphas_cumprod[t]) == pytest.approx(expected, abs=5e-10)
    assert float(made.alphas_cumprod[999]) == 0
    assert float(made.alphas_cumprod[0]) == pytest.approx(TABLE[0], abs=1e-12)
    assert made.has_zero_terminal_snr
    assert not process().has_zero_terminal_snr
    assert (made.alphas_cumprod.diff() < 0).all()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
    torch.testing.assert_close(made.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_a_model_is_trained_at_all_timesteps_unless_it_says_otherwise() -> None:
    assert process().timesteps.tolist() == list(range(1000))
    some = dataclasses.replace(process(), trained_at=(3, 7))
    assert some.timesteps.tolist() == [3, 7]
    assert some.timesteps.dtype == torch.int64
    assert some.num_timesteps == 1000
    assert some.with_zero_terminal_snr().timesteps.tolist() == [3, 7]


def test_paths_may_pass_only_where_the_model_is_trained() -> None:
    turbo, refiner = (dataclasses.replace(process(), trained_at=levels) for levels in ((249, 499, 749), tuple(range(200))))
    process().check_passage("trajectory", 999)
    refiner.check_passage("inversion", 199)
    with pytest.raises(ValueError, match=r"path inversion passes through timesteps 0 to 749, but .* trained at 249, 499, 749 only"):
        turbo.check_passage("inversion", 749)
    with pytest.raises(ValueError, match=r"trained at 0 to 199 only; use path forward"):
        refiner.check_passage("trajectory", 900)
