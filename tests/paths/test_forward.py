"""Forward noising: what a pair shares, and what its draws depend on."""

from __future__ import annotations

import pytest
import torch

from diffpref.core.process import DdpmProcess
from diffpref.core.random import PairRandom
from diffpref.core.types import Conditioning, PathStep, PreferenceBatch
from diffpref.paths.forward import ForwardNoising

PROCESS = DdpmProcess.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
V_PROCESS = DdpmProcess(PROCESS.alphas_cumprod, "v_prediction")
IDS, VISITS = ("a", "b", "c"), (0, 0, 4)
LATENTS = torch.randn(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def step(order: list[int], process: DdpmProcess = PROCESS, visits: tuple[int, ...] = VISITS, seed: int = 9) -> PathStep:
    """The path of the pairs in `order`."""
    relevance = torch.tensor([[1.0, 0.0]]).expand(len(order), 2)
    ids, seen = tuple(IDS[i] for i in order), tuple(visits[i] for i in order)
    batch = PreferenceBatch(LATENTS[order], Conditioning(torch.zeros(len(order), 2, 1, 1)), relevance, ids, seen)
    (only,) = ForwardNoising()(batch, process, batch.random(seed))
    return only


def test_noise_and_timestep_are_shared_in_a_pair() -> None:
    made = step([0, 1, 2])
    assert torch.equal(made.timesteps[:, 0], made.timesteps[:, 1])
    assert torch.equal(made.target[:, 0], made.target[:, 1])  # epsilon: the target is the noise
    assert len(set(made.timesteps[:, 0].tolist())) == 3
    assert not torch.equal(made.target[0], made.target[1])
    assert torch.equal(made.weight, torch.ones(3, 2))
    assert made.timesteps.dtype == torch.int64
    assert not made.target.requires_grad


def test_a_pair_sees_the_same_in_any_batch() -> None:
    every, some = step([0, 1, 2]), step([2, 0])
    for name in ("x_t", "timesteps", "target"):
        assert torch.equal(getattr(some, name), getattr(every, name)[[2, 0]])


@pytest.mark.parametrize("change", [{"visits": (1, 1, 5)}, {"seed": 10}])
def test_visit_and_seed_change_the_draws(change: dict[str, object]) -> None:
    first, other = step([0, 1, 2]), step([0, 1, 2], **change)  # type: ignore[arg-type]
    assert (first.timesteps != other.timesteps).any()
    assert all(not torch.equal(a, b) for a, b in zip(first.target, other.target, strict=True))


def test_single_images_get_the_draws_of_their_pair() -> None:
    batch = PreferenceBatch(LATENTS, Conditioning(torch.zeros(3, 2, 1, 1)), torch.ones(3, 2), IDS, VISITS)
    (alone,) = ForwardNoising()(batch.first(1), PROCESS, batch.random(9))
    assert torch.equal(alone.x_t, step([0, 1, 2]).x_t[:, :1])


@pytest.mark.parametrize("process", [PROCESS, V_PROCESS], ids=["epsilon", "v_prediction"])
def test_x_t_and_target_are_the_formula(process: DdpmProcess) -> None:
    made, noise = step([0, 1, 2], process), step([0, 1, 2]).target.double()
    alpha = PROCESS.alphas_cumprod[made.timesteps].sqrt()[..., None, None, None]
    sigma = (1 - alpha**2).sqrt()
    torch.testing.assert_close(made.x_t.double(), alpha * LATENTS.double() + sigma * noise, rtol=1e-6, atol=1e-6)
    expected = noise if process is PROCESS else alpha * noise - sigma * LATENTS.double()
    torch.testing.assert_close(made.target.double(), expected, rtol=1e-6, atol=1e-6)


def test_timesteps_cover_the_whole_range_evenly() -> None:
    ids = tuple(str(i) for i in range(4000))
    batch = PreferenceBatch(torch.zeros(4000, 1, 1, 1, 1), Conditioning(torch.zeros(4000, 1, 1, 1)), torch.ones(4000, 1), ids, (0,) * 4000)
    (made,) = ForwardNoising()(batch, PROCESS, batch.random(0))
    counts = torch.histc(made.timesteps.float(), bins=10, min=0, max=1000)
    assert counts.min() > 320
    assert counts.max() < 480


def made(path: ForwardNoising, process: DdpmProcess = PROCESS) -> PathStep:
    """The step of all three pairs."""
    relevance = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    batch = PreferenceBatch(LATENTS, Conditioning(torch.zeros(3, 2, 1, 1)), relevance, IDS, VISITS)
    (only,) = path(batch, process, batch.random(9), None, None, None)
    return only


def test_noise_can_be_drawn_per_image() -> None:
    shared, own = made(ForwardNoising()), made(ForwardNoising(shared_noise=False))
    assert torch.equal(own.timesteps, shared.timesteps)
    assert not torch.allclose(own.target[:, 0], own.target[:, 1])
    assert abs(float((own.target[:, 0] * own.target[:, 1]).mean())) < 0.1


def test_noise_offset_is_a_constant_per_channel_that_the_pair_shares() -> None:
    plain, moved = made(ForwardNoising()), made(ForwardNoising(noise_offset=0.3))
    offset = moved.target - plain.target  # the network has to predict it
    torch.testing.assert_close(offset, offset[:, :1, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)
    assert offset[:, 0, :, 0, 0].unique().numel() == 12  # three pairs of four channels
    assert 0.1 < float(offset[:, 0, :, 0, 0].std()) < 0.6
    torch.testing.assert_close(moved.x_t, PROCESS.add_noise(LATENTS, moved.target, moved.timesteps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", [PROCESS, V_PROCESS], ids=["epsilon", "v_prediction"])
def test_input_perturbation_is_in_x_t_only_and_shared(process: DdpmProcess) -> None:
    plain, moved = made(ForwardNoising(), process), made(ForwardNoising(input_perturbation=0.1), process)
    assert torch.equal(moved.target, plain.target)
    extra = moved.x_t - plain.x_t
    torch.testing.assert_close(extra[:, 0], extra[:, 1], rtol=0, atol=1e-6)
    sigma = PROCESS.sigma(moved.timesteps)[..., None, None, None]
    assert float((extra / sigma).std()) == pytest.approx(0.1, rel=0.1)


def test_log_snr() -> None:
    step_made = made(ForwardNoising())
    a = PROCESS.alphas_cumprod[step_made.timesteps]
    assert step_made.log_snr is not None
    torch.testing.assert_close(step_made.log_snr.double(), (a / (1 - a)).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["noise_offset", "input_perturbation"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_shares_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        ForwardNoising(**{name: value})


def test_the_default_draws_nothing_but_timestep_and_noise() -> None:
    draws = PairRandom(9, IDS, VISITS)
    t = draws.integers("timestep", 1000)[:, None].expand(3, 2)
    noise = draws.normal("noise", LATENTS.shape[2:])[:, None].expand_as(LATENTS)
    step_made = made(ForwardNoising())
    assert torch.equal(step_made.timesteps, t)
    assert torch.equal(step_made.x_t, PROCESS.add_noise(LATENTS, noise, t))
    assert torch.equal(step_made.target, noise)
