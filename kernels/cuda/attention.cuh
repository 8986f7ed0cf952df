// Attention of one query token over sixteen keys by a warp, and the merging of what warps and programs found.
//
// Scores are K (16 keys) times Q^T (8 heads), outputs V^T (16 dimensions a product) times P^T: with keys and dimensions as rows nothing of a
// product is wasted on a group of eight heads, and each lane loads its fragments straight from the cache, 16 bytes at a time.
#pragma once
#include "device.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef HALF_FLOAT
#define HALF_FLOAT 0
#endif

constexpr int COLUMNS = 8, STEP = 16;              // heads of a product, keys of a step
constexpr int SLICES = HEAD_DIM / 16;              // products of 16 dimensions
constexpr int K_CHUNKS = HEAD_DIM / 32;            // of eight dimensions in a lane's fragment of a key
constexpr int TILES = HEAD_DIM / 64;               // of a step's keys, and of its values
constexpr int PAIRS = HEAD_DIM / 2;                // of neighbouring dimensions

__device__ __forceinline__ u32 pack(float low, float high) { return HALF_FLOAT ? pack_f16(low, high) : pack_bf16(low, high); }

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (HALF_FLOAT) multiply_f16(d, a0, a1, a2, a3, b0, b1);
    else multiply_bf16(d, a0, a1, a2, a3, b0, b1);
}

__device__ __forceinline__ u32 word_of(const uint4& x, int n) { return n == 0 ? x.x : n == 1 ? x.y : n == 2 ? x.z : x.w; }

// A warp's running result for eight heads; this lane has heads 2c and 2c + 1.
struct Partial {
    float best[2], sum[2];  // base 2; sum: over this lane's keys
    float out[SLICES][4];   // dimension d(i): (head 2c, head 2c + 1), dimension d(i) + 1: the same

    __device__ __forceinline__ void clear() {
        best[0] = best[1] = -infinity();
        sum[0] = sum[1] = 0.f;
#pragma unroll
        for (int i = 0; i < SLICES; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
    }
};

// The first of the two neighbouring dimensions that slice i of a lane's outputs holds.
__device__ __forceinline__ int dimension_of(int slice, int r) { return slice / 4 * 64 + r * 8 + slice % 4 * 2; }

// Which eight dimensions of a key are chunk j of lane c: of a tile's eight chunks two neighbours, so that no lanes of a load meet in a bank.
__device__ __forceinline__ int chunk_of(int j, int c) { return j / 2 * 8 + 2 * c + j % 2; }

struct Query {
    uint4 chunks[K_CHUNKS];  // of head r

    __device__ __forceinline__ void load(const char* q, long stride_head, int first, int heads) {
        int thread = fresh(threadIdx.x), r = thread % 32 / 4, c = thread % 4;
#pragma unroll
        for (int j = 0; j < K_CHUNKS; j++) {
            chunks[j] = make_uint4(0, 0, 0, 0);
            if (r >= first && r < heads) chunks[j] = *reinterpret_cast<const uint4*>(q + r * stride_head + chunk_of(j, c) * 16);
        }
    }
};

// A step's keys and values in shared memory: TILES tiles of 16 rows of 128 bytes of each.
constexpr int TILE_BYTES = STEP * 128;
struct alignas(1024) Slot {
    char keys[TILES][TILE_BYTES], values[TILES][TILE_BYTES];
};

__device__ __forceinline__ uint4 read_chunk(const char* tile, int row, int chunk) {
    return *reinterpret_cast<const uint4*>(tile + row * 128 + (chunk ^ row % 8) * 16);
}

// One step of online softmax; keys: of the step (others hold anything).
__device__ __forceinline__ void attend_step(Partial& partial, const Query& query, const Slot& slot, int keys, float scale_log2) {
    int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    float logits[4] = {0.f, 0.f, 0.f, 0.f}, weights[4], decay[2];
#pragma unroll
    for (int j = 0; j < K_CHUNKS; j++) {
        uint4 low = read_chunk(slot.keys[j / 2], r, 2 * c + j % 2), high = read_chunk(slot.keys[j / 2], r + 8, 2 * c + j % 2);
        multiply(logits, low.x, high.x, low.y, high.y, query.chunks[j].x, query.chunks[j].y);
        multiply(logits, low.z, high.z, low.w, high.w, query.chunks[j].z, query.chunks[j].w);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float a = r < keys ? logits[h] * scale_log2 : -infinity(), b = r + 8 < keys ? logits[2 + h] * scale_log2 : -infinity();
        float best = fmaxf(partial.best[h], larger_across<16>(larger_across<8>(larger_across<4>(fmaxf(a, b)))));
        float safe = best == -infinity() ? 0.f : best;
        weights[h] = exp2_fast(a - safe);
        weights[2 + h] = exp2_fast(b - safe);
        decay[h] = exp2_fast(partial.best[h] - safe);
        partial.sum[h] = partial.sum[h] * decay[h] + weights[h] + weights[2 + h];
        partial.best[h] = best;
    }
    u32 b0 = transpose_8x8(pack(weights[0], weights[1])), b1 = transpose_8x8(pack(weights[2], weights[3]));
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        uint4 w[4];
#pragma unroll
        for (int x = 0; x < 4; x++) {
            int key = 2 * c + x % 2 + x / 2 * 8;
            w[x] = read_chunk(slot.values[t], key, r);
            // Rows that were never written may hold NaN: a weight of zero is not enough.
            if (keys < STEP && key >= keys) w[x] = make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float(&out)[4] = partial.out[4 * t + n];
            u32 x0 = word_of(w[0], n), x1 = word_of(w[1], n), x2 = word_of(w[2], n), x3 = word_of(w[3], n);
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] *= decay[i % 2];
            multiply(
                out, __byte_perm(x0, x1, 0x5410), __byte_perm(x0, x1, 0x7632), __byte_perm(x2, x3, 0x5410), __byte_perm(x2, x3, 0x7632), b0, b1
            );
        }
    }
}

// What the warps of a program found. Heads 2c and 2c + 1 lie side by side, two words further than a multiple of 32 from the next pair: no
// two lanes of a store meet in a bank.
constexpr int PAIR_WORDS = 2 * HEAD_DIM + 2;
struct MergeShared {
    // By head and warp: maxima and sums of a warp, then its weight in the result.
    float best[COLUMNS][WARPS], sum[COLUMNS][WARPS], weight[COLUMNS][WARPS];
    float log_sum[COLUMNS];
    float out[WARPS][COLUMNS / 2 * PAIR_WORDS];
};

__device__ __forceinline__ int place_in_merge(int head, int dimension) { return head / 2 * PAIR_WORDS + head % 2 * HEAD_DIM + dimension; }

// Stores a warp's result for the first `heads` heads.
__device__ __forceinline__ void store_partial(MergeShared& shared, Partial& partial, int heads) {
    int thread = fresh(threadIdx.x), warp = thread / 32, r = thread % 32 / 4, c = thread % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = added_across<16>(added_across<8>(added_across<4>(partial.sum[h])));
        if (2 * c + h >= heads) continue;
        if (r == 0) {
            shared.best[2 * c + h][warp] = partial.best[h];
            shared.sum[2 * c + h][warp] = sum;
        }
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
            float2* place = reinterpret_cast<float2*>(&shared.out[warp][place_in_merge(2 * c + h, dimension_of(i, r))]);
            *place = make_float2(partial.out[i][h], partial.out[i][2 + h]);
        }
    }
}

// Weights of the first `warps` warps' results in those of all heads, and the base-2 logs of the sums. By THREADS / 4 threads, one a head and warp.
__device__ __forceinline__ void weigh_warps(MergeShared& shared, int warps) {
    static_assert(COLUMNS * WARPS == 128, "a thread for each head and warp");
    if (threadIdx.x >= COLUMNS * WARPS) return;
    int thread = fresh(threadIdx.x), head = thread / WARPS, w = thread % WARPS;
    float mine = w < warps ? shared.best[head][w] : -infinity();
    float best = larger_across<8>(larger_across<4>(larger_across<2>(larger_across<1>(mine)))), safe = best == -infinity() ? 0.f : best;
    float weight = exp2_fast(mine - safe), sum = w < warps ? weight * shared.sum[head][w] : 0.f;
    sum = added_across<8>(added_across<4>(added_across<2>(added_across<1>(sum))));
    // Warps may have found no key.
    shared.weight[head][w] = sum > 0.f ? weight * reciprocal_fast(sum) : 0.f;
    if (w == 0) shared.log_sum[head] = sum > 0.f ? best + __log2f(sum) : -infinity();
}

// Four dimensions of a head, from a pair with an even number on, normalised.
__device__ __forceinline__ void merge_warps(const MergeShared& shared, int head, int pair, int warps, float2 (&y)[2]) {
    y[0] = y[1] = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int w = 0; w < warps; w++) {
        float weight = shared.weight[head][w];
        const float2* x = reinterpret_cast<const float2*>(&shared.out[w][place_in_merge(head, 2 * pair)]);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            y[n].x += weight * x[n].x;
            y[n].y += weight * x[n].y;
        }
    }
}

// Merges `parts` published results of one head, `stride` records apart, by all threads of the program: eight lanes share a pair of dimensions.
// Returns true where this thread holds the pair's result.
__device__ __forceinline__ bool merge_parts(const Record* parts, long stride, int count, u32 launch, int& pair, float& a, float& b) {
    constexpr int LANES = 8, BATCH = 4;
    int lane = threadIdx.x % 32, first = lane / 4;
    pair = threadIdx.x / 32 * 4 + lane % 4;
    float best = -infinity(), sum = 0.f;
    a = b = 0.f;
    if (pair < PAIRS) {
        for (int from = first; from < count; from += LANES * BATCH) {
            Record seen[BATCH];
            await_all(seen, launch, [&](int j) {
                int part = from + j * LANES;
                return part < count ? peek(parts + part * stride + pair) : Record{0.f, 0.f, -infinity(), launch};
            });
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                float larger = fmaxf(best, seen[j].c), safe = larger == -infinity() ? 0.f : larger;
                float decay = exp2_fast(best - safe), weight = exp2_fast(seen[j].c - safe);
                sum = sum * decay + weight;
                a = a * decay + weight * seen[j].a;
                b = b * decay + weight * seen[j].b;
                best = larger;
            }
        }
    }
#pragma unroll
    for (int x = 4; x < 32; x *= 2) {
        float other = __shfl_xor_sync(FULL, best, x), larger = fmaxf(best, other), safe = larger == -infinity() ? 0.f : larger;
        float decay = exp2_fast(best - safe), weight = exp2_fast(other - safe);
        sum = sum * decay + weight * __shfl_xor_sync(FULL, sum, x);
        a = a * decay + weight * __shfl_xor_sync(FULL, a, x);
        b = b * decay + weight * __shfl_xor_sync(FULL, b, x);
        best = larger;
    }
    float scale = sum > 0.f ? reciprocal_fast(sum) : 0.f;
    a *= scale;
    b *= scale;
    return first == 0 && pair < PAIRS;
}
