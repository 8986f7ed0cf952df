// CUDA C++ on a CPU, for tests: a program is a thread of the system, its threads are fibers of that thread, and what a warp or a program does
// together is a meeting of fibers. Exact where the hardware is; products of 16-bit numbers are summed in fp32. As unkind as the hardware may be:
// warps go on in any order, copies arrive late, shared memory begins as NaN, and a barrier that somebody missed ends the test.
#pragma once
#include <sched.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <semaphore>
#include <thread>
#include <utility>
#include <vector>

using std::ceil;
using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3_on_cpu { int x; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <typename To, typename From>
inline To bits_of(From x) {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float __int_as_float(int x) { return bits_of<float>(x); }
inline int __float_as_int(float x) { return bits_of<int>(x); }
inline float __uint_as_float(unsigned x) { return bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_of<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __log2f(float x) { return std::log2(x); }

// ---- Fibers -----------------------------------------------------------------------------------------------------------------------------

constexpr int FIBERS = 512, STACK_BYTES = 64 << 10;

struct Meeting {
    int arrived = 0;
    unsigned generation = 0;
    // Of two meetings in turn: a fiber may come to the next before others have left.
    unsigned words[2][32][6] = {};
};

struct Program {
    ucontext_t scheduler, fibers[FIBERS];
    std::vector<char> stacks = std::vector<char>((size_t)FIBERS * STACK_BYTES);
    bool done[FIBERS] = {};
    int now = 0, left = FIBERS;
    unsigned seed = 0;
    std::vector<std::function<void()>> copies;  // on their way
    Meeting warps[FIBERS / 32], all;
};

inline thread_local Program* program_on_cpu;
inline thread_local dim3_on_cpu blockIdx, gridDim;
inline std::atomic<unsigned> launches_on_cpu = 0;
inline unsigned random_on_cpu() {
    Program& p = *program_on_cpu;
    p.seed = p.seed * 1664525u + 1013904223u;
    return p.seed >> 10;
}
inline void expect_on_cpu(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "program %d, thread %d: %s\n", blockIdx.x, program_on_cpu->now, what);
    std::abort();
}
struct ThreadIndex {
    struct {
        operator unsigned() const { return program_on_cpu->now; }
    } x;
};
inline ThreadIndex threadIdx;

inline void yield_fiber() {
    Program& p = *program_on_cpu;
    swapcontext(&p.fibers[p.now], &p.scheduler);
}

inline unsigned meet(Meeting& meeting, int members) {
    unsigned generation = meeting.generation;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        meeting.generation++;
    } else {
        while (meeting.generation == generation) yield_fiber();
    }
    return generation % 2;
}

inline void __syncthreads() { meet(program_on_cpu->all, FIBERS); }
inline Meeting& this_warp() { return program_on_cpu->warps[program_on_cpu->now / 32]; }
inline void __syncwarp() { meet(this_warp(), 32); }

// Every lane's word, as all lanes gave them.
inline const unsigned (*gather(std::initializer_list<unsigned> mine))[6] {
    Meeting& warp = this_warp();
    unsigned half = warp.generation % 2;
    int n = 0;
    for (unsigned word : mine) warp.words[half][program_on_cpu->now % 32][n++] = word;
    return warp.words[meet(warp, 32)];
}

template <typename X>
inline X from_lane(X x, int lane) {
    if constexpr (sizeof(X) == 8) {
        uint64_t whole = bits_of<uint64_t>(x);
        auto words = gather({(unsigned)whole, (unsigned)(whole >> 32)});
        return bits_of<X>((uint64_t)words[lane][1] << 32 | words[lane][0]);
    } else {
        return bits_of<X>(gather({bits_of<unsigned>(x)})[lane][0]);
    }
}
inline int lane_on_cpu() { return program_on_cpu->now % 32; }
template <typename X>
inline X __shfl_sync(unsigned, X x, int lane) { return from_lane(x, lane % 32); }
template <typename X>
inline X __shfl_xor_sync(unsigned, X x, int mask) { return from_lane(x, lane_on_cpu() ^ mask); }
template <typename X>
inline X __shfl_up_sync(unsigned, X x, int by) { return from_lane(x, lane_on_cpu() >= by ? lane_on_cpu() - by : lane_on_cpu()); }
inline unsigned __ballot_sync(unsigned, bool x) {
    auto words = gather({x});
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= words[lane][0] << lane;
    return bits;
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    auto words = gather({x});
    unsigned sum = 0;
    for (int lane = 0; lane < 32; lane++) sum += words[lane][0];
    return sum;
}
inline int __reduce_max_sync(unsigned, int x) {
    auto words = gather({(unsigned)x});
    for (int lane = 0; lane < 32; lane++) x = max(x, (int)words[lane][0]);
    return x;
}
inline bool __all_sync(unsigned, bool x) { return __ballot_sync(0, x) == 0xffffffff; }
inline unsigned atomicInc(unsigned* place, unsigned last) {
    unsigned old = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(place, &old, old >= last ? 0 : old + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
inline unsigned atomicAdd(unsigned* place, unsigned x) { return __atomic_fetch_add(place, x, __ATOMIC_RELAXED); }

inline thread_local std::function<void()>* body_on_cpu = nullptr;
inline void begin_fiber() {
    (*body_on_cpu)();
    Program& p = *program_on_cpu;
    p.done[p.now] = true;
    p.left--;
    swapcontext(&p.fibers[p.now], &p.scheduler);
}

inline void spoil_shared_memory();

// Programs of a launch: all at once, or ROOM at a time, the last first, as on a GPU with less room that promises no order.
#ifdef ROOM
constexpr int room_on_cpu = ROOM;
#else
constexpr int room_on_cpu = 1 << 20;
#endif
inline void run_programs(int programs, std::function<void()> body) {
    std::vector<std::thread> threads;
    std::counting_semaphore<> room(room_on_cpu);
    unsigned launch = launches_on_cpu++;
    for (int x = 0; x < programs; x++) {
        const int n = room_on_cpu < programs ? programs - 1 - x : x;
        room.acquire();
        threads.emplace_back([=, &room]() mutable {
            auto mine = std::make_unique<Program>();
            program_on_cpu = mine.get();
            body_on_cpu = &body;
            blockIdx.x = n;
            gridDim.x = programs;
            for (int f = 0; f < FIBERS; f++) {
                getcontext(&mine->fibers[f]);
                mine->fibers[f].uc_stack.ss_sp = &mine->stacks[(size_t)f * STACK_BYTES];
                mine->fibers[f].uc_stack.ss_size = STACK_BYTES;
                mine->fibers[f].uc_link = nullptr;
                makecontext(&mine->fibers[f], begin_fiber, 0);
            }
            mine->seed = 7919 * n + 31337 * launch + 1;
            spoil_shared_memory();
            auto begin = std::chrono::steady_clock::now();
            while (mine->left > 0) {
                expect_on_cpu(std::chrono::steady_clock::now() - begin < std::chrono::seconds(100), "waits for something that does not come");
                // Some warps sleep, the others go on from any of them, up or down.
                unsigned asleep = random_on_cpu(), first = random_on_cpu() % FIBERS, down = random_on_cpu() & 1;
                for (int x = 0; x < FIBERS; x++) {
                    int f = (first + (down ? FIBERS - x : x)) % FIBERS;
                    if (mine->done[f] || (asleep >> f / 32 & 1)) continue;
                    mine->now = f;
                    swapcontext(&mine->scheduler, &mine->fibers[f]);
                }
                for (size_t x = mine->copies.size(); x-- > 0;) {
                    if (random_on_cpu() % 4) continue;
                    std::swap(mine->copies[x], mine->copies.back());
                    mine->copies.back()();
                    mine->copies.pop_back();
                }
                sched_yield();
            }
            expect_on_cpu(mine->copies.empty(), "copies that nobody waited for");
            room.release();
        });
    }
    for (std::thread& thread : threads) thread.join();
}

template <typename... A, size_t... N>
inline void call_with(void (*kernel)(A...), void** parameters, std::index_sequence<N...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(parameters[N])...);
}
template <typename... A>
inline void launch_on_cpu(void (*kernel)(A...), int programs, void** parameters) {
    run_programs(programs, [=]() { call_with(kernel, parameters, std::index_sequence_for<A...>()); });
}

// ---- What kernels/cuda/hardware.cuh says in the hardware's own words ----------------------------------------------------------------------

typedef unsigned int u32;
typedef unsigned long long u64;

struct Record {
    float a, b, c;
    u32 launch;
};

inline std::mutex memory_on_cpu;
inline float reciprocal_fast(float x) { return 1.f / x; }

inline unsigned needed_here(unsigned x) { return x; }
inline float add_toward_zero(float x, float y) {
    double exact = (double)x + y;
    float nearest = (float)exact;
    return std::abs((double)nearest) > std::abs(exact) ? std::nextafter(nearest, 0.f) : nearest;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline void follow_launch_before() {
#ifdef LATE_PROGRAM
    // One warp of this program begins when all others wait for it at the barrier of all. They may not have ended: it would take their launch for
    // one before.
    Program& p = *program_on_cpu;
    if (blockIdx.x != LATE_PROGRAM || p.now / 32 != 5) return;
    while (p.all.arrived < FIBERS - 32) {
        if (p.left <= 32) std::abort();
        yield_fiber();
    }
#endif
}
inline void publish(Record* place, float a, float b, float c, u32 launch) {
    std::lock_guard lock(memory_on_cpu);
    *place = {a, b, c, launch};
}
inline void publish(u64* place, u32 value, u32 launch) {
    std::lock_guard lock(memory_on_cpu);
    *place = (u64)launch << 32 | value;
}
template <typename X>
inline X peek(const X* place) {
    yield_fiber();
    std::lock_guard lock(memory_on_cpu);
    return *place;
}

// What is asked for must be there, and is not changed by it.
template <int BYTES>
inline void prefetch(const char* p) {
    volatile char last = p[BYTES - 1];
    (void)last;
}
inline u32 load_4(const char* p) { return *reinterpret_cast<const u32*>(p); }
inline uint2 load_8(const char* p) { return *reinterpret_cast<const uint2*>(p); }
inline uint4 load_16(const char* p) { return *reinterpret_cast<const uint4*>(p); }

// The test's own description of a tensor, where the host encodes one for the hardware.
struct alignas(64) TensorMap {
    const char* base;
    int64_t strides[3];  // of B, S, K, in bytes
    int64_t sizes[4];
    char rest[128 - 64];
};

// A barrier: phases that have ended, arrivals of a phase, those that are missing, and bytes.
struct Barrier {
    u64 ended : 20, arrivals : 10, missing : 10;
    int64_t bytes : 24;
};
static_assert(sizeof(Barrier) == sizeof(u64));
inline Barrier& barrier_at(u64* place) { return *reinterpret_cast<Barrier*>(place); }
inline void end_phase(u64* barrier) {
    Barrier& b = barrier_at(barrier);
    if (b.bytes == 0 && b.missing == 0) b.ended = b.ended + 1, b.missing = b.arrivals;
}
inline void init_barrier(u64* barrier, int arrivals) { barrier_at(barrier) = {0, (unsigned)arrivals, (unsigned)arrivals, 0}; }
inline void barriers_made() {}
inline void expect_bytes(u64* barrier, int bytes) {
    Barrier& b = barrier_at(barrier);
    expect_on_cpu(b.missing > 0, "more arrivals than a barrier has");
    b.missing = b.missing - 1;
    b.bytes = b.bytes + bytes;
}
inline void arrive(u64* barrier) {
    expect_bytes(barrier, 0);
    end_phase(barrier);
}
inline void await_phase(u64* barrier, u32 phase) {
    // The hardware tells even phases from odd ones, no more.
    auto ended = [&]() {
        unsigned phases = barrier_at(barrier).ended;
        expect_on_cpu(phases == phase || phases == phase + 1, "a barrier's phase that is over, or not yet begun");
        return phases != phase;
    };
    while (!ended()) yield_fiber();
}
inline void copy_tile(void* tile, const TensorMap* map, int dimension, int head, int token, int b, u64* barrier) {
    expect_on_cpu(
        token >= 0 && b >= 0 && b < map->sizes[0] && head >= 0 && head < map->sizes[2] && dimension + 64 <= map->sizes[3], "a tile beyond its tensor"
    );
    std::memset(tile, 0xff, 16 * 128);
    program_on_cpu->copies.push_back([=]() {
        for (int row = 0; row < 16; row++) {
            for (int chunk = 0; chunk < 8; chunk++) {
                char* to = static_cast<char*>(tile) + row * 128 + (chunk ^ row % 8) * 16;
                bool real = token + row < map->sizes[1];
                const char* from = map->base + b * map->strides[0] + (token + row) * map->strides[1] + head * map->strides[2] + dimension * 2 + chunk * 16;
                if (real) std::memcpy(to, from, 16);
                else std::memset(to, 0, 16);
            }
        }
        barrier_at(barrier).bytes = barrier_at(barrier).bytes - 16 * 128;
        end_phase(barrier);
    });
}

inline u32 bf16_bits(float x) {
    u32 bits = bits_of<u32>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(high) << 16 | bf16_bits(low); }
inline u32 pack_f16(float low, float high) { return (u32)bits_of<uint16_t>((_Float16)high) << 16 | bits_of<uint16_t>((_Float16)low); }
inline float half_of(u32 word, int n, bool bf16) {
    uint16_t bits = word >> 16 * n;
    return bf16 ? bits_of<float>((u32)bits << 16) : (float)bits_of<_Float16>(bits);
}
inline float e4m3_of(u32 bits) {
    int exponent = bits >> 3 & 15, fraction = bits & 7;
    float x = (bits & 0x7f) == 0x7f ? NAN : exponent ? std::ldexp(8.f + fraction, exponent - 10) : std::ldexp((float)fraction, -9);
    return bits & 0x80 ? -x : x;
}
inline uint2 f16_of_e4m3(u32 x) {
    return {pack_f16(e4m3_of(x & 0xff), e4m3_of(x >> 8 & 0xff)), pack_f16(e4m3_of(x >> 16 & 0xff), e4m3_of(x >> 24))};
}
inline void multiply_on_cpu(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, bool bf16) {
    auto words = gather({a0, a1, a2, a3, b0, b1});
    int lane = lane_on_cpu();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
        for (int c = 0; c < 4; c++) {
            for (int n = 0; n < 2; n++) {
                d[i] += half_of(words[row * 4 + c][upper], n, bf16) * half_of(words[column * 4 + c][4], n, bf16);
                d[i] += half_of(words[row * 4 + c][2 + upper], n, bf16) * half_of(words[column * 4 + c][5], n, bf16);
            }
        }
    }
}
inline void multiply_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { multiply_on_cpu(d, a0, a1, a2, a3, b0, b1, true); }
inline void multiply_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { multiply_on_cpu(d, a0, a1, a2, a3, b0, b1, false); }
template <typename Number>
inline u32 times_on_cpu(u32 x, u32 y, Number pack, bool bf16) {
    return pack(half_of(x, 0, bf16) * half_of(y, 0, bf16), half_of(x, 1, bf16) * half_of(y, 1, bf16));
}
inline u32 times_bf16(u32 x, u32 y) { return times_on_cpu(x, y, pack_bf16, true); }
inline u32 times_f16(u32 x, u32 y) { return times_on_cpu(x, y, pack_f16, false); }
inline uint4 load_transposed(const char* row) {
    u64 mine = reinterpret_cast<u64>(row);
    auto words = gather({(u32)mine, (u32)(mine >> 32)});
    int r = lane_on_cpu() / 4, c = lane_on_cpu() % 4;
    u32 x[4];
    for (int m = 0; m < 4; m++) {
        x[m] = 0;
        for (int n = 0; n < 2; n++) {
            const u32* at = words[8 * m + 2 * c + n];
            x[m] |= (u32)reinterpret_cast<const uint16_t*>((u64)at[1] << 32 | at[0])[r] << 16 * n;
        }
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}
inline u32 transpose_8x8(u32 x) {
    auto words = gather({x});
    int r = lane_on_cpu() / 4, c = lane_on_cpu() % 4;
    auto at = [&](int row, int column) { return words[row * 4 + column / 2][0] >> 16 * (column % 2) & 0xffff; };
    return at(2 * c + 1, r) << 16 | at(2 * c, r);
}

// Dynamic shared memory of a program.
alignas(1024) thread_local char memory[232448];
inline void spoil_shared_memory() { std::memset(memory, 0xff, sizeof memory); }
