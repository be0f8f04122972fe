"""The discrete variance-preserving noise process of SD1.x, SD2.x and SDXL: x_t = alpha(t) x_0 + sigma(t) eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append singleton axes, so that a (G, K) coefficient multiplies (G, K, C, h, w)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


@dataclass(frozen=True)
class DdpmProcess:
    """Tables in float64; coefficients are rounded to the dtype of the tensor they multiply."""

    alphas_cumprod: Tensor  # (T,) float64, the squared alpha
    prediction_type: PredictionType = "epsilon"
    trained_at: tuple[int, ...] | None = None  # the timesteps that the model is trained at; all when None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # of the table, by device

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], prediction_type: str = "epsilon") -> DdpmProcess:
        """Build from the per-step betas (T,). Raises ValueError for a parameterisation other than epsilon and v_prediction."""
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {prediction_type!r} of the model's scheduler is not supported; use epsilon or v_prediction")
        table = (1 - torch.as_tensor(betas, dtype=torch.float64)).cumprod(0)
        return cls(table, prediction_type)  # type: ignore[arg-type]

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def timesteps(self) -> Tensor:
        """The timesteps that the model is trained at, rising, int64 (L,) with L <= T; draw from these."""
        return torch.arange(self.num_timesteps) if self.trained_at is None else torch.tensor(self.trained_at)

    def check_passage(self, path: str, last: int) -> None:
        """Raises ValueError unless the model is trained at every timestep up to `last`, which the path named passes through."""
        if self.trained_at is not None and not set(range(last + 1)) <= set(self.trained_at):
            own = f"{self.trained_at[0]} to {self.trained_at[-1]}" if len(self.trained_at) > 9 else ", ".join(map(str, self.trained_at))
            raise ValueError(f"path {path} passes through timesteps 0 to {last}, but this model is trained at {own} only; use path forward")

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return bool(self.alphas_cumprod[-1] == 0)

    def with_zero_terminal_snr(self) -> DdpmProcess:
        """The process with alpha shifted and scaled so that it ends at 0 and begins where it did (arXiv:2305.08891, Alg. 1)."""
        alpha = self.alphas_cumprod.sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return replace(self, alphas_cumprod=alpha**2)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient at int64 timesteps, float64, same shape and device as t."""
        return self._table(t.device)[t].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient at int64 timesteps, float64, same shape and device as t."""
        return (1 - self._table(t.device)[t]).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at int64 timesteps, float64, same shape and device as t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for x_0 and noise (G, K, C, h, w) at t (G, K)."""
        return self._mix(self.alpha(t), x_0) + self._mix(self.sigma(t), noise)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network predicts at x_t: the noise, or v = alpha eps - sigma x_0."""
        if self.prediction_type == "epsilon":
            return noise
        return self._mix(self.alpha(t), noise) - self._mix(self.sigma(t), x_0)

    def epsilon(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies."""
        if self.prediction_type == "epsilon":
            return prediction
        return self._mix(self.alpha(t), prediction) + self._mix(self.sigma(t), x_t)

    def x_0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction implies at x_t."""
        if self.prediction_type == "epsilon":
            return self._mix(1 / self.alpha(t), x_t) - self._mix(self.sigma(t) / self.alpha(t), prediction)
        return self._mix(self.alpha(t), x_t) - self._mix(self.sigma(t), prediction)

    def implied(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The prediction that implies `noise` at x_t, the inverse of `epsilon`."""
        if self.prediction_type == "epsilon":
            return noise
        return self._mix(1 / self.alpha(t), noise) - self._mix(self.sigma(t) / self.alpha(t), x_t)

    def noise_slope(self, t: Tensor) -> Tensor:
        """How much the implied noise changes with the prediction, float64: 1, or alpha for v."""
        return torch.ones_like(t, dtype=torch.float64) if self.prediction_type == "epsilon" else self.alpha(t)

    def ddim_move(self, x: Tensor, noise: Tensor, t: Tensor, p: Tensor) -> Tensor:
        """Deterministic DDIM move (arXiv:2010.02502, Eq. 12) of x (G, K, C, h, w) from level t to p (G, K) along `noise`.

        Either direction: p < t denoises, p > t inverts.
        """
        scale = self.alpha(p) / self.alpha(t)
        return self._mix(scale, x) + self._mix(self.sigma(p) - scale * self.sigma(t), noise)

    def transition(self, t: Tensor, p: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, std) of the stochastic DDIM step from t to p < t: x_p ~ N(a x_t + b prediction, std^2).

        In the model's own parameterisation; float64, same shape as t (arXiv:2010.02502, Eq. 16). b is negative for epsilon.
        Raises ValueError where the step has no density: eta outside (0, 1], or p not below t.
        """
        if not 0 < eta <= 1:
            raise ValueError(f"eta is {eta}; a transition has a density only for eta in (0, 1], usually 1")
        if not bool((p < t).all()):
            raise ValueError("a transition goes from t to a lower level p; some p is not below its t")
        alpha, sigma, alpha_p, sigma_p = self.alpha(t), self.sigma(t), self.alpha(p), self.sigma(p)
        std = eta * self.ancestral_std(t, p)
        direct = (sigma_p**2 - std**2).clamp(min=0).sqrt()  # coefficient of the noise that is kept
        if self.prediction_type == "epsilon":
            scale = alpha_p / alpha
            return scale, direct - scale * sigma, std
        return alpha_p * alpha + direct * sigma, direct * alpha - alpha_p * sigma, std

    def ancestral_std(self, t: Tensor, p: Tensor) -> Tensor:
        """std of the step from t to p < t with eta 1, float64, same shape as t; not a number where p is above t."""
        return self.sigma(p) / self.sigma(t) * (1 - (self.alpha(t) / self.alpha(p)) ** 2).sqrt()

    def _table(self, device: torch.device) -> Tensor:
        """alphas_cumprod on a device; copied there once, as a copy waits for the device."""
        if device not in self._copies:
            self._copies[device] = self.alphas_cumprod.to(device)
        return self._copies[device]

    @staticmethod
    def _mix(coefficient: Tensor, x: Tensor) -> Tensor:
        return like(coefficient.to(x.dtype), x) * x
