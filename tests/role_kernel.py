"""A kernel that stores what `roles` gives every program of a launch of the one-launch decode."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from rtpurbo.kernels.decode_layer.fused_parts import roles

STEP_UNITS = tl.constexpr(4)


@triton.jit
def store_roles(
    out_ptr,  # int32 [4, PADDED]: selector, worker, turn of every program; selectors, workers, strands
    programs, processors, jobs, scorers, batch, num_local, local_units, PADDED: tl.constexpr,
):  # fmt: skip
    program = tl.arange(0, PADDED)
    selectors, selector, workers, worker, turn, strands = roles(
        program, programs, processors, jobs, scorers, batch, num_local, local_units, STEP_UNITS
    )
    real = program < programs
    tl.store(out_ptr + program, selector, mask=real)
    tl.store(out_ptr + PADDED + program, worker, mask=real)
    tl.store(out_ptr + 2 * PADDED + program, turn, mask=real)
    tl.store(out_ptr + 3 * PADDED, selectors)
    tl.store(out_ptr + 3 * PADDED + 1, workers)
    tl.store(out_ptr + 3 * PADDED + 2, strands)
