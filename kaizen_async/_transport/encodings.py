"""Content codings that responses are unpacked from, a limited piece at a time.

A few hundred bytes can unpack to 200 MB. So nothing here returns more than `PIECE` bytes at once; the caller decides
whether it wants more.
"""

import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, cast

from aiohttp import compression_utils

PIECE: Final = 65_536
"""Bytes that one step of unpacking returns at most. Brotli takes the limit less exactly: up to half more."""

_STEP: Final = 16_384
"""Packed bytes that are unpacked at once: also a megabyte of empty blocks, which unpack to nothing, takes time."""

MOST_MEMBERS: Final = 64
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
    return zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)


def _new_deflate(packed: bytes) -> Any:
    """Return what unpacks deflate: with the header that the standard asks for, or without, as some servers send it."""
    has_header = packed[:1] and packed[0] & 0xF == zlib.DEFLATED
    return zlib.decompressobj(wbits=zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)


_READS_BROTLI: Final = _reads_brotli()
_NEW: dict[str, Callable[[], Any]] = {}
if _READS_BROTLI:
    import brotli  # type: ignore[import-untyped]

    _NEW["br"] = cast("Any", brotli).Decompressor
if compression_utils.HAS_ZSTD:
    if sys.version_info >= (3, 14):
        from compression.zstd import DecompressionParameter, ZstdDecompressor
    else:
        from backports.zstd import DecompressionParameter, ZstdDecompressor
    # RFC 9659 section 3: no window above 8 MiB.
    _NEW["zstd"] = partial(ZstdDecompressor, options={DecompressionParameter.window_log_max: 23})

_CODECS: Final = {"br": "brotli 1.2 or newer", "zstd": "backports.zstd"}

HUNGRY: Final = frozenset({"br"})
"""Codings whose unpacker may take 16 MiB for a body of a few bytes, and 20 ms to get them."""

OFFERED: Final = ", ".join(["gzip", "deflate", *(name for name in ("br", "zstd") if name in _NEW)])
"""The Accept-Encoding of every request: what can be read here, however the response is read."""


def can_unpack(coding: str) -> bool:
    """Return whether `unpack` knows a content coding."""
    return coding in {"gzip", "deflate"} or coding in _CODECS


def unpack(coding: str, packed: bytes) -> Iterator[bytes]:
    """Yield what a body unpacks to, in pieces of at most PIECE bytes.

    Raises:
        UnpackError: The body is damaged or cut off, or its codec is not installed.
    """
    if coding in _CODECS and coding not in _NEW:
        raise UnpackError(f"it is packed as {coding}. Please install {_CODECS[coding]}")
    match coding:
        case "br":
            steps = _unpack_brotli(packed)
        case "zstd":
            steps = _unpack_zstd(packed)
        case "deflate":
            steps = _unpack_zlib(lambda: _new_deflate(packed), packed)
        case _:
            steps = _unpack_zlib(_new_gzip, packed)
    try:
        yield from steps
    except UnpackError:
        raise
    except Exception as error:  # noqa: BLE001 - each codec has exceptions of its own, all without a common base
        raise UnpackError(str(error)) from None


def unpack_small(coding: str, packed: bytes) -> bytes | None:
    """Return what a body unpacks to, or None if that is so much that it should be unpacked in steps.

    Raises:
        UnpackError: The body is damaged or cut off.
    """
    if len(packed) > _STEP:
        return None
    whole = b""
    for piece in unpack(coding, packed):
        whole += piece
        if len(whole) >= PIECE:
            return None
    return whole


def _unpack_zlib(new: Callable[[], Any], packed: bytes) -> Iterator[bytes]:
    position = 0
    for _ in range(MOST_MEMBERS):
        unpacker = new()
        piece = b""
        while not unpacker.eof:
            data = unpacker.unconsumed_tail
            if not data and len(piece) < PIECE:
                data = _next_step(packed, position)
                position += len(data)
            piece = unpacker.decompress(data, PIECE)
            yield piece
        position -= len(unpacker.unused_data)
        if position == len(packed):
            return
    raise UnpackError("it consists of too many parts")


def _unpack_zstd(packed: bytes) -> Iterator[bytes]:
    position = 0
    for _ in range(MOST_MEMBERS):
        unpacker = _NEW["zstd"]()
        while not unpacker.eof:
            data = _next_step(packed, position) if unpacker.needs_input else b""
            position += len(data)
            yield unpacker.decompress(data, PIECE)
        position -= len(unpacker.unused_data)
        if position == len(packed):
            return
    raise UnpackError("it consists of too many parts")


def _unpack_brotli(packed: bytes) -> Iterator[bytes]:
    position = 0
    unpacker = _NEW["br"]()
    piece = b""
    while not unpacker.is_finished():
        has_more_inside = piece or not unpacker.can_accept_more_data()
        data = b"" if has_more_inside else _next_step(packed, position)
        position += len(data)
        piece = unpacker.process(data, output_buffer_limit=PIECE)
        yield piece


def _next_step(packed: bytes, position: int) -> bytes:
    data = packed[position : position + _STEP]
    if not data:
        raise UnpackError("it is cut off")
    return data
