"""Prefill attention cut along the keys: how many parts fill the GPU evenly, and the launch that merges them."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# P parts  B batch  T chunk tokens  K kv heads  G query heads per kv head  D head dim  H = K * G
import torch
import triton
import triton.language as tl

MAX_PARTS = 4
# Keys of a part: below, writing and merging parts costs more than an uneven last round of work.
MIN_KEYS = 4096
# With so many rounds of work an uneven last one costs little.
MANY_ROUNDS = 6
PARTS_BYTES = 160 << 20


def parts_for(units: int, programs: int, keys: int, unit_bytes: int) -> int:
    """Parts along the keys for `units` equal pieces of work on `programs` processors; unit_bytes: fp32 output of a piece.

    The rounds of work are whole: 320 pieces on 132 processors take 3 rounds, as long as 396. Cut in two they take 5 half rounds.
    """
    if units >= MANY_ROUNDS * programs:
        return 1

    def cost(parts: int) -> float:
        return -(-units * parts // programs) / parts

    fitting = [p for p in range(1, MAX_PARTS + 1) if p == 1 or (keys >= p * MIN_KEYS and p * units * unit_bytes <= PARTS_BYTES)]
    best = min(fitting, key=cost)
    return best if cost(best) <= 0.93 * cost(1) else 1


@triton.jit(do_not_specialize=["T", "B", "H", "GROUP"])
def _merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_ob, stride_ot, stride_ok, stride_og, T, B, H, GROUP,
    PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head. parts [P, B, T, H, D] and their lse [P, B, H, T], fp32."""
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    valid = t < T
    best = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        lse = tl.load(part_lse_ptr + ((part * B + b) * H + h) * T + t, mask=valid, other=float("-inf"))
        best = tl.maximum(best, lse, propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(best == float("-inf"), 0.0, best)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    for part in tl.static_range(PARTS):
        lse = tl.load(part_lse_ptr + ((part * B + b) * H + h) * T + t, mask=valid, other=float("-inf"))
        weight = tl.exp(lse - shift)
        total += weight
        x_ptrs = part_ptr + (((part * B + b) * T + t[:, None]) * H + h) * D + d[None, :]
        out += weight[:, None] * tl.load(x_ptrs, mask=valid[:, None], other=0.0)
    safe = tl.where(total == 0.0, 1.0, total)
    out_ptrs = out_ptr + b * stride_ob + (h // GROUP) * stride_ok + (h % GROUP) * stride_og + t.to(tl.int64)[:, None] * stride_ot
    tl.store(out_ptrs + d[None, :], (out / safe[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
    if HAS_LSE:
        lse = tl.where(total == 0.0, float("-inf"), shift + tl.log(safe))
        tl.store(lse_ptr + (b * H + h) * T + t, lse, mask=valid)


def merge_parts(part_PBTHD: torch.Tensor, part_PBHT: torch.Tensor, out_BTKGD: torch.Tensor, lse_BHT: torch.Tensor | None) -> None:
    """out = sum_p exp(lse_p - lse) part_p and lse = log sum_p exp(lse_p), for parts over disjoint keys; rows without key give 0, -inf."""
    P, B, T, H, D = part_PBTHD.shape
    _merge[(triton.cdiv(T, 32), B * H)](
        part_PBTHD, part_PBHT, out_BTKGD, out_BTKGD if lse_BHT is None else lse_BHT, *out_BTKGD.stride()[:4], T, B, H,
        out_BTKGD.shape[3], PARTS=P, ROWS=32, D=D, HAS_LSE=lse_BHT is not None, num_warps=4,
    )  # fmt: skip
