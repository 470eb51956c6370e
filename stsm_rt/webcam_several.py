"""Several cameras on their way through recognizers on one engine to the sinks, and onto a mosaic."""

from __future__ import annotations

import contextlib
import functools
from time import perf_counter

from stsm_rt.cameras import Camera, Cameras, News
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError, report
from stsm_rt.mosaic import Mosaic
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.source import OnChange, Source, SourceState
from stsm_rt.video.sources import open_source
from stsm_rt.video.window import save_snapshot
from stsm_rt.webcam_options import Options
from stsm_rt.webcam_outputs import Outputs, say

PATIENCE = 5  # steps of a camera that have to fail in a row before the command ends
_MOSAIC_RATE = 15.0  # pictures per second
_PAINTING = 0.02  # seconds that the window gets for each; with less, a busy machine never paints it
_IDLE = 0.2  # seconds to wait for news where no picture is due
_STALE = 2.0  # seconds after which the last picture of a live camera is not shown any more


class SeveralCameras:
    """A session of ``stsm-rt webcam`` with several cameras."""

    def __init__(self, options: Options, stack: contextlib.ExitStack) -> None:
        """Open the engine, the sources and whatever takes the results.

        Args:
            options: What was asked for.
            stack: What closes it all.

        Raises:
            UserError: If something cannot be opened.
        """
        engine = Engine.open(options.engine, slots=len(options.cameras))
        # Until they are played: then each is closed in its own thread, all at the same time.
        self._opened = stack.enter_context(contextlib.ExitStack())
        cameras = []
        for slot, wanted in enumerate(options.cameras):
            recognizer = Recognizer(
                engine,
                slot=slot,
                topk=options.topk,
                threshold=options.threshold,
                smoothing=options.smoothing,
                roi=wanted.roi,
                patience=PATIENCE,
            )
            cameras.append(Camera(wanted.name, recognizer, functools.partial(_open, wanted.source, options)))
            self._opened.enter_context(cameras[-1].source)
        self._outputs = Outputs(options, stack, live=any(camera.source.live for camera in cameras))
        for camera in cameras:
            dropped = functools.partial(getattr, camera, "dropped")
            self._outputs.add(camera.name, camera.source, camera.recognizer, one_of_several=True, dropped=dropped)
            say(f"watching {camera.name}: {camera.source.name}")
        self._mosaic: Mosaic | None = None
        if options.save is not None or not options.headless:
            mosaic = Mosaic([wanted.name for wanted in options.cameras], [wanted.roi for wanted in options.cameras])
            self._outputs.open_video(mosaic.size, _MOSAIC_RATE)
            self._outputs.open_window(mosaic.size, "keys in the window: q quits, r resets, s takes a snapshot")
            if self._outputs.window or self._outputs.video:
                self._mosaic = mosaic
        self._cameras = Cameras(
            cameras,
            pictures=self._mosaic is not None,
            paced=self._mosaic is not None,
            max_frames=options.max_frames,
            on_frame=lambda camera: self._outputs.frame(camera.name),
        )
        self._views = {camera: _View(index) for index, camera in enumerate(cameras)}

    def stop(self) -> None:
        """End at the next frames; may be called from a signal handler."""
        self._cameras.stop()

    def play(self) -> None:
        """Play all until they have ended, or somebody stops them.

        Raises:
            UserError: The engine has failed for good.
        """
        self._opened.pop_all()
        begin = due = perf_counter()
        with self._cameras:
            while (news := self._cameras.take(max(0.0, due - perf_counter()) if self._mosaic else _IDLE)) is not None:
                for item in news:
                    self._take(item)
                self._outputs.tick()
                if self._mosaic is not None and perf_counter() >= due:
                    due += 1 / _MOSAIC_RATE
                    # What could not be shown in time is left out.
                    due = max(due, perf_counter())
                    self._show(self._mosaic, perf_counter() - begin)

    def summarize(self) -> int:
        """Say what was done, and give the exit code: 2 where a camera has failed."""
        self._outputs.summarize(sum(camera.frame_count for camera in self._cameras.cameras))
        failed = [f"{camera.name} has failed: {camera.error}" for camera in self._cameras.cameras if camera.error]
        return report(UserError("; ".join(failed))) if failed else int(self._outputs.failed)

    def _take(self, news: News) -> None:
        name, view = news.camera.name, self._views[news.camera]
        if news.result is not None:
            view.result = news.result
            self._outputs.result(name, news.result)
            if self._mosaic is not None:
                self._mosaic.follow(view.index, news.result)
        if news.change is not None:
            view.reason = news.change.reason
            self._outputs.change(name, news.change)
        self._outputs.events(name, news.events)

    def _show(self, mosaic: Mosaic, time: float) -> None:
        now = perf_counter()
        for camera, view in self._views.items():
            picture = camera.picture
            silence = now - picture.arrived if picture is not None else 0.0
            running = camera.state is SourceState.RUNNING
            if not running or picture is None or picture.frame is None:
                mosaic.draw_lost(view.index, camera.state.value, view.reason)
            elif camera.source.live and silence > _STALE:
                mosaic.draw_lost(view.index, f"no frame for {silence:.0f} s")
            else:
                fps = view.rate(camera.frame_count, now)
                mosaic.draw(view.index, picture.frame, view.result, time=picture.time, fps=fps)
        self._outputs.write_frame(mosaic.canvas, time)
        window = self._outputs.window
        if window is not None:
            key = window.show(mosaic.canvas, _PAINTING)
            if key == "q":
                self.stop()
            elif key == "r":
                self._cameras.reset()
                say("reset")
            elif key == "s":
                say(f"snapshot: {save_snapshot(mosaic.canvas)}")


class _View:
    """What is shown of a camera beside its picture."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.result: Result | None = None
        self.reason = ""
        self._fps = 0.0
        self._counted = (0, perf_counter())

    def rate(self, frames: int, now: float) -> float:
        """Frames per second, counted anew each second."""
        before, since = self._counted
        if now - since >= 1:
            self._fps, self._counted = (frames - before) / (now - since), (frames, now)
        return self._fps


def _open(spec: str, options: Options, on_change: OnChange) -> Source:
    return open_source(
        spec, read_timeout=options.read_timeout, max_retries=options.max_retries, wait=True, on_change=on_change
    )
