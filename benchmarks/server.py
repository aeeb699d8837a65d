"""The servers of the benchmarks, each in its own process on loopback.

Speed is measured against nginx if it is installed, and otherwise against `answering.py`, a raw asyncio server. Both
respond to `POST /<n>kb/instructor/executions/get` with the requested record in n KB. The throttling and the failing
server are always `answering.py`, which counts its requests.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data

HERE = Path(__file__).parent
_START_SECONDS = 10.0

# nginx reads a request's body only for a module that needs it. So the body is mirrored to a location that drops it, and
# `empty_gif`, which refuses POST, leads to the location that responds with the id found in the body.
_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    default_type application/json;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_buffer_size 16k;
    client_body_in_single_buffer on;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    map $request_body $execution_id {{ "~\\"id\\"\\s*:\\s*\\"(?<found>[^\\"]+)\\"" $found; default ""; }}
    {pieces}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        listen 127.0.0.1:{tls_port} ssl backlog=4096;
        ssl_certificate {directory}/server.pem;
        ssl_certificate_key {directory}/server.key;
        location = /dropped {{ internal; return 204; }}
        {locations}
    }}
}}
"""
_NGINX_LOCATION = """
location = /{size}kb/instructor/executions/get {{ mirror /dropped; empty_gif; error_page 405 =200 @answer{size}; }}
location @answer{size} {{ return 200 "{before}$execution_id{after}"; }}
location = /{size}kb-gzip/instructor/executions/get {{ mirror /dropped; empty_gif; error_page 405 =200 @packed{size}; }}
location @packed{size} {{
    gzip on; gzip_types application/json; gzip_min_length 1; gzip_comp_level 1;
    return 200 "{before}$execution_id{after}";
}}
"""
_NGINX_PIECE_BYTES = 4000
"""nginx takes no string longer than 4096 bytes in its configuration."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int
    tls_port: int | None = None
    authority: Path | None = None
    """The certificate of who signed the server's, for clients that speak TLS."""

    def base_url(self, kilobytes: int, *, tls: bool = False, packed: bool = False) -> str:
        """Return the base URL for records of a given size."""
        start = f"https://localhost:{self.tls_port}" if tls else f"http://127.0.0.1:{self.port}"
        return f"{start}/{kilobytes}kb{'-gzip' if packed else ''}/"

    def counters(self) -> dict[str, Any]:
        """Return the counters of an `answering.py` server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/counters", timeout=10) as response:
            counted: dict[str, Any] = json.load(response)
        return counted


@contextmanager
def fast(kind: str = "auto") -> Iterator[Server]:
    """Run the server for measurements of speed: nginx if it is installed, unless another kind is chosen."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin:/opt/homebrew/bin")
    if kind == "asyncio" or (kind == "auto" and nginx is None):
        with answering("fast") as server:
            yield server
        return
    if nginx is None:
        sys.exit("nginx is not installed (Debian: apt-get install nginx)")
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as name:
        directory, port, tls_port = Path(name), _free_port(), _free_port()
        directory.chmod(0o755)
        _make_certificates(directory)
        (directory / "nginx.conf").write_text(_nginx_config(directory, port, tls_port))
        command = [nginx, "-e", "stderr", "-p", name, "-c", f"{name}/nginx.conf"]
        with _process(command, stdout=subprocess.DEVNULL) as process:
            _await_port(port, process)
            yield Server(f"{_nginx_version(nginx)}, one worker", port, tls_port, directory / "authority.pem")


@contextmanager
def answering(mode: str) -> Iterator[Server]:
    """Run `answering.py` in a given mode."""
    with _process([sys.executable, str(HERE / "answering.py"), mode], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        if not line:
            sys.exit("answering.py did not start")
        yield Server(f"raw asyncio protocol on {line[1].decode()}", int(line[0]))


@contextmanager
def _process(command: list[str], *, stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=stdout)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(_START_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    sys.exit("the server did not start; `--server asyncio` does without nginx")


def _nginx_version(nginx: str) -> str:
    said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"nginx/[\d.]+", said)
    return found[0] if found else "nginx"


def _make_certificates(directory: Path) -> None:
    """Make a certificate for localhost, and the authority that signs it: some clients take no self-signed one."""
    (directory / "server.ext").write_text("subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\n")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    signing = "-CA authority.pem -CAkey authority.key -CAcreateserial -extfile server.ext"
    for command in (
        f"req -x509 {key} -keyout authority.key -out authority.pem -days 30 -subj /CN=benchmarks",
        f"req {key} -keyout server.key -out server.csr -subj /CN=localhost",
        f"x509 -req -in server.csr -out server.pem -days 30 {signing}",
    ):
        subprocess.run(["openssl", *command.split()], cwd=directory, check=True, capture_output=True)


def _nginx_config(directory: Path, port: int, tls_port: int) -> str:
    pieces: list[str] = []
    locations = []
    for size in data.SIZES:
        before, after = (_nginx_pieces(part.decode(), pieces) for part in data.template(size))
        locations.append(_NGINX_LOCATION.format(size=size, before=before, after=after))
    return _NGINX.format(
        directory=directory,
        port=port,
        tls_port=tls_port,
        pieces="\n".join(pieces),
        locations=textwrap.indent("".join(locations), " " * 8),
    )


def _nginx_pieces(text: str, pieces: list[str]) -> str:
    """Add variables that hold the text in turn, and return their names in a row."""
    names = []
    for start in range(0, len(text), _NGINX_PIECE_BYTES):
        names.append(f"$piece{len(pieces)}")
        pieces.append(f"map '' {names[-1]} {{ default '{text[start : start + _NGINX_PIECE_BYTES]}'; }}")
    return "".join(names)
