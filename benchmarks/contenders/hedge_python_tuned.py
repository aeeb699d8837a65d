"""hedge-python on aiohttp, with the quantile and the share of `HedgePolicy`, and the request rate of the benchmark."""

from contenders import hedge_python
from hedge import HedgeConfig


class Contender(hedge_python.Contender):
    """The scheduler's token bucket fills by time, so it needs the rate of requests."""

    title = "hedge-python on aiohttp, 0.95 and 5 %"
    config = HedgeConfig(percentile=0.95, budget_percent=5.0, estimated_rps=1000.0)
