"""Telling a lack of memory from an error or a log, and the last words of a log without what is the operator's."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.engines.memory import STILL, Gauge, last_words, starved, tells_of_starving


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError("Unknown error: Failed to launch worker thread: Resource temporarily unavailable"), True),
        (ImportError("libx.so: failed to map segment from shared object"), True),
        (caused_by(InvalidInput("the model failed"), MemoryError()), True),
        (InvalidInput("the column 'out of memory' is missing"), False),
        (ValueError("too many rows"), False),
    ],
)
def test_errors(error: Exception, expected: bool) -> None:
    assert starved(error) is expected


def test_logs() -> None:
    assert tells_of_starving("a\nOpenBLAS error: Memory allocation still failed after 10 retries, giving up.\n")
    assert not tells_of_starving("MemoryError\n" + "then it went on\n" * 30)
    log = "x\n2026-01-01T00:00:00Z error: /home/me/models/net.onnx is broken\n---\n"
    assert last_words(log) == "error: net.onnx is broken"
    assert last_words("") == ""


def test_a_gauge_sees_who_is_near_the_limit_and_who_stands_still_there() -> None:
    hold = (
        "import time; data = bytearray(b'x') * (60 << 20); print(flush=True); input()\n"
        "while time.process_time() < 3: sum(range(10_000))\nprint(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        roomy, tight = Gauge(process.pid, 4096), Gauge(process.pid, 50)
        for now in (0.0, STILL - 1):
            roomy.look(now)
            tight.look(now)
        assert (roomy.near, tight.near, tight.stuck) == (False, True, False)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        tight.look(STILL)  # it did something of its own since
        assert not tight.stuck
        for gauge in (roomy, tight):
            gauge.look(2 * STILL)
        assert (roomy.stuck, tight.stuck) == (False, True)
        process.kill()
        process.wait()
        tight.look(3 * STILL)
        assert tight.near
