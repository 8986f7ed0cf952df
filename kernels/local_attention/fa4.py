"""FlashAttention-4 (extra `fa4`) for the same masks: window + sinks through a mask function and block lists, dense through its causal
kernel."""

# The kernel languages are not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportMissingImports=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# B batch  T chunk tokens  S cached tokens  H query heads  K kv heads  D head dim  M query blocks  N listed key blocks
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 128


def installed() -> bool:
    """Whether FlashAttention-4's CuTe kernels can be imported; its package shares the name of older versions."""
    return importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None


@triton.jit
def _write_range(idx_ptr, count, low, high, WIDTH: tl.constexpr):
    """Append low ... high - 1; returns the new count."""
    n = tl.arange(0, WIDTH)
    tl.store(idx_ptr + count + n, low + n, mask=low + n < high)
    return count + tl.maximum(high - low, 0)


@triton.jit(do_not_specialize=["T", "blocks", "window", "sinks", "masked_width", "full_width"])
def _list_blocks(
    lengths_ptr, counts_ptr, masked_count_ptr, masked_ptr, full_count_ptr, full_ptr, T, blocks, window, sinks, masked_width, full_width,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One program: the key blocks that a block of queries sees in part (diagonal, window edge, sinks) and those that it sees whole."""
    m, b = tl.program_id(0), tl.program_id(1)
    length, count = tl.load(lengths_ptr + b), tl.load(counts_ptr + b)
    row = b * blocks + m
    first = length + m * BLOCK
    last = length + tl.minimum((m + 1) * BLOCK, count) - 1
    full_end = (first + 1) // BLOCK
    full_low = tl.minimum(tl.maximum(tl.cdiv(first + BLOCK - window, BLOCK), 0), full_end)
    edge = tl.minimum(tl.maximum(first - window + 1, 0) // BLOCK, full_low)
    masked, full = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    if m * BLOCK < count:
        masked_row = masked_ptr + row * masked_width
        masked = _write_range(masked_row, masked, 0, tl.minimum(tl.cdiv(sinks, BLOCK), edge), MASKED)
        masked = _write_range(masked_row, masked, edge, full_low, MASKED)
        masked = _write_range(masked_row, masked, full_end, last // BLOCK + 1, MASKED)
        full = _write_range(full_ptr + row * full_width, full, full_low, full_end, FULL)
    tl.store(masked_count_ptr + row, masked)
    tl.store(full_count_ptr + row, full)


def list_blocks(
    lengths_B: torch.Tensor, counts_B: torch.Tensor, T: int, S: int, window: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key blocks of 128 for every block of 128 queries of a chunk: (count, ids) seen in part, (count, ids) seen whole.

    int32 [B, 1, M] and [B, 1, M, N]; a row's queries are positions length + m * 128 ... of a cache by position. In one launch.
    """
    B, M, keys = len(lengths_B), triton.cdiv(T, BLOCK), triton.cdiv(S, BLOCK)
    masked_width = min(6 + triton.cdiv(sinks, BLOCK), keys)
    full_width = min(window // BLOCK + 1, keys)
    device = lengths_B.device
    counts = [torch.empty((B, 1, M), dtype=torch.int32, device=device) for _ in range(2)]
    ids = [torch.empty((B, 1, M, width), dtype=torch.int32, device=device) for width in (masked_width, full_width)]
    _list_blocks[(M, B)](
        lengths_B, counts_B, counts[0], ids[0], counts[1], ids[1], T, M, window, sinks, masked_width, full_width,
        BLOCK=BLOCK, MASKED=triton.next_power_of_2(masked_width), FULL=triton.next_power_of_2(full_width), num_warps=1,
    )  # fmt: skip
    return counts[0], ids[0], counts[1], ids[1]


@functools.cache
def _visible(window: int, sinks: int) -> Callable[..., Any]:
    """The mask function: FlashAttention-4 compiles one kernel for each window and number of sinks."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def visible(batch, head, row, j, seqlen_info, aux_tensors):
        i = row + scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        inside = j > i - scalar_to_ssa(window, cutlass.Int32)
        return (j <= i) & (inside | (j < scalar_to_ssa(sinks, cutlass.Int32)))

    return visible


def launch(
    q_BTHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, lengths_B: torch.Tensor | None, counts_B: torch.Tensor,
    out_BTHD: torch.Tensor, lse_BHT: torch.Tensor | None, *, window: int | None, sinks: int, scale: float,
) -> None:  # fmt: skip
    """Write out (and lse) for a cache by position; window None: dense. lengths None: no token before the chunk, S = T.

    Rows at or beyond counts give 0 and -inf. Values of keys that were not written must be finite: FlashAttention-4 multiplies them by 0.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    B, T = q_BTHD.shape[:2]
    used: dict[str, Any] = {}
    if lengths_B is not None:
        used = {"seqused_q": counts_B, "seqused_k": lengths_B + counts_B}
    if window is None:
        mask: dict[str, Any] = {"causal": True}
    else:
        # Without lengths the rows beyond the counts compute too (and are cleared below): their lists must hold what they would see.
        start = torch.zeros_like(counts_B) if lengths_B is None else lengths_B
        rows = torch.full_like(counts_B, T) if lengths_B is None else counts_B
        masked_count, masked, full_count, full = list_blocks(start, rows, T, k_BSKD.shape[1], window, sinks)
        lists = BlockSparseTensorsTorch(masked_count, masked, full_count, full, block_size=(BLOCK, BLOCK))
        mask = {"mask_mod": _visible(window, sinks), "block_sparse_tensors": lists}
    _flash_attn_fwd(q_BTHD, k_BSKD, v_BSKD, softmax_scale=scale, out=out_BTHD, lse=lse_BHT, **used, **mask)
    empty_BT = torch.arange(T, device=q_BTHD.device) >= counts_B[:, None]
    out_BTHD.masked_fill_(empty_BT[:, :, None, None], 0.0)
    if lse_BHT is not None:
        lse_BHT.masked_fill_(empty_BT[:, None], float("-inf"))
