"""kaizen_async, `get_many`, with metrics of OpenTelemetry and no spans."""

from contenders import ours_get_many
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kaizen_async import KaizenClient
from kaizen_async.otel import Telemetry


class Contender(ours_get_many.Contender):
    """`Telemetry(spans=False)`, with the SDK's own reader."""

    title = "kaizen_async get_many, metrics only"

    def telemetry(self) -> Telemetry:
        """Return what observes the client."""
        return Telemetry(meter_provider=MeterProvider([InMemoryMetricReader()]), spans=False)

    async def setup(self) -> None:
        """Make the client."""
        self._client = KaizenClient(
            api_key="key", base_url=self.base_url, concurrency=self.concurrency, on_event=self.telemetry()
        )
        self.executions = self._client.instructor_executions
