// The producer: weights and context, in the order of the pass, to the ring.

struct Sender {
    Ring at, landed;
    int asked = 0;
    u64 policy;  // weights are read once
    __device__ __forceinline__ Sender() { asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)); }
    // Waits until the stage `at` is free; `bytes` are to come. Of the ring only IN_FLIGHT stages are asked for at
    // a time: what the memory needs to stay busy. With more, requests queue, and other loads wait behind them.
    __device__ __forceinline__ void claim(Shared &s, u32 bytes) {
        if (asked == (IN_FLIGHT < STAGES ? IN_FLIGHT : STAGES)) {
            wait(&s.full[landed.stage], landed.phase);
            landed.next();
        } else {
            asked++;
        }
        wait(&s.empty[at.stage], at.phase ^ 1);
        if ((threadIdx.x & 31) == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&s.full[at.stage])), "r"(bytes) : "memory");
        __syncwarp();
    }
    __device__ __forceinline__ void copy(Shared &s, const void *to, const void *from, u32 bytes) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                     ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(&s.full[at.stage])), "l"(policy) : "memory");
    }
    // One head of BLOCK positions from `position` on. By a map, since these rows are short and apart: a copy of its
    // own for each takes 35 ns however short, and 16 bytes a lane are slower still than memory (measured).
    __device__ __forceinline__ void copy_tile(Shared &s, const void *to, u64 map, int head, int position) {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                     ::"r"(address(to)), "l"(map), "r"(0), "r"(head), "r"(position), "r"(address(&s.full[at.stage])) : "memory");
    }
};

__device__ __forceinline__ void stream_weights(Shared &s, const Params &p, unsigned char *ring, Sender &sender, const Range &r, const Product &product) {
    const int lane = threadIdx.x & 31, tiles = product.tiles();
    const u16 *w = product.kind == HEAD ? p.head : s.layers[product.layer].weights[product.kind];
    const bool pairs = product.kind == GATE_UP;  // four rows of gate, then the same four of up
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
                sender.claim(s, __popc(__ballot_sync(~0u, valid)) * bytes);
                if (valid) sender.copy(s, ring + sender.at.stage * STAGE + lane * PITCH, w + (u64)row * product.k + kc, bytes);
                sender.at.next();
            }
        }
    }
}

// The context of this multiprocessor's items, to the ring: for each block 16 keys, then 16 values, of one head.
// Whole blocks, though the last one's end may not be the row's.
__device__ __forceinline__ void stream_context(Shared &s, const Params &p, unsigned char *ring, Sender &sender, const Layer &w, int items, const Item &first, int me) {
    Item item = first;
#pragma unroll 1
    for (int n = me; n < items; n += NSM) {
        if (n != me) items_of(s, n, item);
        const int *table = p.tables + s.meta.line[item.row] * p.table_stride;
#pragma unroll 1
        for (int block = item.from; block < item.to; block += STAGE_BLOCKS) {
            const int count = min(STAGE_BLOCKS, item.to - block), lane = threadIdx.x & 31, i = block + lane / 2 - item.from;
            sender.claim(s, count * 2 * BLOCK * HD * 2);
            if (lane < 2 * count) {  // keys and values of a block each
                const int id = n == me && i < TABLE ? s.table[i] : table[i + item.from];
                sender.copy_tile(s, ring + sender.at.stage * STAGE + lane * BLOCK * HD * 2, lane & 1 ? w.values : w.keys, item.head, id * BLOCK);
            }
            sender.at.next();
        }
    }
}

__device__ __forceinline__ void stream(Shared &s, const Params &p, unsigned char *ring, const Range &r, int me) {
    Sender sender;
    Item item;
    int items = 0;
#pragma unroll 1
    for (int n = 0; n <= 4 * LAYERS; n++) {
        const Product product(n, r);
        if (n == OUT) {  // the first weights are on their way
            items = items_of(s, me, item);
            if (me < items) {
#pragma unroll 1
                for (int i = threadIdx.x & 31; i < min(TABLE, item.to - item.from); i += 32)
                    s.table[i] = p.tables[s.meta.line[item.row] * p.table_stride + item.from + i];
            }
            __syncwarp();
        }
        if (product.kind == OUT) stream_context(s, p, ring, sender, s.layers[product.layer], items, item, me);
        stream_weights(s, p, ring, sender, r, product);
    }
}
