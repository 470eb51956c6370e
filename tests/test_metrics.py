"""Scores: what holds for all predictions, and a few counted by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stsm_rt.metrics import (
    Predictions,
    calibration_error,
    confusion_matrix,
    in_top_k,
    levenshtein,
    mean_class_accuracy,
)

sequences = st.lists(st.sampled_from("abc"), max_size=7)


@st.composite
def scored_clips(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) without ties and true classes (N,)."""
    count, classes = draw(st.integers(1, 12)), draw(st.integers(2, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = generator.random((count, classes)) + 1e-6
    return scores / scores.sum(1, keepdims=True), generator.integers(0, classes, count)


def record_of(scores: np.ndarray, labels: np.ndarray) -> dict:
    return Predictions.from_scores(scores, labels, [f"class {i}" for i in range(scores.shape[1])]).to_record()


SCALARS = ("clips", "top1", "top5", "mean_class_accuracy", "calibration_error")


@given(scored_clips(), st.randoms(use_true_random=False))
def test_the_order_of_the_clips_does_not_matter(clips, random):
    scores, labels = clips
    order = list(range(len(labels)))
    random.shuffle(order)
    before, after = record_of(scores, labels), record_of(scores[order], labels[order])
    assert before["confusion"] == after["confusion"] and before["per_class"] == after["per_class"]
    assert [after[key] for key in SCALARS] == pytest.approx([before[key] for key in SCALARS])


@given(scored_clips(), st.randoms(use_true_random=False))
def test_the_numbering_of_the_classes_does_not_matter(clips, random):
    scores, labels = clips
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    before, after = record_of(scores, labels), record_of(scores[:, order], np.argsort(order)[labels])
    assert [after[key] for key in SCALARS] == pytest.approx([before[key] for key in SCALARS])


@given(scored_clips())
def test_all_right_and_sure_is_perfect_and_all_wrong_is_zero(clips):
    scores, labels = clips
    sure = np.eye(scores.shape[1])[labels]
    perfect = record_of(sure, labels)
    assert (perfect["top1"], perfect["top5"], perfect["mean_class_accuracy"]) == (1, 1, 1)
    assert perfect["calibration_error"] == 0
    assert all(row["recall"] == row["precision"] == 1 for row in perfect["per_class"].values())
    wrong = record_of(sure, (labels + 1) % scores.shape[1])
    assert (wrong["top1"], wrong["mean_class_accuracy"], wrong["calibration_error"]) == (0, 0, 1)


@given(scored_clips())
def test_more_of_the_best_classes_never_hit_less(clips):
    scores, labels = clips
    hits = [in_top_k(scores, labels, k) for k in range(1, scores.shape[1] + 1)]
    assert all((more >= fewer).all() for fewer, more in pairwise(hits)) and hits[-1].all()
    assert (hits[0] == (scores.argmax(1) == labels)).all()


@given(scored_clips())
def test_the_top_k_are_those_with_fewer_than_k_better_classes(clips):
    scores, labels = clips
    better = (scores > scores[np.arange(len(labels)), labels][:, None]).sum(1)
    assert (in_top_k(scores, labels, 3) == (better < 3)).all()


def test_equal_scores_hit_by_luck_of_the_order_only_for_the_first():
    assert in_top_k(np.zeros((3, 3)), np.arange(3), 1).tolist() == [True, False, False]


def test_accuracy_of_classes_weighs_classes_and_leaves_absent_ones_out():
    matrix = confusion_matrix(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 2, 2]), 3)
    assert matrix.tolist() == [[3, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert mean_class_accuracy(matrix) == pytest.approx((0.75 + 0) / 2)


def test_a_class_that_was_never_predicted_has_no_precision():
    predictions = Predictions(
        np.array([0, 1]), np.array([0, 0]), np.array([True, True]), np.array([0.9, 0.9]), ("a", "b")
    )
    assert predictions.to_record()["per_class"] == {
        "a": {"clips": 1, "recall": 1.0, "precision": 0.5},
        "b": {"clips": 1, "recall": 0.0, "precision": None},
    }


def test_calibration_error_of_a_case_worked_out_by_hand():
    # Two bins of 15 are met: (0.6, 0.667] by 0.65 and 0.65, one right: |0.5 - 0.65|; (0.933, 1] by 0.95, right.
    found = calibration_error(np.array([0.65, 0.65, 0.95]), np.array([True, False, True]))
    assert found == pytest.approx(2 / 3 * 0.15 + 1 / 3 * 0.05)


def test_each_bin_holds_its_upper_end():
    # 0.5 belongs to the first of two bins, so its gap and that of 0.6 are not set off against each other.
    found = calibration_error(np.array([0.5, 0.6]), np.array([True, False]), bins=2)
    assert found == pytest.approx(0.5 / 2 + 0.6 / 2)
    assert calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.data())
def test_calibration_error_is_a_share_and_at_least_the_gap_of_the_means(confidences, data):
    correct = data.draw(hnp.arrays(np.bool_, len(confidences)))
    found = calibration_error(confidences, correct)
    assert abs(correct.mean() - confidences.mean()) - 1e-12 <= found <= 1 + 1e-12


def test_predictions_that_are_right_as_often_as_they_say_are_calibrated():
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.2, 1, 100_000)
    correct = generator.random(len(confidences)) < confidences
    assert calibration_error(confidences, correct) < 0.01
    assert calibration_error(confidences, generator.random(len(confidences)) < confidences**3) > 0.1


@given(sequences, sequences, sequences)
def test_the_edit_distance_is_a_metric(a, b, c):
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, b) == levenshtein(b, a)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@given(sequences, st.data())
def test_one_edit_is_at_most_one(a, data):
    place = data.draw(st.integers(0, len(a)))
    assert levenshtein(a, [*a[:place], "x", *a[place:]]) == 1
    assert levenshtein(a, [*a[:place], *a[place + 1 :]]) <= 1


def test_an_edit_distance_that_everyone_knows():
    assert levenshtein("kitten", "sitting") == 3
