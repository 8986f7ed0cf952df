"""Steps of the one-launch decode: how its programs divide work, tell each other what is there, select, and store results."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  X jobs (a retrieval head of a sequence)  G heads of a product (padded)  D head dim  K kv heads
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.arrival import signal, wait_until
from rtpurbo.kernels.block_selection.histogram import ROW, bins_and_offset, load_tile, parts_of, select_whole, sum_part, write_ids
from rtpurbo.kernels.launch import triton_release

# Counters and the stamps of a program lie in memory lines of their own.
LINE = tl.constexpr(16)
# From release 3.7 on Triton's compiler knows nothing of what a while loop returns nor of what is computed from it, and does not pipeline
# loads whose addresses depend on it: there the words are loaded once more.
LOADS_AGAIN = tl.constexpr(triton_release() >= (3, 7))


@triton.jit
def at(values_x, index_x, index):
    return tl.sum(tl.where(index_x == index, values_x, 0))


@triton.jit
def before(values_x, index_x, index):
    return tl.sum(tl.where(index_x < index, values_x, 0))


@triton.jit
def share_start(place, larger, share):
    """Where the share of a place begins: the first `larger` of them have one more."""
    return place * share + tl.minimum(place, larger)


@triton.jit
def place_of(unit, larger, share):
    """In whose share a unit lies."""
    beyond = unit - larger * (share + 1)
    return tl.where(beyond < 0, unit // (share + 1), larger + beyond // tl.maximum(share, 1))


@triton.jit
def stamp(stamp_ptr, program, n: tl.constexpr, STAMPS: tl.constexpr):
    """The time in ns at which a program came here, where benchmarks/decode.py asks for it; see `fused.STAMP_NAMES`."""
    if STAMPS:
        tl.store(stamp_ptr + program * LINE + n, cuda.globaltimer())


@triton.jit
def ordered_key(value):
    """int32 that sorts like the fp32 value, so that an integer maximum serves."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def one_part_with(count):
    """What a part adds to a head's word: the number of parts in the upper half, of ids in the lower."""
    return count.to(tl.int64) + (tl.full([], 1, tl.int64) << 32)


@triton.jit
def counts_when_listed(word_ptrs_X, parts_X, WAITS: tl.constexpr):
    """Blocks of every list, once all parts of it are written: one trip to memory tells both, where Triton's compiler lets it."""
    word_X = tl.zeros_like(parts_X).to(tl.int64)
    if WAITS:
        missing = tl.full([], 1, tl.int32)
        while missing > 0:
            seen_X = tl.atomic_add(word_ptrs_X, tl.zeros_like(word_X), mask=parts_X > 0, sem="acquire", scope="gpu")
            missing = tl.sum(((parts_X > 0) & ((seen_X >> 32) < parts_X)).to(tl.int32))
            if not LOADS_AGAIN:
                word_X = seen_X
        tl.debug_barrier()
    if not WAITS or LOADS_AGAIN:
        word_X = tl.load(word_ptrs_X, mask=parts_X > 0, other=0, cache_modifier=".cg")
    else:
        word_X = tl.where(parts_X > 0, word_X, 0)
    return word_X.to(tl.int32)


@triton.jit
def roles(program, programs, processors, jobs, scorers, batch, num_local, local_units, STEP_UNITS: tl.constexpr):
    """Who selects, who attends for the local heads, and in which order programs take parts of lists.

    The first `jobs` programs select. Selecting is bound by instructions: where few do, the programs that share their multiprocessors
    (`processors` further, as a GPU places them) do nothing beside it. The others attend for the local heads. Where half of the programs
    have nothing to score, they begin at once and do it alone, no more of them than save a whole step, those beside selectors last.
    Every program attends to lists, those first that only wait for them. With one sequence every local job is a strand of its own with
    as many places: two spans in a share take almost twice as long as one.

    Returns selectors, the program's number among them (negative: it is none); workers, its number among them (at or beyond `workers`:
    it is none); its turn at the lists; strands.
    """
    all_select = jobs * 3 > programs * 2
    only_select = tl.where(all_select, 0, jobs)
    beside = tl.where((jobs * 3 <= programs) & (jobs <= processors) & (processors < programs), jobs, 0)
    free = programs - only_select - beside
    few_score = scorers * 2 <= programs
    idle = tl.where(few_score, programs - beside - tl.maximum(scorers, only_select), free)
    # Descending: scorers are the first programs.
    worker = free - 1 - (program - only_select - tl.where(program >= processors, beside, 0))
    worker += tl.where(worker >= idle, beside, 0)
    worker = tl.where((program >= processors) & (program < processors + beside), idle + program - processors, worker)
    is_selector = program < only_select
    worker = tl.where(is_selector, programs, worker)

    workers = tl.where(few_score, idle + beside, idle)
    strands = tl.where((batch == 1) & (num_local <= workers), tl.maximum(num_local, 1), 1)
    if few_score:
        strand_units = local_units // strands
        steps = tl.cdiv(tl.cdiv(strand_units, workers // strands), STEP_UNITS)
        needed = tl.cdiv(strand_units, tl.maximum(steps, 1) * STEP_UNITS)
        workers = tl.minimum(workers, tl.maximum(needed, 1) * strands)
    waiting = free + beside - workers
    turn = tl.where(worker < workers, programs - workers + worker, worker - workers)
    turn = tl.where(is_selector, waiting + program, turn)
    selector = tl.where(is_selector | all_select, program, -1)
    return tl.where(all_select, programs, jobs), selector, workers, worker, turn, strands


@triton.jit
def part_of(
    job, max_parts, batch_B, blocks_B, num_heads, SELECT_TILE: tl.constexpr, PART_BLOCKS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Row (a head of a sequence) and part of a job, how many parts the row has, its blocks, and the part's first and end block."""
    row = job // max_parts
    part = job % max_parts
    blocks = at(blocks_B, batch_B, row // num_heads)
    parts, part_blocks = parts_of(blocks, SELECT_TILE, PART_BLOCKS, PARTS)
    lo = part * part_blocks
    return row, part, parts, blocks, lo, tl.minimum(lo + part_blocks, blocks)


@triton.jit
def select_jobs(
    selector, selectors, jobs, max_parts, batch_B, blocks_B, num_heads, capacity, max_ptr, sum_ptr, top_ptr, histogram_ptr,
    head_counter_ptr, listed_ptr, ids_ptr, count_ptr, stamp_ptr, program,
    SUMS: tl.constexpr, WRITES: tl.constexpr, TOP_P: tl.constexpr, SINK_BLOCKS: tl.constexpr,
    SELECT_TILE: tl.constexpr, PART_BLOCKS: tl.constexpr, PARTS: tl.constexpr, PARTED: tl.constexpr, STAMPS: tl.constexpr,
):  # fmt: skip
    """One selector's share of the jobs: a head, or (with PARTED) a part of one whose histograms must be summed before any id is written."""
    # A dynamic bound, not a branch: each loop is compiled once.
    whole = tl.where(max_parts == 1, jobs, 0) if PARTED else jobs
    parted = jobs - whole
    if SUMS:
        for row in range(selector, whole, selectors):
            blocks = at(blocks_B, batch_B, row // num_heads)
            start = (tl.zeros([], tl.int64) + row) * capacity
            count = select_whole(
                max_ptr + start, sum_ptr + start, ids_ptr + start, ids_ptr, blocks, TOP_P, SINK_BLOCKS, SELECT_TILE, False
            )  # fmt: skip
            tl.store(count_ptr + row, count)
            signal(listed_ptr + row, one_part_with(count))
    if SUMS and PARTED:
        for job in range(selector, parted, selectors):
            row, part, parts, blocks, lo, hi = part_of(job, max_parts, batch_B, blocks_B, num_heads, SELECT_TILE, PART_BLOCKS, PARTS)
            if part < parts:
                start = (tl.zeros([], tl.int64) + row) * capacity
                max_n = load_tile(max_ptr + start, lo, hi, PART_BLOCKS)
                sum_n = load_tile(sum_ptr + start, lo, hi, PART_BLOCKS)
                top = value_of_key(tl.load(top_ptr + row, cache_modifier=".cg"))
                sum_part(
                    max_n, sum_n, max_ptr + start, sum_ptr + start, histogram_ptr + (row * PARTS + part) * ROW, top, lo, hi, blocks,
                    SINK_BLOCKS, PART_BLOCKS,
                )  # fmt: skip
                stamp(stamp_ptr, program, 4, STAMPS)
                signal(head_counter_ptr + 2 * row)
    if WRITES and PARTED:
        for job in range(selector, parted, selectors):
            row, part, parts, blocks, lo, hi = part_of(job, max_parts, batch_B, blocks_B, num_heads, SELECT_TILE, PART_BLOCKS, PARTS)
            if part < parts:
                start = (tl.zeros([], tl.int64) + row) * capacity
                top = value_of_key(tl.load(top_ptr + row, cache_modifier=".cg"))
                max_n = load_tile(max_ptr + start, lo, hi, PART_BLOCKS)
                wait_until(head_counter_ptr + 2 * row, parts, tl.zeros([], tl.int32))
                stamp(stamp_ptr, program, 5, STAMPS)
                bins, offset = bins_and_offset(histogram_ptr + row * PARTS * ROW, part, parts, PARTS, TOP_P)
                stamp(stamp_ptr, program, 6, STAMPS)
                end = write_ids(
                    max_n, max_ptr + start, ids_ptr + start, ids_ptr, offset, top, bins, lo, hi, blocks, SINK_BLOCKS, PART_BLOCKS,
                    False,
                )  # fmt: skip
                if part == parts - 1:
                    tl.store(count_ptr + row, end)
                signal(listed_ptr + row, one_part_with(end - offset))


@triton.jit
def store_normalised(out_ptr, stride_oh, row_G, used_G, acc_GD, sum_G, D: tl.constexpr, D_PADDED: tl.constexpr):
    dim_D = tl.arange(0, D_PADDED)
    out_GD = acc_GD / sum_G[:, None]
    tl.store(
        out_ptr + row_G[:, None] * stride_oh + dim_D[None, :], out_GD.to(out_ptr.dtype.element_ty),
        mask=used_G[:, None] & (dim_D < D)[None, :],
    )  # fmt: skip


@triton.jit
def store_partial(
    acc_ptr, best_ptr, sum_ptr, row_G, used_G, acc_GD, best_G, sum_G, D: tl.constexpr, D_PADDED: tl.constexpr
):  # fmt: skip
    dim_D = tl.arange(0, D_PADDED)
    tl.store(best_ptr + row_G, best_G, mask=used_G)
    tl.store(sum_ptr + row_G, sum_G, mask=used_G)
    tl.store(acc_ptr + row_G[:, None] * D + dim_D[None, :], acc_GD, mask=used_G[:, None] & (dim_D < D)[None, :])
