"""Scores of predictions: accuracy, confusion, calibration, edit distance. NumPy alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """What was predicted for N clips of K classes.

    Attributes:
        labels: True classes, int (N,).
        predictions: Best classes, int (N,).
        in_top5: Whether the true class is among the best five, bool (N,).
        confidences: Probability that was given to the best class, float (N,), 0 to 1.
        classes: Names of the K classes.
    """

    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    in_top5: npt.NDArray[np.bool_]
    confidences: npt.NDArray[np.float64]
    classes: tuple[str, ...]

    @classmethod
    def from_scores(
        cls, scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], classes: Sequence[str]
    ) -> Predictions:
        """Rank the classes by their probabilities.

        Args:
            scores: Probabilities, float (N, K).
            labels: True classes, int (N,).
            classes: K names.
        """
        return cls(
            np.asarray(labels, np.int64),
            scores.argmax(1),
            in_top_k(scores, labels, 5),
            scores.max(1).astype(np.float64),
            tuple(classes),
        )

    def to_record(self) -> dict[str, Any]:
        """All scores as JSON-ready data.

        ``clips``, ``top1``, ``top5``, ``mean_class_accuracy``, ``calibration_error`` (0 to 1), ``per_class`` (of every
        class that has a clip: ``clips``, ``recall``, and ``precision``, None where it was never predicted) and
        ``confusion`` (``labels`` and ``matrix``, rows are true).
        """
        matrix = confusion_matrix(self.labels, self.predictions, len(self.classes))
        correct = self.labels == self.predictions
        predicted = matrix.sum(0)
        return {
            "clips": len(self.labels),
            "top1": float(correct.mean()),
            "top5": float(self.in_top5.mean()),
            "mean_class_accuracy": mean_class_accuracy(matrix),
            "calibration_error": calibration_error(self.confidences, correct),
            "per_class": {
                name: {
                    "clips": int(row.sum()),
                    "recall": float(row[place] / row.sum()),
                    "precision": float(row[place] / predicted[place]) if predicted[place] else None,
                }
                for place, (name, row) in enumerate(zip(self.classes, matrix, strict=True))
                if row.sum()
            },
            "confusion": {"labels": list(self.classes), "matrix": matrix.tolist()},
        }


def in_top_k(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.bool_]:
    """Whether fewer than k classes rank before the true one; of equal scores the first class ranks first.

    Args:
        scores: Float (N, K).
        labels: True classes, int (N,).
        k: How many of the best classes count.

    Returns:
        Bool (N,).
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return (best == np.asarray(labels)[:, None]).any(1)


def confusion_matrix(
    labels: npt.NDArray[np.integer], predictions: npt.NDArray[np.integer], classes: int
) -> npt.NDArray[np.int64]:
    """Counts, int (classes, classes): the row is the true class, the column the predicted one."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def mean_class_accuracy(matrix: npt.NDArray[np.integer]) -> float:
    """Mean of the recalls of the classes that occur, 0 to 1.

    Args:
        matrix: Counts (K, K), rows are true; at least one is not 0.
    """
    occurs = matrix.sum(1) > 0
    return float((matrix.diagonal()[occurs] / matrix.sum(1)[occurs]).mean())


def calibration_error(
    confidences: npt.NDArray[np.floating], correct: npt.NDArray[np.bool_], bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error, 0 to 1 (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).

    The sum over bins of the share of the predictions in the bin times the distance between their accuracy and their
    mean confidence. The bins divide 0 to 1 equally; each holds its upper end, the first holds 0, too.

    Args:
        confidences: Probability of each predicted class, float (N,), 0 to 1.
        correct: Whether it was right, bool (N,).
        bins: Number of bins; Guo et al. use 15.
    """
    places = np.digitize(confidences, np.arange(1, bins) / bins, right=True)
    gaps = np.bincount(places, weights=np.asarray(correct, np.float64) - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Least number of insertions, deletions and substitutions of one item that turn a sequence into the other."""
    row = list(range(len(second) + 1))
    for place, item in enumerate(first, 1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(second, 1):
            diagonal, row[column] = (
                row[column],
                min(diagonal + (item != other), row[column] + 1, row[column - 1] + 1),
            )
    return row[-1]
