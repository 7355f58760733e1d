// Attention of a decoding pass: work is (row, KV head, 16 queries, split of the context).

// How many items the pass has; the n-th of them. The same on every multiprocessor; splits of a unit are
// neighbours.
__device__ __noinline__ int items_of(const Shared &s, int n, Item &item) {
    int units = 0;
#pragma unroll 1
    for (int r = 0; r < s.meta.rows; r++) units += NKV * ((s.meta.length[r] * FOLD + 15) / 16);
    int unit = 0, items = 0;
#pragma unroll 1
    for (int r = 0; r < s.meta.rows; r++) {
        const int tiles = (s.meta.length[r] * FOLD + 15) / 16, blocks = (s.meta.start[r] + BLOCK - 1) / BLOCK;
        const int splits = max(1, min(NSM / units, (blocks + WARPS - 1) / WARPS)), mine = n - items;
        if (mine >= 0 && mine < NKV * tiles * splits) {
            item.row = r;
            item.splits = splits;
            item.split = mine % splits;
            item.unit = unit + mine / splits;
            item.head = mine / splits % NKV;
            item.tile = mine / splits / NKV;
            item.from = blocks * item.split / splits;
            item.to = blocks * (item.split + 1) / splits;
        }
        items += NKV * tiles * splits;
        unit += NKV * tiles;
    }
    return items;
}

// Sixteen positions of one KV head: lane (g, t) has positions g and g + 8, columns 32 j + 8 t.
struct Context {
    uint4 k[2][HD / 32], v[2][HD / 32];
    int valid;  // positions that are there; the rest is zero
    __device__ __forceinline__ void load(const Shared &s, const Params &p, const Layer &w, const Item &item, int block, bool cached) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, i0 = block - item.from;
        valid = 0;
        if (block >= item.to) return;
        const int id = cached && i0 < TABLE ? s.table[i0] : p.tables[s.meta.line[item.row] * p.table_stride + block];
        valid = min(BLOCK, s.meta.start[item.row] - block * BLOCK);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u64 at = (((u64)id * BLOCK + g + 8 * i) * NKV + item.head) * HD + 8 * t;
#pragma unroll
            for (int j = 0; j < HD / 32; j++) k[i][j] = load_kv(w.k + at + 32 * j);
#pragma unroll
            for (int j = 0; j < HD / 32; j++) {
                v[i][j] = make_uint4(0, 0, 0, 0);  // beyond the row: may be another's NaN, and 0 * NaN is NaN
                if (g + 8 * i < valid) v[i][j] = load_kv(w.v + at + 32 * j);
            }
        }
    }
};

// One head of one token as a warp: normed if the model does so, turned to its position. from: float[HD].
struct Head {
    float a[HD / 64], b[HD / 64];
    __device__ __forceinline__ void load(const float *from) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int m = 0; m < HD / 64; m++) {
            a[m] = load_l2f(from + lane + 32 * m);
            b[m] = load_l2f(from + lane + 32 * m + HD / 2);
        }
    }
    __device__ __forceinline__ bool missing() const {
        bool any = false;
#pragma unroll
        for (int m = 0; m < HD / 64; m++) any |= absent(a[m]) || absent(b[m]);
        return any;
    }
    __device__ __forceinline__ void rotate(const Shared &s, int token, const u16 *norm, float eps, float scale, u16 *to) {
        const int lane = threadIdx.x & 31;
        float sum = 0.f;
#pragma unroll
        for (int m = 0; m < HD / 64; m++) sum += a[m] * a[m] + b[m] * b[m];
        const float rstd = norm ? rsqrtf(warp_sum(sum) / HD + eps) : 1.f;
#pragma unroll
        for (int m = 0; m < HD / 64; m++) {
            const int d = lane + 32 * m;
            const float2 turn = s.rope[token][d];
            float x = a[m], y = b[m];
            if (norm) {
                x *= rstd * from_bf16(norm[d]);
                y *= rstd * from_bf16(norm[d + HD / 2]);
            }
            to[d] = to_bf16((x * turn.x - y * turn.y) * scale);
            to[d + HD / 2] = to_bf16((y * turn.x + x * turn.y) * scale);
        }
    }
};

// The pass's own key and value j of the item's head, to shared memory and to the pool.
__device__ __forceinline__ void new_kv(Shared &s, const Params &p, const Layer &w, const Item &item, int j, int copy) {
    const bool keep = item.tile == 0;  // one of the tiles writes to the pool
    const int lane = threadIdx.x & 31, token = s.meta.begin[item.row] + j, at = s.meta.start[item.row] + j;
    const float *from = p.qkv_of(copy) + token * NQKV + NQ + item.head * HD;
    const int slot = keep ? p.tables[s.meta.line[item.row] * p.table_stride + at / BLOCK] * BLOCK + at % BLOCK : 0;
    Head key;
    float value[HD / 32];
    const auto load = [&] {
        key.load(from);
#pragma unroll
        for (int m = 0; m < HD / 32; m++) value[m] = load_l2f(from + NKVD + lane + 32 * m);
    };
    load_until_there(load, [&] {
        bool missing = key.missing();
#pragma unroll
        for (int m = 0; m < HD / 32; m++) missing |= absent(value[m]);
        return missing;
    });
    key.rotate(s, token, w.knorm, p.eps, 1.f, s.k[j]);
#pragma unroll
    for (int m = 0; m < HD / 32; m++) s.v[j][lane + 32 * m] = to_bf16(value[m]);
    __syncwarp();
    if (!keep) return;
    u32 *k = reinterpret_cast<u32 *>(w.k + ((u64)slot * NKV + item.head) * HD), *v = reinterpret_cast<u32 *>(w.v + ((u64)slot * NKV + item.head) * HD);
#pragma unroll 1
    for (int d = lane; d < HD / 2; d += 32) {
        k[d] = reinterpret_cast<const u32 *>(s.k[j])[d];
        v[d] = reinterpret_cast<const u32 *>(s.v[j])[d];
    }
}

// Running softmax of 16 queries in one warp: rows g and g + 8 of the fragments.
struct Running {
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, o[HD / 8][4];
};

// One step of it. allowed: a bit for each position, for the lane's two query rows.
__device__ __forceinline__ void attend_block(const Shared &s, Running &r, const Context &c, u32 allowed0, u32 allowed1) {
    const int t = threadIdx.x & 3, g = threadIdx.x >> 2 & 7;
    float sc[2][4] = {};
#pragma unroll
    for (int j = 0; j < HD / 32; j++) {
        const uint4 a = load_shared(&s.q[g][32 * j + 8 * t]), b = load_shared(&s.q[g + 8][32 * j + 8 * t]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mma(sc[i], a.x, b.x, a.y, b.y, c.k[i][j].x, c.k[i][j].y);
            mma(sc[i], a.z, b.z, a.w, b.w, c.k[i][j].z, c.k[i][j].w);
        }
    }
    float top[2] = {r.m[0], r.m[1]};
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int at = 8 * i + 2 * t + (e & 1);
            if (!(((e < 2 ? allowed0 : allowed1) >> at) & 1)) sc[i][e] = -INFINITY;
            top[e >> 1] = fmaxf(top[e >> 1], sc[i][e]);
        }
    float keep[2], base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
        base[h] = top[h] == -INFINITY ? 0.f : top[h];
        keep[h] = exp2f(r.m[h] - base[h]);
        r.m[h] = top[h];
        r.l[h] *= keep[h];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            sc[i][e] = exp2f(sc[i][e] - base[e >> 1]);
            r.l[e >> 1] += sc[i][e];  // this lane's share; summed over the four lanes at the end
        }
    const u32 p0 = pack_bf16(sc[0][0], sc[0][1]), p1 = pack_bf16(sc[0][2], sc[0][3]);
    const u32 p2 = pack_bf16(sc[1][0], sc[1][1]), p3 = pack_bf16(sc[1][2], sc[1][3]);
#pragma unroll
    for (int j = 0; j < HD / 32; j++) {
        const u32 lo[4] = {c.v[0][j].x, c.v[0][j].y, c.v[0][j].z, c.v[0][j].w};
        const u32 hi[4] = {c.v[1][j].x, c.v[1][j].y, c.v[1][j].z, c.v[1][j].w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float(&o)[4] = r.o[4 * j + e];  // columns 32 j + 8 t + 2 e and the next
            o[0] *= keep[0];
            o[1] *= keep[0];
            o[2] *= keep[1];
            o[3] *= keep[1];
            mma(o, p0, p1, p2, p3, transpose(lo[e]), transpose(hi[e]));
        }
    }
}

// The parts of a unit, added in their order: each of its multiprocessors does a slice. base: first item.
__device__ __forceinline__ void combine(Shared &s, const Params &p, const Item &item, int base, int copy) {
    const int tid = threadIdx.x, begin = s.meta.begin[item.row], length = s.meta.length[item.row];
    float *top = s.red, *sum = s.red + item.splits * 16;
    const int queries = min(16, length * FOLD - item.tile * 16), all = queries * (HD / 4);
    const int rounds = (item.splits * 16 + CONSUMERS - 1) / CONSUMERS;
#pragma unroll 1
    for (int n = 0; n < rounds; n++) {
        const int e = tid + n * CONSUMERS, i = e % 16;
        const bool mine = e < item.splits * 16 && i < queries;
        const float *from = p.part_ml_of(copy, base + (mine ? e / 16 : 0)) + i * 2;
        float m = 0.f, l = 0.f;
        const auto load = [&] {
            if (mine) {
                m = load_l2f(from);
                l = load_l2f(from + 1);
            }
        };
        load_until_there(load, [&] { return absent(m) || absent(l); });
        if (mine) {
            top[e] = m;
            sum[e] = l;
        }
    }
    consumers_sync();
    const int first = all * item.split / item.splits, end = all * (item.split + 1) / item.splits;
#pragma unroll 1
    for (int n0 = first; n0 < end; n0 += CONSUMERS) {
        const bool mine = n0 + tid < end;
        const int e = mine ? n0 + tid : first, i = e / (HD / 4), d = e % (HD / 4) * 4;
        float best = -INFINITY, total = 0.f, value[4] = {};
#pragma unroll 1
        for (int n = 0; n < item.splits; n++) best = fmaxf(best, top[n * 16 + i]);
#pragma unroll 1
        for (int n = 0; n < item.splits; n += 4) {
            uint4 part[4];
            const auto load = [&] {
#pragma unroll
                for (int u = 0; u < 4; u++)
                    part[u] = n + u < item.splits && mine ? load_l2(p.part_of(copy, base + n + u) + i * HD + d) : make_uint4(0, 0, 0, 0);
            };
            load_until_there(load, [&] {
                bool missing = false;
#pragma unroll
                for (int u = 0; u < 4; u++) missing |= absent(part[u]);
                return missing;
            });
#pragma unroll
            for (int u = 0; u < 4; u++) {
                if (n + u < item.splits) {
                    const float weight = exp2f(top[(n + u) * 16 + i] - best);
                    total += weight * sum[(n + u) * 16 + i];
                    value[0] += weight * __uint_as_float(part[u].x);
                    value[1] += weight * __uint_as_float(part[u].y);
                    value[2] += weight * __uint_as_float(part[u].z);
                    value[3] += weight * __uint_as_float(part[u].w);
                }
            }
        }
        if (mine) {
            const int query = item.tile * 16 + i, j = query / FOLD, f = query % FOLD;
            const float inverse = 1.f / total;
            u32 *out = reinterpret_cast<u32 *>(p.attn_of(copy) + (u64)(begin + j) * NQ + (item.head * FOLD + f) * HD + d);
            store(out, pack_bf16(value[0] * inverse, value[1] * inverse));
            store(out + 1, pack_bf16(value[2] * inverse, value[3] * inverse));
        }
    }
}

// Queries [first, first + count) of the item from the eight warps' sums: the output, or this split's part.
__device__ __forceinline__ void write_queries(Shared &s, const Params &p, const Item &item, int n, int copy, int first, int count) {
#pragma unroll 1
    for (int e = threadIdx.x; e < count * (HD / 4); e += CONSUMERS) {
        const int i = e / (HD / 4), d = e % (HD / 4) * 4, query = item.tile * 16 + first + i;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        float top = -INFINITY, total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float4 x = *reinterpret_cast<const float4 *>(s.red + (w * 8 + i) * HD + d);
            sum.x += x.x;
            sum.y += x.y;
            sum.z += x.z;
            sum.w += x.w;
            top = fmaxf(top, s.ml[w][first + i][0]);
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (s.ml[w][first + i][0] != -INFINITY) total += s.ml[w][first + i][1] * exp2f(s.ml[w][first + i][0] - top);
        if (item.splits == 1) {
            const float inverse = 1.f / total;
            const int token = s.meta.begin[item.row] + query / FOLD, head = item.head * FOLD + query % FOLD;
            u32 *out = reinterpret_cast<u32 *>(p.attn_of(copy) + (u64)token * NQ + head * HD + d);
            store(out, pack_bf16(sum.x * inverse, sum.y * inverse));
            store(out + 1, pack_bf16(sum.z * inverse, sum.w * inverse));
            continue;
        }
        float *part = p.part_of(copy, n) + (first + i) * HD + d;
        store(part, sum.x);
        store(part + 1, sum.y);
        store(part + 2, sum.z);
        store(part + 3, sum.w);
        if (d == 0) {
            store(p.part_ml_of(copy, n) + (first + i) * 2, top);
            store(p.part_ml_of(copy, n) + (first + i) * 2 + 1, total);
        }
    }
}

__device__ __forceinline__ void attend_item(Shared &s, const Params &p, const Layer &w, const Item &item, int n, Context &c, bool cached, int copy) {
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int begin = s.meta.begin[item.row], length = s.meta.length[item.row];
    const bool newest = item.split == item.splits - 1;  // this split also has the pass's own tokens
    const int own = newest ? length : 0;
#pragma unroll 1
    for (int task = warp; task < own + 16; task += WARPS) {
        if (task < own) {
            new_kv(s, p, w, item, task, copy);
            continue;
        }
        const int i = task - own, query = item.tile * 16 + i, j = query / FOLD, f = query % FOLD;
        if (j < length) {
            Head head;
            const auto load = [&] { head.load(p.qkv_of(copy) + (begin + j) * NQKV + (item.head * FOLD + f) * HD); };
            load_until_there(load, [&] { return head.missing(); });
            head.rotate(s, begin + j, w.qnorm, p.eps, p.scale * 1.4426950408889634f, s.q[i]);
        } else {
#pragma unroll 1
            for (int d = lane; d < HD; d += 32) s.q[i][d] = 0;
        }
    }
    consumers_sync();
    Running r;
#pragma unroll
    for (int i = 0; i < HD / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) r.o[i][e] = 0.f;
    const int a = (item.tile * 16 + g) / FOLD, b = (item.tile * 16 + g + 8) / FOLD;  // tokens of the lane's queries
    bool last = newest && warp == WARPS - 1;  // has the pass's own tokens as its last block
#pragma unroll 1
    for (int block = item.from + warp;; block += WARPS) {
        u32 first = (1u << c.valid) - 1, second = first;
        if (block >= item.to) {
            if (!last) break;
            last = false;
            first = a < length ? s.meta.mask[begin + a] : 0;
            second = b < length ? s.meta.mask[begin + b] : 0;
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < HD / 32; j++) {
                    const bool there = g + 8 * i < length;
                    c.k[i][j] = there ? load_shared(&s.k[(g + 8 * i) % MT][32 * j + 8 * t]) : make_uint4(0, 0, 0, 0);
                    c.v[i][j] = there ? load_shared(&s.v[(g + 8 * i) % MT][32 * j + 8 * t]) : make_uint4(0, 0, 0, 0);
                }
        }
        attend_block(s, r, c, first, second);
        c.load(s, p, w, item, block + WARPS, cached);
    }
    // Merge the warps: common maximum, then sums in the order of the warps, eight queries at a time.
#pragma unroll
    for (int h = 0; h < 2; h++) {
        r.l[h] += __shfl_xor_sync(~0u, r.l[h], 1);
        r.l[h] += __shfl_xor_sync(~0u, r.l[h], 2);
        if (t == 0) {
            s.ml[warp][g + 8 * h][0] = r.m[h];
            s.ml[warp][g + 8 * h][1] = r.l[h];
        }
    }
    consumers_sync();
    const int queries = min(16, length * FOLD - item.tile * 16);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (8 * h < queries) {
            float top = -INFINITY;
#pragma unroll
            for (int i = 0; i < WARPS; i++) top = fmaxf(top, s.ml[i][g + 8 * h][0]);
            const float keep = r.m[h] == -INFINITY ? 0.f : exp2f(r.m[h] - top);
            float *to = s.red + (warp * 8 + g) * HD + 8 * t;
#pragma unroll
            for (int e = 0; e < HD / 8; e++)
                *reinterpret_cast<float2 *>(to + e / 4 * 32 + 2 * (e % 4)) = make_float2(r.o[e][2 * h] * keep, r.o[e][2 * h + 1] * keep);
            consumers_sync();
            write_queries(s, p, item, n, copy, 8 * h, min(8, queries - 8 * h));
            consumers_sync();
        }
    }
    if (item.splits > 1) combine(s, p, item, n - item.split, copy);
    consumers_sync();
}

// Wide heads need many registers, which would be taken from the products': not inlined.
#if HD > 64
__device__ __noinline__
#else
__device__ __forceinline__
#endif
void attend(Shared &s, const Params &p, int me, int l) {
    const Layer &w = s.layers[l];
    Item item = s.item;
#pragma unroll 1
    for (int n = me; n < s.items; n += NSM) {
        if (n != me) items_of(s, n, item);
        Context context;  // keys and values from before this pass need not wait for its queries
        context.load(s, p, w, item, item.from + (threadIdx.x >> 5), n == me);
        attend_item(s, p, w, item, n, context, n == me, l & 1);
    }
}
