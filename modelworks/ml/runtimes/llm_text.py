"""A call's text on its way: cut at the first stop text, and held back while one may be beginning. Light."""

from __future__ import annotations

from collections.abc import Sequence

# special tokens whose text is part of the answer: the edge reads tool calls and reasoning out of it
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")


class Text:
    """`prefix` comes before what is taken; no stop text is looked for in it."""

    def __init__(self, stops: Sequence[str], prefix: str = "") -> None:
        self._stops = stops
        self._prefix = prefix
        self._text = ""
        self.stopped = False

    def take(self, text: str) -> None:
        self._text += text
        found = [at for at in (self._text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def ready(self, *, all: bool) -> str:
        """The text that no stop text can begin in, once."""
        keep = 0
        if not all:
            keep = max((_overlap(self._text, stop) for stop in self._stops), default=0)
        text = self._text[: len(self._text) - keep]
        self._text = self._text[len(text) :]
        prefix, self._prefix = self._prefix, ""
        return prefix + text


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
