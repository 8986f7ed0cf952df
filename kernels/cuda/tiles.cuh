// Tiles of index keys: how a warp holds two blocks of them, and scores them for the heads that share their set.
//
// A tile is eight strips of 16 keys, each the A operand of a product with the heads' queries as columns. A set that only one or two heads read has
// columns to spare: with four or eight of them a head, keys may lie in registers as 16 bytes of memory do.
//
// Keys of 16 bits are bf16. Keys of 8 bits, e4m3, are multiplied as f16, which holds each of them; a query in bf16 is made to fit by a power of two.
#pragma once
#include "device.cuh"

#ifndef INDEX_QUERY
#define INDEX_QUERY float
#endif
#ifndef KEY_BITS
#define KEY_BITS 16
#endif
#ifndef KEY_STRIDE
#define KEY_STRIDE (2 * KEY_BITS)
#endif

constexpr int INDEX_DIM = 16, KEY_BYTES = INDEX_DIM * KEY_BITS / 8, TILE_KEYS = 128, STRIPS = 8;

// Two neighbouring dimensions of a query as they lie in memory: rounding them would wait for them.
struct alignas(2 * sizeof(INDEX_QUERY)) QueryPair {
    INDEX_QUERY a, b;

    __device__ __forceinline__ u32 as_bf16() const {
        if constexpr (sizeof(INDEX_QUERY) == 4) return pack_bf16(a, b);
        else return (u32)b << 16 | (u32)a;
    }
    __device__ __forceinline__ float2 rounded() const {
        u32 pair = as_bf16();
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
    }
    // The larger magnitude, as a whole number.
    __device__ __forceinline__ int magnitude() const {
        float2 q = rounded();
        return max(__float_as_int(q.x) & 0x7fffffff, __float_as_int(q.y) & 0x7fffffff);
    }
};

__device__ __forceinline__ void multiply_keys(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (KEY_BITS == 16) multiply_bf16(d, a0, a1, a2, a3, b0, b1);
    else multiply_f16(d, a0, a1, a2, a3, b0, b1);
}

template <bool FIRST, typename A, typename B>
struct Choice {
    using Type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
    using Type = B;
};

__device__ __forceinline__ QueryPair query_pair(const INDEX_QUERY* q, bool real) {
    return real ? *reinterpret_cast<const QueryPair*>(q) : QueryPair{};
}

// A power of two by which a query whose largest magnitude is given comes to less than 2^15, and its inverse: f16 holds the eight digits of what is at
// least 2^-31 of the largest, and less than that to 2^-39 of it.
struct PowerOfTwo {
    float up, down;

    __device__ __forceinline__ explicit PowerOfTwo(int magnitude) {
        int exponent = max(magnitude >> 23, 15);
        up = __int_as_float((268 - exponent) << 23), down = __int_as_float((exponent - 14) << 23);
    }
    __device__ __forceinline__ u32 as_f16(QueryPair pair) const {
        float2 q = pair.rounded();
        return pack_f16(q.x * up, q.y * up);
    }
    // Finite, so that a score of zero stays zero.
    __device__ __forceinline__ float scaled(float scale) const { return fmaxf(fminf(scale * down, 3.4028235e38f), -3.4028235e38f); }
};

// Columns of a product: a query's part of it, and what makes scores of the two sums of a lane that count.
struct Columns {
    u32 q[2];
    float scale[2];
};

// A head's result for a block, from COUNT scores of each lane that differs from this one in the bits of MASKS.
template <int... MASKS, int COUNT>
__device__ __forceinline__ void reduce_block(const float (&scores)[COUNT], float& best, float& sum) {
    best = scores[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) best = fmaxf(best, scores[i]);
    ((best = larger_across<MASKS>(best)), ...);
    // A block beyond the last key has none: its exponentials must not see inf - inf.
    float safe = best == -infinity() ? 0.f : best;
    sum = 0.f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += exp2_fast((scores[i] - safe) * LOG2E);
    ((sum = added_across<MASKS>(sum)), ...);
}

// Keys of one or two heads. A lane's 16 bytes are eight dimensions of one key, half of it: lanes c = 0, 1 have key 2r of a strip, c = 2, 3 key
// 2r + 1. As A they are, in turn, two dimensions of rows r, r + 8, r, r + 8: a head's four columns are (key 2r, 2r + 1) x (row r, row r + 8),
// and a score is the sum of two elements of a lane. One head alone has two strips to a product, of the first block and of the second.
template <int HEADS>
struct PairedTile {
    static constexpr int COUNT = 4;  // scores of a lane, of each of its blocks
    uint4 keys[STRIPS];
    struct Query {
        QueryPair x, y;

        __device__ __forceinline__ void load(const INDEX_QUERY* q, long stride_head, int) {
            int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4, dimension = c % 2 * 8 + r % 2 * 2;
            q += (HEADS == 1 ? 0 : r / 4) * stride_head + dimension;
            bool real = c / 2 == r / 2 % 2;
            x = query_pair(q, real), y = query_pair(q + 4, real);
        }
        __device__ __forceinline__ Columns columns(float scale) const { return {{x.as_bf16(), y.as_bf16()}, {scale, scale}}; }
    };

    __device__ __forceinline__ void load(const char* keys_of_tile, int tokens) {
        int lane = threadIdx.x % 32;
        const char* p = keys_of_tile + lane / 2 * KEY_STRIDE + lane % 2 * 16;
        // All by one address.
        if (tokens >= TILE_KEYS) {
#pragma unroll
            for (int n = 0; n < STRIPS; n++) keys[n] = load_16(p + n * 16 * KEY_STRIDE);
        } else {
#pragma unroll
            for (int n = 0; n < STRIPS; n++) keys[n] = 16 * n + lane / 2 < tokens ? load_16(p + n * 16 * KEY_STRIDE) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void score(const Columns& q, int tokens, int, Record* records, long stride_head, u32 launch) const {
        int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < HEADS; i++) {
            float scores[COUNT], best, sum;
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                float d[4] = {};
#pragma unroll
                for (int x = 0; x < (HEADS == 1 ? 2 : 1); x++) {
                    const uint4& k = keys[n + 4 * (HEADS == 1 ? x : i)];
                    bool mine = HEADS > 1 || r / 4 == x;
                    multiply_bf16(d, k.x, k.y, k.z, k.w, mine ? q.q[0] : 0, mine ? q.q[1] : 0);
                }
                scores[n] = (d[0] + d[3]) * q.scale[0];
            }
            const int block = HEADS == 1 ? c / 2 : i, head = HEADS == 1 ? 0 : c / 2;
            if (tokens < TILE_KEYS) {
#pragma unroll
                for (int n = 0; n < COUNT; n++) {
                    if ((n + 4 * block) * 16 + 2 * r + c % 2 >= tokens) scores[n] = -infinity();
                }
            }
            reduce_block<4, 8, 16, 1>(scores, best, sum);
            if (r == 0 && c % 2 == 0 && block * BLOCK < tokens) publish(records + head * stride_head + block, best, sum, 0.f, launch);
        }
    }
};

// Keys of 8 bits, of one or two heads. A lane's 16 bytes are a key: lanes 0 ... 15 have keys of the first block. As A they are, in two products, two
// dimensions of rows r, r + 8, r, r + 8 in turn: a head's eight columns are (key of lane c) x (row r, row r + 8).
template <int HEADS>
struct WholeTile {
    static constexpr int COUNT = TILE_KEYS / 32;  // keys of a lane
    uint4 keys[COUNT];
    struct Query {
        QueryPair pairs[HEADS][2][2];

        __device__ __forceinline__ void load(const INDEX_QUERY* q, long stride_head, int) {
            int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
            for (int n = 0; n < 4 * HEADS; n++) {
                pairs[n / 4][n / 2 % 2][n % 2] = query_pair(q + n / 4 * stride_head + n % 4 * 4 + r % 2 * 2, c == r / 2);
            }
        }
        struct EveryHead {
            Columns of[HEADS][2];
        };
        __device__ __forceinline__ EveryHead columns(float scale) const {
            EveryHead all;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                int largest = 0;
#pragma unroll
                for (int n = 0; n < 4; n++) largest = max(largest, pairs[h][n / 2][n % 2].magnitude());
                PowerOfTwo power(__reduce_max_sync(FULL, largest));
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    all.of[h][x] = {{power.as_f16(pairs[h][x][0]), power.as_f16(pairs[h][x][1])}, {power.scaled(scale), power.scaled(scale)}};
                }
            }
            return all;
        }
    };

    __device__ __forceinline__ static int key_of(int n) {
        int lane = threadIdx.x % 32;
        return lane / 16 * BLOCK + n * 16 + lane % 16;
    }

    __device__ __forceinline__ void load(const char* keys_of_tile, int tokens) {
        const char* p = keys_of_tile + key_of(0) * KEY_STRIDE;
        if (tokens >= TILE_KEYS) {
#pragma unroll
            for (int n = 0; n < COUNT; n++) keys[n] = load_16(p + n * 16 * KEY_STRIDE);
        } else {
#pragma unroll
            for (int n = 0; n < COUNT; n++) keys[n] = key_of(n) < tokens ? load_16(p + n * 16 * KEY_STRIDE) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void score(
        const typename Query::EveryHead& q, int tokens, int, Record* records, long stride_head, u32 launch
    ) const {
        const int lane = threadIdx.x % 32, block = lane / 16;
        float scores[HEADS][COUNT], best, sum;
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const uint4& k = keys[n];
            const uint2 pairs[4] = {f16_of_e4m3(k.x), f16_of_e4m3(k.y), f16_of_e4m3(k.z), f16_of_e4m3(k.w)};
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float d[4] = {};
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    multiply_f16(d, pairs[2 * x].x, pairs[2 * x].y, pairs[2 * x + 1].x, pairs[2 * x + 1].y, q.of[h][x].q[0], q.of[h][x].q[1]);
                }
                scores[h][n] = tokens >= TILE_KEYS || key_of(n) < tokens ? (d[0] + d[3]) * q.of[h][0].scale[0] : -infinity();
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            reduce_block<1, 2, 4, 8>(scores[h], best, sum);
            if (lane % 16 == 0 && block * BLOCK < tokens) publish(records + h * stride_head + block, best, sum, 0.f, launch);
        }
    }
};

// Keys of up to four or eight heads, a column each. A lane has dimensions 4c ... 4c + 3 of key r or r + 8 of a strip; for four heads two strips share
// a product.
template <int COLUMNS>
struct SharedTile {
    // Of a key.
    struct Wide {
        uint2 x;

        __device__ __forceinline__ void load(const char* p) { x = load_8(p); }
        __device__ __forceinline__ uint2 pairs() const { return x; }
    };
    struct Narrow {
        u32 x;

        __device__ __forceinline__ void load(const char* p) { x = load_4(p); }
        __device__ __forceinline__ uint2 pairs() const { return f16_of_e4m3(x); }
    };
    using Part = typename Choice<KEY_BITS == 16, Wide, Narrow>::Type;
    Part keys[2 * STRIPS];
    struct Query {
        QueryPair x, y;  // of head r mod COLUMNS

        __device__ __forceinline__ void load(const INDEX_QUERY* q, long stride_head, int heads) {
            int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4, head = r % COLUMNS;
            q += head * stride_head + 4 * c;
            x = query_pair(q, head < heads), y = query_pair(q + 2, head < heads);
        }
        __device__ __forceinline__ Columns columns(float scale) const {
            if (KEY_BITS == 16) return {{x.as_bf16(), y.as_bf16()}, {scale, scale}};
            int c = threadIdx.x % 4, largest = max(x.magnitude(), y.magnitude());
            largest = max(largest, __shfl_xor_sync(FULL, largest, 1));
            PowerOfTwo power(max(largest, __shfl_xor_sync(FULL, largest, 2)));
            // Of columns 2c and 2c + 1.
            float first = __shfl_sync(FULL, power.scaled(scale), 8 * c), second = __shfl_sync(FULL, power.scaled(scale), 8 * c + 4);
            return {{power.as_f16(x), power.as_f16(y)}, {first, second}};
        }
    };

    __device__ __forceinline__ void load(const char* keys_of_tile, int tokens) {
        int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        const char* p = keys_of_tile + r * KEY_STRIDE + c * (KEY_BYTES / 4);
        if (tokens >= TILE_KEYS) {
#pragma unroll
            for (int n = 0; n < 2 * STRIPS; n++) keys[n].load(p + n * 8 * KEY_STRIDE);
        } else {
#pragma unroll
            for (int n = 0; n < 2 * STRIPS; n++) {
                keys[n] = {};
                if (8 * n + r < tokens) keys[n].load(p + n * 8 * KEY_STRIDE);
            }
        }
    }

    __device__ __forceinline__ void score(const Columns& q, int tokens, int heads, Record* records, long stride_head, u32 launch) const {
        constexpr int STRIPS_A_PRODUCT = 8 / COLUMNS;
        int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
        for (int block = 0; block < 2; block++) {
            float scores[2][COLUMNS];  // of columns 2c, 2c + 1
#pragma unroll
            for (int n = 0; n < COLUMNS / 2; n++) {
                float d[4] = {};
#pragma unroll
                for (int x = 0; x < STRIPS_A_PRODUCT; x++) {
                    int strip = block * 4 + n * STRIPS_A_PRODUCT + x;
                    bool mine = r / COLUMNS == x;
                    uint2 low = keys[2 * strip].pairs(), high = keys[2 * strip + 1].pairs();
                    multiply_keys(d, low.x, high.x, low.y, high.y, mine ? q.q[0] : 0, mine ? q.q[1] : 0);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int strip = block * 4 + n * STRIPS_A_PRODUCT + 2 * c / COLUMNS;
                    bool real = tokens >= TILE_KEYS || strip * 16 + r + i / 2 * 8 < tokens;
                    scores[i % 2][2 * n + i / 2] = real ? d[i] * q.scale[i % 2] : -infinity();
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float best, sum;
                if constexpr (COLUMNS == 4) reduce_block<4, 8, 16, 2>(scores[h], best, sum);
                else reduce_block<4, 8, 16>(scores[h], best, sum);
                int head = (2 * c + h) % COLUMNS;
                if (r == 0 && 2 * c + h == head && head < heads && block * BLOCK < tokens) {
                    publish(records + head * stride_head + block, best, sum, 0.f, launch);
                }
            }
        }
    }
};

template <int HEADS>
using FewHeadsTile = typename Choice<KEY_BITS == 16, PairedTile<HEADS>, WholeTile<HEADS>>::Type;
