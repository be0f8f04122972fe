"""The implicit reward as a scorer, with predictors simple enough to know the answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffpref.core.process import DdpmProcess
from diffpref.core.types import Conditioning, Predict, PreferenceBatch
from diffpref.scorers.implicit import ImplicitReward, implicit_scorer, pair_accuracy

PROCESS = DdpmProcess.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
MAKER = torch.Generator().manual_seed(0)
LIKED, OTHER = torch.randn(2, 4, 3, 3, generator=MAKER)


def knows(image: Tensor) -> Predict:
    """A perfect denoiser of a world that consists of `image` alone."""

    def predict(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        alpha, sigma = (c(timesteps)[..., None, None, None].float() for c in (PROCESS.alpha, PROCESS.sigma))
        return (x_t - alpha * image) / sigma

    return predict


def halves(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """A denoiser without knowledge."""
    return 0.5 * x_t


def pairs(order: list[int]) -> PreferenceBatch:
    """Three pairs of (liked, other), the second turned round."""
    latents = torch.stack([torch.stack(p) for p in ((LIKED, OTHER), (OTHER, LIKED), (LIKED, LIKED + 1))])[order]
    size = len(order)
    ids = tuple("abc"[i] for i in order)
    return PreferenceBatch(latents, Conditioning(torch.zeros(size, 2, 1, 1)), torch.ones(size, 2), ids, tuple(order))


def test_pair_accuracy_of_hand_made_gains() -> None:
    chosen = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, -1.0], [0.0, 0.0]])
    rejected = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    overall, buckets = pair_accuracy(torch.stack([chosen, rejected], 1))
    assert overall == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert buckets == pytest.approx([(1 + 0 + 1 + 0.5) / 4, (0.5 + 0 + 0 + 0.5) / 4])


def test_policy_equal_to_reference_gains_nothing() -> None:
    gains = ImplicitReward(halves, halves, PROCESS).gains(pairs([0, 1, 2]))
    assert torch.equal(gains, torch.zeros(3, 2, 10))
    assert pair_accuracy(gains)[0] == 0.5


def test_gains_do_not_depend_on_order_or_neighbours() -> None:
    reward = ImplicitReward(knows(LIKED), halves, PROCESS, num_draws=4)
    every = reward.gains(pairs([0, 1, 2]))
    assert every.shape == (3, 2, 4)
    assert every.dtype == torch.float32
    assert torch.equal(reward.gains(pairs([2, 0])), every[[2, 0]])
    assert torch.equal(reward.gains(pairs([1])), every[[1]])


def test_a_policy_that_learned_an_image_scores_it_higher() -> None:
    gains = ImplicitReward(knows(LIKED), knows(OTHER), PROCESS).gains(pairs([0, 1, 2]))
    margin = gains[:, 0] - gains[:, 1]
    assert (margin[[0, 2]] > 0).all()
    assert (margin[1] < 0).all()
    overall, buckets = pair_accuracy(gains)
    assert overall == pytest.approx(2 / 3)
    assert buckets == pytest.approx([2 / 3] * 10)


def test_the_images_of_a_pair_share_their_draws() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        seen.append((x_t, timesteps))
        return x_t

    twins = pairs([0])
    ImplicitReward(spy, spy, PROCESS, num_draws=5).gains(
        PreferenceBatch(twins.latents[:, :1].expand(-1, 2, -1, -1, -1), twins.cond, twins.relevance, twins.pair_ids, twins.visits)
    )
    assert all(torch.equal(x_t[:, 0], x_t[:, 1]) for x_t, _ in seen)
    levels = [int(t[0, 0]) for _, t in seen[::2]]
    assert [t // 200 for t in levels] == [0, 1, 2, 3, 4]  # one per bucket of the time axis


def test_scorer_looks_at_prompt_and_pixels_only() -> None:
    def encode_prompts(prompts: list[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1, 1))

    scorer = implicit_scorer(ImplicitReward(knows(LIKED), halves, PROCESS), lambda pixels: pixels, encode_prompts)  # type: ignore[arg-type]
    pixels = torch.stack([LIKED, OTHER, LIKED + 0.2])
    scores = scorer(pixels, ["a", "a", "b"])
    assert scores.shape == (3,)
    assert scores[0] > scores[1]
    assert torch.equal(scorer(pixels[[2, 0]], ["b", "a"]), scores[[2, 0]])
    assert torch.equal(scorer(pixels[:1], ["a"]), scores[:1])
    assert not torch.equal(scorer(pixels[:1], ["c"]), scores[:1])
