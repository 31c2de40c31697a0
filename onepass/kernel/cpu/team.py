"""How the threads of a launch end it: the one that launched sleeps until the others are done.

OpenMP's own wait at the end of a parallel region is a loop that asks again and again, for
milliseconds. If other processes have work, a thread that is waited for may not be running: it would
run at once on the processor that the waiting thread keeps busy. So the launching thread looks for a
moment, then sleeps until the last thread wakes it. `benchmarks/loaded.py` measures it.

Three threads, of which thread 0 has launched and is done first; `words` are [finished, asleep]:

    thread 0  adds 1: [1, 0], looks LOOKS times, writes [1, 1], and sleeps while `finished` is 1
    thread 2  adds 1: [2, 1], sees that thread 0 sleeps, and wakes it
    thread 0  sees 2 of 3, looks no more, and sleeps while `finished` is 2
    thread 1  adds 1: [3, 1], sees that thread 0 sleeps, and wakes it
    thread 0  sees 3 of 3, and returns

A thread that adds 1 between the last look of thread 0 and its sleep is not missed: the system lets
a thread sleep only while the word still is what it has seen.

This is for Linux, where a thread can sleep on a word of memory (futex). Elsewhere OpenMP waits in
its own way.
"""

from __future__ import annotations

import ctypes
import platform
import sys

from ..graph.caches import once
from ..llvm.native import Library, openmp_functions

# The number of the system call, by processor.
FUTEX = {"x86_64": 202, "aarch64": 98}
# How a processor is told that a loop waits: the intrinsic as it is declared, and as it is called.
PAUSES = {
    "x86_64": ("llvm.x86.sse2.pause()", "llvm.x86.sse2.pause()"),
    "aarch64": ("llvm.aarch64.hint(i32)", "llvm.aarch64.hint(i32 1)"),
}
# How often the launching thread looks before it sleeps: about ten microseconds, the rest of a unit
# of work.
LOOKS = 200
# The longest sleep, in nanoseconds: nothing that another thread does or leaves undone can keep it.
LONGEST = 1_000_000

# `words` are 32 bits each, 0 at the launch: how many threads have finished, and whether the
# launching one sleeps.
SOURCE = """
declare void @{declared}
@longest = private constant [2 x i64] [i64 0, i64 {longest}]

define void @finish(ptr %words) nounwind {{
entry:
  %asleep = getelementptr i32, ptr %words, i64 1
  %before = atomicrmw add ptr %words, i32 1 seq_cst
  %who_at = inttoptr i64 {thread} to ptr
  %who = call i32 %who_at()
  %launched = icmp eq i32 %who, 0
  br i1 %launched, label %wait, label %other
other:
  %sleeps = load atomic i32, ptr %asleep seq_cst, align 4
  %must_wake = icmp ne i32 %sleeps, 0
  br i1 %must_wake, label %wake, label %done
wake:
  %call = inttoptr i64 {system} to ptr
  %woken = call i64 (i64, ...) %call(
      i64 {futex}, ptr %words, i32 129, i32 1, ptr null, ptr null, i32 0)
  br label %done
wait:
  %team_at = inttoptr i64 {team} to ptr
  %team = call i32 %team_at()
  br label %look
look:
  %looks = phi i64 [ {looks}, %wait ], [ %looks_left, %again ], [ 0, %slept ]
  %finished = load atomic i32, ptr %words seq_cst, align 4
  %all = icmp sge i32 %finished, %team
  br i1 %all, label %done, label %not_all
not_all:
  %patient = icmp sgt i64 %looks, 0
  br i1 %patient, label %again, label %sleep
again:
  call void @{pause}
  %looks_left = sub i64 %looks, 1
  br label %look
sleep:
  store atomic i32 1, ptr %asleep seq_cst, align 4
  %system = inttoptr i64 {system} to ptr
  %still = load atomic i32, ptr %words seq_cst, align 4
  %in_time = icmp sge i32 %still, %team
  br i1 %in_time, label %done, label %really
really:
  %s = call i64 (i64, ...) %system(
      i64 {futex}, ptr %words, i32 128, i32 %still, ptr @longest, ptr null, i32 0)
  br label %slept
slept:
  br label %look
done:
  ret void
}}
"""


@once
def _library() -> Library | None:
    """The machine code of `finish`; None if there is none for this system."""
    machine = platform.machine()
    functions = openmp_functions("omp_get_thread_num", "omp_get_num_threads")
    if sys.platform != "linux" or machine not in FUTEX or functions is None:
        return None
    thread, team = functions
    declared, pause = PAUSES[machine]
    source = SOURCE.format(
        thread=thread,
        team=team,
        declared=declared,
        pause=pause,
        longest=LONGEST,
        looks=LOOKS,
        futex=FUTEX[machine],
        system=ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value,
    )
    return Library(source)


def finish() -> int:
    """Return the address of `void finish(void* words)`; 0 on a system that has none.

    Every thread of a launch calls it at its end.
    """
    library = _library()
    return 0 if library is None else library.address("finish")
