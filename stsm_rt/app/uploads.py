"""What visitors upload: one job each at a time, in a folder of their own that goes when they leave."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from stsm_rt.app.engines import EngineChoice
from stsm_rt.app.jobs import Job, Limits

_KEEP = 3600.0  # seconds for which results of visitors who never say goodbye are kept


class Uploads:
    """The running jobs and the kept results of all visitors.

    A visitor is whoever has the same session; a new job ends their old one and replaces its results.

    Attributes:
        limits: What a video may be.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Remember where results go.

        Args:
            folder: An existing folder; each visitor gets one in it.
            limits: What a video may be.
        """
        self.limits = limits
        self._folder = folder
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._results: dict[str, tuple[Path, float]] = {}

    @contextmanager
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

        The results stay until the visitor's next job or ``forget``. Where the block is left by an error, or the job was
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
        self.forget(visitor)
        self._clear_out()
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

    def forget(self, visitor: str) -> None:
        """End the visitor's job and remove their results."""
        self.cancel(visitor)
        with self._lock:
            folder, _ = self._results.pop(visitor, (None, 0.0))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End all jobs and remove all results."""
        with self._lock:
            visitors = {*self._jobs, *self._results}
        for visitor in visitors:
            self.forget(visitor)

    def _clear_out(self) -> None:
        with self._lock:
            old = [visitor for visitor, (_, since) in self._results.items() if monotonic() - since > _KEEP]
        for visitor in old:
            self.forget(visitor)
