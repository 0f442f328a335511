"""Figures, in one style. The only module that imports matplotlib.

Each function takes plain numbers and returns a figure; `show` displays it in a notebook or page with alternative text.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLORS = (
    "#0b5fa5",
    "#c8551b",
    "#2b8a3e",
    "#7a3e9d",
    "#b8860b",
    "#444444",
)  # distinct in gray and for the color-blind
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "llmcourse",  # the same figure gives the same file
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
}
SIZE = (6.4, 3.6)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    markers: bool = False,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    horizontal: Mapping[str, float] | None = None,
) -> Figure:
    """Curves: name -> (x, y). `bands` name -> (low, high) shades a spread around the curve of that name, `horizontal`
    name -> y draws dashed levels such as a floor or chance.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for name, (x, y) in series.items():
            (line,) = axes.plot(
                x, y, label=name, marker="o" if markers else None, markersize=3.5, linewidth=1.6
            )
            if bands and name in bands:
                low, high = bands[name]
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        for name, level in (horizontal or {}).items():
            axes.axhline(level, color="#666666", linestyle="--", linewidth=1.2)
            axes.annotate(
                name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
            )
        _label(axes, xlabel, ylabel, title)
        if logx:
            axes.set_xscale("log")
        if logy:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend(fontsize=9)
    return figure


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    errors: Sequence[Sequence[float]] | Sequence[float] | None = None,
    *,
    ylabel: str,
    title: str = "",
    horizontal: Mapping[str, float] | None = None,
) -> Figure:
    """One bar a label. `errors` are half-widths (n,), or distances below and above, (2, n)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        whiskers = None if errors is None else np.abs(np.asarray(errors, dtype=float))
        axes.bar(range(len(labels)), values, yerr=whiskers, capsize=4, color=COLORS[0], width=0.6)
        axes.set_xticks(range(len(labels)), labels, rotation=0 if len("".join(labels)) < 60 else 20)
        for name, level in (horizontal or {}).items():
            axes.axhline(level, color="#666666", linestyle="--", linewidth=1.2)
            axes.annotate(
                name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9
            )
        _label(axes, "", ylabel, title)
        axes.grid(axis="x", visible=False)
    return figure


def heatmap(
    matrix: Any,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """A matrix (rows, columns) as colored cells with a scale; labels are drawn where given."""
    values = np.asarray(matrix, dtype=float)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            values, cmap="viridis", aspect="auto", vmin=low, vmax=high, interpolation="nearest"
        )
        figure.colorbar(image, ax=axes)
        axes.grid(visible=False)
        if columns is not None:
            axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 8 else 0)
        if rows is not None:
            axes.set_yticks(range(len(rows)), rows)
        _label(axes, xlabel, ylabel, title)
    return figure


def _label(axes: Any, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document, the same text for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def show(figure: Figure, *, alt: str) -> None:
    """Display the figure in a notebook or book page as an `<img>` with alternative text.

    The image is an SVG inside the page: sharp at any size, no file beside it, and the same bytes for the same numbers.

    Raises:
        ValueError: no alternative text.
    """
    from IPython.display import HTML, display

    if not alt.strip():
        raise ValueError("alt is empty: say in a sentence what the figure shows")
    data = base64.b64encode(to_svg(figure).encode()).decode()
    style = "max-width:100%;height:auto;background:white"
    display(HTML(f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}" style="{style}">'))
