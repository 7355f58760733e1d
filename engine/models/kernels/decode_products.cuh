// Matrix products: the consumers that multiply, and what is handed on.

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

// ---- activations times weights

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
    release(s, at);
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
