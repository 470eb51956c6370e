"""The annotation files of public data sets, as their authors publish them, and the lists of TSM and mmaction2."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stsm_rt.errors import UserError


class Entry(NamedTuple):
    """A line of a list.

    Attributes:
        names: What the video may be called, the usual name first: without suffix where `Listing.by_stem`, else a path.
        label: Index into the classes.
        frames: Of a folder of extracted frames, how many there are, where the list says so.
    """

    names: tuple[str, ...]
    label: int
    frames: int | None = None


class Listing(NamedTuple):
    """A part of a data set as its annotations have it.

    Attributes:
        source: The file (of HMDB51 the folder) that lists the videos.
        entries: The videos.
        classes: Names.
        by_stem: Whether videos are known by their name alone, wherever they are; else by their path.
    """

    source: Path
    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    by_stem: bool


@dataclass(frozen=True)
class Format:
    """How a data set is annotated.

    Attributes:
        read: From the folder of the annotations (or the list file), the part and the split to the list.
        parts: That have labels.
        image_template: Of the extracted frames that the set is published as; None: it is published as videos.
        frame_rate: Frames per second of its videos, where they have one.
    """

    read: Callable[[Path, str, int], Listing]
    parts: tuple[str, ...]
    image_template: str | None = None
    frame_rate: float | None = None


def read_kinetics(folder: Path, part: str, split: int) -> Listing:
    """Kinetics: CSV files with the columns label, youtube_id, time_start, time_end and split.

    Videos are called ``ID_000012_000022`` (the seconds of the clip, six digits) as the usual tools name them, or by the
    id alone. Classes are those of the training list, in alphabetical order, which is everybody's.
    """
    source = _one_file(folder, _KINETICS_FILES[part])
    rows = _table(source, ("youtube_id", "time_start", "time_end"))
    if "label" not in rows[0]:
        raise UserError(f"{source} has no column label; the labels of this list were not published, use validation")
    training = source if part == "train" else _one_file(folder, _KINETICS_FILES["train"])
    classes = tuple(sorted({row["label"] for row in _table(training, ("label",))}))
    index = _Index(classes, training)
    entries = []
    for row in rows:
        try:
            seconds = [int(float(row[column])) for column in ("time_start", "time_end")]
        except ValueError as error:
            raise UserError(f"{source}: expected seconds for {row['youtube_id']}, got {error}") from error
        identity = row["youtube_id"]
        names = (f"{identity}_{seconds[0]:06d}_{seconds[1]:06d}", f"{identity}_{seconds[0]}_{seconds[1]}", identity)
        entries.append(Entry(names, index(row["label"], source)))
    return Listing(source, tuple(entries), classes, by_stem=True)


_KINETICS_FILES = {
    "train": ("train.csv", "kinetics_train.csv", "kinetics400_train.csv", "kinetics-400_train.csv"),
    "validation": ("validate.csv", "validation.csv", "val.csv", "kinetics_val.csv", "kinetics400_val.csv"),
    "test": ("test.csv", "kinetics_test.csv", "kinetics400_test.csv", "kinetics-400_test.csv"),
}


def read_something_something(folder: Path, part: str, split: int) -> Listing:
    """Something-Something V2: labels.json numbers the templates; the lists have id and template, placeholders in []."""
    table = _one_file(folder, ("labels.json", "something-something-v2-labels.json"))
    numbers = _json(table, dict)
    try:
        ordered = sorted(numbers, key=lambda name: int(numbers[name]))
        complete = [int(numbers[name]) for name in ordered] == list(range(len(ordered)))
    except (TypeError, ValueError):
        complete = False
    if not complete:
        raise UserError(f"{table} should number its templates from 0 on, each number once; it does not")
    classes = tuple(_without_brackets(name) for name in ordered)
    index = _Index(classes, table)
    if part == "test":
        source = _one_file(folder, ("test-answers.csv", "something-something-v2-test-answers.csv"))
        rows = [(identity, label) for identity, label in _pairs(source, ";")]
    else:
        source = _one_file(folder, (f"{part}.json", f"something-something-v2-{part}.json"))
        items = _json(source, list)
        try:
            rows = [(str(item["id"]), item["template"]) for item in items]
        except (KeyError, TypeError) as error:
            raise UserError(f"{source}: every item should have an id and a template; one has none") from error
    entries = tuple(Entry((identity,), index(_without_brackets(label), source)) for identity, label in rows)
    return Listing(source, entries, classes, by_stem=True)


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def read_jester(folder: Path, part: str, split: int) -> Listing:
    """Jester: the class names one a line, and lists of ``id;label``; every video is a folder of frames."""
    table = _one_file(folder, ("jester-v1-labels.csv", "labels.csv"))
    classes = tuple(_lines(table))
    index = _Index(classes, table)
    source = _one_file(folder, (f"jester-v1-{part}.csv", f"{part}.csv"))
    entries = tuple(Entry((identity,), index(label, source)) for identity, label in _pairs(source, ";"))
    return Listing(source, entries, classes, by_stem=True)


def read_ucf101(folder: Path, part: str, split: int) -> Listing:
    """UCF101: classInd.txt, trainlist01.txt with paths and class numbers, testlist01.txt with paths."""
    _check_split("UCF101", split)
    table = _one_file(folder, ("classInd.txt",))
    numbered = [line.split() for line in _lines(table)]
    if any(len(words) != 2 or words[0] != str(place) for place, words in enumerate(numbered, 1)):
        raise UserError(f"{table}: expected lines such as '1 ApplyEyeMakeup', numbered from 1 on")
    classes = tuple(words[1] for words in numbered)
    index = _Index(classes, table)
    source = _one_file(folder, (f"{part}list{split:02d}.txt",))
    paths = [line.split()[0] for line in _lines(source)]
    entries = tuple(Entry(_video_or_folder(path), index(path.split("/")[0], source)) for path in paths)
    return Listing(source, entries, classes, by_stem=False)


def read_hmdb51(folder: Path, part: str, split: int) -> Listing:
    """HMDB51: a file for every class and split with the video and 1 (train), 2 (test) or 0 (neither)."""
    _check_split("HMDB51", split)
    ending = f"_test_split{split}.txt"
    files = next((found for pattern in ("", "*/") if (found := list(folder.glob(f"{pattern}*{ending}")))), [])
    files.sort(key=lambda file: file.name.removesuffix(ending))  # "kick" comes before "kick_ball"
    if not files:
        raise UserError(f"expected files such as wave{ending} in {folder} or a folder in it, found none")
    classes = tuple(file.name.removesuffix(ending) for file in files)
    side, entries = {"train": "1", "test": "2"}[part], []
    for label, file in enumerate(files):
        for line in _lines(file):
            name, _, mark = line.rpartition(" ")
            if mark not in ("0", "1", "2"):
                raise UserError(f"{file}: expected lines such as 'name.avi 1' with 0, 1 or 2, got {line!r}")
            if mark == side:
                entries.append(Entry(_video_or_folder(f"{classes[label]}/{name.strip()}"), label))
    return Listing(files[0].parent, tuple(entries), classes, by_stem=False)


def read_list(path: Path, part: str, split: int) -> Listing:
    """The lists of TSM and mmaction2: ``path label`` for videos, ``path frames label`` for folders of frames.

    The class names are in a file beside it, one a line: category.txt, classes.txt or label_map*.txt.
    """
    source = path if path.is_file() else _only(path, [f"*{_LIST_PARTS[part]}*.txt"], f"{part} list")
    for_training = "train" in source.stem
    if for_training != (part == "train") and any(word in source.stem for word in _LIST_PARTS.values()):
        raise UserError(f"{source} is not the {part} list by its name; give that list, or the folder of all of them")
    table = _only(source.parent, ["category.txt", "classes.txt", "*label_map*.txt"], "file of class names")
    classes = tuple(_lines(table))
    rows = [line.split() for line in _lines(source)]
    with_frames = all(len(row) > 2 and row[-2].isdecimal() for row in rows)
    entries = []
    for row in rows:
        numbers, words = (row[-2:], row[:-2]) if with_frames else (row[-1:], row[:-1])
        if not words or not all(number.isdecimal() for number in numbers):
            raise UserError(f"{source}: expected lines 'path label' or 'path frames label', got {' '.join(row)!r}")
        if int(numbers[-1]) >= len(classes):
            raise UserError(f"{source} has the label {numbers[-1]}, but {table} has {len(classes)} classes, from 0 on")
        entries.append(Entry((" ".join(words),), int(numbers[-1]), int(numbers[0]) if with_frames else None))
    return Listing(source, tuple(entries), classes, by_stem=False)


_LIST_PARTS = {"train": "train", "validation": "val", "test": "test"}

FORMATS = {
    "kinetics400": Format(read_kinetics, ("train", "validation", "test")),
    "something_something_v2": Format(read_something_something, ("train", "validation", "test"), None, 12.0),
    "jester": Format(read_jester, ("train", "validation"), "{:05d}.jpg", 12.0),
    "ucf101": Format(read_ucf101, ("train", "test"), None, 25.0),
    "hmdb51": Format(read_hmdb51, ("train", "test"), None, 30.0),
    "list": Format(read_list, ("train", "validation", "test")),
}


class _Index:
    """From a class name to its index."""

    def __init__(self, classes: Sequence[str], table: Path) -> None:
        self._places = {name: place for place, name in enumerate(classes)}
        self._table = table

    def __call__(self, label: str, source: Path) -> int:
        if label not in self._places:
            raise UserError(f"{source} has the label {label!r}, which is not among the classes of {self._table}")
        return self._places[label]


def _check_split(name: str, split: int) -> None:
    if split not in (1, 2, 3):
        raise UserError(f"{name} has splits 1, 2 and 3, not {split}")


def _video_or_folder(path: str) -> tuple[str, ...]:
    """The path of a video, and that of its folder of extracted frames."""
    return path, path.rpartition(".")[0]


def _one_file(folder: Path, names: Iterable[str]) -> Path:
    """The first of these files in a folder or in a folder in it."""
    names = tuple(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for name in names:
        if below := sorted(folder.glob(f"*/{name}")):
            return below[0]
    raise UserError(f"expected the annotation file {' or '.join(names)} in {folder} or a folder in it, found none")


def _only(folder: Path, patterns: Iterable[str], what: str) -> Path:
    """The one file in a folder that fits a pattern."""
    patterns = tuple(patterns)
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"expected one {what} ({' or '.join(patterns)}) in {folder}, found {names}")
    return found[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the annotations {path} cannot be read ({error}); expected text in UTF-8") from error


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines()]
    return [line for line in lines if line]


def _pairs(path: Path, delimiter: str) -> list[tuple[str, str]]:
    rows = [line.split(delimiter) for line in _lines(path)]
    if any(len(row) != 2 for row in rows):
        raise UserError(f"{path}: expected lines 'id{delimiter}label'")
    return [(row[0].strip(), row[1].strip()) for row in rows]


def _table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    reader = csv.DictReader(_text(path).splitlines())
    if absent := sorted(set(columns) - set(reader.fieldnames or ())):
        raise UserError(f"{path} has no column {absent[0]}; expected the CSV file that the set is published with")
    rows = list(reader)
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} has a line with more or fewer fields than its first; get the file again")
    if not rows:
        raise UserError(f"{path} lists no video")
    return rows


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} should hold a JSON {'object' if kind is dict else 'list'}, it does not")
    return value
