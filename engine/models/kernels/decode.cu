// One launch, one pass of a Llama-shaped decoder over at most MT tokens: bf16 weights, paged KV.
//
// Every multiprocessor owns a fixed range of each matrix's rows and a part of the context. One warp of
// it, the producer, streams these in the order of the pass through a ring in shared memory and never
// waits for anything but free space, so that memory stays busy while the eight consumer warps wait for other
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
// defined by the host (engine/models/decode.py); `Params` has its other side in engine/models/decode_data.py.

#include "decode_state.cuh"
#include "decode_memory.cuh"
#include "decode_products.cuh"
#include "decode_merge.cuh"
#include "decode_attention.cuh"
#include "decode_stream.cuh"

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

__device__ __forceinline__ void compute(Shared &s, const Params &p, unsigned char *ring, const Range &r, int me) {
    const int tid = threadIdx.x;
    const u32 launch = *(volatile const u32 *)p.launches;
    const int last = launch & 1;
    prepare(s, p, r, s.meta.tokens);
    if (tid == 0) s.items = items_of(s, me, s.item);
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
            if (product.kind == OUT) {
#pragma unroll 1
                while (s.cleared < l) __nanosleep(20);
                at = attend(s, p, ring, at, me, l);
            }
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
        stream(s, p, ring, r, me);
    else
        keep_clear(s, p, r, me);
}
