"""A report as one HTML page with its plots inside, and as markdown with the plots beside it.

Same content, one source.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from evenflow.bench.tables import Table


@dataclass(frozen=True, slots=True)
class Plot:
    """name: of the SVG file. caption: what it shows, for those who do not see it too."""

    name: str
    svg: str
    caption: str


@dataclass(slots=True)
class Section:
    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    summary: str
    sections: Sequence[Section]

    def html(self) -> str:
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        source = files("evenflow.bench").joinpath("report.html.jinja").read_text(encoding="utf-8")
        return environment.from_string(source).render(report=self)

    def markdown(self, plot_directory: str) -> str:
        parts = [f"# {self.title}\n", f"{self.summary}\n"]
        for section in self.sections:
            parts.append(f"## {section.title}\n")
            parts += [f"{paragraph}\n" for paragraph in section.paragraphs]
            parts += [table.markdown() for table in section.tables]
            parts += [
                f"![{plot.caption}]({plot_directory}/{plot.name}.svg)\n\n{plot.caption}\n" for plot in section.plots
            ]
        return "\n".join(parts)


def write(report: Report, directory: Path) -> list[Path]:
    """report.html, report.md and figures/*.svg. Returns what was written."""
    figures = directory / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    written = []
    for section in report.sections:
        for plot in section.plots:
            written.append(figures / f"{plot.name}.svg")
            written[-1].write_text(plot.svg, encoding="utf-8")
    for name, text in (("report.html", report.html()), ("report.md", report.markdown("figures"))):
        written.append(directory / name)
        written[-1].write_text(text, encoding="utf-8")
    return written
