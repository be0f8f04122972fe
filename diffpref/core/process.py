"""The discrete variance-preserving noise process of SD1.x, SD2.x and SDXL: x_t = alpha(t) x_0 + sigma(t) eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient at int64 timesteps, float64, same shape and device as t."""
        return self.alphas_cumprod.to(t.device)[t].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient at int64 timesteps, float64, same shape and device as t."""
        return (1 - self.alphas_cumprod.to(t.device)[t]).sqrt()

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

    @staticmethod
    def _mix(coefficient: Tensor, x: Tensor) -> Tensor:
        return like(coefficient.to(x.dtype), x) * x
