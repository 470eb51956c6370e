"""The page itself: what is on it, and what happens when somebody presses something."""

from __future__ import annotations

import html
import secrets
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.processing_utils
import gradio.routes
from fastapi import HTTPException

from stsm_rt.app.engines import EngineChoice, describe
from stsm_rt.app.jobs import Job, Progress
from stsm_rt.app.report import Report
from stsm_rt.app.timeline import events_table, timeline
from stsm_rt.app.uploads import Uploads
from stsm_rt.app.visitors import Visitors
from stsm_rt.errors import UserError
from stsm_rt.video.sample import SampleClip

_STATIC = Path(__file__).parent / "static"
_AT_ONCE = 2  # uploads that are run at the same time; the others wait in Gradio's queue
_LONGEST_QUEUE = 50
# Names that tables of types do not know as videos; what it really is, the job finds out.
_SUFFIXES = [".mkv", ".m4v", ".ts", ".mts", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv", ".vob", ".mxf", ".y4m", ".gif"]
_COLUMNS = ("action", "start", "end", "length", "best score")
_SETTINGS = "(engine, threshold, smoothing) => { window.stsmSettings = {engine, threshold, smoothing}; }"
# Until its turn comes, which may be after the uploads of others.
_WAITING = "() => `<p class='message'>Waiting for its turn.</p>`"
_ANNOUNCE = "() => document.querySelector('#upload-status')?.setAttribute('aria-live', 'polite')"

Update = dict[Any, Any]


def look() -> dict[str, Any]:
    """What ``Blocks.launch`` needs to know of how the page looks: theme, style and scripts, nothing from elsewhere."""
    scripts = "".join(f"<script>{(_STATIC / name).read_text()}</script>" for name in ("timeline.js", "live.js"))
    return {
        # System fonts: the default theme's come from another server.
        "theme": gr.themes.Default(
            primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            button_primary_background_fill_dark="*primary_700",
            button_primary_background_fill_hover_dark="*primary_600",
        ),
        "css": "".join((_STATIC / name).read_text() for name in ("page.css", "live.css")),
        "head": scripts,
    }


def fetch_nothing() -> None:
    """Let nobody make this server fetch something: Gradio takes addresses where it expects files, of any size."""

    async def refuse_download(*_: object, **__: object) -> str:
        raise gr.Error("give the file itself, not its address", print_exception=False)

    async def refuse_stream(*_: object, **__: object) -> None:
        raise HTTPException(403)

    for module, name, refusal in (
        (gradio.processing_utils, "async_ssrf_protected_download", refuse_download),
        (gradio.routes, "secure_url_stream_response", refuse_stream),
    ):
        assert hasattr(module, name), f"this version of Gradio has no {module.__name__}.{name}"
        setattr(module, name, refusal)


def build_page(
    choices: Sequence[EngineChoice], visitors: Visitors, uploads: Uploads, sample: SampleClip | None
) -> gr.Blocks:
    """Put the page together.

    Args:
        choices: The engines to choose from, the default one first.
        visitors: Who lets visitors in to the live half.
        uploads: Who runs what visitors upload.
        sample: The clip that is one click away, if it is installed.

    Returns:
        The page, to be launched with what ``look`` says.
    """
    return _Page(choices, visitors, uploads, sample).blocks


class _Page:
    def __init__(
        self, choices: Sequence[EngineChoice], visitors: Visitors, uploads: Uploads, sample: SampleClip | None
    ) -> None:
        self._choices = {choice.title: choice for choice in choices}
        self._visitors = visitors
        self._uploads = uploads
        self._sample = sample
        with gr.Blocks(title="stsm-rt: what are they doing?", analytics_enabled=False) as self.blocks:
            gr.HTML(_heading(choices[0]))
            with gr.Tabs():
                with gr.Tab("Video"):
                    self._lay_out_video()
                with gr.Tab("Camera"):
                    gr.HTML((_STATIC / "live.html").read_text())
            self._lay_out_settings(choices)
            self._connect()
        # Who goes round the queue goes round its limits.
        self.blocks.queue(api_open=False, max_size=_LONGEST_QUEUE)

    def _lay_out_video(self) -> None:
        limits = self._uploads.limits
        self._file = gr.File(
            label=f"A video of up to {limits.seconds / 60:g} minutes and {limits.megabytes} MB",
            file_types=["video", *_SUFFIXES],
            type="filepath",
            elem_id="upload-file",
            height=140,
        )
        with gr.Row(elem_id="upload-buttons"):
            self._run = gr.Button("Recognize", variant="primary", elem_id="upload-run", interactive=False)
            self._try = gr.Button("Try the sample clip", elem_id="upload-sample", visible=self._sample is not None)
            self._stop = gr.Button("Stop", variant="stop", elem_id="upload-stop", visible=False)
        self._status = gr.HTML(elem_id="upload-status")
        with gr.Column(visible=False, elem_id="upload-results") as self._results:
            self._video = gr.Video(
                label="What was recognized", elem_id="result-video", interactive=False, buttons=["download"]
            )
            self._timeline = gr.HTML(elem_id="upload-timeline")
            self._events = gr.HTML(elem_id="upload-events")
            with gr.Row(elem_id="upload-downloads"):
                self._downloads = [
                    gr.DownloadButton(label, elem_id=f"download-{name}", size="sm")
                    for name, label in (
                        ("video", "Annotated video (MP4)"),
                        ("jsonl", "Every result (JSONL)"),
                        ("csv", "Events (CSV)"),
                    )
                ]

    def _lay_out_settings(self, choices: Sequence[EngineChoice]) -> None:
        first = choices[0]
        decision = first.manifest.decision
        with gr.Accordion("Engine and settings", open=False, elem_id="settings"):
            self._engine = gr.Dropdown(
                list(self._choices), value=first.title, label="Engine", elem_id="setting-engine", filterable=False
            )
            with gr.Row():
                self._threshold = gr.Slider(
                    0.05, 0.95, decision.threshold, step=0.01, label="Threshold",
                    info="Score at which an action starts. Lower finds more, and more that is not there.",
                    elem_id="setting-threshold",
                )  # fmt: skip
                self._smoothing = gr.Slider(
                    1, 30, decision.smoothing, step=1, label="Smoothing",
                    info="Steps that are averaged. Fewer answer sooner, more are calmer.",
                    elem_id="setting-smoothing",
                )  # fmt: skip
            self._about = gr.Markdown(describe(first), elem_id="setting-about")

    def _connect(self) -> None:
        settings = [self._engine, self._threshold, self._smoothing]
        shown = [
            self._file, self._run, self._stop, self._try, self._status, self._results,
            self._video, self._timeline, self._events, *self._downloads,
        ]  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        work: dict[str, Any] = {"concurrency_limit": _AT_ONCE, "concurrency_id": "uploads"} | private
        gr.on([self._run.click, self._file.upload, self._try.click], None, None, self._status, js=_WAITING, **private)
        gr.on([self._run.click, self._file.upload], self._recognize, [self._file, *settings], shown, **work)
        self._try.click(self._recognize_sample, [self._file, *settings], shown, **work)
        self._file.change(lambda file: gr.Button(interactive=bool(file)), self._file, self._run, **private)
        self._stop.click(self._cancel, queue=False, **private)
        self._engine.change(self._choose, self._engine, [self._threshold, self._smoothing, self._about], **private)
        changes = [self._engine.change, self._threshold.change, self._smoothing.change, self.blocks.load]
        gr.on(changes, None, settings, js=_SETTINGS, **private)
        self.blocks.load(None, js=_ANNOUNCE, **private)
        self.blocks.unload(self._leave)
        # The endpoint for programs: the same, without a page.
        with gr.Row(visible=False):
            gr.Button().click(
                self._answer,
                [gr.File(label="video", type="filepath"), *settings],
                [
                    gr.JSON(label="report"),
                    *(gr.File(label=label) for label in ("annotated video", "results", "events")),
                ],
                api_name="recognize",
                api_description="Recognize the actions in a video file.",
                concurrency_limit=_AT_ONCE,
                concurrency_id="uploads",
            )

    def _recognize(
        self, file: str | None, engine: str, threshold: float, smoothing: float, request: gr.Request
    ) -> Iterator[Update]:
        if file is None:
            yield {self._status: _message("Choose a video first.")}
            return
        yield from self._play(Path(file), None, file, engine, threshold, smoothing, request)

    def _recognize_sample(
        self, file: str | None, engine: str, threshold: float, smoothing: float, request: gr.Request
    ) -> Iterator[Update]:
        assert self._sample is not None
        yield from self._play(self._sample.path, self._sample.roi, file, engine, threshold, smoothing, request)

    def _play(
        self,
        video: Path,
        roi: tuple[int, int, int, int] | None,
        file: str | None,
        engine: str,
        threshold: float,
        smoothing: float,
        request: gr.Request,
    ) -> Iterator[Update]:
        """Show how far it is, and in the end what was found or why nothing was."""
        idle = {
            self._file: gr.File(interactive=True),
            self._run: gr.Button(interactive=file is not None),
            self._try: gr.Button(interactive=True),
            self._stop: gr.Button(visible=False),
        }
        try:
            with self._job(str(request.session_hash), video, engine, threshold, smoothing, roi) as job:
                # Not before there is something to stop; meanwhile nothing else can be started.
                yield {
                    self._status: _progress(None),
                    self._results: gr.Column(visible=False),
                    self._file: gr.File(interactive=False),
                    self._run: gr.Button(interactive=False),
                    self._try: gr.Button(interactive=False),
                    self._stop: gr.Button(visible=True),
                }
                for progress in job:
                    yield {self._status: _progress(progress)}
                report = job.report
        except UserError as error:
            yield {self._status: _message(str(error), "error"), self._results: gr.Column(visible=False)} | idle
            return
        yield self._show(report) | idle

    def _show(self, report: Report) -> Update:
        files = [report.video, report.jsonl, report.csv]
        return {
            self._status: _summary(report),
            self._results: gr.Column(visible=True),
            self._video: gr.Video(value=str(report.video)),
            self._timeline: timeline(report),
            self._events: _table(events_table(report)),
            **{button: gr.DownloadButton(value=str(path)) for button, path in zip(self._downloads, files, strict=True)},
        }

    def _answer(
        self, video: str | None, engine: str, threshold: float, smoothing: float, request: gr.Request
    ) -> tuple[Any, ...]:
        if video is None:
            raise gr.Error("give a video file", print_exception=False)
        try:
            # A program may send several at once; each is a visitor of its own, who leaves with the program.
            visitor = f"{request.session_hash}/{secrets.token_hex(8)}"
            with self._job(visitor, Path(video), engine, threshold, smoothing) as job:
                for _ in job:
                    pass
                report = job.report
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return (report.to_record(), str(report.video), str(report.jsonl), str(report.csv))

    def _job(
        self,
        visitor: str,
        video: Path,
        engine: str,
        threshold: float,
        smoothing: float,
        roi: tuple[int, int, int, int] | None = None,
    ) -> AbstractContextManager[Job]:
        choice = self._choices[engine]
        return self._uploads.job(visitor, video, choice, threshold, int(smoothing), roi)

    def _choose(self, engine: str) -> tuple[float, int, str]:
        choice = self._choices[engine]
        decision = choice.manifest.decision
        return decision.threshold, decision.smoothing, describe(choice)

    def _cancel(self, request: gr.Request) -> None:
        self._uploads.cancel(str(request.session_hash))

    def _leave(self, request: gr.Request) -> None:
        self._uploads.leave(str(request.session_hash))


def _heading(choice: EngineChoice) -> str:
    manifest = choice.manifest
    actions = [label for label in manifest.labels if label != manifest.background]
    some = ", ".join(html.escape(action.replace("_", " ")) for action in actions[:3])
    return (
        "<header id='heading'><h1>What are they doing?</h1>"
        f"<p>Drop in a video, or switch on your camera: frame by frame it says which of {len(actions)} actions it sees "
        f"({some}, ...). Everything stays on the machine that serves this page.</p></header>"
    )


def _message(text: str, kind: str = "note") -> str:
    role = " role='alert'" if kind == "error" else ""
    return f"<p class='message {kind}'{role}>{html.escape(text)}</p>"


def _progress(progress: Progress | None) -> str:
    if progress is None:
        return "<p class='message'><progress aria-label='Progress'></progress> <span>opening the video</span></p>"
    share = f" value='{min(1.0, progress.time / progress.duration):.4f}'" if progress.duration else ""
    length = f" of {progress.duration:.1f}" if progress.duration else ""
    return (
        f"<div class='message' aria-live='off'><progress aria-label='Progress' max='1'{share}></progress> "
        f"<span>{progress.time:.1f}{length} s, {progress.frames} frames, "
        f"{html.escape(progress.label)} {progress.score:.2f}</span></div>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th scope='col'>{column}</th>" for column in _COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>Events</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _summary(report: Report) -> str:
    count = len(report.events)
    found = "no event" if not count else "1 event" if count == 1 else f"{count} events"
    broken = "" if report.complete else " The file breaks off before its declared end: this is what could be decoded."
    median, p95 = 1000 * report.latency.median, 1000 * report.latency.p95
    return _message(
        f"{report.source.frames} frames, {report.steps} steps of the network, {found}. From a decoded frame to its "
        f"result: median {median:.1f} ms, 95 % within {p95:.1f} ms.{broken}",
        "note" if report.complete else "warning",
    )
