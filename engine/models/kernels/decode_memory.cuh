// Loads, stores and waits of the decoding kernel, and its tensor core instructions.

__device__ __forceinline__ float from_bf16(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
__device__ __forceinline__ u16 to_bf16(float x) { return (u16)pack_bf16(x, 0.f); }
__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// What other multiprocessors store in this launch: never from L1.
__device__ __forceinline__ uint4 load_l2(const void *p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ float load_l2f(const float *p) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ void store(float *p, float x) { asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory"); }
__device__ __forceinline__ void store(u32 *p, u32 x) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
__device__ __forceinline__ void store(u16 *p, u16 x) { asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(x) : "memory"); }
__device__ __forceinline__ bool absent(float x) { return __float_as_uint(x) == ABSENT; }
__device__ __forceinline__ bool absent(const uint4 &v) { return v.x == ABSENT || v.y == ABSENT || v.z == ABSENT || v.w == ABSENT; }
// A bit is set for each half that is absent.
__device__ __forceinline__ u32 absent_halves(u32 x) { return (~x - 0x00010001u) & x & 0x80008000u; }
__device__ __forceinline__ u32 absent_halves(const uint4 &v) { return absent_halves(v.x) | absent_halves(v.y) | absent_halves(v.z) | absent_halves(v.w); }

// Loads until everything is there: `load` loads, `missing` says whether this lane lacks something. Here
// a first load has been made before; `load_until_there` makes it.
template <class Load, class Missing>
__device__ __forceinline__ void until_there(Load load, Missing missing) {
    u32 tries = 0;
#pragma unroll 1
    while (__any_sync(~0u, missing())) {
        load();
        if (++tries > (1u << 23)) __trap();  // never in working code: better a fault than a hung device
    }
}
template <class Load, class Missing>
__device__ __forceinline__ void load_until_there(Load load, Missing missing) {
    u32 tries = 0;
#pragma unroll 1
    do {
        load();
        if (++tries > (1u << 23)) __trap();
    } while (__any_sync(~0u, missing()));
}
__device__ __forceinline__ uint4 load_shared(const void *p) {
    return *reinterpret_cast<const uint4 *>(p);
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// ---- the ring

struct Ring {
    int stage = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) { stage = 0; phase ^= 1; }
    }
};

__device__ __forceinline__ void wait(u64 *bar, u32 phase) {
    u32 done = 0;
#pragma unroll 1
    for (u32 tries = 0; !done; tries++) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(address(bar)), "r"(phase) : "memory");
        if (tries > (1u << 24)) __trap();  // never in working code: better a fault than a hung device
    }
}

// This warp is done with a stage.
__device__ __forceinline__ void release(Shared &s, Ring &at) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&s.empty[at.stage])) : "memory");
    at.next();
}
