"""What is kept for later, and how long: while somebody can still use it, and never more than so
much of it.

`remember` keeps what a function has returned as long as its first argument lives, a rule or a
graph; of the last few that have died, it keeps it a while longer. `share` gives all who ask for the
same the same, and keeps nothing. `once` makes a thing once in the process's life.

There are two locks for all of these. A process that forks waits for both, and so for what another
thread compiles: the child would find them held by a thread that it does not have.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, update_wrapper, wraps
from threading import RLock
from types import MethodType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, overload
from weakref import WeakValueDictionary, ref

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

# Held while something is made that there must be once; within it the other one, never the other way
# round.
_making = RLock()
# Held while results are looked up and put.
_knowing = RLock()

_locks: list[AbstractContextManager[Any]] = [_making, _knowing]


# Those that a fork has taken: another lock may be made known meanwhile.
_held: list[AbstractContextManager[Any]] = []


def hold_in_forks(lock: AbstractContextManager[Any]) -> None:
    """Let a process that forks wait for a lock, within which neither of the two is taken; the child
    finds it free."""
    _locks.append(lock)


def _hold() -> None:
    locks = []
    # There may be one more when the others are free.
    for lock in _locks:
        lock.__enter__()
        locks.append(lock)
    _held[:] = locks


def _let_go() -> None:
    locks = _held[::-1]
    _held.clear()
    for lock in locks:
        lock.__exit__(None, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go)


class CacheInfo(NamedTuple):
    """How often a function had to be called, and how many of its results are known."""

    misses: int
    currsize: int


class Remembered(Generic[P, R]):
    """A function that is called once for each of its first argument's lives, whichever thread asks.

    The first argument is known by its identity and held weakly, all others by their values. What a
    function returns must not hold its first argument: it would never be given back but for `most`.
    """

    def __init__(self, function: Callable[P, R], most: int, longer: int) -> None:
        update_wrapper(self, function)
        self._function, self._most = function, most
        # The least recently used first, each with what tells when its owners have died.
        self._known: dict[tuple[object, ...], tuple[R, list[object]]] = {}
        self._longer: deque[R] = deque(maxlen=longer)
        self._misses = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        owners = _owners(args[0])
        key = (tuple(map(id, owners)), args[1:], tuple(sorted(kwargs.items())))
        with _knowing:
            entry = self._known.pop(key, None)
            if entry is not None:
                self._known[key] = entry
                return entry[0]
            self._misses += 1
        # Without the lock: a rule is the user's code.
        value = self._function(*args, **kwargs)
        forget = partial(_forget, key, self._known, self._longer)
        entry = value, [_watch(owner, forget) for owner in owners]
        with _knowing:
            value, _ = self._known.setdefault(key, entry)
            surplus = [self._known.pop(old, None) for old in list(self._known)[: -self._most]]
        # What is freed may wait for a lock of its own.
        del surplus
        return value

    def cache_clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._longer.clear()

    def cache_info(self) -> CacheInfo:
        """How often the function was called, and how many results are known."""
        return CacheInfo(self._misses, len(self._known))


class Shared(Generic[P, R]):
    """A function whose result is the same object for the same arguments as long as somebody has
    it."""

    def __init__(self, function: Callable[P, R]) -> None:
        update_wrapper(self, function)
        self._function = function
        self._living: WeakValueDictionary[tuple[object, ...], R] = WeakValueDictionary()
        self._misses = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (args, tuple(sorted(kwargs.items())))
        # With the lock: of two threads that ask at once, the second waits for what the first makes.
        with _making:
            value = self._living.get(key)
            if value is None:
                self._misses += 1
                value = self._living[key] = self._function(*args, **kwargs)
            return value

    def cache_clear(self) -> None:
        """Forget everything; who has a result keeps it."""
        self._living.clear()

    def cache_info(self) -> CacheInfo:
        """How often the function was called, and how many of its results live."""
        return CacheInfo(self._misses, len(self._living))


def remember(most: int, longer: int = 0) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Keep what a function returns while its first argument lives: the `most` results that were
    last used.

    Of those whose first arguments have died, keep the last few `longer`: what was defined again may
    need them.
    """
    return lambda function: Remembered(function, most, longer)


def share(function: Callable[P, R]) -> Shared[P, R]:
    """Return the same object for the same arguments as long as somebody has it."""
    return Shared(function)


def _owners(first: object) -> tuple[object, ...]:
    """What must live for a first argument to come again: a method is made at each access, of parts
    that stay."""
    return (first.__self__, first.__func__) if isinstance(first, MethodType) else (first,)


def _watch(owner: object, forget: Callable[[object], None]) -> object:
    """What calls `forget` when an owner dies; the owner itself, where nothing can tell that it
    does."""
    try:
        return ref(owner, forget)
    except TypeError:
        return owner


def _forget(
    key: tuple[object, ...], known: dict[Any, tuple[R, list[object]]], longer: deque[R], _: object
) -> None:
    """Forget an entry whose owner has died; its result may stay a while longer."""
    # This runs wherever an object dies, even within the code above. So it takes no lock, and a pop
    # needs none.
    entry = known.pop(key, None)
    if entry is not None:
        longer.append(entry[0])


class computed(Generic[S, R]):
    """A property that is computed when it is first asked for, and kept.

    Up to Python 3.11 `functools.cached_property` holds a lock meanwhile, for all objects of a
    class: a child that is forked then would wait for a thread that it does not have.
    """

    def __init__(self, function: Callable[[S], R]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    @overload
    def __get__(self, owner: None, cls: type) -> computed[S, R]: ...

    @overload
    def __get__(self, owner: S, cls: type) -> R: ...

    def __get__(self, owner: S | None, cls: type) -> computed[S, R] | R:
        if owner is None:
            return self
        value = vars(owner)[self._function.__name__] = self._function(owner)
        return value


def once(function: Callable[[], R]) -> Callable[[], R]:
    """A function that is called once in the process's life, whichever threads ask first.

    What it returns may be code of which others keep the address only: there must not be a second
    one that is freed.
    """
    results: list[R] = []

    @wraps(function)
    def known() -> R:
        if not results:
            with _making:
                if not results:
                    results.append(function())
        return results[0]

    return known
