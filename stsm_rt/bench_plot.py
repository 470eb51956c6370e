"""A picture of comparisons: a dot for each ratio, a bar for its interval."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stsm_rt.errors import UserError
from stsm_rt.timing import title

_INK, _SOFT, _GRID = "#222222", "#6b6b6b", "#dddddd"
_OURS, _OTHERS = "#0b6e99", "#b08a3c"


def plot(comparisons: Sequence[Mapping[str, Any]], heading: str, out: Path) -> None:
    """Draw the ratios of comparisons with their 95 % intervals.

    Args:
        comparisons: As the bench's JSON holds them.
        heading: Above the picture.
        out: A .png or .svg file.

    Raises:
        UserError: There is no comparison to draw, or the file cannot be written.
    """
    if not comparisons:
        raise UserError("there is nothing to draw: a plot shows comparisons; measure two engines first")
    from matplotlib.figure import Figure

    rows = list(reversed(comparisons))
    figure = Figure(figsize=(8.5, 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for row, comparison in enumerate(rows):
        colour = _OTHERS if comparison["b"].endswith((" naive", " again")) else _OURS
        ratio, interval = comparison["ratio_median"], comparison["interval"] or (comparison["ratio_median"],) * 2
        axes.plot(interval, [row, row], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt")
        axes.plot(ratio, row, "o", color=colour, markersize=6)
        # In a column of its own, right of the axes, where no dot can lie.
        axes.annotate(
            f"{ratio:.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=10
        )
    axes.axvline(1.0, color=_INK, linewidth=1)
    axes.grid(axis="x", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(rows)), [title(comparison["a"], comparison["b"]) for comparison in rows], color=_INK)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.margins(x=0.06)
    axes.set_xlabel("ratio of times, with its 95 % interval", color=_SOFT)
    figure.suptitle(heading, fontsize=11, color=_INK, x=0.01, ha="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False, colors=_SOFT, labelleft=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"the plot cannot be written to {out} ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
