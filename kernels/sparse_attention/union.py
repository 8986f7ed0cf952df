"""Blocks that any head of a job selected, from one bit a block: counted, and listed for the program that reads them."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# G heads of a job (padded)  w words of 32 blocks  t words of a tile  y bits of a word  n blocks of a tile
import triton
import triton.language as tl

TILE_WORDS = tl.constexpr(8)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def bits_set(word_w):
    """Number of ones of int32 words: sums of 1, 2, 4 bits side by side, then of the bytes by a product."""
    word_w = word_w.to(tl.uint32, bitcast=True)
    word_w = word_w - ((word_w >> 1) & 0x55555555)
    word_w = (word_w & 0x33333333) + ((word_w >> 2) & 0x33333333)
    word_w = (word_w + (word_w >> 4)) & 0x0F0F0F0F
    return ((word_w * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def counts_of_union(mask_ptr, row_G, used_G, stride_row, words, W_PADDED: tl.constexpr):
    """Blocks that any of the heads selected, by word."""
    word_w = tl.arange(0, W_PADDED)
    words_Gw = tl.load(
        mask_ptr + row_G[:, None] * stride_row + word_w[None, :], mask=used_G[:, None] & (word_w < words)[None, :], other=0
    )  # fmt: skip
    return bits_set(tl.reduce(words_Gw, 0, either))


@triton.jit
def list_union(
    mask_ptr, list_ptr, heads_ptr, row_G, used_G, stride_row, words, first, end, W_PADDED: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Write the union's blocks number first ... end - 1, ascending, and for each the heads that selected it (bit g: head g).

    The caller's barrier makes them visible to its program.
    """
    count_w = counts_of_union(mask_ptr, row_G, used_G, stride_row, words, W_PADDED)
    upto_w = tl.cumsum(count_w, axis=0)
    first_word = tl.sum((upto_w <= first).to(tl.int32))
    end_word = tl.minimum(tl.sum((upto_w < end).to(tl.int32)) + 1, words)
    before = tl.sum(tl.where(tl.arange(0, W_PADDED) < first_word, count_w, 0))
    word_t = tl.arange(0, TILE_WORDS)
    bit_y = tl.arange(0, 32)
    block_n = tl.arange(0, TILE_WORDS * 32)
    for start in range(first_word, end_word, TILE_WORDS):
        words_Gt = tl.load(
            mask_ptr + row_G[:, None] * stride_row + start + word_t[None, :], mask=used_G[:, None] & (start + word_t < words)[None, :],
            other=0,
        )  # fmt: skip
        bits_Gty = (words_Gt[:, :, None] >> bit_y[None, None, :]) & 1
        heads_n = tl.reshape(tl.sum(bits_Gty << tl.arange(0, G)[:, None, None], axis=0), [TILE_WORDS * 32])
        chosen_n = (heads_n != 0).to(tl.int32)
        number_n = before + tl.cumsum(chosen_n, axis=0) - chosen_n
        wanted_n = (chosen_n != 0) & (number_n >= first) & (number_n < end)
        tl.store(list_ptr + number_n, start * 32 + block_n, mask=wanted_n)
        tl.store(heads_ptr + number_n, heads_n, mask=wanted_n)
        before += tl.sum(chosen_n)
