// Attention of a decoding pass: work is (row, KV head, 16 queries, split of the context). Keys and values of the
// context come through the ring like weights: they are there before the queries are.

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
        const int splits = max(1, min(NSM / units, (blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS)), mine = n - items;
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

// One step of it over sixteen positions of one KV head, in shared memory: u16[16, pitch] each; those from `valid`
// on are not there (what lies there may be a NaN, and 0 * NaN is NaN). allowed: a bit for each position, for the
// lane's two query rows.
__device__ __forceinline__ void attend_block(const Shared &s, Running &r, const u16 *keys, const u16 *values, int pitch, int valid, u32 allowed0, u32 allowed1) {
    const int t = threadIdx.x & 3, g = threadIdx.x >> 2 & 7;
    const auto there = [&](const u16 *of, int i, int j) { return g + 8 * i < valid ? load_shared(of + (g + 8 * i) * pitch + 32 * j + 8 * t) : make_uint4(0, 0, 0, 0); };
    float sc[2][4] = {};
#pragma unroll
    for (int j = 0; j < HD / 32; j++) {
        const uint4 a = load_shared(&s.q[g][32 * j + 8 * t]), b = load_shared(&s.q[g + 8][32 * j + 8 * t]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint4 k = there(keys, i, j);
            mma(sc[i], a.x, b.x, a.y, b.y, k.x, k.y);
            mma(sc[i], a.z, b.z, a.w, b.w, k.z, k.w);
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
        const uint4 low = there(values, 0, j), high = there(values, 1, j);
        const u32 lo[4] = {low.x, low.y, low.z, low.w}, hi[4] = {high.x, high.y, high.z, high.w};
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

// The context comes through the ring, see `stream_context`.
__device__ __forceinline__ void attend_item(Shared &s, const Params &p, const unsigned char *ring, Ring &at, const Layer &w, const Item &item, int n, int copy) {
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
#pragma unroll 1
    for (int block = item.from; block < item.to; block += STAGE_BLOCKS) {
        wait(&s.full[at.stage], at.phase);  // all warps: who releases a stage must have seen it full
        const int c = (warp - (block - item.from)) & (WARPS - 1);  // which of its blocks is this warp's
        if (c < STAGE_BLOCKS && block + c < item.to) {
            const u16 *keys = reinterpret_cast<const u16 *>(ring + at.stage * STAGE) + c * 2 * BLOCK * HD;
            const int valid = min(BLOCK, s.meta.start[item.row] - (block + c) * BLOCK);
            attend_block(s, r, keys, keys + BLOCK * HD, HD, valid, (1u << valid) - 1, (1u << valid) - 1);
        }
        release(s, at);
    }
    if (newest && warp == WARPS - 1)  // the pass's own tokens
        attend_block(s, r, s.k[0], s.v[0], HPAD, length, a < length ? s.meta.mask[begin + a] : 0, b < length ? s.meta.mask[begin + b] : 0);
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
Ring attend(Shared &s, const Params &p, const unsigned char *ring, Ring at, int me, int l) {
    Item item = s.item;
#pragma unroll 1
    for (int n = me; n < s.items; n += NSM) {
        if (n != me) items_of(s, n, item);
        attend_item(s, p, ring, at, s.layers[l], item, n, l & 1);
    }
    return at;
}
