"""Content codings that responses are unpacked from, a limited piece at a time.

A few hundred bytes can unpack to 200 MB. So nothing here returns more than `PIECE` bytes at once; the caller decides
whether it wants more.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

from aiohttp import compression_utils

PIECE: Final = 65_536
"""Bytes that one step of unpacking returns at most."""

_MOST_MEMBERS: Final = 64
"""Compressed streams that one body may consist of. Real bodies are one; empty streams by the thousand are an attack."""


class UnpackError(Exception):
    """Raised when a body is not what its Content-Encoding says."""


def _reads_brotli() -> bool:
    """Return whether the installed brotli can unpack step by step: before 1.2, and in brotlicffi, it cannot."""
    try:
        return compression_utils.BrotliDecompressor().decompress_sync(b"\x0b\x02\x80hello\x03", 100) == b"hello"
    except Exception:  # noqa: BLE001 - not installed, or another signature: every kind of failure means no
        return False


def _new_gzip() -> Any:
    return zlib.decompressobj(wbits=31)


_READS_BROTLI: Final = _reads_brotli()
_NEW: dict[str, Callable[[], Any]] = {"gzip": _new_gzip}
if _READS_BROTLI:
    import brotli  # type: ignore[import-untyped]

    _NEW["br"] = brotli.Decompressor
if compression_utils.HAS_ZSTD:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor
    else:
        from backports.zstd import ZstdDecompressor
    _NEW["zstd"] = ZstdDecompressor

OFFERED: Final = ", ".join(["gzip", "deflate", *(name for name in ("br", "zstd") if name in _NEW)])
"""The Accept-Encoding of every request: what can be read here, however the response is read."""


def can_unpack(coding: str) -> bool:
    """Return whether `unpack` knows a content coding."""
    return coding in _NEW


def unpack(coding: str, packed: bytes) -> Iterator[bytes]:
    """Yield what a body unpacks to, in pieces of at most PIECE bytes.

    Raises:
        UnpackError: The body is damaged or cut off.
    """
    steps = _unpack_brotli if coding == "br" else _unpack_gzip if coding == "gzip" else _unpack_zstd
    try:
        yield from steps(packed)
    except UnpackError:
        raise
    except Exception as error:  # noqa: BLE001 - each codec has exceptions of its own, all without a common base
        raise UnpackError(str(error)) from None


def unpack_small(coding: str, packed: bytes) -> bytes | None:
    """Return what a body unpacks to, or None if that is so much that it should be unpacked in steps.

    Raises:
        UnpackError: The body is damaged or cut off.
    """
    whole = b""
    for piece in unpack(coding, packed):
        whole += piece
        if len(whole) >= PIECE:
            return None
    return whole


def _unpack_gzip(packed: bytes) -> Iterator[bytes]:
    for _ in range(_MOST_MEMBERS):
        unpacker = _NEW["gzip"]()
        piece = unpacker.decompress(packed, PIECE)
        yield piece
        while not unpacker.eof:
            piece = unpacker.decompress(unpacker.unconsumed_tail, PIECE)
            if not piece and not unpacker.eof:
                raise UnpackError("it is cut off")
            yield piece
        packed = unpacker.unused_data
        if not packed:
            return
    raise UnpackError("it consists of too many parts")


def _unpack_zstd(packed: bytes) -> Iterator[bytes]:
    for _ in range(_MOST_MEMBERS):
        unpacker = _NEW["zstd"]()
        yield unpacker.decompress(packed, PIECE)
        while not unpacker.eof:
            if unpacker.needs_input:
                raise UnpackError("it is cut off")
            yield unpacker.decompress(b"", PIECE)
        packed = unpacker.unused_data
        if not packed:
            return
    raise UnpackError("it consists of too many parts")


def _unpack_brotli(packed: bytes) -> Iterator[bytes]:
    unpacker = _NEW["br"]()
    yield unpacker.process(packed, output_buffer_limit=PIECE)
    while not unpacker.is_finished():
        piece = unpacker.process(b"", output_buffer_limit=PIECE)
        if not piece and not unpacker.is_finished():
            raise UnpackError("it is cut off")
        yield piece
