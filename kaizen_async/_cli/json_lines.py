"""Lines of JSON on standard output.

A pipe whose reader is slow must not block the event loop: requests under way would run into their timeouts while
`less` shows its first page. So a write waits for room as everything else here waits, and nothing is buffered: a line
that was written is out.
"""

import asyncio
import io
import os
import select
from contextlib import suppress
from typing import BinaryIO, Final

import click
import msgspec

from kaizen_async._cli.stopping import OutputClosedError

_encode: Final = msgspec.json.Encoder().encode


class JsonLines:
    """Writes values as JSON, one a line."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._poll: select.poll | None = None
        # What has no descriptor is a stand-in in memory, which always has room.
        with suppress(io.UnsupportedOperation):
            descriptor = stream.fileno()
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    async def write(self, value: object) -> None:
        """Write one line, waiting as long as the reader takes.

        Raises:
            OutputClosedError: The reader is gone.
            click.ClickException: It cannot be written, for instance since a disk is full.
        """
        line = _encode(value) + b"\n"
        try:
            if self._poll is None:
                self._stream.write(line)
            else:
                await self._write_when_there_is_room(line, self._poll)
        except BrokenPipeError:
            raise OutputClosedError from None
        except OSError as error:
            raise click.ClickException(f"cannot write to standard output: {error.strerror}") from error

    async def _write_when_there_is_room(self, line: bytes, poll: select.poll) -> None:
        rest = memoryview(line)
        while rest:
            if not poll.poll(0):
                await self._room()
            # POSIX: a pipe that has room at all takes this many bytes without blocking.
            rest = rest[os.write(self._stream.fileno(), rest[: select.PIPE_BUF]) :]

    async def _room(self) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(self._stream, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._stream)

    def sync(self) -> None:
        """Make sure that what was written outlives a power failure, where that can be had."""
        with suppress(OSError):
            os.fsync(self._stream.fileno())
