"""One implementation, two faces: methods are written once as coroutines, and typed for both kinds of client.

A resource's `@call` method is a coroutine function. On an async resource it is called as it stands. On a sync resource
the coroutine is driven to its end on the spot: its transport never suspends, so there is no event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from functools import update_wrapper, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

if TYPE_CHECKING:
    from modelworks.client.transport import Transport

P = ParamSpec("P")
R = TypeVar("R")


class Sync:
    """Marks a resource whose calls return their result."""


class Async:
    """Marks a resource whose calls return an awaitable of their result."""


Mode = TypeVar("Mode")


class Resource(Generic[Mode]):
    """A part of the API. `Resource[Sync]` and `Resource[Async]` differ only in the transport they were given."""

    def __init__(self, transport: Transport) -> None:
        self._http = transport


def drive(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that never suspends, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise RuntimeError("a sync client's transport must not suspend")


class call(Generic[P, R]):
    """Decorates a coroutine method of a Resource: returns R on a sync resource, a coroutine of R on an async one."""

    def __init__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> None:
        self._function = function
        update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, instance: None, owner: Any) -> call[P, R]: ...
    @overload
    def __get__(self, instance: Resource[Sync], owner: Any = None) -> Callable[P, R]: ...
    @overload
    def __get__(self, instance: Resource[Async], owner: Any = None) -> Callable[P, Coroutine[Any, Any, R]]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        method = self._function.__get__(instance, owner)
        if instance._http.is_async:
            return method

        @wraps(method)
        def finished(*args: P.args, **kwargs: P.kwargs) -> R:
            return drive(method(*args, **kwargs))

        return finished


class stream(Generic[P, R]):
    """Decorates an async generator method of a Resource: a plain iterator on a sync resource, async on an async one."""

    def __init__(self, function: Callable[Concatenate[Any, P], AsyncGenerator[R, None]]) -> None:
        self._function = function
        update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, instance: None, owner: Any) -> stream[P, R]: ...
    @overload
    def __get__(self, instance: Resource[Sync], owner: Any = None) -> Callable[P, Iterator[R]]: ...
    @overload
    def __get__(self, instance: Resource[Async], owner: Any = None) -> Callable[P, AsyncIterator[R]]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        method = self._function.__get__(instance, owner)
        if instance._http.is_async:
            return method

        @wraps(method)
        def items(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
            source = method(*args, **kwargs)
            try:
                while True:
                    try:
                        item = drive(source.__anext__())
                    except StopAsyncIteration:
                        return
                    yield item
            finally:
                drive(source.aclose())

        return items
