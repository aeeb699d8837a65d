"""A process that has loaded the command, and forks for each command line, which is faster than to load it again.

Its argument is the number of a socket. Each request on it is a JSON object and four file descriptors: the standard
streams of the command, and a pipe that gets the process id of the command and then its exit status.
"""

import atexit
import fcntl
import json
import os
import resource
import signal
import socket
import sys
import termios
import time
from typing import Any

import kaizen_async._cli.app  # noqa: F401 - what takes so long to load
from _kaizen_async_command import main

MOST_BYTES = 100_000
"""Bytes of the largest request. A larger one does not fit into the socket."""


def serve(requests: socket.socket) -> None:
    """Fork for each request, until the other end of the socket is closed. Each fork returns from here, too."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(requests, MOST_BYTES, 4)
        if not text:
            return
        if os.fork() == 0:
            requests.close()
            run(json.loads(text), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def run(request: dict[str, Any], stdin: int, stdout: int, stderr: int, report: int) -> None:
    """Fork once more, into the process that runs the command, and report how that ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    command = os.fork()
    if command == 0:
        os.close(report)
        prepare(request, stdin, stdout, stderr)
        main()
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    os.write(report, f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)  # there is nothing to clean up, and no coverage of this to save


def prepare(request: dict[str, Any], *streams: int) -> None:
    """Make this process as the interpreter would be when it starts with these arguments, variables and streams."""
    os.setsid()
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    if request["terminal"]:
        fcntl.ioctl(2, termios.TIOCSCTTY, 0)
    if request["most_bytes"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["most_bytes"], hard))
        atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, (hard, hard))  # coverage writes after this
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = ["kaizen-async", *request["arguments"]]
    if not request["uvloop"]:
        sys.modules["uvloop"] = None  # type: ignore[assignment] - how Python notes that a module must not be imported
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the first fork
    serve(socket.socket(fileno=int(sys.argv[1])))
