"""What is known of a video after its analysis: ``report.json`` and the files beside it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
VIDEO, JSONL, CSV, REPORT = "video.mp4", "events.jsonl", "events.csv", "report.json"


@dataclass(frozen=True)
class EngineFacts:
    """What recognized: the fields of the same names in the engine's manifest."""

    network: str
    precision: str
    runtime: str
    sha256: str


@dataclass(frozen=True)
class SourceFacts:
    """What was read.

    Attributes:
        name: Name of the file as its owner calls it.
        width: Width of its pictures in pixels as they are looked at: turned where the file says that they are to be.
        height: Their height.
        frame_rate: Frames per second as the file declares it, or null.
        frames: Frames that were read.
        duration: Seconds from the start to the end of the last frame that was read.
        declared_duration: Seconds that the file declares, or null.
    """

    name: str
    width: int
    height: int
    frame_rate: float | None
    frames: int
    duration: float
    declared_duration: float | None


@dataclass(frozen=True)
class Latency:
    """Seconds from a frame's decoding to its result: the median, and what 95 % of the steps keep to."""

    median: float
    p95: float


@dataclass(frozen=True)
class Span:
    """An event from its start to its end, both in seconds of the video, with its highest score, 0 to 1."""

    label: str
    start: float
    end: float
    peak: float


@dataclass(frozen=True)
class Scores:
    """The scores of the top labels over time: those of events and those that were best at any step, at most 6.

    Attributes:
        time: Seconds of the video, rising, at most 2000. Where there were more steps, each point stands for the steps
            from its time to the next point's.
        labels: For each label its scores, 0 to 1, one for each time: the highest of its steps.
    """

    time: tuple[float, ...]
    labels: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Report:
    """The result of an analysis, as it is in ``report.json``; the keys are the names of the attributes.

    Attributes:
        format: Version of this schema, 1.
        engine: What recognized.
        source: What was read.
        complete: False where the file declares clearly more frames and a longer duration than came: it breaks off.
        steps: Steps that the network made.
        threshold: Score, 0 to 1, at which an event may start.
        smoothing: Steps over which scores are averaged.
        latency: Of the steps.
        events: In the order of their starts; there is never more than one at a time.
        scores: Of the top labels.
        files: Names of the files beside the report by their kinds: ``"video"``, the annotated video (H.264 in an MP4,
            its longest side at most 1280 pixels, every frame at its time in the source); ``"jsonl"``, what
            ``stsm-rt webcam --events`` writes for the same file, a line for each result and each event's start and
            end; ``"csv"``, the events as label,start,end,peak.
        folder: Where they lie; not in the file.
    """

    format: int
    engine: EngineFacts
    source: SourceFacts
    complete: bool
    steps: int
    threshold: float
    smoothing: int
    latency: Latency
    events: tuple[Span, ...]
    scores: Scores
    files: dict[str, str]
    folder: Path

    @property
    def video(self) -> Path:
        """The annotated video."""
        return self.folder / self.files["video"]

    @property
    def jsonl(self) -> Path:
        """Every result and event, one JSON object per line."""
        return self.folder / self.files["jsonl"]

    @property
    def csv(self) -> Path:
        """The events as a table."""
        return self.folder / self.files["csv"]

    def to_record(self) -> dict[str, Any]:
        """Return what is in ``report.json``, ready for JSON."""
        record = dataclasses.asdict(self)
        del record["folder"]
        return record

    def save(self) -> None:
        """Write ``report.json`` into the folder."""
        text = json.dumps(self.to_record(), ensure_ascii=False, allow_nan=False, indent=1)
        (self.folder / REPORT).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Read the ``report.json`` of a folder.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is no such report.
        """
        record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if record.get("format") != FORMAT:
            raise ValueError(f"the report in {folder} should have format {FORMAT}, not {record.get('format')}")
        scores = record["scores"]
        curves = {label: tuple(values) for label, values in scores["labels"].items()}
        parts = {
            "engine": EngineFacts(**record["engine"]),
            "source": SourceFacts(**record["source"]),
            "latency": Latency(**record["latency"]),
            "events": tuple(Span(**event) for event in record["events"]),
            "scores": Scores(tuple(scores["time"]), curves),
        }
        return cls(**(record | parts), folder=folder)
