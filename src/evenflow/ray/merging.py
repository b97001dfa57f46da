"""The metrics of several replicas as one page, every sample labelled with its replica. Imports no ray."""

from collections.abc import Iterator, Mapping

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Merged(Collector):
    """Families of all pages, each once. pages: Prometheus' text by replica."""

    def __init__(self, pages: Mapping[str, str]) -> None:
        self._families: dict[str, Metric] = {}
        for replica in sorted(pages):
            for family in text_string_to_metric_families(pages[replica]):
                merged = self._families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type, family.unit)
                )
                for sample in family.samples:
                    merged.add_sample(sample.name, {"replica": replica} | sample.labels, sample.value)

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()


def merge_metrics(pages: Mapping[str, str]) -> bytes:
    """Prometheus' text of all replicas. pages: each one's text, by its name."""
    return generate_latest(_Merged(pages))
