"""A fuzz target that decodes bytes to a record or a DecodeError, and a fuzzer for it that needs only Hypothesis.

To run it by hand for ten minutes: `python tests/fuzz_decode.py 600`. It prints the number of inputs, and the input that
failed if there is one. The tests run a few thousand inputs.

Inputs are of two kinds. A few are records drawn by Hypothesis and mutated as JSON. Most are recorded bodies mutated as
bytes by a mutator that is fast enough for thousands of inputs a second.
"""

import argparse
import logging
import random
import re
import sys
import time
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from json_strategies import mutated, records

from kaizen_async import DecodeError, InstructorExecution
from kaizen_async._transport.wire import Endpoint
from kaizen_async.errors import BODY_LIMIT

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.json"))
DOCUMENTED = (Path(__file__).parent / "samples" / "documented.json").read_bytes()
DOCUMENTED_ID = msgspec.json.decode(DOCUMENTED)["id"]
EXECUTIONS = Endpoint("instructor/executions/get", InstructorExecution)

INTERESTING = [
    b"",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"\\",
    b"\\u",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
]
INTERESTING += [b"null", b"true", b"-", b"1e999", b"-0", b"9" * 40, b"1.5", b"NaN", b"[" * 2000, b'{"a":' * 2000]
INTERESTING += [
    b'"id"',
    b'"endTime"',
    b'"2026-01-01T00:00:00Z"',
    b'"0000-00-00T24:60:60+99:99"',
    b" " * 300,
    b"\xef\xbb\xbf",
]

FOREIGN = re.compile(r"the response does not fit the record: (\w+): ")
"""The text of an unexpected error in the decoder, which becomes a DecodeError because a user's type may raise any."""

PLAIN_BATCH = 2000
DRAWN_BATCH = 100
"""Numbers of inputs of each kind that are tried in turn."""


def check(body: bytes) -> None:
    """Decode a body as the response to a lookup, and fail unless the result is allowed."""
    for execution_id in (DOCUMENTED_ID, "exec_1"):
        result = decode(body, execution_id)
        if isinstance(result, DecodeError):
            check_error(result, body)
        else:
            assert isinstance(result, InstructorExecution)
            assert result.id == execution_id
            assert decode(msgspec.json.encode(result), execution_id) == result


def decode(body: bytes, execution_id: str) -> InstructorExecution | DecodeError:
    """Return the record or the DecodeError of a body. Any other error is raised."""
    try:
        return EXECUTIONS.decode(body, execution_id)
    except DecodeError as error:
        return error


def check_error(error: DecodeError, body: bytes) -> None:
    """Fail if an error cannot be shown, or hides an error that the decoder should not have raised."""
    assert str(error).isprintable()
    assert len(str(error)) < 1000
    assert error.body == body[:BODY_LIMIT]
    assert error.path is None or error.path.startswith("$")
    foreign = FOREIGN.match(error.reason)
    assert foreign is None or foreign[1] == "UnicodeDecodeError"


def mutate(body: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to six places changed."""
    for _ in range(draw.randint(1, 6)):
        start = draw.randrange(len(body) + 1)
        stop = min(len(body), start + draw.choice([0, 1, 1, 2, 8, 64]))
        piece = draw.choice(
            [draw.choice(INTERESTING), draw.randbytes(draw.randint(1, 4)), body[draw.randrange(len(body) + 1) :][:40]]
        )
        body = body[:start] + piece + body[stop:]
    return body


def fuzz(seconds: float, seed: int, most: int | None = None) -> int:
    """Try inputs until the time or the number of inputs is reached, and return the number."""
    draw = random.Random(seed)
    corpus = [sample.read_bytes() for sample in SAMPLES]
    ends_at = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < ends_at and (most is None or tried < most):
        for _ in range(PLAIN_BATCH):
            check_and_report(mutate(draw.choice(corpus), draw))
        tried += PLAIN_BATCH + _fuzz_records(draw.randrange(2**32))
    return tried


def check_and_report(body: bytes) -> None:
    """Check an input, and print it if it breaks something."""
    try:
        check(body)
    except BaseException:
        sys.stderr.write(f"broken by {body!r}\n")
        raise


def _fuzz_records(number: int) -> int:
    tried = 0

    @seed(number)
    @settings(
        max_examples=DRAWN_BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated(records))
    def try_records(body: bytes) -> None:
        nonlocal tried
        tried += 1
        check_and_report(body)

    try_records()
    return tried


def main() -> None:
    """Fuzz for a while, and print the number of inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    logging.disable()  # of unknown statuses
    tried = fuzz(arguments.seconds, arguments.seed)
    sys.stdout.write(f"{tried:,} inputs in {arguments.seconds:.0f} s from seed {arguments.seed}: nothing broke\n")


if __name__ == "__main__":
    main()
