"""What is said of an engine for own actions: its clips, its numbers on held-out recordings, its model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from stsm_rt.manifest import DecisionSpec
from stsm_rt.model import ModelSpec
from stsm_rt.own_clips import BACKGROUND, OwnClip, held_out_parts
from stsm_rt.train.own_fit import PARTS, Decided, interval

_CARD = """\
# {name}

Knows {count} actions: {actions}; and `{background}`, which is never reported. A classifier fitted to own clips on the
frozen network of `{start}` (sha256 `{start_sha256}`), {trained_on}.

Run it: `stsm-rt webcam --engine {engine}`

| class | clips | recordings | recall of held-out clips |
|---|---|---|---|
{classes}

- Held out ({on}): {hits} of {clips} clips recognized, {top1:.1f} %, 95 % interval {low:.0f} to {high:.0f} %.
  The interval takes clips for independent; those of one recording are not, so it is wider in truth.
- Events: {right:.0f} % of these clips raise their own event and no other. Of {still} streams without an action, which
  are held pictures of the clips and clips of the folder `{background}`, {false_events} raise one. The threshold
  {threshold:g} was chosen on these same streams.
- All clips were then fitted to, so the engine itself has been measured on nothing: the numbers are those of its kind.
- Learned from mirrored copies: {mirror}.

It knows the people, places and clothes of the recordings. What was never recorded, and what looks like one of the
actions without being one, is answered with whatever is nearest; clips of that in a folder `{background}` help most.
"""


def overview(clips: Sequence[OwnClip]) -> str:
    """What there is, class by class."""
    of_each = recordings(clips)
    counts = Counter(clip.label for clip in clips)
    return ", ".join(
        f"{label} {_count(n, 'clip')} of {_count(of_each[label], 'recording')}" for label, n in counts.items()
    )


def recordings(clips: Sequence[OwnClip]) -> dict[str, int]:
    """The number of recordings of each class."""
    return dict(Counter(label for label, _ in {(clip.label, clip.recording) for clip in clips}))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def measure(
    clips: Sequence[OwnClip], of_clips: Sequence[Decided], of_pictures: Sequence[Decided], name: str
) -> dict[str, Any]:
    """What the decisions on held-out clips are worth, for the manifest.

    Args:
        clips: The clips.
        of_clips: Their decisions.
        of_pictures: Those of held pictures.
        name: Of the data set.
    """
    actions = [decided for decided in of_clips if decided.label != BACKGROUND]
    silent = [*of_pictures, *(decided for decided in of_clips if decided.label == BACKGROUND)]
    hits = sum(decided.prediction == decided.label for decided in actions)
    parts = held_out_parts(clips, PARTS)
    low, high = interval(hits, len(actions))
    return {
        "dataset": f"own clips, {name}",
        "on": f"{len(parts)} parts of whole recordings, held out in turn"
        if len(parts) > 1
        else "single clips held out, their recordings not: too good",
        "clips": len(actions),
        "top1": hits / len(actions),
        "top1_95": [round(low, 3), round(high, 3)],
        "recall": {
            label: sum(d.prediction == label for d in actions if d.label == label) / count
            for label, count in Counter(d.label for d in actions).items()
        },
        "right_events": sum(decided.right for decided in actions) / len(actions),
        "still": len(silent),
        "false_events": sum(not decided.right for decided in silent),
    }


def lines(accuracy: dict[str, Any], decision: DecisionSpec) -> list[str]:
    """What the command says of `measure`'s answer and of the chosen thresholds."""
    low, high = (100 * share for share in accuracy["top1_95"])
    hits = round(accuracy["top1"] * accuracy["clips"])
    recall = ", ".join(f"{label} {100 * share:.0f} %" for label, share in accuracy["recall"].items())
    return [
        f"held out:   {hits} of {accuracy['clips']} clips recognized, {100 * accuracy['top1']:.1f} %",
        f"            {accuracy['on']}",
        f"            with so few clips anything from {low:.0f} to {high:.0f} % is likely (95 %), and clips of one "
        "recording are alike",
        f"            {recall}",
        f"events:     {100 * accuracy['right_events']:.0f} % of these clips raise their own event and no other; of "
        f"{accuracy['still']} streams without an action {accuracy['false_events']} raise one",
        f"thresholds: {decision.threshold:g}, release {decision.release:g}, chosen on the same held-out clips",
    ]


def card(spec: ModelSpec, engine: str) -> str:
    """The card's Markdown.

    Args:
        spec: What `stsm_rt.train.own_actions` recorded.
        engine: Name of the engine's file.
    """
    recipe, accuracy = spec.recipe, spec.accuracy or {}
    low, high = (100 * share for share in accuracy["top1_95"])
    actions = [label for label in spec.labels if label != spec.background]
    rows = [
        f"| {label} | {count} | {recipe['recordings'][label]} | "
        + (f"{100 * accuracy['recall'][label]:.0f} % |" if label in accuracy["recall"] else "no action |")
        for label, count in recipe["clips"].items()
    ]
    return _CARD.format(
        name=recipe["name"],
        count=len(actions),
        actions=", ".join(actions),
        background=spec.background,
        start=recipe["start"],
        start_sha256=recipe["start_sha256"],
        trained_on=recipe["trained_on"],
        engine=engine,
        classes="\n".join(rows),
        on=accuracy["on"],
        hits=round(accuracy["top1"] * accuracy["clips"]),
        clips=accuracy["clips"],
        top1=100 * accuracy["top1"],
        low=low,
        high=high,
        right=100 * accuracy["right_events"],
        still=accuracy["still"],
        false_events=accuracy["false_events"],
        threshold=spec.decision.threshold,
        mirror="yes" if recipe["mirror"] else "no",
    )
