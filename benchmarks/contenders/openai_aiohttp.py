"""openai with the aiohttp backend of its `aiohttp` extra. Otherwise the same as `openai_default.py`."""

from contenders import openai_default
from openai import AsyncOpenAI, DefaultAioHttpClient


class Contender(openai_default.Contender):
    """The SDK with `DefaultAioHttpClient`."""

    title = "openai, aiohttp backend"

    def make_client(self) -> AsyncOpenAI:
        """Return the SDK's client over aiohttp."""
        return AsyncOpenAI(api_key="key", base_url=self.base_url, http_client=DefaultAioHttpClient())
