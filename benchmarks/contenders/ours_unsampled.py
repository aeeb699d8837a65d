"""kaizen_async, `get_many`, with a sampler of OpenTelemetry that records no span."""

from contenders import ours_metrics
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from kaizen_async.otel import Telemetry


class Contender(ours_metrics.Contender):
    """Spans are begun and dropped; `traceparent` goes to the server. There are no metrics."""

    title = "kaizen_async get_many, sampler off"

    def telemetry(self) -> Telemetry:
        """Return what observes the client."""
        return Telemetry(TracerProvider(sampler=ALWAYS_OFF))
