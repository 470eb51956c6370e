from __future__ import annotations

import numpy as np

from stsm_rt.engine import Engine
from stsm_rt.manifest import DecisionSpec, Manifest
from stsm_rt.train.thresholds import Stream, best_smoothing, curve, logits_of, try_decision


def stream(label, confidence, classes=4, steps=20, noise=0.0, seed=0):
    """Logits that favour a class with a given probability at every step."""
    probabilities = np.full((steps, classes), (1 - confidence) / (classes - 1))
    probabilities[:, label] = confidence
    logits = np.log(probabilities) + np.random.default_rng(seed).normal(0, noise, probabilities.shape)
    return logits.astype(np.float32)


def test_a_decision_is_tried_on_recorded_logits(tiny_engine):
    manifest = Manifest.load(tiny_engine.path)
    names = manifest.labels
    background = names.index(manifest.background)
    first, second, *_ = (i for i in range(len(names)) if i != background)
    streams = [
        Stream(stream(first, 0.9), names[first], 10),
        Stream(stream(second, 0.4), names[second], 10),
        Stream(stream(second, 0.9), names[first], 10),
        Stream(stream(background, 0.9), None, 0),
    ]
    outcome = try_decision(streams, manifest, DecisionSpec(smoothing=2, threshold=0.6, release=0.3, min_steps=3))
    assert outcome.top1 == 2 / 3
    assert outcome.own == 1 / 2
    assert outcome.false == 0


def test_the_curve_shows_what_a_threshold_gives_and_costs(tiny_engine):
    manifest = Manifest.load(tiny_engine.path)
    names = manifest.labels
    actions = [i for i, name in enumerate(names) if name != manifest.background]
    streams = [Stream(stream(i, 0.45, seed=i), names[i], 10) for i in actions]
    streams.append(Stream(stream(actions[0], 0.3, steps=60), None, 0))
    outcomes = curve(streams, manifest, min_steps=3)
    assert [(o.own, o.false) for o in outcomes if o.spec.threshold in (0.24, 0.4, 0.6)] == [(1, 1), (1, 0), (0, 0)]
    assert all(o.top1 == 1 and o.spec.release < o.spec.threshold for o in outcomes)


def test_the_shortest_of_equal_smoothings_is_taken_and_noise_asks_for_more(tiny_engine):
    manifest = Manifest.load(tiny_engine.path)
    names = manifest.labels
    actions = [i for i, name in enumerate(names) if name != manifest.background]
    clean = [Stream(stream(i, 0.9), names[i], 10) for i in actions]
    noisy = [Stream(stream(i, 0.5, noise=1.5, seed=seed), names[i], 10) for seed in range(20) for i in actions]
    assert best_smoothing(clean, manifest) == 1
    assert best_smoothing(noisy, manifest) > 1


def test_logits_are_those_of_the_recognizers_own_way(tiny_engine):
    engine = Engine.open(tiny_engine.path)
    frames = tiny_engine.frames(6)
    rate = engine.manifest.frame_rate
    rows = logits_of(engine, ((frame, index / rate) for index, frame in enumerate(frames)))
    engine.reset()
    expected = np.stack([engine.step(frame[None]).copy()[0] for frame in frames])
    np.testing.assert_array_equal(rows, expected)
