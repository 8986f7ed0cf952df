// Index scores of one query token and the selection of blocks in one launch. A program that selects a head of a sequence waits for the records of
// all its blocks, so who scores must run or have run.
//
// Where the last programs to start have a head each and score nothing (`selectors` of them), nobody waits for one that has not started: programs
// begin wherever there is room, while the launch before ends. Otherwise all score, and the first ones then select a head or a part of one each;
// parts wait for each other, so all programs must run at once.
#include "scoring.cuh"
#include "selection.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) score_and_select(
    const INDEX_QUERY* index_q,  // [B, H, R]; strides in elements
    const char* index_k,         // bf16 or e4m3 [B, S, I, R], last axis contiguous; strides in bytes
    const int* lengths,          // int32 [B]
    const int4* readers,         // [V]: set, first head, heads of it, 0
    Record* scores,              // [B, H, N]
    Record* tops,                // [B, H, parts]: maximum of a part
    Record* histograms,          // [B, H, parts, BINS + 1]: mass in 64 bits, blocks
    u32* launches,               // [programs]: how many launches there were
    u32* started,                // [1]: how many programs of this launch
    int* ids,                    // int32 [B, H, N]
    int* count,                  // int32 [B, H]
    int batch, int tokens, int num_heads, int num_readers, int capacity, int most_parts, int selectors, int sinks, float index_scale,
    long stride_iqb, long stride_iqh, long stride_ikb, long stride_iki
) {
    __shared__ SelectionShared shared;
    __shared__ int order;
    const int programs = gridDim.x, scoring = programs - selectors;
    const Scoring s = {index_k, stride_ikb, stride_iki, index_q, stride_iqb, stride_iqh, readers, lengths, scores, batch, num_readers, num_heads,
                       capacity, index_scale};
    int program = blockIdx.x;
    if (selectors > 0) {
        // The counter is zero again after the last program, before which none of the next launch begins.
        if (threadIdx.x == 0) order = atomicInc(started, programs - 1);
        __syncthreads();
        program = order;
        if (program < scoring) ask_for_share(s, tokens, program, scoring);
    }
    follow_launch_before();
    const u32 launched = launch_before(launches + program);
    if (program < scoring) score_share(s, program, scoring, launched);
    const u32 launch = number_after(launched);
    const int selector = selectors > 0 ? program - scoring : program;
    if (selector >= 0) {
        select_share(
            shared, scores, tops, histograms, lengths, batch * num_heads, num_heads, capacity, min(most_parts, parts_now(lengths, batch)),
            ceil_div(sinks, BLOCK), TOP_P, selector, selectors > 0 ? selectors : programs, launch,
            [&](int row, int taken) { count[row] = taken; },
            [&](int row, int place, int block) { ids[(long)row * capacity + place] = block; }
        );
    }
    __syncthreads();
    if (threadIdx.x == 0) launches[program] = launch;
}
