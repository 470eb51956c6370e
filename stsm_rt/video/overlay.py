"""What a person sees on the video: labels with bars, the running event, speed, a flash for a new event."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Event
from stsm_rt.result import Result
from stsm_rt.video.fit import Rectangle
from stsm_rt.video.text import Colour, Typeface

Frame = npt.NDArray[np.uint8]

_ROWS = 3
_FLASH = 1.2  # seconds
_SMALLEST = 120  # pixels of a frame's shorter side; on a smaller one nothing could be read

_PANEL: Colour = (30, 24, 20)
_PANEL_OPACITY = 0.78
_TRACK: Colour = (62, 53, 46)
_ACCENT: Colour = (178, 212, 45)
_ACCENT_DEEP: Colour = (122, 140, 16)
_BAR: Colour = (112, 96, 82)
_WHITE: Colour = (255, 255, 255)
_SOFT: Colour = (226, 220, 214)
_MUTED: Colour = (176, 166, 156)
_INK: Colour = (38, 40, 12)
_PANE = np.round(np.arange(256)[None, :, None] * (1 - _PANEL_OPACITY) + np.array(_PANEL) * _PANEL_OPACITY).astype(
    np.uint8
)


@dataclass(frozen=True)
class _Layout:
    """Fonts and places for one frame size, in pixels."""

    title: Typeface
    row: Typeface
    small: Typeface
    banner: Typeface
    panel: Rectangle
    padding: int
    radius: int
    title_height: int
    row_height: int
    row_gap: int
    border: int

    @classmethod
    def for_size(cls, width: int, height: int) -> _Layout:
        side = min(width, height)
        text = max(10, round(6 + 0.0185 * side))
        padding, gap, margin = round(0.8 * text), max(2, round(0.3 * text)), max(4, round(0.025 * side))
        row_height = round(1.55 * text)
        title_height = round(2.3 * text) if side >= 240 else 0
        small = Typeface(max(9, round(0.78 * text)))
        panel_width = min(width - 2 * margin, round((13 if side >= 240 else 11.5) * text))
        panel_height = 2 * padding + title_height + _ROWS * row_height + (_ROWS - 1) * gap + round(1.75 * small.size)
        return cls(
            title=Typeface(round(1.4 * text), bold=True),
            row=Typeface(text),
            small=small,
            banner=Typeface(round(1.5 * text), bold=True),
            panel=Rectangle(margin, max(0, height - margin - panel_height), max(1, panel_width), panel_height),
            padding=padding,
            radius=round(0.6 * text),
            title_height=title_height,
            row_height=row_height,
            row_gap=gap,
            border=max(2, round(0.009 * side)),
        )


class Overlay:
    """Draws results on frames; everything scales with the frame's size.

    Only the panel, the border and the banner are touched. Give it every result, in order, since it keeps the
    last event for the flash: those without a frame to ``follow``.
    """

    def __init__(self, *, roi: tuple[int, int, int, int] | None = None) -> None:
        """Prepare to draw.

        Args:
            roi: Region that the network sees, x, y, width, height in pixels, marked by its corners; None
                marks nothing.
        """
        self._roi = roi
        self._event: Event | None = None
        self._size = (0, 0)
        self._layout = _Layout.for_size(1, 1)
        self._footer: Frame | None = None  # what lies under the last one's text
        self._speed = ""

    def follow(self, result: Result) -> None:
        """Take note of a result that is not drawn."""
        for event in result.events:
            self._event = event if event.end is None else None

    def draw(self, image: Frame, result: Result, *, time: float, fps: float, note: str = "") -> None:
        """Draw on a frame in place, so not before the network has seen it.

        A frame of less than 120 pixels on its shorter side stays as it is.

        Args:
            image: uint8 (H, W, 3), BGR.
            result: The newest result.
            time: Source time of this frame in seconds.
            fps: Frames per second to show.
            note: A word or two beside the speed, for example ``"paused"``.
        """
        self.follow(result)
        self._footer = None
        height, width = image.shape[:2]
        if min(width, height) < _SMALLEST:
            return
        if (width, height) != self._size:
            self._size, self._layout = (width, height), _Layout.for_size(width, height)
        if self._roi is not None:
            self._draw_corners(image, Rectangle(*self._roi))
        self._draw_panel(image, result, time, fps, note or ("warming up" if result.warming_up else ""))
        if self._event is not None and 0 <= time - self._event.start < _FLASH:
            self._draw_flash(image, self._event.label, 1 - (time - self._event.start) / _FLASH)

    def change_note(self, image: Frame, note: str) -> None:
        """Write another note on the frame that was drawn last, for example when it is paused."""
        if self._footer is not None:
            x, y, width, height = self._layout.panel
            panel = image[y : y + height, x : x + width]
            panel[-len(self._footer) :] = self._footer
            self._draw_footer(panel, note)

    def _draw_panel(self, image: Frame, result: Result, time: float, fps: float, note: str) -> None:
        layout = self._layout
        x, y, width, height = layout.panel
        panel = image[y : y + height, x : x + width]
        _darken(panel, layout.radius)
        self._footer = panel[-layout.padding - round(1.3 * layout.small.size) :].copy()
        self._speed = f"{fps:.0f} fps   {1000 * result.latency:.1f} ms"
        inner = width - 2 * layout.padding
        top = layout.padding
        if layout.title_height:
            self._draw_title(panel, result, time, top, inner)
            top += layout.title_height
        for rank, (label, score) in enumerate(zip(result.labels[:_ROWS], result.scores, strict=False)):
            bar = _ACCENT_DEEP if label == result.active else _BAR
            row = Rectangle(layout.padding, top, inner, layout.row_height)
            _fill_rounded(panel, row, layout.radius // 2, _TRACK)
            filled = row._replace(width=round(inner * min(1.0, score)))
            _fill_rounded(panel, filled, layout.radius // 2, bar)
            baseline = layout.row.centre(top, layout.row_height)
            percent = f"{100 * score:.0f} %"
            right = layout.padding + inner - layout.radius - layout.row.width(percent)
            left = layout.padding + layout.radius
            name = layout.row.shorten(_words(label), right - left - layout.radius)
            colour = _WHITE if rank == 0 else _SOFT
            layout.row.draw(panel, name, left, baseline, colour)
            layout.row.draw(panel, percent, right, baseline, colour)
            top += layout.row_height + layout.row_gap
        self._draw_footer(panel, note)

    def _draw_title(self, panel: Frame, result: Result, time: float, top: int, inner: int) -> None:
        layout = self._layout
        dot = round(0.27 * layout.title.size)
        height = layout.title_height - layout.row_gap
        middle = (layout.padding + dot, top + (height - layout.row_gap) // 2)
        left = layout.padding + 3 * dot + layout.row_gap
        baseline = layout.title.centre(top, height - layout.row_gap)
        if result.active is None:
            cv2.circle(panel, middle, dot, _MUTED, max(1, dot // 4), cv2.LINE_AA)
            layout.title.draw(panel, "no action", left, baseline, _MUTED)
            return
        cv2.circle(panel, middle, dot, _ACCENT, -1, cv2.LINE_AA)
        clock = "" if self._event is None else f"{max(0.0, time - self._event.start):.1f} s"
        right = layout.padding + inner - layout.small.width(clock)
        layout.small.draw(panel, clock, right, baseline, _SOFT)
        name = layout.title.shorten(_words(result.active), right - left - layout.row_gap)
        layout.title.draw(panel, name, left, baseline, _WHITE)

    def _draw_footer(self, panel: Frame, note: str) -> None:
        layout, font = self._layout, self._layout.small
        baseline = panel.shape[0] - layout.padding
        inner = layout.panel.width - 2 * layout.padding
        free = inner - font.width(note) if note else inner
        if font.width(self._speed) + font.size <= free or not note:
            font.draw(panel, self._speed, layout.padding, baseline, _MUTED)
        font.draw(panel, note, layout.padding + free, baseline, _ACCENT)

    def _draw_flash(self, image: Frame, label: str, strength: float) -> None:
        layout, (width, height) = self._layout, self._size
        border = min(layout.border, width, height)
        for strip in (image[:border], image[-border:], image[:, :border], image[:, -border:]):
            strip[...] = cv2.addWeighted(strip, 1 - strength, np.full_like(strip, _ACCENT), strength, 0)
        pad = round(0.7 * layout.banner.size)
        text = layout.banner.shorten(_words(label), width - 4 * pad)
        pill = Rectangle(0, 0, layout.banner.width(text) + 2 * pad, round(1.9 * layout.banner.size))
        pill = pill._replace(x=max(0, (width - pill.width) // 2), y=border + pad)
        _fill_rounded(image, pill, pill.height // 2, _ACCENT)
        layout.banner.draw(image, text, pill.x + pad, layout.banner.centre(pill.y, pill.height), _INK)

    def _draw_corners(self, image: Frame, roi: Rectangle) -> None:
        arm = max(4, min(roi.width, roi.height) // 12)
        thickness = max(1, self._layout.border // 3)
        for x, dx in ((roi.x, arm), (roi.x + roi.width - 1, -arm)):
            for y, dy in ((roi.y, arm), (roi.y + roi.height - 1, -arm)):
                for end in ((x + dx, y), (x, y + dy)):
                    cv2.line(image, (x, y), end, _INK, thickness + 2, cv2.LINE_AA)
                for end in ((x + dx, y), (x, y + dy)):
                    cv2.line(image, (x, y), end, _ACCENT, thickness, cv2.LINE_AA)


def _words(label: str) -> str:
    return label.replace("_", " ")


def _darken(panel: Frame, radius: int) -> None:
    """Lay a translucent dark pane with round corners over a region."""
    height, width = panel.shape[:2]
    radius = max(1, min(radius, width // 2, height // 2))
    # Distance of a corner's pixels from the centre of its circle: what lies beyond the radius is put back.
    offset = np.arange(radius) - radius + 0.5
    outside = np.hypot(offset[:, None], offset[None, :])[..., None] > radius
    corners = [
        (panel[:radius, :radius], outside),
        (panel[:radius, -radius:], outside[:, ::-1]),
        (panel[-radius:, :radius], outside[::-1]),
        (panel[-radius:, -radius:], outside[::-1, ::-1]),
    ]
    before = [corner.copy() for corner, _ in corners]
    panel[...] = cv2.LUT(panel, _PANE)
    for (corner, away), old in zip(corners, before, strict=True):
        np.copyto(corner, old, where=away)


def _fill_rounded(image: Frame, area: Rectangle, radius: int, colour: Colour) -> None:
    x, y, width, height = area
    radius = min(radius, width // 2, height // 2)
    if width < 1:
        return
    if radius < 1:
        cv2.rectangle(image, (x, y), (x + width - 1, y + height - 1), colour, -1)
        return
    cv2.rectangle(image, (x + radius, y), (x + width - 1 - radius, y + height - 1), colour, -1)
    cv2.rectangle(image, (x, y + radius), (x + width - 1, y + height - 1 - radius), colour, -1)
    # In sixteenths of a pixel, so that a circle's edge is the rectangle's although its middle is no whole
    # pixel.
    unit, arc = 16, 16 * radius - 8
    for cx in (unit * x + arc, unit * (x + width - 1) - arc):
        for cy in (unit * y + arc, unit * (y + height - 1) - arc):
            cv2.circle(image, (cx, cy), arc, colour, -1, cv2.LINE_AA, shift=4)
