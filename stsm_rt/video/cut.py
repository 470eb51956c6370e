"""Cuts: places where a video goes on with another picture, so that what was seen before says nothing of it."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt


class CutDetector:
    """Finds cuts by the correlation of small grey pictures from step to step.

    Correlation does not mind a change of brightness. The threshold lies below what moving cameras give between frames
    0.1 s apart (J-HMDB's training list) and above what unlike scenes give. A picture without contrast (a covered lens,
    darkness) is never a cut.
    """

    _THRESHOLD = 0.25
    _SIZE = (32, 24)
    _LEAST_CONTRAST = 3.0  # standard deviation in grey levels

    def __init__(self) -> None:
        """Prepare the buffers."""
        self._small = np.empty((self._SIZE[1], self._SIZE[0]), np.uint8)
        self._now, self._before = (np.empty(self._SIZE[0] * self._SIZE[1], np.float32) for _ in range(2))
        self.reset()

    def reset(self) -> None:
        """Forget the last picture."""
        self._contrast_before = 0.0
        self._before.fill(0)

    def is_cut(self, picture: npt.NDArray[np.uint8]) -> bool:
        """Compare with the picture of the call before.

        Args:
            picture: uint8 (H, W, 3), the network's input.

        Returns:
            Whether there is a cut between the two; False for the first.
        """
        # Grey first: averaging takes a third of the time then.
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        cv2.resize(grey, self._SIZE, dst=self._small, interpolation=cv2.INTER_AREA)
        self._now[:] = self._small.ravel()
        self._now -= self._now.mean()
        contrast = float(np.sqrt(self._now @ self._now / self._now.size))
        correlation = float(self._now @ self._before) / self._now.size / max(contrast * self._contrast_before, 1e-9)
        known = min(contrast, self._contrast_before) >= self._LEAST_CONTRAST
        self._now, self._before, self._contrast_before = self._before, self._now, contrast
        return known and correlation < self._THRESHOLD
