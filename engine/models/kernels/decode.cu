// One launch, one pass of a Llama-shaped decoder over at most MT tokens: bf16 weights, paged KV.
//
// Every multiprocessor owns a fixed range of each matrix's rows. One warp of it, the producer,
// streams these rows in the order of the pass through a ring in shared memory and never waits for
// anything but free space, so that memory stays busy while the eight consumer warps wait for other
// multiprocessors, attend, or reduce. Products run on the tensor cores: tokens are the 16 rows of
// m16n8k16, eight weight rows its columns, and the order of k within 32 is permuted alike on both
// sides so that every operand is one 16-byte load.
//
// There is no barrier over the grid. What one stage hands to the next is waited for where it is
// read: a buffer holds ABSENT until its value is stored, and readers load again until it is not.
// (A barrier needs a fence before it, and a fence waits for the bulk copies in flight: measured, 3 to
// 4 us each, five times a layer.) Each buffer has two copies, of even and of odd layers; a warp of its
// own, the janitor, makes a layer's copies ABSENT again once every multiprocessor must have read them:
//   when all of act(l) was received, nobody reads hn, qkv, attn, part of layer l or act(l - 1) any more;
//   the janitor's fence for layer l comes before anything this multiprocessor does from its attention
//   of layer l + 1 on, on which every reader of layer l + 2 depends.
//
// Compiled at run time for one shape: H, NH, NKV, HD, INTER, LAYERS, VOCAB, MT, NSM and flags are
// defined by the host (engine/models/decode.py), which also documents `Params`.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define NQ (NH * HD)
#define NKVD (NKV * HD)
#define NQKV (NQ + 2 * NKVD)
#define FOLD (NH / NKV)
#define WARPS 8
#define CONSUMERS (WARPS * 32)
#define THREADS (CONSUMERS + 64)    // and the producer, and the janitor
#define INFINITY __int_as_float(0x7f800000)
#define KC 1024                // columns of one ring stage
#define PITCH (KC * 2 + 64)    // bytes between its rows: 16 banks apart
#define STAGE (8 * PITCH)
#define IN_FLIGHT 5
#define G 12                   // tiles of eight rows that share one read of the activations
#define TG (MT / 8)
#define BLOCK 16               // positions of one KV block
#define HPAD (HD + 8)
#define RED_FLOATS (4 * 16 * HD > WARPS * G * 8 * MT ? 4 * 16 * HD : WARPS * G * 8 * MT)
#define OWN ((H + NSM - 1) / NSM)
#define OWN_QKV ((NQKV + NSM - 1) / NSM)
#define TABLE 256
#define ABSENT 0xffffffffu          // in two halves: no bf16 or float that arithmetic gives
#define ROWS 16                     // tokens a buffer has room for
#define AHEAD 2                     // stages of activations that are loaded ahead
#define LANES (CONSUMERS / MT)   // threads that add up one token's squares
#define PARTS ((NSM + LANES - 1) / LANES)

struct Layer {
    const u16 *weights[4];  // by Kind: qkv, out, gate and up, down
    const u16 *qkv_bias, *o_bias, *norm1, *norm2, *qnorm, *knorm;
    u16 *k, *v;
};

struct Params {
    const Layer *layers;
    const u16 *embed;
    const float *hidden;  // float[16, H], the embeddings, where embed is null
    const u16 *final_norm, *head;
    const float *inv_freq;
    const int *meta, *tables;
    float *logits;
    // Two copies of each, see above; hn and sumsq have three uses: attention, MLP, head.
    u16 *hn, *attn, *act;
    float *qkv, *sumsq, *part, *part_ml;
    u32 *launches;
    int table_stride;
    float eps, rope_scale, scale;
    __device__ __forceinline__ u16 *hn_of(int use, int copy) const { return hn + (u64)(use * 2 + copy) * ROWS * H; }
    __device__ __forceinline__ u16 *attn_of(int copy) const { return attn + (u64)copy * ROWS * NQ; }
    __device__ __forceinline__ u16 *act_of(int copy) const { return act + (u64)copy * ROWS * INTER; }
    __device__ __forceinline__ float *qkv_of(int copy) const { return qkv + (u64)copy * ROWS * NQKV; }
    __device__ __forceinline__ float *sumsq_of(int use, int copy) const { return sumsq + (use * 2 + copy) * NSM * ROWS; }
    __device__ __forceinline__ float *part_of(int copy, int item) const { return part + ((u64)copy * NSM + item) * 16 * HD; }
    __device__ __forceinline__ float *part_ml_of(int copy, int item) const { return part_ml + (copy * NSM + item) * 16 * 2; }
};

// The batch, as the host or the previous kernel left it: see `decode.py`.
struct Meta {
    int tokens, rows, pad[6];
    int start[16], begin[16], length[16];   // by row
    int line[16];                           // by row: its line of `tables`
    int id[16], pos[16];                    // by token
    u32 mask[16];                           // by token: which new tokens of its row it attends
};

__device__ __forceinline__ int share(int n, int i) { return n * i / NSM; }

struct Range {
    int q0, q1, h0, h1, i0, i1, v0, v1, a0, a1;  // this multiprocessor's rows of each matrix, and columns of attn
    __device__ __forceinline__ void set(int me) {
        q0 = share(NQKV, me), q1 = share(NQKV, me + 1), h0 = share(H, me), h1 = share(H, me + 1);
        i0 = share(INTER, me), i1 = share(INTER, me + 1), v0 = share(VOCAB, me), v1 = share(VOCAB, me + 1);
        a0 = share(NQ, me), a1 = share(NQ, me + 1);
    }
};

// What a multiprocessor attends to: a row, a KV head, sixteen queries, a part of the context.
struct Item {
    int row, head, tile, split, splits, unit;
    int from, to;  // its blocks of the row
};

struct Shared {
    u64 full[STAGES], empty[STAGES];
    Layer layers[LAYERS];
    Meta meta;
    Range range;
    Item item;                              // the first of this multiprocessor's, if it has one
    int items;                              // of the whole pass
    u16 bias[LAYERS][OWN_QKV];              // of this multiprocessor's rows, as are the norms
    u16 norms[2 * LAYERS + 1][OWN];         // before attention and before the MLP of each layer; the last
    int table[TABLE];                       // blocks of this multiprocessor's first share of attention
    float rstd[MT];
    float ml[WARPS][16][2];
    float2 rope[MT][HD / 2];
    float own[MT][OWN];                     // the residual stream of this multiprocessor's rows
    __align__(16) u16 q[16][HPAD];
    __align__(16) u16 k[MT][HPAD];
    __align__(16) u16 v[MT][HPAD];
    __align__(16) float red[RED_FLOATS];
    volatile int received, cleared;         // layers whose act is all here; layers the janitor is done with
};

extern __shared__ __align__(128) unsigned char memory[];

#ifdef TRACE  // nanoseconds of one layer's stages, for tuning
__device__ long long trace[16 * 160];
__device__ __forceinline__ long long now_ns() { long long t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); return t; }
#define MARK(i) if (tid == 0 && l == LAYERS / 2 && product.kind != HEAD) trace[(i) * 160 + me] = now_ns()
#else
#define MARK(i)
#endif

// ---- small things

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
__device__ __forceinline__ uint4 load_kv(const void *p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
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

// The products of a layer in their order, and the head. One piece of code serves them all: a pass runs it
// hundreds of times, and what does not fit the instruction cache would be fetched each time.
enum Kind { QKV, OUT, GATE_UP, DOWN, HEAD };

struct Product {
    Kind kind;
    int layer, k, first, end;  // this multiprocessor's rows (of gate and up: pairs) [first, end)
    __device__ __forceinline__ Product(int n, const Range &r) : kind(n == 4 * LAYERS ? HEAD : (Kind)(n & 3)), layer(n >> 2) {
        k = kind == OUT ? NQ : kind == DOWN ? INTER : H;
        first = kind == QKV ? r.q0 : kind == GATE_UP ? r.i0 : kind == HEAD ? r.v0 : r.h0;
        end = kind == QKV ? r.q1 : kind == GATE_UP ? r.i1 : kind == HEAD ? r.v1 : r.h1;
    }
    __device__ __forceinline__ int per() const { return kind == GATE_UP ? 4 : 8; }  // units of a tile of eight rows
    __device__ __forceinline__ int tiles() const { return (end - first + per() - 1) / per(); }
};

__device__ __forceinline__ void stream_weights(Shared &s, const Params &p, unsigned char *ring, const Range &r) {
    const int lane = threadIdx.x & 31;
    Ring at, landed;
    int asked = 0;
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#pragma unroll 1
    for (int n = 0; n <= 4 * LAYERS; n++) {
        const Product product(n, r);
        const u16 *w = product.kind == HEAD ? p.head : s.layers[product.layer].weights[product.kind];
        const bool pairs = product.kind == GATE_UP;  // four rows of gate, then the same four of up
        const int tiles = product.tiles();
#pragma unroll 1
        for (int group = 0; group < tiles; group += G) {
            const int stop = min(group + G, tiles);
#pragma unroll 1
            for (int kc = 0; kc < product.k; kc += KC) {
                const u32 bytes = min(KC, product.k - kc) * 2;
#pragma unroll 1
                for (int tile = group; tile < stop; tile++) {
                    const int unit = product.first + tile * product.per() + (pairs ? lane & 3 : lane);
                    const bool valid = lane < 8 && unit < product.end;
                    const int row = pairs && lane >= 4 ? INTER + unit : unit;
                    const u32 count = __popc(__ballot_sync(~0u, valid));
                    // Of the ring only IN_FLIGHT stages are asked for at a time: what the memory needs to
                    // stay busy. With more, requests queue, and other loads wait behind them.
                    if (asked == (IN_FLIGHT < STAGES ? IN_FLIGHT : STAGES)) {
                        wait(&s.full[landed.stage], landed.phase);
                        landed.next();
                    } else {
                        asked++;
                    }
                    wait(&s.empty[at.stage], at.phase ^ 1);
                    const u32 full = address(&s.full[at.stage]);
                    if (lane == 0)
                        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(count * bytes) : "memory");
                    __syncwarp();
                    if (valid)
                        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                                     ::"r"(address(ring + at.stage * STAGE + lane * PITCH)), "l"(w + (u64)row * product.k + kc), "r"(bytes), "r"(full), "l"(policy) : "memory");
                    at.next();
                }
            }
        }
    }
}

// ---- between the multiprocessors

// The squares of the residual stream over all rows, from what each multiprocessor left: asked for early,
// added up when the first sums of a product are ready.
struct Squares {
    float part[PARTS];
    __device__ __forceinline__ void load(const float *sumsq, int tokens) {
        const int token = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const int n = lane + i * LANES;
            part[i] = n < NSM && token < tokens ? load_l2f(sumsq + n * ROWS + token) : 0.f;
        }
    }
    __device__ __forceinline__ void finish(Shared &s, const float *sumsq, int tokens, float eps) {
        until_there([&] { load(sumsq, tokens); }, [&] {
            bool missing = false;
#pragma unroll
            for (int i = 0; i < PARTS; i++) missing |= absent(part[i]);
            return missing;
        });
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PARTS; i++) sum += part[i];
#pragma unroll
        for (int i = LANES / 2; i > 0; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
        if (threadIdx.x % LANES == 0) s.rstd[threadIdx.x / LANES] = rsqrtf(sum / H + eps);
    }
};

// Publishes x * norm in bf16 and the squares of x for this multiprocessor's rows [first, end) of the
// stream. norm: of these rows.
__device__ __forceinline__ void publish(Shared &s, u16 *hn, float *sumsq, const u16 *norm, int first, int end) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int token = warp; token < s.meta.tokens; token += WARPS) {
        float sum = 0.f;
#pragma unroll 1
        for (int row = first + lane; row < end; row += 32) {
            const float x = s.own[token][row - first];
            sum += x * x;
            store(hn + (u64)token * H + row, to_bf16(x * from_bf16(norm[row - first])));
        }
        sum = warp_sum(sum);
        if (lane == 0) store(sumsq + blockIdx.x * ROWS + token, sum);
    }
}

#include "decode_attention.cuh"

// ---- the pass

template <class T>
__device__ __forceinline__ void clear(T *from, int stride, int first, int end, int tokens) {
#pragma unroll 1
    for (int token = 0; token < tokens; token++)
#pragma unroll 1
        for (int n = first + (threadIdx.x & 31); n < end; n += 32) store(from + (u64)token * stride + n, (T)ABSENT);
}

// See the top of the file.
__device__ __forceinline__ void keep_clear(Shared &s, const Params &p, const Range &r, int me) {
    const int lane = threadIdx.x & 31, tokens = s.meta.tokens;
    Item item;
    const bool parts = me < items_of(s, me, item) && item.splits > 1;
#pragma unroll 1
    for (int l = 0; l <= LAYERS; l++) {
#pragma unroll 1
        while (s.received <= l) __nanosleep(100);
        const int copy = l & 1;
        if (l > 0) clear(p.act_of(copy ^ 1), INTER, r.i0, r.i1, tokens);
        if (l == LAYERS) break;
#pragma unroll 1
        for (int use = 0; use < 2; use++) {
            clear(p.hn_of(use, copy), H, r.h0, r.h1, tokens);
            clear((u32 *)p.sumsq_of(use, copy), ROWS, me * ROWS, me * ROWS + tokens, 1);
        }
        clear((u32 *)p.qkv_of(copy), NQKV, r.q0, r.q1, tokens);
        clear(p.attn_of(copy), NQ, r.a0, r.a1, tokens);
        if (parts) {
            clear((u32 *)p.part_of(copy, me), HD, 0, HD, 16);
            clear((u32 *)p.part_ml_of(copy, me), 32, 0, 32, 1);
        }
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        __syncwarp();
        if (lane == 0) s.cleared = l + 1;
    }
}

// Rotary angles, norms and biases of this multiprocessor's rows, its share of the embeddings.
__device__ __forceinline__ void prepare(Shared &s, const Params &p, const Range &r, int tokens) {
    const int tid = threadIdx.x, lane = tid & 31;
#pragma unroll 1
    for (int token = tid >> 5; token < tokens; token += WARPS)
#pragma unroll 1
        for (int row = r.h0 + lane; row < r.h1; row += 32)
            s.own[token][row - r.h0] = p.embed ? from_bf16(p.embed[(u64)s.meta.id[token] * H + row]) : p.hidden[token * H + row];
#pragma unroll 1
    for (int l = tid >> 5; l < LAYERS; l += WARPS) {
        const Layer &w = s.layers[l];
#pragma unroll 1
        for (int i = lane; i < r.q1 - r.q0; i += 32) s.bias[l][i] = w.qkv_bias ? w.qkv_bias[r.q0 + i] : (u16)0;
#pragma unroll 1
        for (int i = lane; i < r.h1 - r.h0; i += 32) {
            s.norms[2 * l][i] = w.norm1[r.h0 + i];
            s.norms[2 * l + 1][i] = w.norm2[r.h0 + i];
            if (l == 0) s.norms[2 * LAYERS][i] = p.final_norm[r.h0 + i];
        }
    }
#pragma unroll 1
    for (int n = tid; n < tokens * (HD / 2); n += CONSUMERS) {
        const int token = n / (HD / 2), d = n % (HD / 2);
        float sine, cosine;
        sincosf((float)s.meta.pos[token] * p.inv_freq[d], &sine, &cosine);
        s.rope[token][d] = make_float2(cosine * p.rope_scale, sine * p.rope_scale);
    }
}

__device__ __forceinline__ void load_x(uint4 (&x)[4][TG], const u16 *from, int stride, int kc, int tokens) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const u16 *at = from + (u64)g * stride + kc + warp * 32 + t * 8;
    const int left = stride - kc - warp * 32;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < TG; i++) {
            x[j][i] = make_uint4(0, 0, 0, 0);
            if (WARPS * 32 * j < left && g + 8 * i < tokens) x[j][i] = load_l2(at + WARPS * 32 * j + (u64)8 * i * stride);
        }
}

// One tile of eight rows times the activations of one ring stage, into or onto this warp's sums. (Two tiles
// at a time were slower: more code.)
__device__ __forceinline__ void multiply(Shared &s, unsigned char *ring, Ring &at, const uint4 (&x)[4][TG], int left, bool fresh, float *sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    wait(&s.full[at.stage], at.phase);
    const unsigned char *w = ring + at.stage * STAGE + g * PITCH + warp * 64 + t * 16;
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (WARPS * 32 * j < left) {
            const uint4 b = load_shared(w + j * WARPS * 64);
            const uint4 a = x[j][0], c = TG > 1 ? x[j][TG - 1] : make_uint4(0, 0, 0, 0);
            mma(even, a.x, c.x, a.y, c.y, b.x, b.y);
            mma(odd, a.z, c.z, a.w, c.w, b.z, b.w);
        }
    }
    __syncwarp();
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&s.empty[at.stage])) : "memory");
    at.next();
#pragma unroll
    for (int e = 0; e < 2 * TG; e++) sums[e] = even[e] + odd[e] + (fresh ? 0.f : sums[e]);
}

// What becomes of one sum (of gate and up: two).
__device__ __forceinline__ void finish(Shared &s, const Params &p, const Range &r, const Product &product, int token, int unit, float x, float other) {
    const int l = product.layer, copy = l & 1;
    if (product.kind == QKV) {
        store(p.qkv_of(copy) + token * NQKV + unit, x * s.rstd[token] + from_bf16(s.bias[l][unit - r.q0]));
    } else if (product.kind == GATE_UP) {
        const float gate = x * s.rstd[token];
        store(p.act_of(copy) + (u64)token * INTER + unit, to_bf16(gate / (1.f + __expf(-gate)) * (other * s.rstd[token])));
    } else if (product.kind == HEAD) {
        p.logits[(u64)token * VOCAB + unit] = x * s.rstd[token];
    } else {
        if (product.kind == OUT && s.layers[l].o_bias) x += from_bf16(s.layers[l].o_bias[unit]);
        s.own[token][unit - r.h0] += x;
    }
}

// x [tokens, k] times this multiprocessor's rows. sumsq: of x before it was normed, or null.
// Sums stay in shared memory, not in registers, so that the loop over tiles need not be unrolled.
__device__ __forceinline__ void run(Shared &s, const Params &p, unsigned char *ring, Ring &at, const Range &r, const Product &product, const u16 *x, const float *sumsq) {
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, tokens = s.meta.tokens;
    const int k = product.k, per = product.per(), tiles = product.tiles();
    Squares squares;
    if (sumsq) squares.load(sumsq, tokens);
#pragma unroll 1
    for (int group = 0; group < tiles; group += G) {
        const int count = min(G, tiles - group);
        uint4 xs[AHEAD][4][TG];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) load_x(xs[u], x, k, u * KC, tokens);
#pragma unroll 1
        for (int base = 0; base < k; base += AHEAD * KC) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int kc = base + u * KC;
                if (kc < k) {
                    until_there([&] { load_x(xs[u], x, k, kc, tokens); }, [&] {
                        u32 bits = 0;
#pragma unroll
                        for (int j = 0; j < 4; j++)
#pragma unroll
                            for (int i = 0; i < TG; i++) bits |= absent_halves(xs[u][j][i]);
                        return bits != 0;
                    });
                    float *sums = s.red + (warp * G * 32 + lane) * 2 * TG;
#pragma unroll 1
                    for (int i = 0; i < count; i++, sums += 64 * TG) multiply(s, ring, at, xs[u], k - kc - warp * 32, kc == 0, sums);
                    load_x(xs[u], x, k, kc + AHEAD * KC, tokens);
                }
            }
        }
        if (group == 0 && sumsq) squares.finish(s, sumsq, tokens, p.eps);
        consumers_sync();  // the warps hold sums over different k: added now, in order
        if (group == 0 && tid == 0 && (product.kind == DOWN || product.kind == HEAD)) s.received = product.layer + 1;
        const int bits = per == 4 ? 2 : 3, more = 32 - __clz(tokens - 1);  // tokens padded to a power of two
#pragma unroll 1
        for (int n = tid; n < count << (bits + more); n += CONSUMERS) {
            const int e = n & (per - 1), token = n >> bits & ((1 << more) - 1), tile = n >> (bits + more);
            if (token >= tokens) continue;
            const float *from = s.red + (tile * 32 + token % 8 * 4 + e / 2) * 2 * TG + token / 8 * 2 + e % 2;
            float sum = 0.f, other = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                sum += from[w * G * 64 * TG];
                if (per == 4) other += from[w * G * 64 * TG + 4 * TG];
            }
            const int unit = product.first + (group + tile) * per + e;
            if (unit < product.end) finish(s, p, r, product, token, unit, sum, other);
        }
        consumers_sync();
    }
}

__device__ __forceinline__ void compute(Shared &s, const Params &p, unsigned char *ring, const Range &r, int me) {
    const int tid = threadIdx.x;
    const u32 launch = *(volatile const u32 *)p.launches;
    const int last = launch & 1;
    prepare(s, p, r, s.meta.tokens);
    if (tid == 0) s.items = items_of(s, me, s.item);
    consumers_sync();
    if (me < s.items) {
#pragma unroll 1
        for (int i = tid; i < min(TABLE, s.item.to - s.item.from); i += CONSUMERS)
            s.table[i] = p.tables[s.meta.line[s.item.row] * p.table_stride + s.item.from + i];
    }
    consumers_sync();
    if (tid < 32) {  // of the launch before: all of it has ended
        clear(p.hn_of(2, last ^ 1), H, r.h0, r.h1, ROWS);
        clear((u32 *)p.sumsq_of(2, last ^ 1), ROWS, me * ROWS, me * ROWS + ROWS, 1);
    }
    Ring at;
#pragma unroll 1
    for (int n = -1; n <= 4 * LAYERS; n++) {
        if (n >= 0) {
            const Product product(n, r);
            const int l = product.layer, copy = l & 1;
            MARK(product.kind);
            if (product.kind == OUT) {
#pragma unroll 1
                while (s.cleared < l) __nanosleep(20);
                attend(s, p, me, l);
            }
            MARK(product.kind + 5);
            const int use = product.kind == HEAD ? 2 : product.kind == GATE_UP;
            const bool normed = product.kind == QKV || product.kind == GATE_UP || product.kind == HEAD;
            const int from = use == 2 ? last : copy;
            const u16 *x = normed ? p.hn_of(use, from) : product.kind == OUT ? p.attn_of(copy) : p.act_of(copy);
            run(s, p, ring, at, r, product, x, normed ? p.sumsq_of(use, from) : nullptr);
        }
        if (n & 1) {  // the residual stream has changed: the embeddings (-1), attention, MLP
            const int l = (n + 1) >> 2, use = n + 1 == 4 * LAYERS ? 2 : (n & 3) == OUT, to = use == 2 ? last : l & 1;
            publish(s, p.hn_of(use, to), p.sumsq_of(use, to), s.norms[(n + 1) >> 1], r.h0, r.h1);
        }
    }
    if (me == 0 && tid == 0) *p.launches = launch + 1;  // everyone has read it: all have sent what came here
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(const __grid_constant__ Params p) {
    Shared &s = *reinterpret_cast<Shared *>(memory);
    unsigned char *ring = memory + ((sizeof(Shared) + 127) / 128) * 128;
    const int tid = threadIdx.x, me = blockIdx.x;
    if (*(volatile const int *)p.meta == 0) return;  // no tokens: a draft step after the last
    if (tid < sizeof(Meta) / 4) reinterpret_cast<int *>(&s.meta)[tid] = p.meta[tid];
#pragma unroll 1
    for (int n = tid; n < LAYERS * (int)(sizeof(Layer) / 8); n += THREADS)
        reinterpret_cast<u64 *>(s.layers)[n] = reinterpret_cast<const u64 *>(p.layers)[n];
    if (tid == 0) {
        s.received = s.cleared = 0;
        s.range.set(me);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&s.full[i])) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&s.empty[i])), "r"(WARPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const Range &r = s.range;
    if (tid < CONSUMERS)
        compute(s, p, ring, r, me);
    else if (tid < CONSUMERS + 32)
        stream_weights(s, p, ring, r);
    else
        keep_clear(s, p, r, me);
}
