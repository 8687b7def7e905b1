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
    hold = "data = bytearray(b'x') * (40 << 20); print(flush=True); input(); sum(range(5_000_000)); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        roomy, tight = Gauge(process.pid, 4096), Gauge(process.pid, 50)
        for gauge in (roomy, tight):
            gauge.look(0.0)
            gauge.look(STILL - 1)
        assert (roomy.near, tight.near) == (False, True)
        assert not tight.stuck(STILL - 1)
        assert tight.stuck(STILL)
        assert not roomy.stuck(STILL)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        tight.look(STILL + 1)  # it used the CPU since
        assert not tight.stuck(STILL + 2)
        process.kill()
        process.wait()
        tight.look(STILL + 2)
        assert tight.near
