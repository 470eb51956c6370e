"""Running averages of pooled features: a classifier's cheap memory of the stream.

An exponential average at rate r follows ``a <- (1 - r) a + r p``. It starts at zero, so it carries the sum of
its weights, ``w <- (1 - r) w + r``, and reads ``a / w``: an exact weighted mean from the first frame on.
Differences between a fast and a slow average say what has changed, and the average of |p - p_before| how much
moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stsm_rt.errors import UserError


class RunningAverages(nn.Module):
    """Pooled features of a stream -> features that know the past.

    The output holds the slowest average, each faster one minus it and, if `changes`, the running average of
    absolute changes from frame to frame, at the slowest rate. There is no learned parameter. Without rates
    the features pass unchanged.

    Args:
        features: F, the pooled features of a frame.
        rates: Each in (0, 1], fastest first.
        changes: Whether to add the average of absolute changes.

    Raises:
        UserError: A rate is outside (0, 1], or a slower one stands before a faster one.
    """

    rate_column: Tensor

    def __init__(self, features: int, rates: Sequence[float], *, changes: bool) -> None:
        super().__init__()
        if not all(0 < rate <= 1 for rate in rates) or list(rates) != sorted(rates, reverse=True):
            raise UserError(f"rates of running averages lie in (0, 1], fastest first, got {list(rates)}; correct them")
        self.features = features
        self.rates = tuple(rates)
        self.changes = changes and bool(rates)
        self.out_features = features * (max(len(self.rates), 1) + self.changes)
        # A buffer, because a CUDA graph cannot capture a copy from the host; it is no weight and is not saved.
        column = torch.tensor(self.rates + self.rates[-1:] * self.changes, dtype=torch.float32)[:, None]
        self.register_buffer("rate_column", column, persistent=False)

    def state_shapes(self, batch: int) -> list[tuple[int, ...]]:
        """Shapes of the states for N = batch streams.

        Returns:
            Sums (N, A, F), their weights (N, A, 1) and, with `changes`, the last features (N, F).
        """
        if not self.rates:
            return []
        rows = len(self.rates) + self.changes
        shapes: list[tuple[int, ...]] = [(batch, rows, self.features), (batch, rows, 1)]
        return [*shapes, (batch, self.features)] if self.changes else shapes

    def _arrange(self, averages: Tensor) -> Tensor:
        """(..., A, F) averages -> (..., out_features)."""
        slowest = averages[..., len(self.rates) - 1, :]
        parts = [slowest] + [averages[..., i, :] - slowest for i in range(len(self.rates) - 1)]
        if self.changes:
            parts.append(averages[..., -1, :])
        return torch.cat(parts, -1)

    def clip(self, pooled: Tensor) -> Tensor:
        """(N, T, F) features of a clip -> (N, T, out_features), each frame seeing itself and those before."""
        if not self.rates:
            return pooled
        age = torch.arange(pooled.shape[1], device=pooled.device)
        age = (age[:, None] - age[None, :]).float()
        rows = []
        for index, rate in enumerate(self.rates + self.rates[-1:] * self.changes):
            weights = torch.where(age >= 0, (1 - rate) ** age.clamp(min=0), 0.0)
            signal = pooled
            if self.changes and index == len(self.rates):
                signal = torch.diff(pooled, dim=1, prepend=pooled[:, :1]).abs()
            rows.append((weights / weights.sum(1, keepdim=True)).to(signal.dtype) @ signal)
        return self._arrange(torch.stack(rows, -2))

    def step(self, pooled: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One frame.

        Args:
            pooled: (N, F).
            state: As `state_shapes` lists; zeros at the start of a stream.

        Returns:
            (N, out_features) and the next state.
        """
        if not self.rates:
            return pooled, ()
        sums, weights = state[0], state[1]
        rate = self.rate_column.to(pooled.dtype)
        signal = pooled[:, None].expand(-1, len(self.rates), -1)
        following: tuple[Tensor, ...] = ()
        if self.changes:
            # 0 at the first frame, which has no frame before it to differ from.
            started = weights[:, 0].sign()
            change = (pooled - state[2]).abs() * started
            signal = torch.cat([signal, change[:, None]], 1)
            following = (pooled,)
        sums = sums * (1 - rate) + signal * rate
        weights = weights * (1 - rate) + rate
        return self._arrange(sums / weights), (sums, weights, *following)
