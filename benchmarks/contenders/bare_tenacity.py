"""The usual hand-written loop with retries: aiohttp, msgspec and tenacity."""

import aiohttp
import tenacity
from contenders import bare


def _is_worth_retrying(error: BaseException) -> bool:
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status == 429 or error.status >= 500
    return isinstance(error, aiohttp.ClientError | TimeoutError)


class Contender(bare.Contender):
    """Five attempts with exponential back-off and jitter, for all errors except a 4xx other than 429."""

    title = "bare aiohttp + msgspec + tenacity"

    @tenacity.retry(
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=8),
        retry=tenacity.retry_if_exception(_is_worth_retrying),
        reraise=True,
    )
    async def look_up(self, execution_id: str) -> str:
        """Fetch one."""
        return await super().look_up(execution_id)
