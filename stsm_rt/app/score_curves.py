"""The scores of a video's labels over time, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from stsm_rt.app.report import Scores
from stsm_rt.result import Result

_MOST_POINTS = 2000
_MOST_LABELS = 6


class ScoreCurves:
    """Gathers the results of a video; where points get too many, each two become one of their maxima."""

    def __init__(self, labels: Sequence[str]) -> None:
        """Prepare the buffers.

        Args:
            labels: All labels that results may have.
        """
        self._columns = {label: column for column, label in enumerate(labels)}
        self._times = np.zeros(_MOST_POINTS)
        self._scores = np.zeros((_MOST_POINTS, len(labels)))
        self._best: set[str] = set()
        self._points = 0
        self._steps_per_point = 1
        self._steps_in_last = 0

    def add(self, result: Result) -> None:
        """Take the next result, with the scores of as many labels as are to be known."""
        self._best.add(result.label)
        if self._points == 0 or self._steps_in_last == self._steps_per_point:
            if self._points == _MOST_POINTS:
                self._merge()
            self._times[self._points] = result.time
            self._scores[self._points] = 0
            self._points += 1
            self._steps_in_last = 0
        self._steps_in_last += 1
        columns = [self._columns[label] for label in result.labels]
        last = self._scores[self._points - 1]
        last[columns] = np.maximum(last[columns], result.scores)

    def choose(self, in_events: Collection[str]) -> Scores:
        """Return the curves of the top labels.

        Args:
            in_events: The labels that had events. They come first, then those that were best at any step, both by their
                highest score.
        """
        scores = self._scores[: self._points]
        highest = {label: float(scores[:, self._columns[label]].max()) for label in {*self._best, *in_events}}
        chosen = sorted(highest, key=lambda label: (label not in in_events, -highest[label], label))[:_MOST_LABELS]
        return Scores(
            time=tuple(round(float(time), 3) for time in self._times[: self._points]),
            labels={label: tuple(np.round(scores[:, self._columns[label]], 4).tolist()) for label in chosen},
        )

    def _merge(self) -> None:
        self._points = _MOST_POINTS // 2
        self._times[: self._points] = self._times[::2].copy()
        self._scores[: self._points] = np.maximum(self._scores[::2], self._scores[1::2])
        self._steps_per_point *= 2
