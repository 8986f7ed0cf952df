// The decode step of a layer's attention as one launch of programs that run all at once, one a multiprocessor, sixteen warps each.
//
// 1. Every warp scores tiles of index keys and publishes its blocks' records (scoring.cuh).
// 2. The first programs select, a head of a sequence or a part of one each, as soon as its records are there (selection.cuh); the others
//    attend meanwhile for the local heads: each KV group of a sequence is divided between some of them.
// 3. All programs attend to equal shares of the selected blocks, as soon as the lists are there.
// 4. Parts of a head are merged by one program, as soon as they are there.
//
// Who attends is a pipeline of warps (attention.cuh): the last one finds what to attend to; some take a step each in turn, send for its keys and
// values and weigh the keys; the first ones add up values, all of them each step's.
//
// What is told from program to program are records with the launch's number (device.cuh): nothing has to be cleared between launches.
#include "attention.cuh"
#include "scoring.cuh"
#include "selection.cuh"

#ifndef STAMPS
#define STAMPS 0
#endif
#ifndef SHARED_BYTES
#define SHARED_BYTES 232448
#endif
#ifndef LEAST_STEPS
#define LEAST_STEPS 4
#endif

// Heads of all sequences; what the warps do: the first ones add values, the last one finds spans, those between weigh keys. Each of these has two
// slots: one fills while the other is read. More on their way than bandwidth times latency would only make the programs wait that tell each other
// something.
constexpr int MOST_ROWS = 64, STEPS_A_BLOCK = BLOCK / STEP, ADDING = SLICES, FINDER = WARPS - 1, WEIGHING = FINDER - ADDING;
constexpr int SLOTS = 2 * WEIGHING;

// What a program attends to at a time: some steps of a list of blocks, or of a window, with heads first_head ... heads - 1 of a KV group (or
// one retrieval head alone).
struct Span {
    const char* q;
    const u64* list;        // blocks; null: keys one after the other, `sinks` of them (a multiple of STEP or all) before those from `window` on
    half_bits* out;         // of head 0, where the span is all there is; else null
    Record* parts;
    const TensorMap *k, *v;
    int b, kv_head, first, end, tokens, sinks, window, first_head, heads;
};

// A program's work for the local heads, as the host divided it.
struct LocalShare {
    int b, group, first_head, place, places, job, pad[2];
};

struct Layer {
    const char* q;             // [B, heads, D], last axis contiguous; strides in bytes
    half_bits* out;            // [B, heads, D]; strides in elements
    const int* lengths;        // int32 [B]
    const int* row_head;       // int32 [H]: the query head of each retrieval head
    u64* listed;               // [B, H, N]: (launch, id)
    u64* counted;              // [B, H]: (launch, blocks of the list)
    Record* parts;             // [programs + B * H, D / 2]: two dimensions, base-2 log of the sum
    Record* local_parts;       // [programs, G, D / 2]
    int rows, num_heads, group_size, num_retained, capacity, window, sinks, num_jobs;
    long stride_qb, stride_qh, stride_ob, stride_oh;
    float scale_log2;
};

struct Shared {
    Slot slots[SLOTS];  // step n of all spans lies in slot n mod SLOTS
    Weights weights[SLOTS];
    // Barriers: of a slot, whose bytes are there, whose keys are weighed, whose values are added; of a span, which the last warp knows, which
    // the others are done with.
    u64 filled[SLOTS], weighed[SLOTS], emptied[SLOTS], known[2], done[2];
    SelectionShared selection;
    // Spans in turn, and where their first steps lie.
    Span spans[2];
    int placed[2][32];
    // Of the lists: sequence, query head, tokens, steps; how many chunks end with each of them; steps of a chunk.
    int4 lists[MOST_ROWS];
    int ends[MOST_ROWS], chunk;
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "the host gives less than this");

__device__ __forceinline__ void stamp(long long* stamps, int n) {
#if STAMPS
    if (threadIdx.x == 0) {
        long long now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
        stamps[blockIdx.x * 16 + n] = now;
    }
#endif
}

__device__ __forceinline__ u32 low_bits(const void* p) { return (u32)(u64)p; }

// Steps of the window of a group: of its ring, or of the sinks and the newest keys of a cache by position.
__device__ __forceinline__ int local_steps(const Layer& layer, int length, bool ring) {
    int filled = min(length, layer.sinks + layer.window);
    return ring || filled == length ? ceil_div(filled, STEP) : ceil_div(layer.sinks, STEP) + ceil_div(layer.window, STEP);
}

__device__ __forceinline__ int places_of(int most_places, int steps) { return min(most_places, ceil_div(steps, WARPS)); }

// Where place n of equal ones begins; all programs find the same. No place is empty, up to one for each 16 steps: who merges waits for all.
__device__ __forceinline__ int part_of(int steps, int n, int places) {
    return n == places ? steps : min(steps, (int)((float)steps * n * reciprocal_fast(places)));
}

// What a program's work for the local heads is now. Without any, an empty span.
__device__ __forceinline__ Span local_span(const Layer& layer, const LocalShare& share, const TensorMap* maps) {
    Span span;
    int length = layer.lengths[share.b], first = share.group * layer.group_size;
    bool ring = share.group >= layer.num_retained, all = ring || length <= layer.sinks + layer.window;
    int steps = local_steps(layer, length, ring), places = places_of(share.places, steps);
    span.first = span.end = 0;
    if (share.place < places) span.first = part_of(steps, share.place, places), span.end = part_of(steps, share.place + 1, places);
    span.q = layer.q + share.b * layer.stride_qb + first * layer.stride_qh;
    span.list = nullptr;
    span.k = maps + (ring ? 2 : 0);
    span.v = span.k + 1;
    span.b = share.b;
    span.kv_head = ring ? share.group - layer.num_retained : share.group;
    span.tokens = all ? min(length, layer.sinks + layer.window) : length;
    span.sinks = all ? span.tokens : layer.sinks;
    span.window = length - layer.window;
    span.first_head = share.first_head;
    span.heads = layer.group_size;
    span.out = places == 1 ? layer.out + share.b * layer.stride_ob + first * layer.stride_oh : nullptr;
    span.parts = layer.local_parts + (long)(share.place * layer.num_jobs + share.job) * layer.group_size * PAIRS;
    return span;
}

// By one warp: waits for the lists and cuts them into equal chunks of steps, at most programs + rows in all, none of them empty.
__device__ __forceinline__ void divide_lists(Shared& shared, const Layer& layer, int programs, u32 launch) {
    int lane = threadIdx.x % 32, rows = layer.rows, total = 0, end = 0;
#pragma unroll 1
    for (int row = lane; row < rows; row += 32) {
        int b = quotient(row, layer.num_heads), head = layer.row_head[row - b * layer.num_heads], tokens = layer.lengths[b];
        int steps = await(layer.counted + row, launch) * STEPS_A_BLOCK;
        shared.lists[row] = {b, head, tokens, steps};
        total += steps;
    }
    total = warp_sum(total);
    int chunk = max((int)((float)(total - 1) * reciprocal_fast(max(max(programs - rows, programs / 2), 1))) + 1, LEAST_STEPS);
#pragma unroll 1
    for (int from = 0; from < rows; from += 32) {
        int places = from + lane < rows ? quotient(shared.lists[from + lane].w + chunk - 1, chunk) : 0;
#pragma unroll
        for (int x = 1; x < 32; x *= 2) {
            int before = __shfl_up_sync(FULL, places, x);
            places += lane >= x ? before : 0;
        }
        if (from + lane < rows) shared.ends[from + lane] = end + places;
        end += __shfl_sync(FULL, places, 31);
    }
    if (lane == 0) shared.chunk = chunk;
    __syncwarp();
}

// By one warp: what a chunk of the lists is; item < shared.ends[rows - 1].
__device__ __forceinline__ Span list_span(const Shared& shared, const Layer& layer, int item, const TensorMap* maps) {
    Span span;
    int lane = threadIdx.x % 32, rows = layer.rows, row = 0;
#pragma unroll 1
    for (int from = 0; from < rows; from += 32) row += __popc(__ballot_sync(FULL, from + lane < rows && shared.ends[from + lane] <= item));
    const int4 list = shared.lists[row];
    const int b = list.x, head = list.y, steps = list.w;
    span.q = layer.q + b * layer.stride_qb + head * layer.stride_qh;
    span.list = layer.listed + (long)row * layer.capacity;
    span.k = maps;
    span.v = maps + 1;
    span.b = b;
    span.kv_head = quotient(head, layer.group_size);
    span.first = (item - (row ? shared.ends[row - 1] : 0)) * shared.chunk;
    span.end = min(span.first + shared.chunk, steps);
    span.tokens = list.z;
    span.sinks = span.window = span.first_head = 0;
    span.heads = 1;
    span.out = steps <= shared.chunk ? layer.out + b * layer.stride_ob + head * layer.stride_oh : nullptr;
    span.parts = layer.parts + (long)item * PAIRS;
    return span;
}

// The first key of a step of a window, and where the keys end that it may hold.
__device__ __forceinline__ int window_step(const Span& span, int step, int& end) {
    int sink_steps = ceil_div(span.sinks, STEP);
    end = step < sink_steps ? span.sinks : span.tokens;
    return step < sink_steps ? step * STEP : span.window + (step - sink_steps) * STEP;
}

// Where a step of the span lies: its first key's row times 32, and how many keys.
__device__ __forceinline__ int place_of(const Span& span, int step, u32 launch) {
    int begin, end = span.tokens;
    if (span.list) {
        begin = await(span.list + step / STEPS_A_BLOCK, launch) * BLOCK + step % STEPS_A_BLOCK * STEP;
    } else {
        begin = window_step(span, step, end);
    }
    return begin << 5 | max(0, min(STEP, end - begin));
}

// By one thread: sends for the keys and values of a step that lies at `place`.
__device__ __forceinline__ void send_for(Shared& shared, const Span& span, int slot, int place) {
    shared.weights[slot].keys = place & 31;
    u64* filled = &shared.filled[slot];
    const TensorMap *k = span.k, *v = span.v;
    int kv_head = span.kv_head, b = span.b, token = place >> 5;
    expect_bytes(filled, 2 * TILES * TILE_BYTES);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
        copy_tile(shared.slots[slot].keys[t], k, 64 * t, kv_head, token, b, filled);
        copy_tile(shared.slots[slot].values[t], v, 64 * t, kv_head, token, b, filled);
    }
}

// By a warp that weighs: sends for every WEIGHING-th step and weighs its keys, from `step` on to step `end` of all; the span, whose first steps lie
// at `placed`, began with step `begin`.
__device__ __forceinline__ void weigh_span(
    Shared& shared, const Layer& layer, const Span& span, const int* placed, u32& step, u32 begin, u32 end, u32 launch
) {
    if (step >= end) return;
    const int lane = threadIdx.x % 32, steps = end - begin;
    Query query;
    query.load(span.q, layer.stride_qh, span.first_head, span.heads);
    int places;
#pragma unroll 1
    for (int round = 0; step < end; step += WEIGHING, round++) {
        // Lane n: where the n-th of the next 32 steps lies.
        if (round % 32 == 0) {
            int n = step - begin + lane * WEIGHING;
            places = n < min(32, steps) ? placed[n] : n < steps ? place_of(span, span.first + n, launch) : 0;
        }
        int place = __shfl_sync(FULL, places, round % 32);
        u32 slot = step % SLOTS;
        // The finder sent for the first steps of local heads, while this warp still scored.
        if (span.list || round > 0) {
            if (step >= SLOTS) await_phase(&shared.emptied[slot], step / SLOTS - 1);
            if (lane == 0) send_for(shared, span, slot, place);
        }
        await_phase(&shared.filled[slot], step / SLOTS);
        weigh_step(shared.weights[slot], query, shared.slots[slot], layer.scale_log2);
        arrive_together(&shared.weighed[slot]);
    }
}

// By a warp that adds: all steps of a span, and stores or publishes its sixteen dimensions of what they give.
__device__ __forceinline__ void add_span(Shared& shared, const Layer& layer, const Span& span, u32 step, u32 end, u32 launch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4, place = values_of(warp);
    Partial partial;
    partial.clear();
#pragma unroll 1
    for (; step < end; step += BATCH) {
        int steps = min((u32)BATCH, end - step), slot = step % SLOTS;
        auto slot_of = [&](int n) { return slot + n - (slot + n < SLOTS ? 0 : SLOTS); };
        await_together(steps, [&](int n) { return &shared.weighed[slot_of(n)]; }, [&](int n) { return (step + n) / SLOTS; });
        add_steps(
            partial, steps, place, [&](int n) -> const Weights& { return shared.weights[slot_of(n)]; },
            [&](int n) -> const Slot& { return shared.slots[slot_of(n)]; }
        );
        arrive_together(steps, [&](int n) { return &shared.emptied[slot_of(n)]; });
    }
    int pair = warp * 8 + r;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int head = 2 * c + h;
        if (head < span.first_head || head >= span.heads) continue;
        // Steps may hold no key.
        bool any = partial.sum[h] > 0.f;
        float scale = any ? reciprocal_fast(partial.sum[h]) : 0.f, a = partial.out[h] * scale, b = partial.out[2 + h] * scale;
        if (span.out) store_pair(span.out + head * layer.stride_oh, pair, a, b);
        else publish(span.parts + head * PAIRS + pair, a, b, any ? partial.top[h] + __log2f(partial.sum[h]) : -infinity(), launch);
    }
}

struct alignas(64) TensorMaps {
    TensorMap k, v;            // [B, S, retained K, D]
    TensorMap ring_k, ring_v;  // [B, W, local K, D]
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layer(
    const __grid_constant__ TensorMaps maps,
    const char* q, half_bits* out, const int* lengths, const int* row_head, u64* listed, u64* counted, Record* parts,
    Record* local_parts,                       // see Layer
    const INDEX_QUERY* index_q,                // [B, H, R]; strides in elements
    const char* index_k,                       // bf16 or e4m3 [B, S, I, R], last axis contiguous; strides in bytes
    const int4* readers,                       // [V]: set, first head, heads of it, 0
    const LocalShare* shares,                  // [parts, programs]
    const int* local_heads,                    // int32 [plan's B * heads]: the job of a local head, or -1
    const int* part_places,                    // int32 [parts]: places of a job
    Record* scores,                            // [B, H, N]
    Record* tops,                              // [B, H, parts]: maximum of a part
    Record* histograms,                        // [B, H, parts, BINS + 1]: mass in 64 bits, blocks
    u32* launches,                             // [programs]: how many launches there were
    long long* stamps,                         // [programs, 16], with STAMPS
    int* ids,                                  // int32 [B, H, N]
    int* count,                                // int32 [B, H]
    int batch, int plan_rows, int num_jobs, int num_heads, int num_readers, int group_size, int num_query_heads, int num_retained, int capacity,
    int window, int sinks, int most_parts, float scale_log2, float index_scale, long stride_qb, long stride_qh, long stride_ob, long stride_oh,
    long stride_iqb, long stride_iqh, long stride_ikb, long stride_iki
) {
    extern __shared__ __align__(1024) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int program = blockIdx.x, programs = gridDim.x, rows = batch * num_heads;
    const Layer layer = {q,          out,          lengths,  row_head, listed, counted,  parts,     local_parts, rows,      num_heads,
                         group_size, num_retained, capacity, window,   sinks,  num_jobs, stride_qb, stride_qh,   stride_ob, stride_oh, scale_log2};
    // What does not depend on the launch before is read while that one ends: the plan's tables, and all parameters, whose cache is cold.
    // Barriers are made one after the other, each by one thread in some fifty cycles: every warp makes some.
    if (threadIdx.x % 32 == 0) {
#pragma unroll 1
        for (int n = threadIdx.x / 32; n < SLOTS; n += WARPS) {
            init_barrier(&shared.filled[n], 1), init_barrier(&shared.weighed[n], COMERS), init_barrier(&shared.emptied[n], ADDING * COMERS);
        }
        if (threadIdx.x / 32 >= FINDER - 1) {
            int n = FINDER - threadIdx.x / 32;
            init_barrier(&shared.known[n], COMERS), init_barrier(&shared.done[n], (WARPS - 1) * COMERS);
        }
        barriers_made();
    }
    const int tables =
        shares[program].b ^ row_head[min((int)threadIdx.x, num_heads - 1)] ^ local_heads[min(max(program - rows, 0), num_query_heads - 1)];
    const u32 touched = tables ^ low_bits(q) ^ low_bits(lengths) ^ low_bits(listed) ^ low_bits(layer.local_parts) ^ low_bits(index_k) ^
                        low_bits(tops) ^ low_bits(stamps) ^ (u32)(rows ^ capacity ^ stride_qb ^ stride_ob ^ stride_iqb ^ stride_iki);
    if (touched == 0x9e3779b9) shared.chunk = 0;  // never read before it is written: it keeps the reads
    __syncthreads();
    follow_launch_before();
    stamp(stamps, 0);
    const u32 launched = launch_before(launches + program);
    const int now_parts = min(most_parts, parts_now(lengths, batch)), selectors = plan_rows * now_parts;
    score_share(
        {index_k, stride_ikb, stride_iki, index_q, stride_iqb, stride_iqh, readers, lengths, scores, batch, num_readers, num_heads, capacity,
         index_scale},
        program, programs, launched
    );
    const u32 launch = number_after(launched);
    stamp(stamps, 1);

    if (program < selectors) {
        auto announce = [&](int row, int taken) {
            publish(layer.counted + row, taken, launch);
            count[row] = taken;
        };
        auto emit = [&](int row, int place, int block) {
            publish(layer.listed + (long)row * layer.capacity + place, block, launch);
            ids[(long)row * layer.capacity + place] = block;
        };
        select_share(
            shared.selection, scores, tops, histograms, lengths, rows, num_heads, capacity, now_parts, ceil_div(sinks, BLOCK), TOP_P, program,
            programs, launch, announce, emit
        );
        stamp(stamps, 7);
    }

    // Spans in turn: the local heads, where the program has any, then chunks of the lists. The last warp, which has the fewest tiles of one sequence's
    // index keys, is one ahead of the others; a span that begins at -1 ends them.
    const int warp = threadIdx.x / 32;
    if (warp == FINDER) {
        int first_list = 0;
#pragma unroll 1
        for (int turn = 0;; turn++) {
            Span span;
            if (turn > 1) await_phase(&shared.done[turn % 2], turn / 2 - 1);
            bool local = false;
            if (turn == 0) {
                LocalShare share = shares[(now_parts - 1) * programs + program];
                local = share.b < batch;
                first_list = local ? 1 : 0;
                if (local) span = local_span(layer, share, &maps.k);
            }
            if (!local) {
                if (turn == first_list) divide_lists(shared, layer, programs, launch);
                // Programs that select have the least left of their time: they take the last places.
                int item = programs - 1 - program + (turn - first_list) * programs;
                if (item < shared.ends[rows - 1]) span = list_span(shared, layer, item, &maps.k);
                else span.first = span.end = -1;
            }
            const int lane = threadIdx.x % 32, steps = span.end - span.first, place = lane < steps ? place_of(span, span.first + lane, launch) : 0;
            if (lane == 0) shared.spans[turn % 2] = span;
            shared.placed[turn % 2][lane] = place;
            if (local && lane < min(steps, WEIGHING)) send_for(shared, span, lane, place);
            arrive_together(&shared.known[turn % 2]);
            if (span.first < 0) break;
        }
    } else {
        u32 end = 0;  // steps of all spans so far
        // The last of these warps, which have fewer tiles of one sequence's index keys, begin.
        u32 weighs = FINDER - 1 - warp;
#pragma unroll 1
        for (int turn = 0;; turn++) {
            const Span& span = shared.spans[turn % 2];
            await_phase(&shared.known[turn % 2], turn / 2);
            if (span.first < 0) break;
            if (turn < 2 && span.list) stamp(stamps, 9);
            const u32 begin = end;
            end += span.end - span.first;
            if (warp >= ADDING) weigh_span(shared, layer, span, shared.placed[turn % 2], weighs, begin, end, launch);
            else if (begin < end) add_span(shared, layer, span, begin, end, launch);
            if (!span.list) stamp(stamps, 8);
            arrive_together(&shared.done[turn % 2]);
        }
    }
    stamp(stamps, 10);

    // Merging: retrieval heads first, then all heads of all groups, of which the local ones count. The first programs are the last to have a
    // chunk of the lists.
#pragma unroll 1
    for (int task = program; task < rows + batch * num_query_heads; task += programs) {
        const Record* from;
        long stride;
        int count_parts, b, head;
        if (task < rows) {
            int first_place = task ? shared.ends[task - 1] : 0;
            count_parts = shared.ends[task] - first_place;
            b = quotient(task, num_heads);
            head = row_head[task - b * num_heads];
            from = layer.parts + (long)first_place * PAIRS;
            stride = PAIRS;
        } else {
            int other = task - rows, job = local_heads[other];
            if (job < 0) continue;
            b = quotient(other, num_query_heads);
            head = other - b * num_query_heads;
            int group = quotient(head, group_size);
            count_parts = places_of(part_places[now_parts - 1], local_steps(layer, lengths[b], group >= num_retained));
            from = layer.local_parts + ((long)job * group_size + head - group * group_size) * PAIRS;
            stride = (long)num_jobs * group_size * PAIRS;
        }
        if (count_parts == 1) continue;
        // Without any part the sequence is idle: its rows are zeros.
        int pair;
        float x, y;
        if (merge_parts(from, stride, count_parts, launch, pair, x, y)) store_pair(out + b * stride_ob + head * stride_oh, pair, x, y);
    }
    stamp(stamps, 11);
    // All have read the number of the launch before.
    __syncthreads();
    if (threadIdx.x == 0) launches[program] = launch;
}
