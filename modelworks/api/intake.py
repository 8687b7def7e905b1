"""Bodies on their way into memory: within the room that all of them share, and not so slowly that they keep it."""

from __future__ import annotations

from modelworks.core.errors import RateLimited, RequestTimeout

MIN_RATE = 128  # bytes a second that a body must reach in each stretch of body_timeout
SMALL = 64 * 1024  # bytes of a body that need no room: what most calls have is never refused for others' sake


class Room:
    """Bytes of large bodies that this process holds, of all connections, while they come and are answered."""

    def __init__(self) -> None:
        self.taken = 0


class Intake:
    """One body. `limit`: how many bytes all of them may hold; `timeout`: seconds in which it must get on."""

    __slots__ = ("_held", "_limit", "_mark", "_marked", "_room", "_size", "_timeout")

    def __init__(self, room: Room, limit: int, timeout: float, now: float) -> None:
        self._room = room
        self._limit = limit
        self._timeout = timeout
        self._mark, self._marked = now, 0
        self._held = self._size = 0

    def add(self, size: int, now: float, *, kept: bool = True) -> None:
        """`size` more bytes came, to stay in memory if `kept`.

        RateLimited when there is no room for them; RequestTimeout when they come too slowly.
        """
        self._size += size
        if kept:
            self.hold(self._size)
        seconds = now - self._mark
        if seconds > self._timeout:
            if self._size - self._marked < seconds * MIN_RATE:
                raise RequestTimeout("the body comes too slowly; send it again over a faster connection")
            self._mark, self._marked = now, self._size

    def hold(self, size: int) -> None:
        """It has `size` bytes in memory now. RateLimited when there is no room."""
        if size <= SMALL:
            return
        more = size - self._held
        if self._room.taken + more > self._limit:
            raise RateLimited(
                "too many large bodies are being read at once; try again in a moment, or send fewer rows at a time",
                code="too_many_large_bodies",
                retry_after=1.0,
            )
        self._room.taken += more
        self._held = size

    def close(self) -> None:
        """It is not in memory any more. Closing again changes nothing."""
        self._room.taken -= self._held
        self._held = 0
