"""Plots as SVG text, by matplotlib (extra `bench`): grouped bars and lines. The same data gives the same bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by people who see fewer of them.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
MARKERS = "osD^vPX*"
HATCHES = ("", "", "", "", "//", "..", "xx", "\\\\")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "evenflow",
}


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or the bars of one colour. values: None is left out. errors: half widths of intervals, or None.

    is_limit: a dashed line in the colour of the line before it.
    """

    name: str
    values: Sequence[float | None]
    xs: Sequence[float] = ()
    errors: Sequence[float | None] = field(default=())
    is_limit: bool = False


def import_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'evenflow[bench]'") from None
    return matplotlib


def bars(
    title: str, groups: Sequence[str], series: Sequence[Series], ylabel: str, *, digits: int = 0, percent: bool = False
) -> "Figure":
    """Grouped bars with their numbers on top; bars without a value take no place."""
    figure, axes = _new(title, "", ylabel, width=max(7.0, 1.6 + 0.75 * len(groups) * (len(series) + 0.6)))
    width = 0.84 / max(len(series), 1)
    present = [[s for s, one in enumerate(series) if one.values[group] is not None] for group in range(len(groups))]
    for index, one in enumerate(series):
        xs, heights, errors = [], [], []
        for group, value in enumerate(one.values):
            if value is not None:
                place = present[group].index(index) - (len(present[group]) - 1) / 2
                xs.append(group + place * width)
                heights.append(value)
                errors.append((one.errors[group] if one.errors else None) or 0.0)
        container = axes.bar(
            xs,
            heights,
            width * 0.94,
            yerr=errors if any(errors) else None,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            label=one.name,
            capsize=3,
            error_kw={"linewidth": 1},
        )
        labels = [f"{height:.0%}" if percent else f"{height:,.{digits}f}" for height in heights]
        axes.bar_label(container, labels, padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)  # an interval may reach below
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(axes, len(series))
    return figure


def lines(
    title: str, series: Sequence[Series], xlabel: str, ylabel: str, *, log_y: bool = False, log_x: bool = False
) -> "Figure":
    """Lines with markers."""
    figure, axes = _new(title, xlabel, ylabel)
    index = -1
    for one in series:
        index += not one.is_limit
        points = [(x, y) for x, y in zip(one.xs, one.values, strict=True) if y is not None]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=COLOURS[index % len(COLOURS)],
            marker="" if one.is_limit and len(points) > 1 else MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            linestyle="--" if one.is_limit else "-",
            label=one.name,
        )
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    else:
        axes.set_ylim(bottom=0)
    if log_x:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    _legend(axes, len(series))
    return figure


def _new(title: str, xlabel: str, ylabel: str, width: float = 7.0) -> "tuple[Figure, Axes]":
    matplotlib = import_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(min(width, 14.0), 4.2), layout="constrained")
        axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    return figure, axes


def _legend(axes: "Axes", count: int) -> None:
    if count > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def svg(figure: "Figure") -> str:
    """The SVG element, without XML prologue, so that it can stand in a page."""
    matplotlib = import_matplotlib()
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
