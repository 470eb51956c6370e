"""What happened when in a video, as a picture to click on and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from stsm_rt.app.report import Report, Span

# Each has a contrast of 4.5 or more under white text and of 3 or more against white and Gradio's dark backgrounds.
_COLOURS = ("#2b72c8", "#b85c14", "#128068", "#7b5fd0", "#b8428a", "#8a6d00")
_OTHER_COLOUR = "#6b7280"
_TICK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_MOST_TICKS = 6  # on a phone there is no room for more
_WIDTH, _HEIGHT = 1000, 100  # of the curves' own coordinates

_STYLE = """
.stsm-timeline{margin:0;font-size:13px;line-height:1.4;color:var(--body-text-color,inherit)}
.stsm-timeline .stsm-track{position:relative;cursor:pointer}
.stsm-timeline .stsm-events{position:relative;height:36px;border-radius:6px;background:rgba(127,127,127,.14)}
.stsm-timeline .stsm-events p{margin:0;padding:8px 10px;line-height:20px;opacity:.75}
.stsm-timeline .stsm-events button{position:absolute;top:3px;bottom:3px;min-width:10px;box-sizing:border-box;margin:0;
padding:0 6px;border:0;border-radius:4px;background:var(--stsm-colour);color:#fff;font:inherit;font-weight:600;
text-align:left;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;cursor:pointer}
.stsm-timeline .stsm-events button[data-time]:hover{background:var(--stsm-colour);color:#fff;filter:brightness(1.1)}
.stsm-timeline .stsm-events button:focus-visible{outline:3px solid var(--body-text-color,CanvasText);
outline-offset:2px}
.stsm-timeline .stsm-plot{position:relative;height:160px;margin-top:10px}
.stsm-timeline svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.stsm-timeline path{fill:none;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.stsm-timeline .stsm-curve{stroke:var(--stsm-colour);stroke-width:2}
.stsm-timeline .stsm-grid{stroke:currentColor;stroke-width:1;opacity:.15}
.stsm-timeline .stsm-threshold{stroke:currentColor;stroke-width:1;stroke-dasharray:5 4;opacity:.7}
.stsm-timeline .stsm-note{position:absolute;font-size:11px;line-height:1;opacity:.75;pointer-events:none}
.stsm-timeline .stsm-axis{position:relative;height:22px;font-size:12px;opacity:.8}
.stsm-timeline .stsm-axis span{position:absolute;top:5px;line-height:1;transform:translateX(-50%)}
.stsm-timeline .stsm-axis span:first-child{transform:none}
.stsm-timeline .stsm-axis span.stsm-last{transform:translateX(-100%)}
.stsm-timeline .stsm-cursor{position:absolute;top:0;bottom:22px;left:0;width:2px;margin-left:-1px;border-radius:1px;
background:var(--color-accent,currentColor);pointer-events:none}
.stsm-timeline figcaption{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:6px}
.stsm-timeline figcaption span{display:inline-flex;align-items:center;gap:6px}
.stsm-timeline figcaption i{width:16px;height:4px;border-radius:2px;background:var(--stsm-colour)}
"""


def timeline(report: Report) -> str:
    """Draw the events as spans above the curves of the scores.

    ``static/timeline.js`` brings it to life: a click on a span or on the curves seeks the video in ``#result-video``,
    and a line follows its playback.

    Args:
        report: What is known of the video.

    Returns:
        A fragment of HTML that needs nothing else, as wide as its place, in the colours of the page that it is on.
    """
    duration = max(report.source.duration, 1e-3)
    colours = dict(zip(report.scores.labels, _COLOURS, strict=False))
    ticks = list(_ticks(duration))
    actions = ", ".join(map(_words, colours))
    return (
        f'<figure class="stsm-timeline" data-duration="{duration:.3f}" aria-label="{escape(_summary(report))}">'
        f"<style>{_STYLE}</style>"
        '<div class="stsm-track">'
        f'<div class="stsm-events">{_spans(report, duration, colours)}</div>'
        '<div class="stsm-plot">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"Scores over time of {actions}")}">'
        f"{_grid(ticks, duration)}{_curves(report, duration, colours)}"
        f'<path class="stsm-threshold" d="M0 {_height(report.threshold)}H{_WIDTH}"/></svg>'
        f"{_notes(report.threshold)}</div>"
        f'<div class="stsm-axis" aria-hidden="true">{_axis(ticks, duration)}</div>'
        '<div class="stsm-cursor" aria-hidden="true"></div>'
        "</div>"
        f"<figcaption>{_legend(colours)}</figcaption>"
        "</figure>"
    )


def events_table(report: Report) -> list[list[str]]:
    """List the events for people.

    Args:
        report: What is known of the video.

    Returns:
        For each event its label, start and end as minutes:seconds, its length in seconds, and its peak, 0 to 1.
    """
    return [
        [
            _words(event.label),
            _clock(event.start),
            _clock(event.end),
            f"{event.end - event.start:.2f} s",
            f"{event.peak:.2f}",
        ]
        for event in report.events
    ]


def _spans(report: Report, duration: float, colours: dict[str, str]) -> str:
    if not report.events:
        return f"<p>No action was certain enough to start an event (threshold {report.threshold:.2f}).</p>"
    return "".join(_span(event, duration, colours.get(event.label, _OTHER_COLOUR)) for event in report.events)


def _span(event: Span, duration: float, colour: str) -> str:
    words = escape(_words(event.label))
    told = f"{words}, {_clock(event.start)} to {_clock(event.end)}, best score {event.peak:.2f}"
    # Not before the frame at which it starts, whose time is rounded too.
    seek = math.ceil(event.start * 1000) / 1000
    return (
        f'<button type="button" data-time="{seek:.3f}" title="{told}" aria-label="{told}: show it" '
        f'style="left:{_percent(event.start, duration)};width:{_percent(event.end - event.start, duration)};'
        f'--stsm-colour:{colour}">{words}</button>'
    )


def _curves(report: Report, duration: float, colours: dict[str, str]) -> str:
    places = [_WIDTH * time / duration for time in report.scores.time]
    return "".join(
        f'<path class="stsm-curve" style="--stsm-colour:{colour}" d="M'
        + "L".join(f"{x:.1f} {_height(score)}" for x, score in zip(places, report.scores.labels[label], strict=True))
        + f'"><title>{escape(_words(label))}</title></path>'
        for label, colour in colours.items()
    )


def _grid(ticks: list[float], duration: float) -> str:
    lines = [f"M0 {_height(score)}H{_WIDTH}" for score in (0, 0.5, 1)]
    lines += [f"M{_WIDTH * tick / duration:.1f} 0V{_HEIGHT}" for tick in ticks]
    return f'<path class="stsm-grid" d="{"".join(lines)}"/>'


def _notes(threshold: float) -> str:
    # The threshold's stands on its line, which is rarely near the top; the others hang from theirs.
    scores = "".join(
        f'<span class="stsm-note" style="left:4px;top:calc({100 * (1 - score):.0f}% + 4px)">score {score:g}</span>'
        for score in (0.5, 1)
    )
    return (
        f'{scores}<span class="stsm-note" style="right:4px;bottom:calc({100 * threshold:.1f}% + 3px)">'
        f"threshold {threshold:.2f}</span>"
    )


def _axis(ticks: list[float], duration: float) -> str:
    return "".join(
        f'<span class="{"stsm-last" if tick > 0.94 * duration else ""}" style="left:{_percent(tick, duration)}">'
        f"{_tick_label(tick, duration)}</span>"
        for tick in ticks
    )


def _legend(colours: dict[str, str]) -> str:
    return "".join(
        f'<span style="--stsm-colour:{colour}"><i></i>{escape(_words(label))}</span>'
        for label, colour in colours.items()
    )


def _ticks(duration: float) -> Iterator[float]:
    step = next((step for step in _TICK_STEPS if duration / step <= _MOST_TICKS), duration / _MOST_TICKS)
    return (number * step for number in range(int(duration / step + 1e-9) + 1))


def _tick_label(seconds: float, duration: float) -> str:
    if duration < 60:
        return f"{seconds:.1f} s" if duration < 5 else f"{seconds:.0f} s"
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def _summary(report: Report) -> str:
    count = len(report.events)
    events = "no events" if not count else "1 event" if count == 1 else f"{count} events"
    return f"Timeline of {report.source.name}: {events} in {report.source.duration:.1f} seconds"


def _clock(seconds: float) -> str:
    hundredths = round(100 * seconds)
    return f"{hundredths // 6000}:{hundredths // 100 % 60:02}.{hundredths % 100:02}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%"


def _height(score: float) -> str:
    return f"{_HEIGHT * (1 - score):.2f}"


def _words(label: str) -> str:
    return label.replace("_", " ")
