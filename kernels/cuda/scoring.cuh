// Index scores of one query token, reduced to (maximum, sum of exponentials) of every block: who scores which tiles of keys.
#pragma once
#include "tiles.cuh"

// Everything that has to be scored, in tiles: of sequence after sequence, of one group of readers after the other.
struct Scoring {
    const char* keys;          // [B, S, I, R] of KEY_BITS, last axis contiguous; strides in bytes, that of S is KEY_STRIDE
    long stride_b, stride_i;
    const INDEX_QUERY* q;      // [B, H, R]; strides in elements
    long stride_qb, stride_qh;
    const int4* readers;       // [V]: set, first head, heads, 0
    const int* lengths;        // int32 [B]
    Record* records;           // [B, H, N]: maximum, sum
    int batch, num_readers, num_heads, capacity;
    float scale;
};

// What a warp scores of the keys of one group of readers: `count` tiles, every `step`-th from `tile` on, one on its way while another is scored.
// records: of the first head.
template <typename Tile>
__device__ __forceinline__ void score_tiles(
    const Scoring& s, const char* keys, const INDEX_QUERY* q, int heads, Record* records, int tile, int step, int count, int length, u32 launched
) {
    typename Tile::Query parts;
    parts.load(q, s.stride_qh, heads);
    keys += (long)tile * (TILE_KEYS * KEY_STRIDE);
    records += tile * (TILE_KEYS / BLOCK);
    int tokens = length - tile * TILE_KEYS;
    const int keys_a_step = step * TILE_KEYS;
    Tile next;
    next.load(keys, tokens);
    const auto query = parts.columns(s.scale);
    const u32 launch = number_after(launched);
#pragma unroll 1
    for (; count > 0; count--) {
        Tile now = next;
        if (count > 1) {
            keys += (long)step * (TILE_KEYS * KEY_STRIDE);
            next.load(keys, tokens - keys_a_step);
        }
        now.score(query, tokens, heads, records, s.capacity, launch);
        tokens -= keys_a_step;
        records += step * (TILE_KEYS / BLOCK);
    }
}

// Which tiles of one sequence a warp scores, whatever its length: of the keys of group `v` every `step`-th, from `tile` on.
struct WarpShare {
    int v, tile, step;

    __device__ __forceinline__ WarpShare(int groups, int program, int programs) {
        int place = program + programs * (int)(threadIdx.x / 32), warps = programs * WARPS;
        auto begin = [&](int v) { return quotient(v * warps + groups - 1, groups); };
        v = quotient(place * groups, warps);
        tile = place - begin(v);
        step = begin(v + 1) - begin(v);
    }
};

// Lets a warp's first tile come to the L2 cache. It may be called before the launch before has ended: no key of an earlier token depends on it, and
// a length that it is about to write decides only what is asked for. tokens: the keys that there is memory for.
__device__ __forceinline__ void ask_for_share(const Scoring& s, int tokens, int program, int programs) {
    if (s.batch > 1 || s.num_readers > programs * WARPS || KEY_STRIDE != KEY_BYTES) return;
    WarpShare share(s.num_readers, program, programs);
    const int now = *const_cast<const volatile int*>(s.lengths), length = min(now, tokens);
    if ((share.tile + 1) * TILE_KEYS > length || threadIdx.x % 32) return;
    prefetch<TILE_KEYS * KEY_BYTES>(s.keys + s.readers[share.v].x * s.stride_i + (long)share.tile * (TILE_KEYS * KEY_STRIDE));
}

// This program's share of all tiles. launched: the launch before.
__device__ __forceinline__ void score_share(const Scoring& s, int program, int programs, u32 launched) {
    const int lane = threadIdx.x % 32, warps = programs * WARPS, groups = s.num_readers;
    const bool one_sequence = s.batch == 1 && groups <= warps;
    // What is read at once: the first length, the first 32 groups of readers.
    const int4 some = s.readers[min(lane, groups - 1)];
    int b = 0, v = 0, length = s.lengths[0], tile = 0, step = 1, first = 0, left = 0;
    if (one_sequence) {
        // All but the number of tiles is known before the length.
        WarpShare share(groups, program, programs);
        v = share.v, tile = share.tile, step = share.step;
    } else {
        // Neighbouring tiles of sequence after sequence and one group of readers after the other.
        int tiles = 0;
#pragma unroll 1
        for (int n = lane; n < s.batch; n += 32) tiles += ceil_div(s.lengths[n], TILE_KEYS);
        tiles = warp_sum(tiles) * groups;
        auto first_of = [&](int n) { return n == warps ? tiles : min(tiles, (int)((float)tiles * reciprocal_fast(warps) * n)); };
        int place = program * WARPS + threadIdx.x / 32;
        first = first_of(place), left = first_of(place + 1) - first;
        if (left == 0) return;
    }
#pragma unroll 1
    do {
        if (!one_sequence) {
            // Found again for every group, so that nothing of it is kept in registers meanwhile.
            b = v = 0, length = s.lengths[0], tile = first;
#pragma unroll 1
            while (tile * TILE_KEYS >= length) {
                tile -= ceil_div(length, TILE_KEYS);
                if (++v == groups) v = 0, length = s.lengths[++b];
            }
        }
        int4 readers = {__shfl_sync(FULL, some.x, v), __shfl_sync(FULL, some.y, v), __shfl_sync(FULL, some.z, v), 0};
        if (v >= 32) readers = s.readers[v];
        const char* keys = s.keys + b * s.stride_b + readers.x * s.stride_i;
        const INDEX_QUERY* q = s.q + b * s.stride_qb + readers.y * s.stride_qh;
        Record* records = s.records + (long)(b * s.num_heads + readers.y) * s.capacity;
        const int here = ceil_div(length, TILE_KEYS), heads = readers.z;
        const int count = one_sequence ? quotient(max(here - tile, 0) + step - 1, step) : min(here - tile, left);
        first += count, left -= count;
        if (count == 0) break;
        if (heads == 1) score_tiles<FewHeadsTile<1>>(s, keys, q, heads, records, tile, step, count, length, launched);
        else if (heads == 2) score_tiles<FewHeadsTile<2>>(s, keys, q, heads, records, tile, step, count, length, launched);
        else if (heads <= 4) score_tiles<SharedTile<4>>(s, keys, q, heads, records, tile, step, count, length, launched);
        else score_tiles<SharedTile<8>>(s, keys, q, heads, records, tile, step, count, length, launched);
    } while (left > 0);
}
