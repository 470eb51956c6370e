"""The labelled videos that an evaluation plays, from any data set that we read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stsm_rt.errors import UserError
from stsm_rt.playback import Clip, read_clips
from stsm_rt.train.annotations import VideoList, VideoRecord, load_videos

# The part of each data set that is published with labels and that papers report on.
PARTS = {
    "kinetics400": "validation",
    "something_something_v2": "validation",
    "jester": "validation",
    "ucf101": "test",
    "hmdb51": "test",
    "list": "validation",
}


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Which videos are to be played.

    Attributes:
        folder: Where they are.
        dataset: A key of `PARTS`, or None: the folder has our own ``manifest.csv``.
        split: Of the data sets that have several.
        part: ``"train"``, ``"validation"`` or ``"test"``; None: that of `PARTS`, of a ``manifest.csv`` ``"test"``.
        annotations: The annotation file or folder, where it is not in its usual place.
        image_template: Of extracted frames, the name of frame n; None: the data set's own.
        frame_rate: Frames per second of extracted frames; None: the data set's own.
        missing: Share of the listed videos that the disk may lack.
    """

    folder: Path
    dataset: str | None = None
    split: int = 1
    part: str | None = None
    annotations: Path | None = None
    image_template: str | None = None
    frame_rate: float | None = None
    missing: float = 0.01

    def read(self, labels: Sequence[str]) -> VideoList:
        """List the videos, numbered as the network numbers its labels.

        Args:
            labels: The network's labels without the background.

        Returns:
            The videos; ``classes`` are the labels.

        Raises:
            UserError: The annotations cannot be read, or the network does not know a class.
        """
        part = self.used_part
        if self.dataset is None:
            clips = read_clips(self.folder, self.split, labels, part=part)
            places = {label: place for place, label in enumerate(labels)}
            return VideoList(tuple(VideoRecord(clip.path, places[clip.label]) for clip in clips), tuple(labels))
        videos = load_videos(
            self.dataset,
            self.folder,
            part,
            split=self.split,
            annotations=self.annotations,
            image_template=self.image_template,
            frame_rate=self.frame_rate,
            missing=self.missing,
        )
        return relabel(videos, labels)

    @property
    def used_part(self) -> str:
        """The part that is read."""
        return self.part or PARTS.get(self.dataset or "", "test")

    def to_record(self) -> dict[str, str | int]:
        """What was played: ``split`` and, of a named data set, ``dataset`` and ``part``."""
        return {
            "split": self.split,
            **({"dataset": self.dataset, "part": self.used_part} if self.dataset is not None else {}),
        }


def relabel(videos: VideoList, labels: Sequence[str]) -> VideoList:
    """Number the classes of a list as a network does.

    Names are compared by their letters and digits alone, as ``brush_hair`` is written ``Brush hair`` elsewhere. Where
    the list or the network has class numbers in place of names, the numbers decide.

    Args:
        videos: The list.
        labels: The network's labels without the background.

    Returns:
        The list with ``labels`` as its classes.

    Raises:
        UserError: A class that has a video is not among the labels.
    """
    used = {record.label: videos.classes[record.label] for record in videos.records}
    spelled = Counter(map(_letters, labels))
    places = {_letters(label): place for place, label in enumerate(labels) if spelled[_letters(label)] == 1}
    exact = {label: place for place, label in enumerate(labels)}
    found = {label: exact.get(name, places.get(_letters(name))) for label, name in used.items()}
    place_of = {label: place for label, place in found.items() if place is not None}
    if unknown := [name for label, name in used.items() if label not in place_of]:
        numbered = _are_numbers(videos.classes) or (_are_numbers(labels) and len(labels) == len(videos.classes))
        if not numbered or max(used) >= len(labels):
            raise UserError(
                f"the network does not know {len(unknown)} of the {len(used)} classes that are to be played, among "
                f"them {unknown[0]!r}; give an engine or weights whose labels are those of the data set"
            )
        place_of = {label: label for label in used}
    records = (dataclasses.replace(record, label=place_of[record.label]) for record in videos.records)
    return dataclasses.replace(videos, records=tuple(records), classes=tuple(labels))


def as_clips(videos: VideoList) -> list[Clip]:
    """The videos of a list for the recognizer, which plays them whole."""
    return [
        Clip(record.path, videos.classes[record.label], record.template, record.frame_rate) for record in videos.records
    ]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isdecimal() for name in names)
