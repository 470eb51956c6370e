from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stsm_rt.errors import UserError
from stsm_rt.running_average import RunningAverages

RATES = (0.5, 0.2, 0.08)


def features(n: int, frames: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, frames, count, generator=generator) + 3


def reference(pooled: npt.NDArray[np.float32], rates: Sequence[float], *, changes: bool) -> npt.NDArray[np.float64]:
    """The weighted means as sums over the past, in double precision."""
    x = pooled.astype(np.float64)
    steps = np.abs(np.diff(x, axis=1, prepend=x[:, :1]))

    def average(signal: npt.NDArray[np.float64], rate: float, t: int) -> npt.NDArray[np.float64]:
        weights = np.array([(1 - rate) ** (t - s) for s in range(t + 1)])
        return np.einsum("s,nsf->nf", weights / weights.sum(), signal[:, : t + 1])

    rows = []
    for t in range(x.shape[1]):
        averages = [average(x, rate, t) for rate in rates]
        parts = [averages[-1], *(a - averages[-1] for a in averages[:-1])]
        if changes:
            parts.append(average(steps, rates[-1], t))
        rows.append(np.concatenate(parts, -1))
    return np.stack(rows, 1)


def streamed(averages: RunningAverages, pooled: Tensor) -> Tensor:
    state = [torch.zeros(shape) for shape in averages.state_shapes(pooled.shape[0])]
    rows = []
    for frame in pooled.unbind(1):
        row, following = averages.step(frame, state)
        assert [s.shape for s in following] == [s.shape for s in state]
        state = list(following)
        rows.append(row)
    return torch.stack(rows, 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4).map(lambda rates: sorted(rates, reverse=True)),
    st.booleans(),
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5)),
    st.integers(0, 2**16),
)
def test_clip_and_step_equal_the_weighted_means(
    rates: list[float], changes: bool, shape: tuple[int, int, int], seed: int
) -> None:
    pooled = features(*shape, seed)
    averages = RunningAverages(shape[2], rates, changes=changes)
    expected = torch.from_numpy(reference(pooled.numpy(), rates, changes=changes)).float()
    assert expected.shape[-1] == averages.out_features
    torch.testing.assert_close(averages.clip(pooled), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(streamed(averages, pooled), expected, rtol=1e-5, atol=1e-5)


def test_the_first_frame_is_its_own_average_and_its_change_is_zero() -> None:
    pooled = features(2, 4, 3)
    averages = RunningAverages(3, RATES, changes=True)
    for output in (averages.clip(pooled), streamed(averages, pooled)):
        first = output[:, 0]
        torch.testing.assert_close(first[:, :3], pooled[:, 0])
        torch.testing.assert_close(first[:, 3:], torch.zeros(2, 9), rtol=0, atol=1e-6)
        assert torch.equal(first[:, 9:], torch.zeros(2, 3))
        assert (output[:, 1, 9:] > 0).all()


def test_a_constant_stream_has_a_constant_average_and_no_change() -> None:
    pooled = features(1, 1, 4).expand(-1, 50, -1)
    averages = RunningAverages(4, RATES, changes=True)
    for output in (averages.clip(pooled), streamed(averages, pooled)):
        torch.testing.assert_close(output[..., :4], pooled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output[..., 4:], torch.zeros(1, 50, 12), rtol=0, atol=1e-5)


def test_no_frame_sees_a_later_one() -> None:
    pooled = features(1, 8, 3)
    changed = pooled.clone()
    changed[:, 5] += 1
    averages = RunningAverages(3, RATES, changes=True)
    before, after = averages.clip(pooled), averages.clip(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-3).all()


def test_streams_in_a_batch_do_not_touch_each_other() -> None:
    pooled = features(3, 6, 4)
    averages = RunningAverages(4, RATES, changes=True)
    together = streamed(averages, pooled)
    for i in range(3):
        torch.testing.assert_close(streamed(averages, pooled[i : i + 1])[0], together[i])


def test_a_stream_that_starts_later_has_its_own_first_frame() -> None:
    pooled = features(2, 5, 4)
    averages = RunningAverages(4, RATES, changes=True)
    _, running = averages.step(pooled[:, 0], [torch.zeros(s) for s in averages.state_shapes(2)])
    state = [s.clone() for s in running]
    for s in state:
        s[1] = 0
    output, _ = averages.step(pooled[:, 1], state)
    torch.testing.assert_close(output[0], averages.clip(pooled[:1, :2])[0, 1])
    torch.testing.assert_close(output[1], averages.clip(pooled[1:, 1:2])[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_long_stream_stays_finite_and_does_not_grow(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    averages = RunningAverages(4, RATES, changes=True)
    state = [torch.zeros(shape, dtype=dtype) for shape in averages.state_shapes(1)]
    largest = torch.zeros(averages.out_features, dtype=dtype)
    for _ in range(20_000):
        frame = torch.rand(1, 4, generator=generator).to(dtype)
        output, following = averages.step(frame, state)
        state = list(following)
        largest = torch.maximum(largest, output[0].abs())
    assert torch.isfinite(largest).all()
    assert largest.max() <= 1.01  # means and differences of numbers between 0 and 1
    assert (state[1] > 0.95).all()
    assert (state[1] < 1.01).all()
    assert output.dtype == dtype


def test_without_rates_the_features_pass_unchanged() -> None:
    pooled = features(2, 3, 4)
    averages = RunningAverages(4, (), changes=True)
    assert averages.out_features == 4
    assert averages.state_shapes(2) == []
    assert averages.clip(pooled) is pooled
    assert torch.equal(streamed(averages, pooled), pooled)


def test_there_is_nothing_to_learn_or_to_save() -> None:
    averages = RunningAverages(4, RATES, changes=True)
    assert list(averages.parameters()) == []
    assert averages.state_dict() == {}


@pytest.mark.parametrize("rates", [(0.0,), (-0.1,), (1.5,), (float("nan"),), (0.08, 0.5)])
def test_rates_out_of_range_or_order_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"in \(0, 1\], fastest first, got"):
        RunningAverages(4, rates, changes=False)


def test_gradients_reach_every_frame_of_the_past() -> None:
    pooled = features(1, 5, 2).double().requires_grad_()
    averages = RunningAverages(2, RATES, changes=False)
    (gradient,) = torch.autograd.grad(averages.clip(pooled)[:, -1].pow(2).sum(), pooled)
    assert (gradient != 0).all()
