"""A folder per class of clips as a data set: ``FOLDER/LABEL/<recording>-NNNN.mp4``, as ``stsm-rt record`` writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError
from stsm_rt.playback import videos_in
from stsm_rt.sampler import Sampler
from stsm_rt.video.fit import fit
from stsm_rt.video.sources import open_source

BACKGROUND = "nothing"
_NUMBERED = re.compile(r"(.+)-\d+")
_LONGEST_NAME = 60
LONGEST_CLIP = 60.0  # seconds


@dataclass(frozen=True)
class OwnClip:
    """A clip of an own action.

    Attributes:
        path: The video file.
        label: The folder's name.
        recording: What was filmed in one session: the file's name without its number. Clips of one recording show the
            same place, clothes and light, so they are held out together. A file without a number is a recording.
    """

    path: Path
    label: str
    recording: str


def check_label(label: str) -> str:
    """Hold a class name to what is a folder's name on every system and fits on a picture.

    Returns:
        The name.

    Raises:
        UserError: It is empty, longer than 60 characters, does not begin and end with a letter or a digit, or holds
            something else than letters, digits, spaces, hyphens and underscores.
    """
    if len(label) > _LONGEST_NAME or not re.fullmatch(r"[^\W_](?:[\w -]*[^\W_])?", label):
        raise UserError(
            f"a class is named with letters, digits, spaces, hyphens and underscores, at most {_LONGEST_NAME} of them, "
            f"such as wave_left, not {label!r}; choose such a name"
        )
    return label


def own_clips(folder: Path) -> list[OwnClip]:
    """List the clips of a folder per class, sorted by class and name; hidden files and empty folders are no part of it.

    Raises:
        UserError: There is no such folder, it holds fewer than two classes besides ``nothing`` and that one, a class
            has an unusable name, or two names differ in capitals alone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds a folder of clips for each class")
    clips = [
        OwnClip(path, part.name, match[1] if (match := _NUMBERED.fullmatch(path.stem)) else path.stem)
        for part in sorted(folder.iterdir())
        if part.is_dir() and not part.name.startswith(".")
        for path in videos_in(part)
        if not path.name.startswith(".")
    ]
    labels = list(dict.fromkeys(check_label(clip.label) for clip in clips))
    seen: dict[str, str] = {}
    for label in labels:
        if (other := seen.setdefault(label.casefold(), label)) != label:
            raise UserError(f"the classes {other!r} and {label!r} differ in capitals alone; rename one of them")
    actions = [label for label in labels if label != BACKGROUND]
    if BACKGROUND in seen and BACKGROUND not in labels:
        raise UserError(f"the class of clips without an action is named {BACKGROUND!r}; rename {seen[BACKGROUND]!r}")
    if len(actions) < 2:
        found = f"only {actions[0]!r}" if actions else "none"
        raise UserError(
            f"two classes of clips or more were expected in {folder} besides {BACKGROUND!r}, found {found}; record "
            "another one with stsm-rt record LABEL"
        )
    return clips


def read_clip(path: Path, size: tuple[int, int]) -> tuple[npt.NDArray[np.uint8], list[float]]:
    """The frames of a clip, of each the part that a recognizer looks at.

    Args:
        path: The video.
        size: Height and width in pixels.

    Returns:
        uint8 (F, height, width, 3), BGR, and the source times in seconds.

    Raises:
        UserError: The clip cannot be read, or is longer than a minute.
    """
    frames, times = [], []
    with open_source(path) as source:
        for frame, time in source:
            if time > LONGEST_CLIP:
                raise UserError(f"{path} is longer than {LONGEST_CLIP:g} s; cut out what shows the action")
            fit(frame, None, picture := np.empty((*size, 3), np.uint8))
            frames.append(picture)
            times.append(time)
    return np.stack(frames), times


def seen_frames(times: Sequence[float], frame_rate: float) -> list[int]:
    """Indices of the frames that a recognizer sees of a clip, at a number of steps per second."""
    sampler = Sampler(frame_rate)
    return [index for index, time in enumerate(times) if sampler.take(time)]


def held_out_parts(clips: Sequence[OwnClip], most: int) -> list[list[int]]:
    """Divide clips into parts to hold out one after another, never dividing a recording.

    A recording goes to the part that has fewest clips of its class, the largest recordings first, so every part holds
    clips of every class that has as many recordings of its own as there are parts. Classes with few recordings come
    first: one that shares its recordings with others is spread as far as it can be.

    Args:
        clips: The clips.
        most: Parts at most.

    Returns:
        Indices of clips, one list for each part: as many as the action with the fewest recordings has, at most `most`;
        one where there is an action with a single recording, since nothing can be held out honestly then.
    """
    by_class = {label: _recordings(clips, label) for label in dict.fromkeys(clip.label for clip in clips)}
    fewest = min(len(found) for label, found in by_class.items() if label != BACKGROUND)
    parts: list[list[int]] = [[] for _ in range(min(most, fewest))]
    home: dict[str, int] = {}
    for label, found in sorted(by_class.items(), key=lambda item: len(item[1])):
        counts = [sum(clips[i].label == label for i in part) for part in parts]
        for recording in sorted(found, key=lambda name: (-len(found[name]), name)):
            if recording not in home:
                home[recording] = counts.index(min(counts))
                parts[home[recording]] += [i for i, clip in enumerate(clips) if clip.recording == recording]
                counts = [sum(clips[i].label == label for i in part) for part in parts]
    return [sorted(part) for part in parts if part]


def _recordings(clips: Sequence[OwnClip], label: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, clip in enumerate(clips):
        if clip.label == label:
            found.setdefault(clip.recording, []).append(index)
    return found


def mirrored_label(label: str, labels: Sequence[str]) -> str | None:
    """What a clip shows in a mirror: ``wave_left`` becomes ``wave_right``.

    Returns:
        The label itself where it names no side, the label with the sides swapped where that is one of the labels,
        else None: such a clip must not be mirrored.
    """
    words = list(_swapped(label))
    swapped = "".join(words)
    return swapped if swapped in labels else None


def _swapped(label: str) -> Iterator[str]:
    for word in re.split(r"([\W_]+)", label):
        yield {"left": "right", "right": "left"}.get(word, word)
