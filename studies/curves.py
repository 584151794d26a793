"""Curves that one can read, by matplotlib: log axes, units, bands over seeds, a name at each end.

matplotlib is needed for them alone: pip install matplotlib."""

from dataclasses import dataclass
from pathlib import Path as File

import numpy as np

from rf import InputError
from training.folder import written


@dataclass
class Panel:
    """One frame: the axes' names with their units; and curves {name: (x, y)}, x (n,) and y (n,) or
    (seeds,n), of which the mean is drawn, with a band of one standard error."""

    x: str
    y: str
    curves: dict


def draw_curves(file: File, *panels: Panel) -> None:
    """Write the panels side by side as a picture. InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise InputError("the curves need matplotlib: pip install matplotlib") from None
    figure = Figure((6.4 * len(panels), 4.6), dpi=110, layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.set(xlabel=panel.x, ylabel=panel.y, xscale="log", yscale="log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        ends = []
        for i, (name, (x, y)) in enumerate(panel.curves.items()):
            x, y = np.asarray(x), np.atleast_2d(np.asarray(y))
            mean, colour = y.mean(0), f"C{i % 10}"
            axes.plot(x, mean, color=colour, lw=1.6)
            if len(y) > 1:
                error = y.std(0, ddof=1) / len(y) ** 0.5
                axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
            ends.append((name, x[-1], mean[-1], colour))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            if high < 20 * low:  # hardly a power of ten is inside: name the ticks between
                axis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
                axis.set_minor_formatter("{x:g}")
                axis.set_major_formatter("{x:g}")
        label_ends(axes, ends)
    with written(file) as out:
        figure.savefig(out, format="png")


def label_ends(axes, ends: list[tuple], gap: float = 0.045) -> None:
    """Write each name beside the end of its curve, no two closer than `gap` of the height."""
    axes.figure.draw_without_rendering()
    place = axes.transData + axes.transAxes.inverted()
    heights = [(place.transform((x, y)), name, colour) for name, x, y, colour in ends]
    low = -np.inf
    for (x, height), name, colour in sorted(heights, key=lambda end: end[0][1]):
        low = max(min(height, 1.0), low + gap)
        axes.annotate(name, (x, min(height, 1.0)), (1.01, low), color=colour, fontsize=9,
                      va="center", xycoords=axes.transAxes, textcoords=axes.transAxes)  # fmt: skip
