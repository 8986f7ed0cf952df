"""Which key tiles a block of query rows needs: window + sinks over a ring or a cache by position, everything, or listed blocks."""

# Triton's kernel language is not typed Python: launches take options and constants that signatures do not name.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# A key tile is a run of consecutive positions that lies contiguously in one source: the chunk (or the cache by position), the ring's
# window slots before or after the write position, or the ring's sinks. Tiles are aligned to the END of their run, so that none reaches
# past the last written row: an unwritten row may hold NaN, and 0 * NaN would reach the sum. Rows before a tensor's first row read as zero.
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CHUNK = tl.constexpr(0)
RING_WINDOW = tl.constexpr(1)
RING_SINKS = tl.constexpr(2)
UNBOUNDED = tl.constexpr(1 << 30)


@triton.jit
def plan_tiles(t0, length, origin, count, window, sinks, M: tl.constexpr, N: tl.constexpr, HAS_RING: tl.constexpr):
    """Key tiles of the query rows t0 ... min(t0 + M, count) - 1 (t0 < count): (masked tiles, full tiles, details).

    origin: position of row 0 of the first source, `length` for a chunk and 0 for a cache by position. A full tile is visible to each
    of these rows; a masked one holds a border (diagonal, window edge, sinks) and needs `oldest_visible`. A window of UNBOUNDED is
    dense attention. Where no row's window starts after the sinks, they are no separate run: everything up to the query is visible.
    """
    first = length + t0
    last = length + tl.minimum(t0 + M, count) - 1
    joined = last - window + 1 <= sinks
    width = tl.where(joined, UNBOUNDED, window)
    low = tl.maximum(first - width + 1, 0)
    full_low = last - width + 1
    chunk_low = tl.maximum(tl.maximum(low, origin), tl.where(joined, 0, sinks))
    diagonal = tl.maximum(tl.cdiv(last - first, N), 1)
    chunk_full = tl.maximum((last + 1 - tl.maximum(chunk_low, full_low)) // N - diagonal, 0)
    chunk_masked = tl.cdiv(last + 1 - chunk_low, N) - chunk_full
    chunk_sinks_end = tl.maximum(tl.where(joined, 0, sinks), origin)
    chunk_sinks = tl.cdiv(chunk_sinks_end - origin, N)
    masked = chunk_masked + chunk_sinks
    full = chunk_full
    lap = length
    new_low, new_full, new_masked = length, 0, 0
    old_low, old_full, old_masked = length, 0, 0
    if HAS_RING:
        # Position of the ring's first window slot in the lap that is being written; before it, the previous lap.
        lap = length - tl.maximum(length - sinks, 0) % window
        old_low = tl.maximum(low, sinks)
        new_low = tl.maximum(old_low, lap)
        new_full = tl.maximum(length - tl.maximum(new_low, full_low), 0) // N
        new_masked = tl.cdiv(tl.maximum(length - new_low, 0), N) - new_full
        old_full = tl.maximum(lap - tl.maximum(old_low, full_low), 0) // N
        old_masked = tl.cdiv(tl.maximum(lap - old_low, 0), N) - old_full
        masked += new_masked + old_masked + tl.cdiv(tl.minimum(sinks, length), N)
        full += new_full + old_full
    chunk = (width, origin, last + 1, chunk_low, diagonal, chunk_full, chunk_masked, chunk_sinks, chunk_sinks_end)
    ring = (lap, new_low, new_full, new_masked, old_low, old_full, old_masked)
    return masked, full, chunk + ring


@triton.jit
def masked_tile(x, details, window, sinks, N: tl.constexpr, HAS_RING: tl.constexpr):
    """Tile x of the masked ones: (source, first row in it, first position, lowest position of the run, width of its window)."""
    width, origin, end, chunk_low, diagonal, chunk_full, chunk_masked, chunk_sinks, chunk_sinks_end = details[:9]
    k = tl.where(x < diagonal, x, x + chunk_full)
    source = CHUNK
    shift = origin
    low = chunk_low
    position = end - (k + 1) * N
    x -= chunk_masked
    in_sinks = x >= 0
    low = tl.where(in_sinks, origin, low)
    width = tl.where(in_sinks, UNBOUNDED, width)
    position = tl.where(in_sinks, chunk_sinks_end - (x + 1) * N, position)
    if HAS_RING:
        lap, new_low, new_full, new_masked, old_low, old_full, old_masked = details[9:]
        x -= chunk_sinks
        in_new = x >= 0
        width = tl.where(in_new, details[0], width)
        low = tl.where(in_new, new_low, low)
        shift = tl.where(in_new, lap, shift)
        position = tl.where(in_new, origin - (x + new_full + 1) * N, position)
        source = tl.where(in_new, RING_WINDOW, CHUNK)
        x -= new_masked
        in_old = x >= 0
        low = tl.where(in_old, old_low, low)
        shift = tl.where(in_old, lap - window, shift)
        position = tl.where(in_old, lap - (x + old_full + 1) * N, position)
        x -= old_masked
        in_ring_sinks = x >= 0
        low = tl.where(in_ring_sinks, 0, low)
        width = tl.where(in_ring_sinks, UNBOUNDED, width)
        shift = tl.where(in_ring_sinks, 0, shift)
        position = tl.where(in_ring_sinks, tl.minimum(sinks, origin) - (x + 1) * N, position)
        source = tl.where(in_ring_sinks, RING_SINKS, source)
    return source, position - shift, position, low, width


@triton.jit
def full_tile(x, details, window, N: tl.constexpr, HAS_RING: tl.constexpr):
    """Tile x of the full ones: (source, first row in it)."""
    width, origin, end, chunk_low, diagonal, chunk_full = details[:6]
    row = end - origin - (x + diagonal + 1) * N
    source = CHUNK
    if HAS_RING:
        lap, new_low, new_full, new_masked, old_low, old_full, old_masked = details[9:]
        x -= chunk_full
        source = tl.where(x >= 0, RING_WINDOW, CHUNK)
        row = tl.where(x >= 0, origin - lap - (x + 1) * N, row)
        x -= new_full
        row = tl.where(x >= 0, window - (x + 1) * N, row)
    return source, row


@triton.jit
def plan_listed(ids_row, listed, first, BLOCK: tl.constexpr, SUB: tl.constexpr):
    """Key tiles of a row of `listed` block ids, ascending: (masked tiles, full tiles); a tile is one of SUB parts of a block.

    At most the last two blocks reach past the oldest query, position `first`: their tiles are masked.
    """
    newest = tl.load(ids_row + tl.maximum(listed - 1, 0))
    previous = tl.load(ids_row + tl.maximum(listed - 2, 0))
    masked = 1 + (previous * BLOCK + BLOCK - 1 > first).to(tl.int32)
    masked = tl.minimum(tl.where(newest * BLOCK + BLOCK - 1 > first, masked, 1), listed)
    return masked * SUB, (listed - masked) * SUB


@triton.jit
def listed_tile(x, ids_row, listed, end, N: tl.constexpr, SUB: tl.constexpr):
    """Tile x of a row of block ids, from the last one on: (first row, which is its position, lowest position that belongs to it)."""
    low = (tl.load(ids_row + listed - 1 - x // SUB) * SUB + SUB - 1 - x % SUB) * N
    return tl.minimum(low, end - N), low


@triton.jit
def oldest_visible(i, low, width):
    """The query at position i sees the keys of a masked tile's run from here to i."""
    return tl.maximum(low, i - width + 1)


@triton.jit
def unit_of_work(index, tiles, B, H, parts, M: tl.constexpr):
    """(sequence, query head, part of its keys, first query row) of a work index.

    Heads run fastest and share K/V in L2, long rows come first.
    """
    h = index % H
    b = (index // H) % B
    part = (index // (H * B)) % parts
    return b, h, part, (tiles - 1 - index // (H * B * parts)) * M


@triton.jit
def rounds_of(program, programs, units):
    """How many units of work a program takes when they are dealt in rounds, every second round in reverse order."""
    whole = units // programs
    place = tl.where(whole % 2 == 1, programs - 1 - program, program)
    return whole + (place < units - whole * programs).to(tl.int32)


@triton.jit
def index_in_round(x, program, programs):
    """The work index of a program in round x. Units shrink with their index: turning the order evens out what each program gets."""
    return x * programs + tl.where(x % 2 == 1, programs - 1 - program, program)
