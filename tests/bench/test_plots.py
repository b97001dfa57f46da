"""Plots and pages: well-formed, true to their numbers, the same every time. They were looked at, too."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from evenflow.bench import plots
from evenflow.bench.plots import Series
from evenflow.bench.report import Plot, Report, Section, write
from evenflow.bench.tables import Table

VOID = {"meta", "br", "img", "hr", "link"}


def heights(figure):
    """Of the bars, by series."""
    axes = figure.axes[0]
    return {c.get_label(): [round(bar.get_height(), 6) for bar in c] for c in axes.containers if hasattr(c, "patches")}


def test_bars_are_as_high_as_their_values_and_carry_them():
    figure = plots.bars("T", ["a", "b"], [Series("x", [10, None]), Series("y", [20, 1234.4])], "tokens/s")
    assert heights(figure) == {"x": [10], "y": [20, 1234.4]}
    assert {text.get_text() for text in figure.axes[0].texts} == {"10", "20", "1,234"}


def test_a_group_with_one_bar_has_it_in_the_middle():
    figure = plots.bars("T", ["a", "b"], [Series("x", [10, None]), Series("y", [20, 5])], "tokens/s")
    lone = figure.axes[0].containers[1][1]
    assert lone.get_x() + lone.get_width() / 2 == pytest.approx(1.0)


def test_an_interval_that_reaches_below_zero_is_cut_there():
    figure = plots.bars("T", ["a"], [Series("x", [10], errors=[25])], "tokens/s")
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] > 35


def test_lines_leave_out_what_is_missing_and_limits_are_dashed_in_the_colour_of_their_line():
    series = [
        Series("h100", [1, None, 3], [1, 2, 3]),
        Series("limit, h100", [0.5, 0.5, 0.5], [1, 2, 3], is_limit=True),
        Series("mi300x", [2, 2, 2], [1, 2, 3]),
    ]
    drawn = plots.lines("T", series, "requests/s", "ms", log_y=True).axes[0].lines
    assert list(drawn[0].get_xdata()) == [1, 3]
    assert [line.get_linestyle() for line in drawn] == ["-", "--", "-"]
    assert drawn[0].get_color() == drawn[1].get_color() != drawn[2].get_color()


def test_ticks_of_a_logarithmic_axis_are_plain_numbers():
    figure = plots.lines("T", [Series("a", [0.3, 6.0], [1, 2])], "x", "y", log_y=True)
    plots.svg(figure)  # draws it
    axis = figure.axes[0].yaxis
    shown = {t.get_text() for t in (*axis.get_majorticklabels(), *axis.get_minorticklabels())} - {""}
    assert {"0.5", "1", "2", "5"} <= shown
    assert not any("10^" in text for text in shown)


def test_the_same_data_gives_the_same_bytes_and_they_are_xml():
    def draw():
        return plots.svg(plots.bars("A & B <c>", ["a"], [Series("x", [1.0]), Series("y", [2.0])], "u"))

    assert draw() == draw()
    assert ElementTree.fromstring(draw()).tag.endswith("svg")
    assert draw().startswith("<svg")


class WellFormed(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.counts = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "td":
            self.cells.append(text)


@pytest.fixture
def report():
    svg = plots.svg(plots.bars("B", ["a"], [Series("x", [1.0])], "u"))
    table = Table("T <1>", ("", "tokens/s"), [["llama|2 & <b>", "757.4"]], "a note")
    return Report("Title", "Summary.", [Section("One", ["A paragraph."], [table], [Plot("fig", svg, "What is seen.")])])


def test_the_page_is_well_formed_escaped_and_whole(report):
    html = report.html()
    parser = WellFormed()
    parser.feed(html)
    assert parser.open == []
    assert parser.cells == ["llama|2 & <b>", "757.4"]
    assert parser.counts["svg"] == 1
    assert "<b>" not in html.split("<svg")[0]
    assert not re.search(r"https?://(?!www\.w3\.org)", html.split("</style>")[1].split("<svg")[0])  # fetches nothing


def test_the_twin_says_the_same(report, tmp_path):
    written = write(report, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "figures/fig.svg",
        "report.html",
        "report.md",
    ]
    text = (tmp_path / "report.md").read_text()
    assert "| llama\\|2 & <b> | 757.4 |" in text
    assert "![What is seen.](figures/fig.svg)" in text
    assert (tmp_path / "figures" / "fig.svg").read_text() in (tmp_path / "report.html").read_text()
    for words in ("Title", "Summary.", "A paragraph.", "a note"):
        assert words in text
        assert words in (tmp_path / "report.html").read_text()
