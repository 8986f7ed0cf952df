// Attention of one query token over steps of sixteen keys by warps of two kinds, and the merging of what programs found.
//
// One kind weighs: it takes a step's keys and leaves the weights of all heads. The other kind has sixteen dimensions each, and adds up the
// values of all steps: nothing has to be summed between warps. Scores are K (16 keys) times Q^T (8 heads), outputs V^T (16 dimensions) times
// P^T: with keys and dimensions as rows nothing of a product is wasted on a group of eight heads.
#pragma once
#include "device.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef HALF_FLOAT
#define HALF_FLOAT 0
#endif

constexpr int COLUMNS = 8, STEP = 16;              // heads of a product, keys of a step
constexpr int SLICES = HEAD_DIM / 16;              // of 16 dimensions
constexpr int K_CHUNKS = HEAD_DIM / 32;            // of eight dimensions in a lane's fragment of a key
constexpr int TILES = HEAD_DIM / 64;               // of a step's keys, and of its values
constexpr int PAIRS = HEAD_DIM / 2;                // of dimensions that a lane holds together

__device__ __forceinline__ u32 pack(float low, float high) { return HALF_FLOAT ? pack_f16(low, high) : pack_bf16(low, high); }

// Both halves times a power of two.
__device__ __forceinline__ u32 scaled(u32 x, float scale) {
    u32 both = pack(scale, scale);
    return HALF_FLOAT ? times_f16(x, both) : times_bf16(x, both);
}

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (HALF_FLOAT) multiply_f16(d, a0, a1, a2, a3, b0, b1);
    else multiply_bf16(d, a0, a1, a2, a3, b0, b1);
}

// A step's keys and values in shared memory: TILES tiles of 16 rows of 128 bytes of each.
constexpr int TILE_BYTES = STEP * 128;
struct alignas(1024) Slot {
    char keys[TILES][TILE_BYTES], values[TILES][TILE_BYTES];
};

// What a key counts for a head: 2^(its score - the head's top), 16 bits. The top is a whole number, so that other tops change no digit.
struct alignas(16) Weights {
    uint2 fragments[32];  // of P^T
    float top[COLUMNS];
    int keys;             // of the step; others hold anything
};

// Queries of eight heads as a lane needs them. The inner axis is in an order of its own: a lane's chunk of eight dimensions is of one row.
struct Query {
    uint4 chunks[K_CHUNKS];  // of head r

    __device__ __forceinline__ void load(const char* q, long stride_head, int first, int heads) {
        int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < K_CHUNKS; j++) {
            chunks[j] = make_uint4(0, 0, 0, 0);
            // Of a tile's eight chunks two neighbours, so that no lanes of a load from shared memory meet in a bank.
            if (r >= first && r < heads) chunks[j] = *reinterpret_cast<const uint4*>(q + r * stride_head + (j / 2 * 8 + 2 * c + j % 2) * 16);
        }
    }
};

__device__ __forceinline__ uint4 read_chunk(const char* tile, int row, int chunk) {
    return *reinterpret_cast<const uint4*>(tile + row * 128 + (chunk ^ row % 8) * 16);
}

// Weighs a step's keys, by one warp.
__device__ __forceinline__ void weigh_step(Weights& weights, const Query& query, const Slot& slot, float scale_log2) {
    int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, keys = weights.keys;
    float logits[2][4] = {}, weight[4], top[2];
#pragma unroll
    for (int j = 0; j < K_CHUNKS; j++) {
        uint4 low = read_chunk(slot.keys[j / 2], r, 2 * c + j % 2), high = read_chunk(slot.keys[j / 2], r + 8, 2 * c + j % 2);
        multiply(logits[0], low.x, high.x, low.y, high.y, query.chunks[j].x, query.chunks[j].y);
        multiply(logits[1], low.z, high.z, low.w, high.w, query.chunks[j].z, query.chunks[j].w);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float a = r < keys ? (logits[0][h] + logits[1][h]) * scale_log2 : -infinity();
        float b = r + 8 < keys ? (logits[0][2 + h] + logits[1][2 + h]) * scale_log2 : -infinity();
        top[h] = ceilf(larger_across<16>(larger_across<8>(larger_across<4>(fmaxf(a, b)))));
        float safe = top[h] == -infinity() ? 0.f : top[h];
        weight[h] = exp2_fast(a - safe);
        weight[2 + h] = exp2_fast(b - safe);
    }
    weights.fragments[lane] = make_uint2(transpose_8x8(pack(weight[0], weight[1])), transpose_8x8(pack(weight[2], weight[3])));
    if (r == 0) *reinterpret_cast<float2*>(&weights.top[2 * c]) = make_float2(top[0], top[1]);
}

// A warp's running result: of heads 2c and 2c + 1 dimensions r and r + 8 of its sixteen.
struct Partial {
    float top[2], top_r;  // base 2; of head r
    float out[4];         // dimension r: (head 2c, head 2c + 1), dimension r + 8: the same
    float sum[4];         // of weights, the first two: values times V^T have one row more, of ones

    __device__ __forceinline__ void clear() {
        top[0] = top[1] = top_r = -infinity();
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = sum[i] = 0.f;
    }
};

// Where a lane's row of the four matrices lies that are a warp's dimensions of a step's values.
__device__ __forceinline__ int values_of(int warp) {
    int lane = threadIdx.x % 32, key = lane / 16 * 8 + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;
    return warp / 4 * TILE_BYTES + key * 128 + (chunk ^ key % 8) * 16;
}

// Adds the values of BATCH steps or fewer, of the dimensions at `place`; weights(n), slot(n): of step n.
constexpr int BATCH = 4;
template <typename WeightsOf, typename SlotOf>
__device__ __forceinline__ void add_steps(Partial& partial, int steps, int place, WeightsOf weights, SlotOf slot) {
    int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    uint2 w[BATCH];
    uint4 v[BATCH];
    float2 tops[BATCH];
    float top_r[BATCH], best_r = partial.top_r, best[2] = {partial.top[0], partial.top[1]};
#pragma unroll
    for (int n = 0; n < BATCH; n++) {
        w[n] = make_uint2(0, 0);
        v[n] = make_uint4(0, 0, 0, 0);
        tops[n] = make_float2(-infinity(), -infinity());
        top_r[n] = -infinity();
        if (n >= steps) continue;
        const Weights& of = weights(n);
        w[n] = of.fragments[lane];
        tops[n] = *reinterpret_cast<const float2*>(&of.top[2 * c]);
        top_r[n] = of.top[r];
        v[n] = load_transposed(slot(n).values[0] + place);
        int keys = of.keys;
        if (keys < STEP) {
            // Rows that were never written may hold NaN: a weight of zero is not enough.
            u32 low = (2 * c < keys ? 0xffff : 0) | (2 * c + 1 < keys ? 0xffff0000 : 0);
            u32 high = (2 * c + 8 < keys ? 0xffff : 0) | (2 * c + 9 < keys ? 0xffff0000 : 0);
            v[n] = make_uint4(v[n].x & low, v[n].y & low, v[n].z & high, v[n].w & high);
        }
    }
#pragma unroll
    for (int n = 0; n < BATCH; n++) {
        best_r = fmaxf(best_r, top_r[n]);
        best[0] = fmaxf(best[0], tops[n].x);
        best[1] = fmaxf(best[1], tops[n].y);
    }
    float safe_r = best_r == -infinity() ? 0.f : best_r;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float decay = exp2_fast(partial.top[h] - (best[h] == -infinity() ? 0.f : best[h]));
        partial.top[h] = best[h];
        partial.out[h] *= decay;
        partial.out[2 + h] *= decay;
        partial.sum[h] *= decay;
    }
    partial.top_r = best_r;
    const u32 ones = pack(1.f, 1.f);
#pragma unroll
    for (int n = 0; n < BATCH; n++) {
        float scale = exp2_fast(top_r[n] - safe_r);
        u32 low = scaled(w[n].x, scale), high = scaled(w[n].y, scale);
        multiply(partial.out, v[n].x, v[n].y, v[n].z, v[n].w, low, high);
        multiply(partial.sum, ones, ones, ones, ones, low, high);
    }
}

// The first of a pair's dimensions; the second is eight further.
__device__ __forceinline__ int dimension_of(int pair) { return pair / 8 * 16 + pair % 8; }

__device__ __forceinline__ void store_pair(half_bits* head, int pair, float a, float b) {
    u32 both = pack(a, b);
    head[dimension_of(pair)] = (half_bits)both;
    head[dimension_of(pair) + 8] = (half_bits)(both >> 16);
}

// Merges `parts` published results of one head, `stride` records apart, by all threads of the program: eight lanes share a pair of dimensions.
// Returns true where this thread holds the pair's result.
__device__ __forceinline__ bool merge_parts(const Record* parts, long stride, int count, u32 launch, int& pair, float& a, float& b) {
    constexpr int LANES = 8;
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
