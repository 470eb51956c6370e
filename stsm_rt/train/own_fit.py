"""The classifier of own actions: logistic regression on features of a frozen network, and what decides on its answers.

Everything that is chosen is chosen on clips that the classifier has not seen: the strength of the regularisation by
cross-validation within the clips it is fitted to, the thresholds on the parts that were held out of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stsm_rt.decision import Decision
from stsm_rt.manifest import DecisionSpec
from stsm_rt.own_clips import BACKGROUND, OwnClip, held_out_parts
from stsm_rt.train.own_features import Played, Rows

_L2 = (1.0, 3e-1, 1e-1, 3e-2)  # of the sum of squared weights; strongest first
PARTS, _INNER_PARTS = 5, 3  # at most: to measure with, and to choose the strength with among the others
_PERCENTS = range(30, 91, 2)
_RELEASE = 0.6  # of the threshold


@dataclass(frozen=True)
class Classifier:
    """A linear classifier of standardised features: ``(x - offset) * scale @ weight.T + bias``.

    Attributes:
        offset: float32 (F,).
        scale: float32 (F,).
        weight: float32 (K, F).
        bias: float32 (K,).
        l2: Strength of the regularisation it was fitted with.
    """

    offset: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    def logits(self, features: Tensor) -> Tensor:
        """(R, F) -> (R, K)."""
        return ((features - self.offset) * self.scale) @ self.weight.T + self.bias


def fit(rows: Rows, classes: int, strengths: Sequence[float]) -> list[Classifier]:
    """Multinomial logistic regression with an L2 term, every class with the same weight.

    Args:
        rows: The examples.
        classes: K.
        strengths: Of the L2 term, strongest first.

    Returns:
        One classifier for each strength.
    """
    offset, scale = rows.features.mean(0), 1 / rows.features.std(0).clamp(min=1e-3)
    standard = (rows.features - offset) * scale
    # The best weights lie in the span of the examples, so the fit is made there, which is exact: fewer than F numbers.
    span, inside = torch.linalg.qr(standard.T)
    x = inside.T.contiguous()
    per_class = torch.zeros(classes).index_add_(0, rows.labels, rows.weights)
    weights = rows.weights / per_class[rows.labels]
    weights = weights / weights.sum()
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    found = []
    for strength in strengths:
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
        optimiser.step(_objective(optimiser, x, rows.labels, weights, weight, bias, strength))
        whole = weight.detach() @ span.T
        found.append(Classifier(offset, scale, whole, bias.detach().clone(), strength))
    return found


def _objective(
    optimiser: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    weight: Tensor,
    bias: Tensor,
    strength: float,
) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (F.cross_entropy(x @ weight.T + bias, labels, reduction="none") * weights).sum()
        value = value + strength * weight.square().sum()
        value.backward()
        return value

    return loss


def choose_and_fit(rows: Rows, clips: Sequence[OwnClip], classes: int, used: Sequence[int]) -> Classifier:
    """Fit to some of the clips, with the strength that predicts held-out recordings among them best.

    Args:
        rows: Examples of all clips.
        clips: All clips.
        classes: K.
        used: Indices of the clips to fit to.
    """
    chosen = [clips[i] for i in used]
    losses = np.zeros(len(_L2))
    parts = parts_of(chosen, _INNER_PARTS)
    for part in parts if len(parts) > 1 else ():  # a single clip of a class: the strongest
        held = {used[i] for i in part}
        test = _of(rows, held)
        for index, classifier in enumerate(fit(_of(rows, set(used) - held), classes, _L2)):
            wrong = F.cross_entropy(classifier.logits(test.features), test.labels, reduction="none")
            losses[index] += float((wrong * test.weights).sum())
    return fit(_of(rows, set(used)), classes, [_L2[int(losses.argmin())]])[0]


def parts_of(clips: Sequence[OwnClip], most: int = PARTS) -> list[list[int]]:
    """Parts to hold out: whole recordings where every action has two or more, else single clips; one if that fails."""
    parts = held_out_parts(clips, most)
    if len(parts) > 1:
        return parts
    return held_out_parts([dataclasses.replace(clip, recording=str(clip.path)) for clip in clips], most)


def _of(rows: Rows, clips: set[int]) -> Rows:
    kept = torch.isin(rows.clips, torch.tensor(sorted(clips)))
    return Rows(rows.features[kept], rows.labels[kept], rows.weights[kept], rows.clips[kept])


@dataclass(frozen=True)
class HeldOut:
    """A stream, as a classifier answered that had not seen its recording.

    Attributes:
        label: What it shows; `BACKGROUND` where nothing is done.
        logits: float32 (steps, K).
        steps: Those of a clip itself; after them its last picture is held.
    """

    label: str
    logits: np.ndarray
    steps: int


def hold_out(
    rows: Rows,
    clips: Sequence[OwnClip],
    played: Sequence[Played],
    held: Sequence[Sequence[Tensor]],
    classes: int,
) -> tuple[list[HeldOut], list[HeldOut]]:
    """Answers of classifiers that have not seen what they are asked.

    Args:
        rows: Examples of all clips.
        clips: All clips.
        played: Each clip's features.
        held: Each clip's held pictures' features.
        classes: K.

    Returns:
        Of the clips in their order, and of the held pictures.
    """
    whole: list[HeldOut | None] = [None] * len(clips)
    pictures = []
    for part in parts_of(clips):
        classifier = choose_and_fit(rows, clips, classes, [i for i in range(len(clips)) if i not in part])
        for i in part:
            whole[i] = HeldOut(clips[i].label, classifier.logits(played[i].features).numpy(), played[i].steps)
            pictures += [HeldOut(BACKGROUND, classifier.logits(x).numpy(), len(x)) for x in held[i]]
    return [answer for answer in whole if answer is not None], pictures


@dataclass(frozen=True)
class Decided:
    """What decisions say of a stream.

    Attributes:
        label: What it shows.
        prediction: The best action at a clip's last step.
        events: Labels of the events that started.
    """

    label: str
    prediction: str
    events: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the events are what they should be: one or more of its own action, or none where nothing is done."""
        return set(self.events) == ({self.label} - {BACKGROUND})


def decide(stream: HeldOut, labels: Sequence[str], spec: DecisionSpec, frame_rate: float) -> Decided:
    """Run the recognizer's decision over a stream from a fresh state."""
    decision = Decision(labels, BACKGROUND, spec, topk=1)
    prediction, events = "", []
    for index, row in enumerate(stream.logits):
        best, _, raised = decision.update(row, index / frame_rate, index)
        events += [event.label for event in raised if event.end is None]
        if index == stream.steps - 1:
            prediction = best[0]
    return Decided(stream.label, prediction, tuple(events))


def choose_thresholds(
    streams: Sequence[HeldOut], labels: Sequence[str], start: DecisionSpec, frame_rate: float
) -> DecisionSpec:
    """The threshold at which most events are right, actions and nothing weighing the same; the middle of equals.

    Args:
        streams: Answers of classifiers that had not seen them.
        labels: One per logit.
        start: Of which the smoothing and the number of steps are kept.
        frame_rate: Steps per second.
    """
    scores = []
    for percent in _PERCENTS:
        spec = dataclasses.replace(start, threshold=percent / 100, release=round(percent / 100 * _RELEASE, 3))
        right: dict[bool, list[bool]] = {True: [], False: []}
        for stream in streams:
            right[stream.label == BACKGROUND].append(decide(stream, labels, spec, frame_rate).right)
        scores.append((sum(np.mean(group) for group in right.values() if group), spec))
    best = [spec for score, spec in scores if score == max(score for score, _ in scores)]
    return best[len(best) // 2]


def interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson (1927); it takes the clips for independent."""
    z = 1.96
    centre = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)
