"""Telling a lack of memory from an error or a log, and the last words of a log without what is the operator's."""

from __future__ import annotations

import errno

import pytest

from modelworks.core.errors import InvalidInput
from modelworks.engines.memory import last_words, starved, tells_of_starving


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
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
