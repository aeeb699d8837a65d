"""kaizen_async, `get_many`, with two recorded spans for each lookup."""

from contenders import ours_metrics
from opentelemetry.sdk.trace import TracerProvider

from kaizen_async.otel import Telemetry


class Contender(ours_metrics.Contender):
    """Spans are recorded and exported nowhere. There are no metrics."""

    title = "kaizen_async get_many, spans"

    def telemetry(self) -> Telemetry:
        """Return what observes the client."""
        return Telemetry(TracerProvider())
