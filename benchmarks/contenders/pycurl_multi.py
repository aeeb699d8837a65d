"""pycurl: libcurl, with its multi interface on the event loop."""

import asyncio
import os
from io import BytesIO

import contender
import msgspec
import pycurl
from shapes import LeanExecution


class Contender(contender.Contender):
    """One multi handle. The event loop watches its sockets and its timer."""

    title = "pycurl (multi on the event loop) + msgspec"

    async def setup(self) -> None:
        """Make the multi handle, and an easy handle for each lookup in flight."""
        self._loop = asyncio.get_running_loop()
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, self.concurrency)
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: dict[pycurl.Curl, asyncio.Future[int]] = {}
        self._watched: set[int] = set()
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(LeanExecution).decode
        self._idle = [self._new_handle() for _ in range(self.concurrency)]

    def _new_handle(self) -> pycurl.Curl:
        handle = pycurl.Curl()
        handle.setopt(pycurl.URL, f"{self.base_url}instructor/executions/get")
        if authority := os.environ.get("SSL_CERT_FILE"):
            handle.setopt(pycurl.CAINFO, authority)
        handle.setopt(pycurl.ACCEPT_ENCODING, "gzip, br")
        handle.setopt(pycurl.HTTPHEADER, ["Authorization: Bearer key", "Content-Type: application/json"])
        return handle

    async def look_up(self, execution_id: str) -> str:
        """Fetch one."""
        handle = self._idle.pop()
        body = BytesIO()
        handle.setopt(pycurl.POSTFIELDS, self._encode({"id": execution_id}))
        handle.setopt(pycurl.WRITEDATA, body)
        finished = self._waiting[handle] = self._loop.create_future()
        self._multi.add_handle(handle)
        status = await finished
        self._idle.append(handle)
        if status != 200:
            raise RuntimeError(f"status {status}")
        return self._decode(body.getvalue()).id

    def _watch(self, event: int, descriptor: int, *_: object) -> None:
        if descriptor in self._watched:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
            self._watched.discard(descriptor)
        if event & pycurl.POLL_IN and event != pycurl.POLL_REMOVE:
            self._loop.add_reader(descriptor, self._act, descriptor, pycurl.CSELECT_IN)
            self._watched.add(descriptor)
        if event & pycurl.POLL_OUT and event != pycurl.POLL_REMOVE:
            self._loop.add_writer(descriptor, self._act, descriptor, pycurl.CSELECT_OUT)
            self._watched.add(descriptor)

    def _set_timer(self, milliseconds: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if milliseconds >= 0:
            self._timer = self._loop.call_later(milliseconds / 1000, self._act, pycurl.SOCKET_TIMEOUT, 0)

    def _act(self, descriptor: int, events: int) -> None:
        self._multi.socket_action(descriptor, events)
        while True:
            left, succeeded, failed = self._multi.info_read()
            for handle in succeeded:
                self._finish(handle, handle.getinfo(pycurl.RESPONSE_CODE))
            for handle, code, _ in failed:
                self._finish(handle, -code)
            if not left:
                break

    def _finish(self, handle: pycurl.Curl, status: int) -> None:
        self._multi.remove_handle(handle)
        self._waiting.pop(handle).set_result(status)

    async def close(self) -> None:
        """Close the handles, and with them the connections."""
        if self._timer is not None:
            self._timer.cancel()
        for handle in self._idle:
            handle.close()
        self._multi.close()
