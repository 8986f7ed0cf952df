"""Histogram top-p over stored block scores: the selecting half of decode selection, in exact integers."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# n blocks of a tile  b bins  P parts of a head's selection
import triton
import triton.language as tl

from rtpurbo.kernels.block_selection.plan import HISTOGRAM_WORDS, NUM_BINS

BINS = tl.constexpr(NUM_BINS)
BINS_PER_NAT = tl.constexpr(8.0)
MASS_ONE = tl.constexpr(4294967296.0)
# Masses of one tile as two limbs, whose sums fit 32 bits: 2^38 = 64 keys * 2^32, up to 4096 blocks.
LIMB_BITS = tl.constexpr(19)
LIMB = tl.constexpr(524288.0)
# A part has at most 4096 blocks of 64 keys: its mass stays below 2^51, its count within the 13 bits above.
COUNT_SHIFT = tl.constexpr(51)
COUNT_MASK = tl.constexpr((1 << 13) - 1)
PACKED_MASS = tl.constexpr((1 << 51) - 1)
# A part's histogram in memory: its bins, and one for the forced blocks.
FORCED = BINS
ROW = tl.constexpr(HISTOGRAM_WORDS)
# A part ends at a multiple of this, whatever the tiles of the loops.
PART_UNIT = tl.constexpr(256)


@triton.jit
def block_bin(block_max, top):
    """Histogram bin of a block: 0 for the highest maximum, 255 open-ended."""
    return tl.minimum((top - block_max) * BINS_PER_NAT, 255.0).to(tl.int32)


@triton.jit
def block_mass(block_max, block_sum, top):
    """round(2^32 * l * exp(m - top)) as int64: the products are fp32, their sums exact."""
    return (block_sum * tl.exp(block_max - top) * MASS_ONE + 0.5).to(tl.int64)


@triton.jit
def mass_needed(total, TOP_P: tl.constexpr):
    return tl.ceil(total.to(tl.float64) * tl.full([], TOP_P, tl.float64)).to(tl.int64)


@triton.jit
def is_forced(block, blocks, SINK_BLOCKS: tl.constexpr):
    return (block < SINK_BLOCKS) | (block >= blocks - 2)


@triton.jit
def parts_of(blocks, SELECT_TILE: tl.constexpr, PART_BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """Into how many parts a head's selection is cut, and how many blocks each has."""
    parts = tl.where(blocks <= SELECT_TILE, 1, tl.minimum(PARTS, tl.cdiv(blocks, PART_BLOCKS)))
    return parts, tl.cdiv(tl.cdiv(blocks, parts), PART_UNIT) * PART_UNIT


@triton.jit
def limbs_of(block_max, block_sum, top):
    """`block_mass` as two limbs of 19 bits, low and high: 32-bit sums are one instruction a warp, 64-bit ones are ten."""
    mass = block_sum * tl.exp(block_max - top) * MASS_ONE + 0.5
    # Powers of two and the difference are exact in fp32.
    high = (mass / LIMB).to(tl.int32)
    return (mass - high.to(tl.float32) * LIMB).to(tl.int32), high


@triton.jit
def mass_of(low, high):
    return low.to(tl.int64) + (high.to(tl.int64) << LIMB_BITS)


@triton.jit
def four_sums(a_n, b_n, c_n, d_n):
    """Sums of four int32 columns in one exchange between warps: joined along new axes they stay in their thread."""
    ab_2, cd_2 = tl.split(tl.sum(tl.join(tl.join(a_n, b_n), tl.join(c_n, d_n)), axis=0))
    a, b = tl.split(ab_2)
    c, d = tl.split(cd_2)
    return a, b, c, d


@triton.jit
def masses_below(bin_n, low_n, high_n, first, second):
    """Masses of the blocks whose bin is below each of two limits, as int64."""
    in_first_n = bin_n < first
    in_second_n = bin_n < second
    a, b, c, d = four_sums(
        tl.where(in_first_n, low_n, 0), tl.where(in_first_n, high_n, 0), tl.where(in_second_n, low_n, 0), tl.where(in_second_n, high_n, 0)
    )  # fmt: skip
    return mass_of(a, b), mass_of(c, d)


@triton.jit
def last_bin(bin_n, low_n, high_n, TOP_P: tl.constexpr):
    """The last bin taken: the largest n with (mass of the bins below n, forced blocks in bin -1) < needed; -1: only the forced ones.

    Two bits at a time from masked sums of the high limbs, which rarely miss it; exact masses tell, and find it where they did.
    """
    total_low, total_high, forced_low, forced_high = four_sums(
        low_n, high_n, tl.where(bin_n < 0, low_n, 0), tl.where(bin_n < 0, high_n, 0)
    )  # fmt: skip
    needed = mass_needed(mass_of(total_low, total_high), TOP_P)
    needed_high = (needed >> LIMB_BITS).to(tl.int32)
    last = tl.zeros([], tl.int32)
    for digit in range(4):
        step = 64 >> (2 * digit)
        a, b, c, nothing = four_sums(
            tl.where(bin_n < last + step, high_n, 0), tl.where(bin_n < last + 2 * step, high_n, 0),
            tl.where(bin_n < last + 3 * step, high_n, 0), tl.zeros_like(high_n),
        )  # fmt: skip
        last += ((a < needed_high).to(tl.int32) + (b < needed_high).to(tl.int32) + (c < needed_high).to(tl.int32)) * step
    below, upto = masses_below(bin_n, low_n, high_n, last, last + 1)
    if (below >= needed) | ((upto < needed) & (last < BINS - 1)):
        last = tl.zeros([], tl.int32)
        for bit in range(8):
            below, upto = masses_below(bin_n, low_n, high_n, last + (128 >> bit), 0)
            last += tl.where(below < needed, 128 >> bit, 0)
    return tl.where(mass_of(forced_low, forced_high) < needed, last, -1)


@triton.jit
def store_mask(mask_ptr, selected_n, start, blocks, TILE: tl.constexpr):
    """One bit a block, 32 to a word, of a tile that starts at a multiple of 32."""
    bit_n = selected_n.to(tl.int32) << (tl.arange(0, TILE) % 32)
    word_w = tl.arange(0, TILE // 32)
    tl.store(mask_ptr + start // 32 + word_w, tl.sum(tl.reshape(bit_n, [TILE // 32, 32]), axis=1), mask=start + word_w * 32 < blocks)


@triton.jit
def load_in_fours(ptr, blocks, TILE: tl.constexpr):
    """What is stored for the first blocks, four to a load; anything at or beyond `blocks`. Three numbers beyond them can be read."""
    block_n = tl.arange(0, TILE)
    return tl.load(ptr + block_n, mask=block_n // 4 * 4 < blocks, other=0.0, cache_modifier=".cg")


@triton.jit
def choose_whole(max_ptr, sum_ptr, blocks, TOP_P: tl.constexpr, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Select among blocks that fit one tile, in registers: which [TILE], and at which place of the list each of them stands."""
    block_n = tl.arange(0, TILE)
    valid_n = block_n < blocks
    selected_n = valid_n
    if TOP_P < 1.0:
        max_n = load_in_fours(max_ptr, blocks, TILE)
        sum_n = load_in_fours(sum_ptr, blocks, TILE)
        top = tl.max(tl.where(valid_n, max_n, float("-inf")))
        low_n, high_n = limbs_of(tl.where(valid_n, max_n, top), tl.where(valid_n, sum_n, 0.0), top)
        # Forced blocks count from the start: they sit in a bin before the first.
        bin_n = tl.where(is_forced(block_n, blocks, SINK_BLOCKS), -1, block_bin(tl.where(valid_n, max_n, top), top))
        selected_n = valid_n & (bin_n <= last_bin(bin_n, low_n, high_n, TOP_P))
    return selected_n, tl.cumsum(selected_n.to(tl.int32), axis=0) - 1


@triton.jit
def select_whole(
    max_ptr, sum_ptr, ids_ptr, mask_ptr, blocks, TOP_P: tl.constexpr, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr, MASKS: tl.constexpr
):  # fmt: skip
    """Select among blocks that fit one tile; returns the count. With MASKS one bit a block as well."""
    selected_n, place_n = choose_whole(max_ptr, sum_ptr, blocks, TOP_P, SINK_BLOCKS, TILE)
    tl.store(ids_ptr + place_n, tl.arange(0, TILE), mask=selected_n)
    if MASKS:
        store_mask(mask_ptr, selected_n, 0, blocks, TILE)
    return tl.sum(selected_n.to(tl.int32))


@triton.jit
def load_tile(ptr, start, hi, TILE: tl.constexpr):
    """What is stored for the blocks from `start` on; 0 at or beyond `hi`."""
    block_n = start + tl.arange(0, TILE)
    return tl.load(ptr + block_n, mask=block_n < hi, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_part(max_n, sum_n, max_ptr, sum_ptr, row_ptr, top, lo, hi, blocks, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Fill one part's row of histograms [ROW]: mass in the low 51 bits and number of the free blocks by bin, then the forced ones.

    max_n, sum_n: of the first tile. The caller loads them before a barrier, which keeps the assembler from moving each load to where
    its value is used, one trip to memory after the other. No other program writes this row: it is cleared here, and the barrier orders
    that before the additions.
    """
    bin_b = tl.arange(0, BINS)
    tl.store(row_ptr + bin_b, tl.zeros([BINS], tl.int64))
    tl.store(row_ptr + FORCED, tl.zeros([], tl.int64))
    tl.debug_barrier()
    for start in range(lo, hi, TILE):
        block_n = start + tl.arange(0, TILE)
        valid_n = block_n < hi
        max_n = tl.where(valid_n, max_n, top)
        packed_n = block_mass(max_n, sum_n, top) + (tl.full([], 1, tl.int64) << COUNT_SHIFT)
        bin_n = tl.where(is_forced(block_n, blocks, SINK_BLOCKS), FORCED, block_bin(max_n, top))
        tl.atomic_add(row_ptr + bin_n, packed_n, mask=valid_n, sem="relaxed", scope="gpu")
        max_n = load_tile(max_ptr, start + TILE, hi, TILE)
        sum_n = load_tile(sum_ptr, start + TILE, hi, TILE)


@triton.jit
def bins_and_offset(rows_ptr, part, parts, PARTS: tl.constexpr, TOP_P: tl.constexpr):
    """Whole bins from the top until forced + binned mass >= top_p * total; where this part's ids start."""
    part_p = tl.arange(0, PARTS)
    bin_b = tl.arange(0, BINS)
    forced_p = tl.load(rows_ptr + part_p * ROW + FORCED, mask=part_p < parts, other=0, cache_modifier=".cg")
    # One part after the other: a thread sums its own bins, and all loads are on their way at once.
    mass_b = tl.zeros([BINS], tl.int64)
    count_b = tl.zeros([BINS], tl.int32)
    for p in tl.static_range(PARTS):
        packed_b = tl.load(rows_ptr + p * ROW + bin_b, mask=bin_b < tl.where(parts > p, BINS, 0), other=0, cache_modifier=".cg")
        mass_b += packed_b & PACKED_MASS
        count_b += tl.where(part > p, (packed_b >> COUNT_SHIFT).to(tl.int32) & COUNT_MASK, 0)
    bins = tl.full([], BINS, tl.int32)
    if TOP_P < 1.0:
        upto_b = tl.cumsum(mass_b, axis=0) + tl.sum(forced_p & PACKED_MASS)
        needed = mass_needed(tl.max(upto_b), TOP_P)
        bins = tl.sum((upto_b - mass_b < needed).to(tl.int32))
    forced_count_p = (forced_p >> COUNT_SHIFT).to(tl.int32) & COUNT_MASK
    return bins, tl.sum(tl.where(bin_b < bins, count_b, 0)) + tl.sum(tl.where(part_p < part, forced_count_p, 0))


@triton.jit
def write_ids(
    max_n, max_ptr, ids_ptr, mask_ptr, offset, top, bins, lo, hi, blocks, SINK_BLOCKS: tl.constexpr, TILE: tl.constexpr, MASKS: tl.constexpr
):  # fmt: skip
    """Write the part's selected ids, ascending, from `offset` on; returns where they end. With MASKS one bit a block as well.

    max_n: the first tile's maxima, loaded before the caller waited for the other parts.
    """
    for start in range(lo, hi, TILE):
        block_n = start + tl.arange(0, TILE)
        valid_n = block_n < hi
        max_n = tl.where(valid_n, max_n, top)
        selected_n = valid_n & (is_forced(block_n, blocks, SINK_BLOCKS) | (block_bin(max_n, top) < bins))
        place_n = offset + tl.cumsum(selected_n.to(tl.int32), axis=0) - 1
        tl.store(ids_ptr + place_n, block_n, mask=selected_n)
        if MASKS:
            store_mask(mask_ptr, selected_n, start, hi, TILE)
        offset += tl.sum(selected_n.to(tl.int32))
        max_n = load_tile(max_ptr, start + TILE, hi, TILE)
    return offset
