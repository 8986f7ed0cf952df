// What the kernels say in the hardware's own words (PTX). No headers: NVRTC compiles this wherever PyTorch runs.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float add_toward_zero(float x, float y) {
    float z;
    asm("add.rz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// A number that was loaded: the compiler may not wait for it any earlier than here.
__device__ __forceinline__ u32 needed_here(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Programmatic dependent launch: let the next launch begin, and wait for the one before.
__device__ __forceinline__ void follow_launch_before() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- Records ----------------------------------------------------------------------------------------------------------------------------
// What one program tells another is written as records of 8 or 16 bytes, each of them one memory operation, that hold the number of their
// launch: the reader polls the record itself. No fence, no counter, no second trip to memory.

struct Record {
    float a, b, c;
    u32 launch;
};

__device__ __forceinline__ void publish(Record* place, float a, float b, float c, u32 launch) {
    u64 low = (u64)__float_as_uint(b) << 32 | __float_as_uint(a), high = (u64)launch << 32 | __float_as_uint(c);
    asm volatile("{ .reg .b128 x; mov.b128 x, {%1, %2}; st.relaxed.gpu.global.b128 [%0], x; }" ::"l"(place), "l"(low), "l"(high) : "memory");
}

__device__ __forceinline__ Record peek(const Record* place) {
    u64 low, high;
    asm volatile("{ .reg .b128 x; ld.relaxed.gpu.global.b128 x, [%2]; mov.b128 {%0, %1}, x; }" : "=l"(low), "=l"(high) : "l"(place) : "memory");
    return {__uint_as_float((u32)low), __uint_as_float((u32)(low >> 32)), __uint_as_float((u32)high), (u32)(high >> 32)};
}

__device__ __forceinline__ void publish(u64* place, u32 value, u32 launch) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(place), "l"((u64)launch << 32 | value) : "memory");
}

__device__ __forceinline__ u64 peek(const u64* place) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
    return word;
}

// ---- Keys and values, which are read once -----------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 load_4(const char* p) {
    u32 x;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ uint2 load_8(const char* p) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}

__device__ __forceinline__ uint4 load_16(const char* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// So many bytes on their way to the L2 cache.
template <int BYTES>
__device__ __forceinline__ void prefetch(const char* p) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "n"(BYTES) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A description of a tensor of four axes that the host encoded (CUtensorMap), for copies of tiles to shared memory.
struct alignas(64) TensorMap {
    char bytes[128];
};

// Barriers in shared memory: a phase ends when `arrivals` threads have come and the bytes they announced are there. What a thread did before it
// came is seen by those who waited.
__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// After the barriers were made, before copies that complete them.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(u64* barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"); }

// Comes, and announces bytes.
__device__ __forceinline__ void expect_bytes(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of phase 0, 1, ...; nobody may be so late that the next one may have ended too.
__device__ __forceinline__ void await_phase(u64* barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
        "r"(phase & 1)
        : "memory"
    );
}

// One tile on its way: [1, 16, 1, 64] of [B, S, K, D], rows of 128 bytes whose chunks of 16 bytes are permuted (chunk x of row y at x ^ y % 8).
__device__ __forceinline__ void copy_tile(void* tile, const TensorMap* map, int dimension, int head, int token, int b, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(tile)),
        "l"(map), "r"(dimension), "r"(head), "r"(token), "r"(b), "r"(shared_address(barrier))
        : "memory"
    );
}

// ---- 16-bit numbers and products --------------------------------------------------------------------------------------------------------
// Fragments of m16n8k16: lane = 4 * r + c. A: (row r, columns 2c, 2c + 1), (row r + 8, same), (row r, columns 2c + 8, + 9), (row r + 8, same);
// B: (rows 2c, 2c + 1, column r), (rows 2c + 8, + 9, column r); D: (row r, columns 2c, 2c + 1), (row r + 8, same). The inner axis may be in
// any order that A and B agree on.

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

// Four numbers of 8 bits, two of them in each word.
__device__ __forceinline__ uint2 f16_of_e4m3(u32 x) {
    uint2 y;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(y.x), "=r"(y.y) : "r"(x));
    return y;
}

__device__ __forceinline__ void multiply_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Products of two pairs.
__device__ __forceinline__ u32 times_bf16(u32 x, u32 y) {
    u32 z;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

__device__ __forceinline__ u32 times_f16(u32 x, u32 y) {
    u32 z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// Four 8 x 8 matrices from shared memory, transposed, two numbers of a row of each in every lane; row x of matrix m lies where lane 8 m + x says.
__device__ __forceinline__ uint4 load_transposed(const char* row) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(shared_address(row)) : "memory");
    return x;
}

// The transposed 8 x 8 matrix of 16-bit numbers, two of a row in every lane.
__device__ __forceinline__ u32 transpose_8x8(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
