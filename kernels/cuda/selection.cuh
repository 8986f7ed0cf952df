// Histogram top-p over the scored blocks of one head by one program, in exact integers: what kernels/block_selection describes.
#pragma once
#include "device.cuh"

#ifndef TOP_P
#define TOP_P 0.9
#endif

// Masses (2^32 * l * exp(m - top), at most 2^38) as two limbs, whose sums over a warp fit 32 bits.
constexpr int LIMB_BITS = 19, HIGH_BITS = 20, BINS = 256;
// Of a block: (bin + 1) above the high limb; forced blocks lie in bin -1, places beyond the last block in a bin beyond all.
constexpr u32 HIGH_MASK = (1u << HIGH_BITS) - 1, NOWHERE = (BINS + 2) << HIGH_BITS;
// Blocks of a thread, at most: so many of a head are selected by one program, more of them in parts that exchange histograms.
#ifndef PART_ITEMS
#define PART_ITEMS 4
#endif
constexpr int PART_BLOCKS = PART_ITEMS * THREADS;

struct SelectionShared {
    float top[WARPS];
    // Low limbs, high limbs and numbers of blocks by `bin + 1`.
    u32 histogram[3 * (BINS + 1)];
    // By warp: masses of its bins, how many of them are taken, and blocks in them: of all parts, of earlier ones.
    u64 masses[WARPS];
    int bins[WARPS], blocks[WARPS], earlier[WARPS];
    int counts[PART_ITEMS][WARPS];
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

// Waits for the records of a program's blocks first ... end - 1; thread t holds blocks first + t, first + t + THREADS, ... Returns the highest
// maximum of all of them.
template <int ITEMS>
__device__ __forceinline__ float await_scores(
    SelectionShared& shared, const Record* records, int first, int end, u32 launch, float (&best)[ITEMS], float (&sum)[ITEMS]
) {
    constexpr int BATCH = ITEMS < 4 ? ITEMS : 4;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float top = -infinity();
#pragma unroll
    for (int from = 0; from < ITEMS; from += BATCH) {
        Record seen[BATCH];
        await_all(seen, launch, [&](int j) {
            int n = first + (from + j) * THREADS + threadIdx.x;
            return n < end ? peek(records + n) : Record{-infinity(), 0.f, 0.f, launch};
        });
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            best[from + j] = seen[j].a;
            sum[from + j] = seen[j].b;
            top = fmaxf(top, seen[j].a);
        }
    }
    top = larger_across<16>(larger_across<8>(larger_across<4>(larger_across<2>(larger_across<1>(top)))));
    if (lane == 0) shared.top[warp] = top;
    __syncthreads();
    top = shared.top[lane % WARPS];
    return larger_across<8>(larger_across<4>(larger_across<2>(larger_across<1>(top))));
}

// What a block counts: `bin + 1` above the high limb of its mass, and the low limb.
__device__ __forceinline__ void weigh(float best, float sum, float top, bool forced, u32& word, u32& low) {
    float mass = fmaf(sum * exp2_fast((best - top) * LOG2E), 4294967296.f, 0.5f);
    // Powers of two and the difference are exact.
    u32 high = (u32)(mass * (1.f / (1 << LIMB_BITS)));
    int bin = (int)fminf((top - best) * 8.f, BINS - 1.f);
    word = (forced ? 0 : bin + 1) << HIGH_BITS | high;
    low = (u32)(mass - (float)high * (1 << LIMB_BITS));
}

// Gives what is taken, words below the limit, to `emit(place, block)`, places from `offset` on in ascending order of blocks.
template <int ITEMS, typename Emit>
__device__ __forceinline__ void write_taken(SelectionShared& shared, const u32 (&word)[ITEMS], u32 limit, int first, int offset, Emit emit) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        u32 taken = __ballot_sync(FULL, word[j] < limit);
        if (lane == 0) shared.counts[j][warp] = __popc(taken);
    }
    __syncthreads();
    // Lane j: how many are taken before this warp's j-th blocks.
    int all = 0, before = 0;
    if (lane < ITEMS) {
#pragma unroll 4
        for (int w = 0; w < WARPS; w++) {
            int count = shared.counts[lane][w];
            all += count;
            before += w < warp ? count : 0;
        }
    }
    int upto = all;
#pragma unroll
    for (int x = 1; x < ITEMS; x *= 2) {
        int other = __shfl_up_sync(FULL, upto, x);
        upto += lane >= x ? other : 0;
    }
    before += upto - all;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        bool mine = word[j] < limit;
        u32 taken = __ballot_sync(FULL, mine);
        int place = offset + __shfl_sync(FULL, before, j) + __popc(taken & ((1u << lane) - 1));
        if (mine) emit(place, first + j * THREADS + (int)threadIdx.x);
    }
}

// Adds a block to the histogram. Lanes of one bin take turns: where all of them have the same, one adds for all.
__device__ __forceinline__ void count_block(SelectionShared& shared, bool real, u32 word, u32 low) {
    u32 bin = word >> HIGH_BITS, high = word & HIGH_MASK;
    int same;
    __match_all_sync(FULL, real ? bin : NOWHERE, &same);
    if (same) {
        low = warp_sum(real ? low : 0);
        high = warp_sum(real ? high : 0);
    }
    if (real && (!same || threadIdx.x % 32 == 0)) {
        atomicAdd(&shared.histogram[bin], low);
        atomicAdd(&shared.histogram[BINS + 1 + bin], high);
        atomicAdd(&shared.histogram[2 * (BINS + 1) + bin], same ? 32u : 1u);
    }
}

// Selects among the blocks of one of a head's parts, together with the programs of the others, which must run at the same time. tops [parts],
// histograms [parts, BINS + 1]: of the head. Only the first part announces, the head's count. All threads of the program call it.
template <int ITEMS, typename Announce, typename Emit>
__device__ __forceinline__ void select_part(
    SelectionShared& shared, const Record* records, int blocks, int part, int parts, Record* tops, Record* histograms, int sink_blocks,
    double top_p, u32 launch, Announce announce, Emit emit
) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = quotient(blocks + parts - 1, parts), first = part * size, end = min(blocks, first + size);
    for (int n = threadIdx.x; n < 3 * (BINS + 1); n += THREADS) shared.histogram[n] = 0;
    float best[ITEMS], sum[ITEMS];
    float top = await_scores<ITEMS>(shared, records, first, end, launch, best, sum);
    if (parts > 1) {
        if (threadIdx.x == 0) publish(tops + part, top, 0.f, 0.f, launch);
        float other = lane < parts ? await(tops + lane, launch).a : -infinity();
        __syncwarp();
        top = larger_across<16>(larger_across<8>(larger_across<4>(larger_across<2>(larger_across<1>(other)))));
    }
    u32 word[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        int n = first + j * THREADS + threadIdx.x;
        u32 low = 0;
        word[j] = NOWHERE;
        if (n < end) weigh(best[j], sum[j], top, n < sink_blocks || n >= blocks - 2, word[j], low);
        count_block(shared, n < end, word[j], low);
    }
    __syncthreads();
    // Thread n: bin n - 1, of all parts.
    u64 mass = 0;
    int count = 0, count_before = 0;
    if (threadIdx.x <= BINS) {
        mass = shared.histogram[threadIdx.x] + ((u64)shared.histogram[BINS + 1 + threadIdx.x] << LIMB_BITS);
        count = (int)shared.histogram[2 * (BINS + 1) + threadIdx.x];
        if (parts > 1) {
            publish(
                histograms + part * (BINS + 1) + threadIdx.x, __uint_as_float((u32)mass), __uint_as_float((u32)(mass >> 32)),
                __int_as_float(count), launch
            );
            mass = 0, count = 0;
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
                    count_before += from + x < part ? __float_as_int(seen[x].c) : 0;
                }
            }
        }
    }
    __syncwarp();
    u64 upto = mass;
#pragma unroll
    for (int x = 1; x < 32; x *= 2) {
        u64 below = __shfl_up_sync(FULL, upto, x);
        upto += lane >= x ? below : 0;
    }
    if (lane == 31) shared.masses[warp] = upto;
    __syncthreads();
    u64 total = 0, earlier = 0;
#pragma unroll
    for (int w = 0; w <= BINS / 32; w++) {
        u64 x = shared.masses[w];
        total += x;
        earlier += w < warp ? x : 0;
    }
    // A bin is taken while what lies above it is not enough; the forced blocks, bin -1, always are.
    bool taken = threadIdx.x <= BINS && (threadIdx.x == 0 || top_p >= 1 || earlier + upto - mass < (u64)ceil((double)total * top_p));
    u32 taken_bins = __popc(__ballot_sync(FULL, taken)), taken_blocks = warp_sum(taken ? count : 0), before = warp_sum(taken ? count_before : 0);
    if (lane == 0) shared.bins[warp] = taken_bins, shared.blocks[warp] = taken_blocks, shared.earlier[warp] = before;
    __syncthreads();
    bool bins_warp = lane <= BINS / 32;
    u32 limit = warp_sum(bins_warp ? shared.bins[lane] : 0) << HIGH_BITS;
    int offset = (int)warp_sum(bins_warp ? shared.earlier[lane] : 0), all = (int)warp_sum(bins_warp ? shared.blocks[lane] : 0);
    if (part == 0 && threadIdx.x == 0) announce(all);
    write_taken(shared, word, limit, first, offset, emit);
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
