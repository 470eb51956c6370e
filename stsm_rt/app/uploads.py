"""What visitors upload: one job each at a time, in a folder of their own that goes when they leave."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, time

from stsm_rt.app.engines import EngineChoice
from stsm_rt.app.jobs import Job, Limits

_KEEP = 3600.0  # seconds for which is kept what belongs to visitors who never say goodbye


class Uploads:
    """The running jobs and the kept results of all visitors.

    A visitor is whoever has the same session; a new job ends their old one and replaces its results. What they uploaded
    stays until they leave, so that they can run it again with other settings.

    Attributes:
        limits: What a video may be.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Remember where results go.

        Args:
            folder: An existing folder; each job gets one in it, and uploads in it are removed with their visitor.
            limits: What a video may be.
        """
        self.limits = limits
        self._folder = folder.resolve()
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._results: dict[str, tuple[Path, float]] = {}
        self._videos: dict[str, set[Path]] = {}

    @contextlib.contextmanager
    def job(
        self,
        visitor: str,
        video: Path,
        choice: EngineChoice,
        threshold: float | None = None,
        smoothing: int | None = None,
        roi: tuple[int, int, int, int] | None = None,
    ) -> Iterator[Job]:
        """Run a video through an engine; iterate over the job for its progress, then look at its report.

        The results stay until the visitor's next job or ``leave``. Where the block is left by an error, or the job was
        cancelled, nothing stays.

        Args:
            visitor: The visitor's session.
            video: The uploaded file; its name is shown.
            choice: The engine.
            threshold: Score, 0 to 1, that starts an event; None means the engine's.
            smoothing: Steps over which scores are averaged; None means the engine's.
            roi: Region of interest as x, y, width, height in pixels of the frame; None means the whole frame.

        Raises:
            UserError: If the video cannot be used, as `Job` says.
        """
        self._forget(visitor)
        with self._lock:
            if self._folder in video.resolve().parents:
                self._videos.setdefault(visitor, set()).add(video)
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        job: Job | None = None
        kept = False
        try:
            with Job(
                video, folder, engine=choice.path, threshold=threshold, smoothing=smoothing, roi=roi, limits=self.limits
            ) as job:
                with self._lock:
                    self._jobs[visitor] = job
                yield job
            with self._lock:
                kept = self._jobs.get(visitor) is job
                if kept:
                    self._results[visitor] = folder, monotonic()
        finally:
            with self._lock:
                if job is not None and self._jobs.get(visitor) is job:
                    del self._jobs[visitor]
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)

    def cancel(self, visitor: str) -> None:
        """End the visitor's running job, if there is one: at once, and nothing of it stays."""
        with self._lock:
            job = self._jobs.pop(visitor, None)
        if job is not None:
            job.cancel()

    def leave(self, session: str) -> None:
        """End the jobs and remove the results and uploads of a visitor, and of those named after them, ``name/...``."""
        with self._lock:
            names = {*self._jobs, *self._results, *self._videos}
        for visitor in names:
            if visitor == session or visitor.startswith(f"{session}/"):
                self._forget(visitor)
                self._remove_videos(visitor)

    def clear_out(self) -> None:
        """Remove what is older than an hour and belongs to no running job; a server calls it from time to time."""
        with self._lock:
            old = [visitor for visitor, (_, since) in self._results.items() if monotonic() - since > _KEEP]
        for visitor in old:
            self.leave(visitor)
        with self._lock:
            used = {job.folder for job in self._jobs.values()}
            used |= {job.video.resolve().parent for job in self._jobs.values()}
            used |= {folder for folder, _ in self._results.values()}
            here = {*self._jobs, *self._results}
            self._videos = {visitor: videos for visitor, videos in self._videos.items() if visitor in here}
        # Also uploads that broke off or that nobody ran.
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if path not in used and time() - path.stat().st_mtime > _KEEP:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """End all jobs and remove all results."""
        with self._lock:
            visitors = {*self._jobs, *self._results, *self._videos}
        for visitor in visitors:
            self.leave(visitor)

    def _forget(self, visitor: str) -> None:
        self.cancel(visitor)
        with self._lock:
            folder, _ = self._results.pop(visitor, (None, 0.0))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_videos(self, visitor: str) -> None:
        with self._lock:
            videos = self._videos.pop(visitor, set())
            # The same file of two visitors is one file.
            videos -= set().union(*self._videos.values())
        for video in videos:
            with contextlib.suppress(OSError):
                video.unlink()
                video.parent.rmdir()
