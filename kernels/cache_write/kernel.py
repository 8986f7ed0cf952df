"""write_cache in Triton: rows are copied as 32-bit words; one program a tile of tokens, sequence and cache."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  T chunk tokens  t tokens of a tile  w words of a step
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rtpurbo.kernels.launch import Launch

TILE = 16
STEP = 256


@triton.jit
def copy_rows(source_ptr, cache_ptr, row_t, slot_t, kept_t, words, stride, STEP: tl.constexpr):
    for start in range(0, words, STEP):
        word_w = start + tl.arange(0, STEP)
        mask_tw = kept_t[:, None] & (word_w < words)[None, :]
        value_tw = tl.load(source_ptr + row_t[:, None] * stride + word_w[None, :], mask=mask_tw)
        tl.store(cache_ptr + slot_t[:, None] * words + word_w[None, :], value_tw, mask=mask_tw)


@triton.jit
def write_cache_kernel(
    first_ptr,  # int32 words of the chunks [B, T, words], rows a stride apart ...
    second_ptr,
    third_ptr,
    first_cache_ptr,  # ... and of the caches [B, slots, words]
    second_cache_ptr,
    third_cache_ptr,
    lengths_ptr,  # int32 [B]
    counts_ptr,  # int32 [B]
    visible_ptr,  # int32 [B]
    T,
    slots,
    first_words,
    second_words,
    third_words,
    first_stride,
    second_stride,
    third_stride,
    window,
    sinks,
    IS_RING: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    length, count = tl.load(lengths_ptr + batch), tl.load(counts_ptr + batch)
    t_t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position_t = length + t_t
    kept_t = t_t < tl.minimum(count, T)
    slot_t = position_t
    if IS_RING:
        slot_t = tl.where(position_t < sinks, position_t, sinks + (position_t - sinks) % window)
        kept_t = kept_t & ((position_t < sinks) | (position_t >= length + count - window))
    # Nested: the outer condition is decided when the kernel is compiled.
    if HAS_VISIBLE:  # noqa: SIM102
        if (tl.program_id(0) == 0) & (which == 0):
            tl.store(visible_ptr + batch, length + count)
    row_t = batch * T + t_t
    slot_t = batch * slots + slot_t
    if which == 0:
        copy_rows(first_ptr, first_cache_ptr, row_t, slot_t, kept_t, first_words, first_stride, STEP)
    elif which == 1:
        copy_rows(second_ptr, second_cache_ptr, row_t, slot_t, kept_t, second_words, second_stride, STEP)
    else:
        copy_rows(third_ptr, third_cache_ptr, row_t, slot_t, kept_t, third_words, third_stride, STEP)


def describe(
    caches: Sequence[torch.Tensor],
    chunks: Sequence[torch.Tensor],
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    window: int | None,
    sinks: int,
    visible_B: torch.Tensor | None = None,
) -> Launch:
    """The launch that writes the chunks, see `kernels.cache_write.write_cache`; visible_B (int32) gets lengths + counts.

    Chunks may be a slice of the heads of a contiguous tensor [B, T, heads, D].
    """
    B, T = chunks[0].shape[:2]
    places = [0, *range(1, len(caches)), *[0] * (3 - len(caches))]
    sources = [chunks[place].flatten(2).view(torch.int32) for place in places]
    targets = [caches[place].flatten(2).view(torch.int32) for place in places]
    tile = 1 if T == 1 else TILE
    return Launch(
        kernel=write_cache_kernel,
        grid=(triton.cdiv(T, tile), B, len(caches)),
        arguments=(
            *sources, *targets, lengths_B, counts_B, lengths_B if visible_B is None else visible_B,
            T, caches[0].shape[1], *(source.shape[2] for source in sources), *(source.stride(1) for source in sources),
            1 if window is None else window, sinks,
        ),
        constants={"IS_RING": window is not None, "HAS_VISIBLE": visible_B is not None, "TILE": tile, "STEP": STEP},
    )  # fmt: skip
