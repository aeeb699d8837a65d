"""The entry point of the command `kaizen-async` and of `python -m kaizen_async`."""

import sys
from typing import Final

EXTRA: Final = frozenset({"click", "rich"})


def main() -> None:
    """Run the command; without the extra `cli`, say how to get it."""
    try:
        from kaizen_async._cli.app import main as run  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.exit(_hint())
    run()


def _hint() -> int:
    sys.stderr.write("The command needs an extra: pip install 'kaizen-async[cli]'\n")
    return 2


if __name__ == "__main__":
    main()
