"""What a run leaves behind while it goes: a checkpoint to go on from, a log in CSV, and TensorBoard's events."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stsm_rt.errors import UserError

CHECKPOINT, LOG, EVENTS, MISSING = "last.pt", "log.csv", "tensorboard", "missing.txt"


def has_tensorboard() -> bool:
    """Whether TensorBoard's events can be written."""
    return importlib.util.find_spec("tensorboard") is not None


class RunFolder:
    """The folder of a run; the first process writes it, all may read it.

    Args:
        path: Of the folder.

    Attributes:
        rows: The log, one row per epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._events: Any = None

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return (self.path / CHECKPOINT).is_file()

    def load(self) -> dict[str, Any]:
        """The state that `save` wrote last, read weights-only.

        Raises:
            UserError: It cannot be read.
        """
        path = self.path / CHECKPOINT
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.rows = list(state["log"])
        except Exception as error:  # torch.load raises many kinds, the unpickler's own among them
            raise UserError(
                f"{path} is not a checkpoint that can be read; remove it to start the run again, or choose another "
                "--out"
            ) from error
        return state

    def save(self, state: dict[str, Any], row: dict[str, float]) -> None:
        """Write the checkpoint and the log after an epoch, each whole or not at all.

        Args:
            state: Tensors, numbers and texts.
            row: Of the log.

        Raises:
            UserError: They cannot be written.
        """
        self.rows.append(row)
        buffer = io.BytesIO()
        torch.save({**state, "log": self.rows}, buffer)
        self._write(CHECKPOINT, buffer.getvalue())
        self.write_log()
        for name, value in row.items():
            if name != "epoch":
                self.scalar(f"epoch/{name}", value, int(row["epoch"]))

    def write_log(self) -> None:
        """Write the log as CSV.

        Raises:
            UserError: It cannot be written.
        """
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        self._write(LOG, text.getvalue().encode())

    def write_missing(self, names: Sequence[str]) -> None:
        """List the videos that the annotations name and the disk does not hold.

        Raises:
            UserError: The list cannot be written.
        """
        self._write(MISSING, "".join(f"{name}\n" for name in names).encode())

    def open_events(self, step: int) -> None:
        """Begin to write TensorBoard's events, where it is installed; those from `step` on are written anew."""
        if has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path / EVENTS), purge_step=step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve in TensorBoard."""
        if self._events is not None:
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """End TensorBoard's file."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / f"{name}.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            os.replace(partial, self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {self.path / name} ({error}); make room or choose another --out, then give --resume"
            ) from error
