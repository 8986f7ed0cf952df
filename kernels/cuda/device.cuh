// What the CUDA kernels share.
#pragma once
#include <hardware.cuh>

#define LOG2E 1.4426950408889634f

typedef unsigned short half_bits;  // a number of 16 bits, of either kind

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int BLOCK = 64;  // keys
constexpr u32 FULL = 0xffffffff;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// a / b of numbers below 2^20 without a division, which takes some forty instructions.
__device__ __forceinline__ int quotient(int a, int b) { return (int)(((float)a + 0.5f) * reciprocal_fast(b)); }

// ---- Barriers of whole warps ------------------------------------------------------------------------------------------------------------

// One lane comes for all that met before. compute-sanitizer's racecheck does not follow that: with EVERY_LANE all of them come, and wait.
#ifndef EVERY_LANE
#define EVERY_LANE 0
#endif
constexpr int COMERS = EVERY_LANE ? 32 : 1;

// By a warp: what its lanes did before is seen by those who wait.
__device__ __forceinline__ void arrive_together(u64* barrier) {
    __syncwarp();
    if (EVERY_LANE || threadIdx.x % 32 == 0) arrive(barrier);
}

// The same of several barriers, that of the n-th given by `barrier(n)`: lane n comes to it, or waits there.
template <typename BarrierOf>
__device__ __forceinline__ void arrive_together(int count, BarrierOf barrier) {
    int lane = threadIdx.x % 32;
    __syncwarp();
    if (EVERY_LANE) {
        for (int n = 0; n < count; n++) arrive(barrier(n));
    } else if (lane < count) {
        arrive(barrier(lane));
    }
}

template <typename BarrierOf, typename PhaseOf>
__device__ __forceinline__ void await_together(int count, BarrierOf barrier, PhaseOf phase) {
    int lane = threadIdx.x % 32;
    if (EVERY_LANE) {
        for (int n = 0; n < count; n++) await_phase(barrier(n), phase(n));
    } else if (lane < count) {
        await_phase(barrier(lane), phase(lane));
    }
    __syncwarp();
}

// ---- Waiting for records ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Record await(const Record* place, u32 launch) {
    Record seen;
    do seen = peek(place);
    while (seen.launch != launch);
    return seen;
}

// Several records at a time: what `look(j)` gives for each, until all are of this launch.
template <int COUNT, typename Look>
__device__ __forceinline__ void await_all(Record (&seen)[COUNT], u32 launch, Look look) {
    bool missing = true;
    while (missing) {
        missing = false;
#pragma unroll
        for (int j = 0; j < COUNT; j++) seen[j] = look(j);
#pragma unroll
        for (int j = 0; j < COUNT; j++) missing |= seen[j].launch != launch;
    }
}

__device__ __forceinline__ u32 await(const u64* place, u32 launch) {
    u64 word;
    do word = peek(place);
    while ((u32)(word >> 32) != launch);
    return (u32)word;
}

// The number of the launch before. Counters of several programs share a line that another processor's cache of that launch may have held: the
// load goes past it.
__device__ __forceinline__ u32 launch_before(const u32* launches) { return *const_cast<const volatile u32*>(launches); }

// The number of the launch after it, never that of records before the first.
__device__ __forceinline__ u32 number_after(u32 launched) {
    u32 number = needed_here(launched) + 1;
    return number ? number : 1;
}

// ---- Reductions of a warp ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(FULL, x); }

// A whole number that is as large, compared with that of others, as the float is.
__device__ __forceinline__ int ordered(float x) {
    int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

__device__ __forceinline__ float from_ordered(int x) { return __int_as_float(x ^ (x >> 31 & 0x7fffffff)); }

template <int MASK>
__device__ __forceinline__ float larger_across(float x) { return fmaxf(x, __shfl_xor_sync(FULL, x, MASK)); }

template <int MASK>
__device__ __forceinline__ float added_across(float x) { return x + __shfl_xor_sync(FULL, x, MASK); }
