"""Large tensors in memory that both ends of a link see. Each end owns a pool that only it can write; the peer maps it to read.

A pool is a few memfds: no names, sealed so that nobody shrinks them under a reader and nobody else maps them for writing.
A slot is the owner's again when the peer says that its last view is gone. With the link the whole pool is given up, and
what it held is never written again: there is no moment at which a reader can see another call's data.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from modelworks.core.telemetry import logger

SHARED_FROM = 256 * 1024  # bytes: below, a copy through the socket is as fast
STEP = 64 * 1024 * 1024  # bytes by which a pool grows
LIMIT = 1024 * 1024 * 1024  # bytes of a link's pool, in each direction
IDLE_SECONDS = 10.0  # an empty segment is given back after that
_BLOCK = 64 * 1024
_MAX_NUMBER = 2**32 - 1
_F_SEAL_FUTURE_WRITE = 0x10  # not in Python's fcntl; Linux 5.1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _F_SEAL_FUTURE_WRITE
_HANDOVER = struct.Struct("<IQ")  # segment, bytes: what travels beside a file descriptor
_LINGER = 0.005  # seconds that an acknowledgement waits for another frame to ride in
_URGENT = 16 * 1024 * 1024  # bytes of unsaid acknowledgements that do not wait

log = logger("channel")


class SharingError(Exception):
    """The peer named memory that it did not give, or gave what may not be trusted."""


class Slot(NamedTuple):
    """Where a tensor lies: `size` bytes from `offset` in a segment of the sender's pool."""

    number: int
    segment: int
    offset: int
    size: int


class Segment:
    """One memfd of a pool, written by its owner. First fit from its start, so that few pages stay warm."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.empty_since = time.monotonic()
        self.usable = False  # the peer has mapped it
        self._holes = [(0, size // _BLOCK)]  # (first block, blocks), in order
        self.fd = os.memfd_create("modelworks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(self.fd)
            raise
        self.memory = memoryview(self._map)

    @property
    def empty(self) -> bool:
        return self._holes == [(0, self.size // _BLOCK)]

    def take(self, blocks: int) -> int | None:
        """The first block of a run that is now taken; None when there is no such run."""
        for index, (first, length) in enumerate(self._holes):
            if length >= blocks:
                if length == blocks:
                    del self._holes[index]
                else:
                    self._holes[index] = first + blocks, length - blocks
                return first
        return None

    def give(self, first: int, blocks: int) -> None:
        holes = self._holes
        insort(holes, (first, blocks))
        index = holes.index((first, blocks))
        if index + 1 < len(holes) and first + blocks == holes[index + 1][0]:
            holes[index : index + 2] = [(first, blocks + holes[index + 1][1])]
        if index and sum(holes[index - 1]) == first:
            holes[index - 1 : index + 1] = [(holes[index - 1][0], holes[index - 1][1] + holes[index][1])]
        if self.empty:
            self.empty_since = time.monotonic()

    def close(self) -> None:
        """Unmap it here; the peer's mapping lives as long as its views."""
        self.memory.release()
        self._map.close()
        self.close_fd()

    def close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Pool:
    """The memory that this end writes. Bounded: with no room, `put` says so and the tensor is copied through the socket.

    `offer(segment number, size, fd)` sends a new segment to the peer; it is used once the peer has mapped it.
    """

    def __init__(self, offer: Callable[[int, int, int], None], *, step: int = STEP, limit: int = LIMIT) -> None:
        self._offer = offer
        self._step = step
        self._limit = limit
        self._segments: dict[int, Segment] = {}
        self._slots: dict[int, tuple[Segment, int, int]] = {}
        self._next_slot = 0
        self._next_segment = 0
        self._offered: int | None = None
        self._closed = False

    @property
    def used(self) -> int:
        """Slots that the peer may be reading."""
        return len(self._slots)

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self._segments.values())

    def put(self, data: bytes | memoryview) -> Slot | None:
        """A copy of `data` where the peer can read it; None when there is no room (the pool may be growing)."""
        size = len(data)
        blocks = -(-size // _BLOCK)
        for key, segment in self._segments.items():
            if not segment.usable:
                continue
            first = segment.take(blocks)
            if first is None:
                continue
            offset = first * _BLOCK
            segment.memory[offset : offset + size] = data
            number = self._next_slot
            while number in self._slots:
                number = (number + 1) & _MAX_NUMBER
            self._next_slot = (number + 1) & _MAX_NUMBER
            self._slots[number] = segment, first, blocks
            return Slot(number, key, offset, size)
        self._grow(blocks * _BLOCK)
        return None

    def free(self, number: int) -> None:
        """The peer has no view of a slot any more, or was never told of it."""
        try:
            segment, first, blocks = self._slots.pop(number)
        except KeyError:
            raise SharingError(f"slot {number} is not in use") from None
        segment.give(first, blocks)

    def mapped(self, key: int, done: bool) -> None:
        """The peer's word on the segment it was offered. A refusal ends growth."""
        if key != self._offered:
            raise SharingError(f"segment {key} was not offered")
        self._offered = None
        if done:
            self._segments[key].usable = True
        else:
            self._segments.pop(key).close()
            self._limit = 0

    def idle(self, now: float) -> list[int]:
        """Segments that were empty for long: closed here, and to be dropped by the peer."""
        gone = [
            key
            for key, segment in self._segments.items()
            if segment.usable and segment.empty and now - segment.empty_since >= IDLE_SECONDS
        ]
        for key in gone:
            self._segments.pop(key).close()
        return gone

    def close(self) -> None:
        self._closed = True
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._slots.clear()

    def _grow(self, need: int) -> None:
        size = max(self._step, need)
        if self._closed or self._offered is not None or self.size + size > self._limit:
            return
        segment = None
        key = self._next_segment
        try:
            segment = Segment(size)
            self._offer(key, size, segment.fd)
        except OSError as error:  # no memory, no descriptors, an old kernel: go on by copying
            log.warning("no_shared_memory", reason=str(error))
            self._limit = 0
            if segment is not None:
                segment.close()
            return
        segment.close_fd()
        self._segments[key] = segment
        self._offered = key
        self._next_segment = key + 1


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """A peer's segment, mapped for reading until its last view is gone. Python's mmap cannot be watched for that."""

    def __init__(self, fd: int, size: int) -> None:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size < size:
            raise SharingError("shared memory that could shrink under its reader")
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "cannot map shared memory")
        self.address = address
        self.size = size
        weakref.finalize(self, _libc.munmap, address, size).atexit = False


class _Watch(weakref.ref[Any]):
    """Tells when the last view of a slot is gone."""

    __slots__ = ("size", "slot")
    size: int
    slot: int


@lru_cache(maxsize=256)
def _array(size: int) -> Any:
    return ctypes.c_ubyte * size


class Window:
    """The peer's pool, to read. `released` collects slots whose views are gone, in whichever thread the last one died."""

    def __init__(self, on_release: Callable[[int], None], *, limit: int = LIMIT) -> None:
        self.released: deque[int] = deque()
        self._on_release = on_release
        self._limit = limit
        self._mappings: dict[int, _Mapping] = {}
        self._held: dict[int, _Watch] = {}
        self._closed = False

    @property
    def held(self) -> int:
        """Slots of which views are alive."""
        return len(self._held)

    def attach(self, key: int, size: int, fd: int) -> bool:
        """Map a segment; False when this process cannot. SharingError when it is not one to trust."""
        total = sum(mapping.size for mapping in self._mappings.values())
        if key in self._mappings or size < 1 or total + size > self._limit:
            raise SharingError(f"segment {key} of {size} bytes is one too many")
        try:
            self._mappings[key] = _Mapping(fd, size)
        except OSError as error:
            log.warning("no_shared_memory", reason=str(error))
            return False
        return True

    def view(self, slot: Slot) -> memoryview:
        """The bytes of a slot, read-only. It is the sender's again once the last view of them is gone."""
        number, key, offset, size = slot
        mapping = self._mappings.get(key)
        if mapping is None or number in self._held or offset < 0 or size < 1 or offset + size > mapping.size:
            raise SharingError(f"{size} bytes at {offset} of segment {key}, slot {number}, which is no free slot there")
        whole = -(-size // _BLOCK) * _BLOCK  # few types of array
        array = _array(min(whole, mapping.size - offset)).from_address(mapping.address + offset)
        array.mapping = mapping
        watch = _Watch(array, self._gone)
        watch.slot, watch.size = number, size
        self._held[number] = watch
        return memoryview(array).cast("B").toreadonly()[:size]

    def detach(self, key: int) -> None:
        if self._mappings.pop(key, None) is None:
            raise SharingError(f"segment {key} is not mapped")

    def close(self) -> None:
        """Views that are still out stay valid; nobody is told of their end any more."""
        self._closed = True
        self._mappings.clear()
        self._held.clear()

    def _gone(self, watch: Any) -> None:
        if not self._closed:
            self._held.pop(watch.slot, None)
            self.released.append(watch.slot)
            self._on_release(watch.size)


class Loop(Protocol):
    def call_soon_threadsafe(self, callback: Callable[[], None]) -> Any: ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any: ...


class Sharing:
    """Both directions of one link. `side`: the socket on which file descriptors travel, each before its message.

    `announce(segment, size)` tells the peer of a segment; `acknowledge()` is called in the loop when views were released.
    """

    def __init__(
        self, side: socket.socket, loop: Loop, announce: Callable[[int, int], None], acknowledge: Callable[[], None]
    ) -> None:
        side.setblocking(False)
        self._side = side
        self._loop = loop
        self._announce = announce
        self._acknowledge = acknowledge
        self._thread = threading.get_ident()
        self._due = False
        self._unsaid = 0
        self._closed = False
        self.pool = Pool(self._offer)
        self.window = Window(self._released)

    def take_released(self) -> list[int]:
        """The slots to acknowledge now."""
        released = self.window.released
        if not released:
            return []
        self._due = False  # before the look: what another thread adds meanwhile is told again
        self._unsaid = 0
        numbers = []
        while released:
            numbers.append(released.popleft())
        return numbers

    def accept(self, key: int, size: int) -> bool:
        """Map the segment that a message announced; its descriptor has arrived before. False: cannot."""
        try:
            data, fds, _, _ = socket.recv_fds(self._side, _HANDOVER.size, 1)
        except OSError as error:
            raise SharingError(f"a segment without its memory: {error}") from None
        try:
            if len(fds) != 1 or data != _HANDOVER.pack(key, size):
                raise SharingError("a segment that is not the announced one")
            return self.window.attach(key, size, fds[0])
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._side.close()
            self.pool.close()
            self.window.close()

    def _offer(self, key: int, size: int, fd: int) -> None:
        socket.send_fds(self._side, [_HANDOVER.pack(key, size)], [fd])
        self._announce(key, size)

    def _released(self, size: int) -> None:
        """In any thread, and in the midst of anything, as the garbage collector may call it: only note it down."""
        self._unsaid += size
        try:
            if threading.get_ident() != self._thread or (self._due and self._unsaid >= _URGENT):
                self._loop.call_soon_threadsafe(self._say)
            elif not self._due:
                self._due = True
                self._loop.call_later(_LINGER, self._say)
        except RuntimeError:  # the loop has ended, and the link with it
            pass

    def _say(self) -> None:
        if not self._closed and self.window.released:
            self._acknowledge()
