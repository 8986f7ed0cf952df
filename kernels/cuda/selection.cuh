// Histogram top-p over the scored blocks of one head by one program, in exact integers: what kernels/block_selection describes.
#pragma once
#include "device.cuh"

#ifndef TOP_P
#define TOP_P 0.9
#endif

// Masses (2^32 * l * exp(m - top), at most 2^38) as two limbs, whose sums over a warp fit 32 bits.
// Sums over all parts of a head, at most 2^55, are two others, whose sums over all bins fit too.
constexpr int LIMB_BITS = 19, HIGH_BITS = 20, BINS = 256, SUM_BITS = 24;
// Of a block: (bin + 1) above the high limb; forced blocks lie in bin -1, places beyond the last block in a bin beyond all.
constexpr u32 HIGH_MASK = (1u << HIGH_BITS) - 1, NOWHERE = (BINS + 2) << HIGH_BITS;
// Blocks of a thread, at most: so many of a head are selected by one program, more of them in parts that exchange histograms.
#ifndef PART_ITEMS
#define PART_ITEMS 4
#endif
constexpr int PART_BLOCKS = PART_ITEMS * THREADS;

// Bins of a lane, where one warp looks for the last one that is taken: lane n has bins 8 n ... 8 n + 7. Bin -1 lies before them.
constexpr int LANE_BINS = BINS / 32, FORCED = LANE_BINS - 1;

struct alignas(16) Histogram {
    u32 low[FORCED + 1 + BINS], high[FORCED + 1 + BINS];  // at FORCED + 1 + bin: limbs of masses
    u32 blocks[FORCED + 1 + BINS];                        // of heads in parts
};

struct SelectionShared {
    Histogram bins;
    u32 earlier[FORCED + 1 + BINS];  // blocks of earlier parts
    int top[WARPS];
    u32 limit;                       // words below it are taken
    int taken, taken_earlier;        // of heads in parts, blocks: of all parts, of earlier ones
    int counts[(PART_ITEMS + 3) / 4 * WARPS];
};

// Into how many parts a head of so many blocks is cut.
__device__ __forceinline__ int parts_of(int blocks) { return max(1, ceil_div(blocks, PART_BLOCKS)); }

// Into how many the longest head is cut.
__device__ __forceinline__ int parts_now(const int* lengths, int batch) {
    int longest = 0;
#pragma unroll 1
    for (int b = 0; b < batch; b++) longest = max(longest, lengths[b]);
    return parts_of(ceil_div(longest, BLOCK));
}

// Which block of a program's is a thread's j-th: each warp has 32 * `each` neighbouring ones of every WARPS * 32 * `each`.
template <int ITEMS>
struct Blocks {
    static constexpr int EACH = ITEMS < 4 ? ITEMS : 4;
    int first, end, each;

    __device__ __forceinline__ Blocks(int first, int end) : first(first), end(end), each(min(EACH, (end - first + THREADS - 1) / THREADS)) {}
    __device__ __forceinline__ int operator[](int j) const {
        int n = first + ((j / EACH * WARPS + (int)threadIdx.x / 32) * each + j % EACH) * 32 + (int)threadIdx.x % 32;
        return j % EACH < each ? n : end;
    }
};

// Waits for the records of a program's blocks. Returns the highest maximum of all of them.
template <int ITEMS>
__device__ __forceinline__ float await_scores(
    SelectionShared& shared, const Record* records, const Blocks<ITEMS>& blocks, u32 launch, float (&best)[ITEMS], float (&sum)[ITEMS]
) {
    constexpr int BATCH = Blocks<ITEMS>::EACH;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float top = -infinity();
#pragma unroll
    for (int from = 0; from < ITEMS; from += BATCH) {
        Record seen[BATCH];
        await_all(seen, launch, [&](int j) {
            int n = blocks[from + j];
            return n < blocks.end ? peek(records + n) : Record{-infinity(), 0.f, 0.f, launch};
        });
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            best[from + j] = seen[j].a;
            sum[from + j] = seen[j].b;
            top = fmaxf(top, seen[j].a);
        }
    }
    int highest = __reduce_max_sync(FULL, ordered(top));
    if (lane == 0) shared.top[warp] = highest;
    __syncthreads();
    return from_ordered(__reduce_max_sync(FULL, shared.top[lane % WARPS]));
}

// A float of 0 ... 2^23 - 1 without its fraction, as an integer below and in the float: conversions run at a sixteenth of an addition's rate.
struct Whole {
    float x;  // 2^23 more

    __device__ __forceinline__ explicit Whole(float number) : x(add_toward_zero(number, 8388608.f)) {}
    __device__ __forceinline__ u32 bits() const { return __float_as_uint(x) - 0x4b000000; }
    __device__ __forceinline__ float number() const { return x - 8388608.f; }
};

// What a block counts: `bin + 1` above the high limb of its mass, and the low limb.
__device__ __forceinline__ void weigh(float best, float sum, float top, bool forced, u32& word, u32& low) {
    // Scores that are no numbers have no mass; fmaxf gives the other one.
    float mass = fmaxf(fmaf(sum * exp2_fast((best - top) * LOG2E), 4294967296.f, 0.5f), 0.5f);
    // Powers of two and the difference are exact.
    Whole high(mass * (1.f / (1 << LIMB_BITS))), bin(fminf((top - best) * 8.f, BINS - 1.f));
    word = (forced ? 0 : bin.bits() + 1) << HIGH_BITS | high.bits();
    low = Whole(mass - high.number() * (1 << LIMB_BITS)).bits();
}

// Gives what is taken, words below the limit, to `emit(place, block)`, places from `offset` on in ascending order of blocks, after the first thread
// told how many to `announce`.
template <int ITEMS, typename Announce, typename Emit>
__device__ __forceinline__ void write_taken(
    SelectionShared& shared, const u32 (&word)[ITEMS], u32 limit, const Blocks<ITEMS>& blocks, int offset, Announce announce, Emit emit
) {
    constexpr int EACH = Blocks<ITEMS>::EACH, TURNS = ITEMS / EACH, PLACES = TURNS * WARPS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 taken[ITEMS];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int many = 0;
#pragma unroll
        for (int j = turn * EACH; j < (turn + 1) * EACH; j++) many += __popc(taken[j] = __ballot_sync(FULL, word[j] < limit));
        if (lane == 0) shared.counts[turn * WARPS + warp] = many;
    }
    __syncthreads();
    // How many are taken before this warp's blocks of each turn: all lanes add up what they see of all counts, two sums of 16 bits at a time.
    u32 before[(TURNS + 1) / 2] = {}, all = 0;
#pragma unroll
    for (int n = 0; n < (PLACES + 31) / 32; n++) {
        int place = n * 32 + lane;
        u32 count = place < PLACES ? shared.counts[place] : 0;
        all += count;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) before[turn / 2] += place < turn * WARPS + warp ? count << turn % 2 * 16 : 0;
    }
#pragma unroll
    for (int turn = 0; turn < (TURNS + 1) / 2; turn++) before[turn] = warp_sum(before[turn]);
    all = warp_sum(all);
    if (threadIdx.x == 0) announce((int)all);
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int place = offset + (before[turn / 2] >> turn % 2 * 16 & 0xffff);
#pragma unroll
        for (int j = turn * EACH; j < (turn + 1) * EACH; j++) {
            if (taken[j] >> lane & 1) emit(place + __popc(taken[j] & ((1u << lane) - 1)), blocks[j]);
            place += __popc(taken[j]);
        }
    }
}

// Adds a warp's blocks to the histogram. Rows of 32 whose blocks are all of one bin, that of the first block, in sums: most are far below the top,
// or all are alike, and lanes of one bin would take turns.
template <int ITEMS>
__device__ __forceinline__ void count_blocks(Histogram& bins, const u32 (&word)[ITEMS], const u32 (&low)[ITEMS], bool parts) {
    auto add = [&](u32 bin_and_one, u32 low, u32 high, u32 blocks) {
        atomicAdd(&bins.low[FORCED + bin_and_one], low);
        atomicAdd(&bins.high[FORCED + bin_and_one], high);
        if (parts) atomicAdd(&bins.blocks[FORCED + bin_and_one], blocks);
    };
    const u32 first = __shfl_sync(FULL, word[0] >> HIGH_BITS, 0);
    bool alike[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) alike[j] = __all_sync(FULL, word[j] >> HIGH_BITS == first);
    u32 sums[2] = {0, 0}, rows = 0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        u32 bin_and_one = word[j] >> HIGH_BITS;
        if (alike[j]) sums[0] += low[j], sums[1] += word[j] & HIGH_MASK, rows++;
        else if (bin_and_one <= BINS) add(bin_and_one, low[j], word[j] & HIGH_MASK, 1);
    }
    if (rows == 0 || first > BINS) return;
    sums[0] = warp_sum(sums[0]), sums[1] = warp_sum(sums[1]);
    if (threadIdx.x % 32 == 0) add(first, sums[0], sums[1], 32 * rows);
}

// By one warp: which bins are taken. A bin is while what lies above it is not enough; the forced blocks, bin -1, always are. Masses are
// low + high * 2^limb_bits; limbs of all bins have sums of 32 bits.
__device__ __forceinline__ void find_limit(SelectionShared& shared, int limb_bits, double top_p, bool parts) {
    int lane = threadIdx.x % 32;
    const Histogram& bins = shared.bins;
    u64 forced = bins.low[FORCED] + ((u64)bins.high[FORCED] << limb_bits);
    u32 limbs[2][LANE_BINS], upto[2] = {0, 0};
#pragma unroll
    for (int x = 0; x < 2; x++) {
        const uint4* from = reinterpret_cast<const uint4*>((x ? bins.high : bins.low) + FORCED + 1 + lane * LANE_BINS);
#pragma unroll
        for (int n = 0; n < LANE_BINS / 4; n++) {
            uint4 four = from[n];
            limbs[x][4 * n] = four.x, limbs[x][4 * n + 1] = four.y, limbs[x][4 * n + 2] = four.z, limbs[x][4 * n + 3] = four.w;
        }
#pragma unroll
        for (int n = 0; n < LANE_BINS; n++) upto[x] += limbs[x][n];
    }
    u64 total = forced + warp_sum(upto[0]) + ((u64)warp_sum(upto[1]) << limb_bits), enough = (u64)ceil((double)total * top_p);
    enough = enough > forced ? enough - forced : 0;
    u32 above[2] = {0 - upto[0], 0 - upto[1]};
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
        for (int x = 0; x < 2; x++) {
            u32 below = __shfl_up_sync(FULL, upto[x], step);
            upto[x] += lane >= step ? below : 0;
        }
    }
    above[0] += upto[0], above[1] += upto[1];
    u32 taken_bins = 0, taken = 0, taken_earlier = 0;
#pragma unroll
    for (int n = 0; n < LANE_BINS; n++) {
        bool is = top_p >= 1 || above[0] + ((u64)above[1] << limb_bits) < enough;
        above[0] += limbs[0][n], above[1] += limbs[1][n];
        taken_bins += is;
        if (parts) {
            taken += is ? bins.blocks[FORCED + 1 + lane * LANE_BINS + n] : 0;
            taken_earlier += is ? shared.earlier[FORCED + 1 + lane * LANE_BINS + n] : 0;
        }
    }
    taken_bins = warp_sum(taken_bins);
    if (lane == 0) shared.limit = (1 + taken_bins) << HIGH_BITS;
    if (!parts) return;
    taken = warp_sum(taken) + bins.blocks[FORCED];
    taken_earlier = warp_sum(taken_earlier) + shared.earlier[FORCED];
    if (lane == 0) shared.taken = taken, shared.taken_earlier = taken_earlier;
}

// Selects among the blocks of one of a head's parts, together with the programs of the others, which must run at the same time. tops [parts],
// histograms [parts, BINS + 1]: of the head. Only the first part announces, the head's count. All threads of the program call it.
template <int ITEMS, typename Announce, typename Emit>
__device__ __forceinline__ void select_part(
    SelectionShared& shared, const Record* records, int blocks, int part, int parts, Record* tops, Record* histograms, int sink_blocks,
    double top_p, u32 launch, Announce announce, Emit emit
) {
    int lane = threadIdx.x % 32, size = quotient(blocks + parts - 1, parts), first = part * size, end = min(blocks, first + size);
    for (int n = threadIdx.x; n < (int)(sizeof(Histogram) / sizeof(u32)); n += THREADS) reinterpret_cast<u32*>(&shared.bins)[n] = 0;
    const Blocks<ITEMS> mine(first, end);
    float best[ITEMS], sum[ITEMS];
    float top = await_scores<ITEMS>(shared, records, mine, launch, best, sum);
    if (parts > 1) {
        if (threadIdx.x == 0) publish(tops + part, top, 0.f, 0.f, launch);
        float other = lane < parts ? await(tops + lane, launch).a : -infinity();
        __syncwarp();
        top = from_ordered(__reduce_max_sync(FULL, ordered(other)));
    }
    u32 word[ITEMS], low[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        int n = mine[j];
        weigh(best[j], sum[j], top, n < sink_blocks || n >= blocks - 2, word[j], low[j]);
        if (n >= end) word[j] = NOWHERE;
    }
    count_blocks(shared.bins, word, low, parts > 1);
    __syncthreads();
    if (parts > 1) {
        // Thread n: bin n - 1, of all parts.
        if (threadIdx.x <= BINS) {
            int place = FORCED + threadIdx.x, count = 0, earlier = 0;
            u64 mass = shared.bins.low[place] + ((u64)shared.bins.high[place] << LIMB_BITS);
            publish(
                histograms + part * (BINS + 1) + threadIdx.x, __uint_as_float((u32)mass), __uint_as_float((u32)(mass >> 32)),
                __int_as_float(shared.bins.blocks[place]), launch
            );
            mass = 0;
#pragma unroll 1
            for (int from = 0; from < parts; from += 4) {
                Record seen[4];
                await_all(seen, launch, [&](int x) {
                    return from + x < parts ? peek(histograms + (from + x) * (BINS + 1) + threadIdx.x) : Record{0.f, 0.f, 0.f, launch};
                });
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    mass += (u64)__float_as_uint(seen[x].b) << 32 | __float_as_uint(seen[x].a);
                    count += __float_as_int(seen[x].c);
                    earlier += from + x < part ? __float_as_int(seen[x].c) : 0;
                }
            }
            shared.bins.low[place] = (u32)mass & ((1 << SUM_BITS) - 1);
            shared.bins.high[place] = (u32)(mass >> SUM_BITS);
            shared.bins.blocks[place] = count;
            shared.earlier[place] = earlier;
        }
        __syncthreads();
    }
    if (threadIdx.x < 32) find_limit(shared, parts > 1 ? SUM_BITS : LIMB_BITS, top_p, parts > 1);
    __syncthreads();
    auto tell = [&](int taken) {
        if (part == 0) announce(parts > 1 ? shared.taken : taken);
    };
    write_taken(shared, word, shared.limit, mine, parts > 1 ? shared.taken_earlier : 0, tell, emit);
    // The next head of this program writes what is read here.
    __syncthreads();
}

// One program's share of the selection of all heads: head after head, or a part of one. rows: heads of all sequences; programs: those that
// select, at least one for each part. announce(row, count), emit(row, place, block).
template <typename Announce, typename Emit>
__device__ __forceinline__ void select_share(
    SelectionShared& shared, const Record* records, Record* tops, Record* histograms, const int* lengths, int rows, int num_heads, int capacity,
    int most_parts, int sink_blocks, double top_p, int program, int programs, u32 launch, Announce announce, Emit emit
) {
#pragma unroll 1
    for (int job = program; job < rows * most_parts; job += programs) {
        int row = quotient(job, most_parts), part = job - row * most_parts;
        int blocks = ceil_div(lengths[quotient(row, num_heads)], BLOCK), parts = min(most_parts, parts_of(blocks));
        const Record* scores = records + (long)row * capacity;
        auto tell = [&](int count) { announce(row, count); };
        auto write = [&](int place, int block) { emit(row, place, block); };
        if (part >= parts) continue;
        Record *row_tops = tops + (long)row * most_parts, *row_histograms = histograms + (long)row * most_parts * (BINS + 1);
        if (blocks <= THREADS) select_part<1>(shared, scores, blocks, 0, 1, row_tops, row_histograms, sink_blocks, top_p, launch, tell, write);
        else select_part<PART_ITEMS>(shared, scores, blocks, part, parts, row_tops, row_histograms, sink_blocks, top_p, launch, tell, write);
    }
}
