"""What to do when the server refuses the API key."""

import os

import click

from kaizen_async._cli.stopping import MISUSE
from kaizen_async.errors import AuthenticationError, KaizenError

UNAUTHORIZED = 401


class KeyRefusedError(click.ClickException):
    """Raised when the server does not know the key, so that no look-up can succeed.

    A 403 is another matter: it may be about one execution.
    """

    exit_code = MISUSE


def require_accepted_key(error: KaizenError | None) -> None:
    """End the command if an error says that the key was refused.

    Raises:
        KeyRefusedError: It does.
    """
    if isinstance(error, AuthenticationError) and error.status == UNAUTHORIZED:
        found = "look at how KAIZEN_API_KEY is set" if os.environ.get("KAIZEN_API_KEY") else "KAIZEN_API_KEY is not set"
        raise KeyRefusedError(f"the server wants another API key (it answered 401): {found}")
