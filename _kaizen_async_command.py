"""The start of the command `kaizen-async`.

This file stands beside the package, not in it, because importing the package takes a while: Ctrl-C in that time is to
end the command like Ctrl-C at any other time, without a traceback.
"""

import os
import signal
import sys
from types import FrameType
from typing import Final

EXTRA: Final = frozenset({"click", "rich"})
INTERRUPTED: Final = 128 + signal.SIGINT


def main() -> None:
    """Run the command; without the extra `cli`, say how to get it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored, as under `nohup`
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        from kaizen_async._cli.app import main as run  # noqa: PLC0415 - slow, and an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.stderr.write("The command needs an extra: pip install 'kaizen-async[cli]'\n")
        sys.exit(2)
    run()


def _end_at_once(_signum: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
