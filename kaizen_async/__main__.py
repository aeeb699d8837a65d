"""The entry point of `python -m kaizen_async`: the command `kaizen-async`."""

from _kaizen_async_command import main

if __name__ == "__main__":
    main()
