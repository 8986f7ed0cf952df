// Index scores of one query token, reduced to (maximum, sum of exponentials) of every block, for the heads that share a set of keys.
//
// A warp takes a tile of two blocks: eight strips of 16 keys, each the A operand of one product with the heads' queries as columns. A set
// read by fewer than eight heads has columns to spare: strips take turns at them, so that all numbers of a result are scores.
#pragma once
#include "device.cuh"

#ifndef INDEX_QUERY
#define INDEX_QUERY float
#endif

constexpr int INDEX_DIM = 16, TILE_KEYS = 128, STRIPS = 8;
constexpr int MOST_READERS = 64;  // of a table in shared memory

struct IndexTile {
    uint2 keys[2 * STRIPS];  // of a strip: key r, key r + 8; dimensions 4c ... 4c + 3
    uint2 q;                 // of head r mod (columns a strip), as bf16
};

__device__ __forceinline__ void load_tile(IndexTile& tile, const char* keys, long stride, int tokens) {
    int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const char* p = keys + r * stride + c * 8;
    if (tokens == TILE_KEYS && stride == 2 * INDEX_DIM) {
        // Keys one after the other: all loads by one address.
#pragma unroll
        for (int n = 0; n < 2 * STRIPS; n++) tile.keys[n] = load_8(p + n * 16 * INDEX_DIM);
    } else if (tokens == TILE_KEYS) {
#pragma unroll
        for (int n = 0; n < 2 * STRIPS; n++, p += 8 * stride) tile.keys[n] = load_8(p);
    } else {
#pragma unroll
        for (int n = 0; n < 2 * STRIPS; n++, p += 8 * stride) tile.keys[n] = 8 * n + r < tokens ? load_8(p) : make_uint2(0, 0);
    }
}

template <typename Q>
__device__ __forceinline__ void load_query(IndexTile& tile, const Q* q, long stride_head, int columns, int heads) {
    int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4, head = r & (columns - 1);
    tile.q = make_uint2(0, 0);
    if (head < heads) {
        const Q* p = q + head * stride_head + 4 * c;
        if constexpr (sizeof(Q) == 4) {
            float4 x = *reinterpret_cast<const float4*>(p);
            tile.q = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
        } else {
            tile.q = *reinterpret_cast<const uint2*>(p);
        }
    }
}

// Scores and publishes the tile's blocks; tokens: of the tile that are cached (> 0). records: of the first head and the tile's first block.
template <int COLUMNS>
__device__ __forceinline__ void score_tile(const IndexTile& tile, int tokens, int heads, float scale, Record* records, long stride_head, u32 launch) {
    constexpr int STRIPS_A_PRODUCT = 8 / COLUMNS, PRODUCTS = COLUMNS;
    int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    float scores[PRODUCTS][4];
#pragma unroll
    for (int d = 0; d < PRODUCTS; d++) {
        // Two sums, neither of which waits for the other.
        float sums[2][4] = {};
#pragma unroll
        for (int x = 0; x < STRIPS_A_PRODUCT; x++) {
            int strip = d * STRIPS_A_PRODUCT + x;
            bool mine = r / COLUMNS == x;
            uint2 low = tile.keys[2 * strip], high = tile.keys[2 * strip + 1];
            multiply_bf16(sums[x % 2], low.x, high.x, low.y, high.y, mine ? tile.q.x : 0, mine ? tile.q.y : 0);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) scores[d][i] = (sums[0][i] + sums[1][i]) * scale;
    }
    if (tokens < TILE_KEYS) {
#pragma unroll
        for (int d = 0; d < PRODUCTS; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int strip = d * STRIPS_A_PRODUCT + (2 * c + i % 2) / COLUMNS, token = strip * 16 + r + i / 2 * 8;
                if (token >= tokens) scores[d][i] = -infinity();
            }
        }
    }
    // Columns 2c and 2c + 1 are of two heads, or of two strips of the only one. A block is half of the products, or half of the columns.
#pragma unroll
    for (int block = 0; block < (COLUMNS == 1 ? 1 : 2); block++) {
        constexpr int DS = COLUMNS == 1 ? 1 : PRODUCTS / 2;
        float best[2] = {-infinity(), -infinity()}, sum[2] = {0.f, 0.f};
#pragma unroll
        for (int d = block * DS; d < (block + 1) * DS; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) best[i % 2] = fmaxf(best[i % 2], scores[d][i]);
        }
        if (COLUMNS == 1) best[0] = best[1] = fmaxf(best[0], best[1]);
#pragma unroll
        for (int h = 0; h < (COLUMNS == 1 ? 1 : 2); h++) {
            best[h] = larger_across<16>(larger_across<8>(larger_across<4>(best[h])));
            if (COLUMNS <= 4 && COLUMNS > 1) best[h] = larger_across<2>(best[h]);
            if (COLUMNS <= 2) best[h] = larger_across<1>(best[h]);
        }
        if (COLUMNS == 1) best[1] = best[0];
        // A block beyond the last key has none: its exponentials must not see inf - inf.
        float safe[2] = {best[0] == -infinity() ? 0.f : best[0], best[1] == -infinity() ? 0.f : best[1]};
#pragma unroll
        for (int d = block * DS; d < (block + 1) * DS; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum[i % 2] += exp2_fast((scores[d][i] - safe[i % 2]) * LOG2E);
            }
        }
        if (COLUMNS == 1) sum[0] += sum[1];
#pragma unroll
        for (int h = 0; h < (COLUMNS == 1 ? 1 : 2); h++) {
            sum[h] = added_across<16>(added_across<8>(added_across<4>(sum[h])));
            if (COLUMNS <= 4 && COLUMNS > 1) sum[h] = added_across<2>(sum[h]);
            if (COLUMNS <= 2) sum[h] = added_across<1>(sum[h]);
        }
        if (COLUMNS == 1) {
            // Columns 0 ... 3 are the first block, 4 ... 7 the second.
            if (r == 0 && c % 2 == 0 && c / 2 * BLOCK < tokens) publish(records + c / 2, best[0], sum[0], 0.f, launch);
        } else if (r == 0 && block * BLOCK < tokens) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int head = (2 * c + h) % COLUMNS;
                if (2 * c + h == head && head < heads) publish(records + head * stride_head + block, best[h], sum[h], 0.f, launch);
            }
        }
    }
}

__device__ __forceinline__ int columns_of(int heads) { return heads == 1 ? 1 : heads == 2 ? 2 : heads <= 4 ? 4 : 8; }

__device__ __forceinline__ void score_tile(const IndexTile& tile, int tokens, int heads, float scale, Record* records, long stride_head, u32 launch) {
    if (heads == 1) score_tile<1>(tile, tokens, heads, scale, records, stride_head, launch);
    else if (heads == 2) score_tile<2>(tile, tokens, heads, scale, records, stride_head, launch);
    else if (heads <= 4) score_tile<4>(tile, tokens, heads, scale, records, stride_head, launch);
    else score_tile<8>(tile, tokens, heads, scale, records, stride_head, launch);
}

// Everything that has to be scored, in tiles: of sequence after sequence, of one group of readers after the other.
struct Scoring {
    const char* keys;          // bf16 [B, S, I, R], last axis contiguous; strides in bytes
    long stride_b, stride_s, stride_i;
    const void* q;             // [B, H, R]; strides in elements
    long stride_qb, stride_qh;
    const int4* readers;       // [V]: set, first head, heads, 0
    const int* lengths;        // int32 [B]
    Record* records;           // [B, H, N]: maximum, sum
    int batch, num_readers, num_heads, capacity;
    float scale;
};

// A tile, and which of all records is the first of its blocks'.
struct TileOf {
    IndexTile tile;
    int tokens, heads, record;

    __device__ __forceinline__ void score(const Scoring& s, u32 launch) const {
        score_tile(tile, tokens, heads, s.scale, s.records + record, s.capacity, launch);
    }
};

// Where tiles begin: of sequence after sequence, of one group of readers after the other. Queries and pointers in it would be spilled.
struct Cursor {
    int b, v, tile, length;

    // To the tile so many after the first of all.
    __device__ __forceinline__ Cursor(const Scoring& s, int tile) : b(0), v(0), tile(tile), length(s.lengths[0]) {}

    // Where the tile lies beyond the readers' keys, to where it is; false: beyond all.
    __device__ __forceinline__ bool settle(const Scoring& s) {
        if (b == s.batch) return false;
        while (tile * TILE_KEYS >= length) {
            tile -= ceil_div(length, TILE_KEYS);
            if (++v == s.num_readers) {
                v = 0;
                if (++b == s.batch) return false;
                length = s.lengths[b];
            }
        }
        return true;
    }

    __device__ __forceinline__ const char* keys(const Scoring& s, int key_set) const {
        return s.keys + b * s.stride_b + key_set * s.stride_i + (long)tile * TILE_KEYS * s.stride_s;
    }

    // Loads this tile, which has settled, and goes on by so many.
    template <typename Q>
    __device__ __forceinline__ void load(TileOf& to, const Scoring& s, int step) {
        int4 readers = s.readers[v];
        to.tokens = min(length - tile * TILE_KEYS, TILE_KEYS);
        to.heads = readers.z;
        to.record = (b * s.num_heads + readers.y) * s.capacity + tile * (TILE_KEYS / BLOCK);
        load_tile(to.tile, keys(s, readers.x), s.stride_s, to.tokens);
        load_query(to.tile, static_cast<const Q*>(s.q) + b * s.stride_qb + readers.y * s.stride_qh, s.stride_qh, columns_of(to.heads), to.heads);
        tile += step;
    }
};

// This program's share: every programs-th tile, one of them on its way while another is scored.
template <typename Q>
__device__ __forceinline__ void score_share(const Scoring& s, int program, int programs, u32 launch) {
    int step = programs * WARPS;
    Cursor cursor(s, program + programs * (threadIdx.x / 32));
    TileOf next;
    bool loaded = false, more = cursor.settle(s);
#pragma unroll 1
    while (loaded || more) {
        TileOf now = next;
        if (more) cursor.load<Q>(next, s, step);
        bool after = more && cursor.settle(s);
        if (loaded) now.score(s, launch);
        loaded = more;
        more = after;
    }
}
