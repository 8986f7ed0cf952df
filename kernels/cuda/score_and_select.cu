// Index scores of one query token and the selection of blocks in one launch of programs that run all at once: the first programs select, a head
// of a sequence or a part of one each, as soon as the records of its blocks are there.
#include "scoring.cuh"
#include "selection.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) score_and_select(
    const INDEX_QUERY* index_q,  // [B, H, R]; strides in elements
    const char* index_k,         // bf16 [B, S, I, R], last axis contiguous; strides in bytes
    const int* lengths,          // int32 [B]
    const int4* readers,         // [V]: set, first head, heads of it, 0
    Record* scores,              // [B, H, N]
    Record* tops,                // [B, H, parts]: maximum of a part
    Record* histograms,          // [B, H, parts, BINS + 1]: mass in 64 bits, blocks
    u32* launches,               // [programs]: how many launches there were
    int* ids,                    // int32 [B, H, N]
    int* count,                  // int32 [B, H]
    int batch, int num_heads, int num_readers, int capacity, int most_parts, int sinks, float index_scale, long stride_iqb, long stride_iqh,
    long stride_ikb, long stride_iks, long stride_iki
) {
    __shared__ SelectionShared shared;
    const int program = blockIdx.x, programs = gridDim.x;
    follow_launch_before();
    const u32 launch = number_of_launch(launches + program);
    score_share<INDEX_QUERY>(
        {index_k, stride_ikb, stride_iks, stride_iki, index_q, stride_iqb, stride_iqh, readers, lengths, scores, batch, num_readers,
         num_heads, capacity, index_scale},
        program, programs, launch
    );
    select_share(
        shared, scores, tops, histograms, lengths, batch * num_heads, num_heads, capacity, min(most_parts, parts_now(lengths, batch)),
        ceil_div(sinks, BLOCK), TOP_P, program, programs, launch, [&](int row, int taken) { count[row] = taken; },
        [&](int row, int place, int block) { ids[(long)row * capacity + place] = block; }
    );
    __syncthreads();
    if (threadIdx.x == 0) launches[program] = launch;
}
