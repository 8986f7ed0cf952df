"""Completion counters inside one launch: programs arrive, and the last ones go on with what the others wrote."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def arrive(counter_ptr, amount=1):
    """Add to the counter and return the old value; everything this program wrote before is visible to whoever reads the new value.

    The barrier first: the atomic is executed by one thread, and its release covers the other threads' stores only after it.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, amount, sem="acq_rel", scope="gpu")


@triton.jit
def signal(counter_ptr, amount=1):
    """`arrive` for those that go on without the old value: nothing waits for the answer."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, amount, sem="release", scope="gpu")


@triton.jit
def wait_until(counter_ptr, target, seen):
    """Spin until the counter reaches target, given a value seen before; what was written before the arrivals is visible.

    The caller makes sure that those it waits for can run (see `division.max_waiting`).
    """
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def last_to_leave(counter_ptr, leavers):
    """Whether all leavers - 1 others have left, so that the counters may be reset; orders no data."""
    return tl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu") == leavers - 1
