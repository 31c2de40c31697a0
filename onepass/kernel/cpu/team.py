"""How the threads of a launch end it: the one that launched sleeps until the others are done.

OpenMP's own wait at the end of a parallel region is a loop that asks again and again, for
milliseconds. Where other processes have work, a thread that is waited for may not be running: it
would run at once on the processor that the waiting one keeps busy. So the launching thread asks for
a moment, then sleeps until the last thread wakes it. `benchmarks/loaded.py` measures it.

On Linux, where a thread can sleep on a word of memory (futex). Elsewhere OpenMP waits in its own
way.
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
# How often the launching thread looks before it sleeps: some ten microseconds, the rest of a unit
# of work.
LOOKS = 200
# It sleeps so long at most, in nanoseconds: nothing that another thread does or leaves undone can
# keep it.
LONGEST = 1_000_000

# `words`: how many threads have finished, and whether the launching one sleeps; 32 bits each, 0 at
# the launch.
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
    machine = platform.machine()
    functions = openmp_functions("omp_get_thread_num", "omp_get_num_threads")
    if sys.platform != "linux" or machine not in FUTEX or functions is None:
        return None
    system = ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value
    thread, team = functions
    declared, pause = PAUSES[machine]
    numbers = {"longest": LONGEST, "looks": LOOKS, "futex": FUTEX[machine], "system": system}
    return Library(
        SOURCE.format(thread=thread, team=team, declared=declared, pause=pause, **numbers)
    )


def finish() -> int:
    """The address of `void finish(void*)`, which every thread of a launch calls at its end; 0 where
    there is none."""
    library = _library()
    return 0 if library is None else library.address("finish")
