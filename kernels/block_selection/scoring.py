"""Index scores of one query token, reduced to (maximum, sum of exponentials) per block: the streaming half of decode selection."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# G heads of a group (padded)  R index dim
import triton
import triton.language as tl
from triton import knobs

from rtpurbo.kernels.division import stages_that_fit
from rtpurbo.kernels.launch import triton_release

# From release 3.7 on Triton gives products of eight columns to Hopper's asynchronous unit, which reads its tile from shared memory
# while the next ones arrive. Engines, whose kernels any release may have compiled, always leave room for it.
HELD_TILES = int(triton_release() >= (3, 7))
MOST_HELD_TILES = 1
# The interpreter multiplies bf16 numbers only as fp32.
BF16_PRODUCT = tl.constexpr(tl.float32 if knobs.runtime.interpret else tl.bfloat16)


def score_stages(wanted: int, tile_bytes: int, pipeline_bytes: int, held_tiles: int | None) -> int:
    """Stages of the scoring loop that fit into shared memory; held_tiles None: as the installed Triton needs."""
    return stages_that_fit(wanted, tile_bytes, pipeline_bytes, held_steps=HELD_TILES if held_tiles is None else held_tiles)


@triton.jit
def score_chunk(
    q_GR,
    set_slot_G,
    k_base,
    max_ptrs_G,
    sum_ptrs_G,
    head_G,
    first_tile,
    end_tile,
    length,
    sets_in_group,
    stride_ks,
    stride_ki,
    scale,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    G: tl.constexpr,
    SETS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write (m_b, l_b) of the chunk's blocks for the group's heads; returns the largest m_b per head.

    One column of the product a head: K_set [tokens, R] times q^T with zeros for the heads of other sets, summed over the
    group's sets, so that heads with keys of their own fill the matrix unit as well as heads that share one set. Where keys are
    narrower than fp32, the query is rounded to bf16: the matrix unit has no fp32.

    Rows of a tile are ordered so that a warp holds whole blocks in the layouts that Triton gives products (16 rows a
    warp, then the next warp, then the next register): row = ((x * SUB + y) * WARPS + warp) * 16 + z is token y * 16 + z
    of block x * WARPS + warp. The reductions over a block then stay inside a warp.
    """
    TILE: tl.constexpr = TILE_BLOCKS * BLOCK
    SUB: tl.constexpr = BLOCK // 16
    ROUNDS: tl.constexpr = TILE_BLOCKS // WARPS
    if k_base.dtype.element_ty.primitive_bitwidth < 32 and q_GR.dtype == tl.float32:
        q_GR = q_GR.to(tl.bfloat16).to(BF16_PRODUCT)
    row_t = tl.arange(0, TILE)
    warp_t = (row_t // 16) % WARPS
    round_t = row_t // (16 * WARPS)
    offset_t = ((round_t // SUB) * WARPS + warp_t) * BLOCK + (round_t % SUB) * 16 + row_t % 16
    dim_R = tl.arange(0, R_PADDED)
    offset_tR = offset_t[:, None] * stride_ks + dim_R[None, :]
    best_nG = tl.full([TILE_BLOCKS, G], float("-inf"), tl.float32)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        visible_t = offset_t < length - tile * TILE
        k_tile = k_base + (tl.zeros([], tl.int64) + tile * TILE) * stride_ks
        logits_tG = tl.zeros([TILE, G], tl.float32)
        for slot in tl.static_range(SETS):
            mask_t = offset_t < tl.where(sets_in_group > slot, length - tile * TILE, 0)
            mask_tR = mask_t[:, None] if R == R_PADDED else mask_t[:, None] & (dim_R < R)[None, :]
            k_tR = tl.load(k_tile + slot * stride_ki + offset_tR, mask=mask_tR, other=0.0)
            q_slot_GR = tl.where((set_slot_G == slot)[:, None], q_GR, 0.0).to(q_GR.dtype)
            logits_tG = tl.dot(k_tR.to(q_GR.dtype), tl.trans(q_slot_GR), logits_tG, input_precision="ieee")
        logits_tG = tl.where(visible_t[:, None], logits_tG * scale, float("-inf"))
        logits_xywzG = tl.reshape(logits_tG, [ROUNDS, SUB, WARPS, 16, G])
        max_xywzG = tl.max(tl.max(logits_xywzG, axis=1, keep_dims=True), axis=3, keep_dims=True)
        # A block without visible key has maximum -inf; its exponentials must not see inf - inf.
        weight_xywzG = tl.exp(logits_xywzG - tl.where(max_xywzG == float("-inf"), 0.0, max_xywzG))
        sum_xywzG = tl.sum(tl.sum(weight_xywzG, axis=1, keep_dims=True), axis=3, keep_dims=True)
        max_nG = tl.reshape(max_xywzG, [TILE_BLOCKS, G])
        sum_nG = tl.reshape(sum_xywzG, [TILE_BLOCKS, G])
        block_n = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        written_nG = (block_n * BLOCK < length)[:, None] & (head_G >= 0)[None, :]
        tl.store(max_ptrs_G[None, :] + block_n[:, None], max_nG, mask=written_nG)
        tl.store(sum_ptrs_G[None, :] + block_n[:, None], sum_nG, mask=written_nG)
        best_nG = tl.maximum(best_nG, max_nG)
    return tl.max(best_nG, axis=0)
