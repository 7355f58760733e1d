// What becomes of the softmax sums of an attention item: of its eight warps, then of all splits of the context.

// The parts of a unit, added up: each of its multiprocessors does a slice of the columns. base: first item. As
// many lanes share four columns as it takes to ask for all their parts at once: one wait for memory, not one a part.
__device__ __forceinline__ void combine(Shared &s, const Params &p, const Item &item, int base, int copy) {
    const int tid = threadIdx.x, begin = s.meta.begin[item.row], length = s.meta.length[item.row];
    const int queries = min(16, length * FOLD - item.tile * 16), all = queries * (HD / 4);
    const int first = all * item.split / item.splits, end = all * (item.split + 1) / item.splits;
    int wide = 1;
    while (wide * PARTS_A_LANE < item.splits) wide *= 2;
#pragma unroll 1
    for (int n0 = first; n0 < end; n0 += CONSUMERS / wide) {
        const bool mine = n0 + tid / wide < end;
        const int e = mine ? n0 + tid / wide : first, i = e / (HD / 4), d = e % (HD / 4) * 4;
        uint4 part[PARTS_A_LANE];
        float m[PARTS_A_LANE], l[PARTS_A_LANE];
        const auto load = [&] {
#pragma unroll
            for (int u = 0; u < PARTS_A_LANE; u++) {
                const int n = tid % wide + u * wide;
                const bool there = mine && n < item.splits;
                const float *ml = p.part_ml_of(copy, base + n) + i * 2;
                part[u] = there ? load_l2(p.part_of(copy, base + n) + i * HD + d) : make_uint4(0, 0, 0, 0);
                m[u] = there ? load_l2f(ml) : -INFINITY;
                l[u] = there ? load_l2f(ml + 1) : 0.f;
            }
        };
        load_until_there(load, [&] {
            bool missing = false;
#pragma unroll
            for (int u = 0; u < PARTS_A_LANE; u++) missing |= absent(part[u]) || absent(m[u]) || absent(l[u]);
            return missing;
        });
        float best = m[0], total = 0.f, value[4] = {};
#pragma unroll
        for (int u = 1; u < PARTS_A_LANE; u++) best = fmaxf(best, m[u]);
#pragma unroll 1
        for (int o = wide / 2; o > 0; o /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
#pragma unroll
        for (int u = 0; u < PARTS_A_LANE; u++) {
            const float weight = m[u] == -INFINITY ? 0.f : exp2f(m[u] - best);
            total += weight * l[u];
            value[0] += weight * __uint_as_float(part[u].x);
            value[1] += weight * __uint_as_float(part[u].y);
            value[2] += weight * __uint_as_float(part[u].z);
            value[3] += weight * __uint_as_float(part[u].w);
        }
#pragma unroll 1
        for (int o = wide / 2; o > 0; o /= 2) {
            total += __shfl_xor_sync(~0u, total, o);
#pragma unroll
            for (int c = 0; c < 4; c++) value[c] += __shfl_xor_sync(~0u, value[c], o);
        }
        if (mine && tid % wide == 0) {
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
