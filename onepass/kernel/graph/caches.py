"""What is kept for later, and how long: while somebody can still use it, and never without bound.

`remember` keeps what a function has returned as long as its first argument lives, a rule or a
graph. Of the last few that have died it keeps the result a while longer. `share` gives the same
object to all who ask for the same, and keeps nothing. `once` makes a thing once in the process's
life.

Who keeps whom alive, from a user's class to machine code ("->" holds, "~>" holds only weakly):

    class Lion -> its rule
    trace      ~> rule,    -> graph       as long as the rule lives
    finish     ~> graph,   -> graph       as long as the first graph lives
    compile    ~> graph,   -> kernel      as long as the graph lives, and 8 kernels longer
    make_kernel            ~> kernel      shared by equal programs of different graphs
    a plan                 -> kernel      as long as the optimizer steps

When a notebook defines `Lion` again, the old class dies, and with it go rule, graphs and programs.
Its kernel is one of the 8 that stay longer. The new class's program is equal, so `make_kernel`
finds the kernel, and nothing is compiled again.

There are two locks for all of these. A process that forks waits for both, and so for what another
thread compiles. Otherwise the child would find them held by a thread that it does not have.
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

# Held while something is made that must exist only once. Whoever holds it may take the other one,
# never the other way round.
_making = RLock()
# Held while results are looked up and entered.
_knowing = RLock()

_locks: list[AbstractContextManager[Any]] = [_making, _knowing]
# Those that a fork has taken: another lock may be added meanwhile.
_held: list[AbstractContextManager[Any]] = []


def hold_in_forks(lock: AbstractContextManager[Any]) -> None:
    """Let a process that forks wait for a lock, so that the child finds it free.

    Whoever holds this lock must not take one of the two here.
    """
    _locks.append(lock)


def _hold() -> None:
    """Take all locks, before a fork."""
    locks = []
    # There may be a further one by the time that the others are free.
    for lock in _locks:
        lock.__enter__()
        locks.append(lock)
    _held[:] = locks


def _let_go() -> None:
    """Give all locks back, after a fork, in parent and child."""
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
    """A function that keeps its results: see `remember`.

    The first argument is recognised by its identity and held weakly, all others by their values.
    What the function returns must not hold its first argument, or both would stay until `most`
    others have come.
    """

    def __init__(self, function: Callable[P, R], most: int, longer: int) -> None:
        update_wrapper(self, function)
        self._function = function
        self._most = most
        # The least recently used first, each with what tells us when its owners have died.
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
        entry = (value, [_watch(owner, forget) for owner in owners])
        with _knowing:
            # Another thread may have been faster: all get what was entered first.
            value, _ = self._known.setdefault(key, entry)
            oldest = list(self._known)[: -self._most]
            surplus = [self._known.pop(old, None) for old in oldest]
        # Outside the lock: what is freed may wait for a lock of its own.
        del surplus
        return value

    def cache_clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._longer.clear()

    def cache_info(self) -> CacheInfo:
        """Return how often the function was called, and how many results are known."""
        return CacheInfo(self._misses, len(self._known))


class Shared(Generic[P, R]):
    """A function that shares its results: see `share`."""

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
                value = self._function(*args, **kwargs)
                self._living[key] = value
            return value

    def cache_clear(self) -> None:
        """Forget everything; whoever has a result keeps it."""
        self._living.clear()

    def cache_info(self) -> CacheInfo:
        """Return how often the function was called, and how many of its results live."""
        return CacheInfo(self._misses, len(self._living))


def remember(most: int, longer: int = 0) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Return a decorator: keep what a function returns while its first argument lives.

    Only the `most` results that were used last are kept. Of those whose first arguments have died
    the last few, `longer`, stay: a class that is defined again may need them.
    """
    return lambda function: Remembered(function, most, longer)


def share(function: Callable[P, R]) -> Shared[P, R]:
    """Return the same object for the same arguments as long as somebody has it."""
    return Shared(function)


def _owners(first: object) -> tuple[object, ...]:
    """Return what must live for a first argument to come again.

    A method is made at each access, of parts that stay.
    """
    if isinstance(first, MethodType):
        return first.__self__, first.__func__
    return (first,)


def _watch(owner: object, forget: Callable[[object], None]) -> object:
    """Return what calls `forget` when an owner dies.

    That is the owner itself if nothing can tell that it dies, so that it lives.
    """
    try:
        return ref(owner, forget)
    except TypeError:
        return owner


def _forget(
    key: tuple[object, ...], known: dict[Any, tuple[R, list[object]]], longer: deque[R], _: object
) -> None:
    """Forget an entry whose owner has died; its result may stay a while longer."""
    # An object may die anywhere, even within the code above. So this takes no lock, and a pop needs
    # none.
    entry = known.pop(key, None)
    if entry is not None:
        longer.append(entry[0])


class computed(Generic[S, R]):
    """A property that is computed when it is first asked for, and kept.

    Up to Python 3.11 `functools.cached_property` holds a lock meanwhile, for all objects of a
    class. A child that is forked then would wait for a thread that it does not have.
    """

    def __init__(self, function: Callable[[S], R]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, owner: None, cls: type) -> computed[S, R]: ...

    @overload
    def __get__(self, owner: S, cls: type) -> R: ...

    def __get__(self, owner: S | None, cls: type) -> computed[S, R] | R:
        if owner is None:
            return self
        value = self._function(owner)
        # Python finds this entry first from now on.
        vars(owner)[self._function.__name__] = value
        return value


def once(function: Callable[[], R]) -> Callable[[], R]:
    """Return a function that is called once in the process's life, whichever thread asks first.

    What it returns may be code of which others only keep the address, so there must not be a second
    copy that is freed.
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
