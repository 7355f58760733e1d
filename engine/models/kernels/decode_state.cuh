// What a decoding pass is given and what a multiprocessor keeps.

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
#define STAGE_BLOCKS (STAGE / (2 * BLOCK * HD * 2))  // KV blocks of one head that a ring stage holds
#define RED_FLOATS (4 * 16 * HD > WARPS * G * 8 * MT ? 4 * 16 * HD : WARPS * G * 8 * MT)
#define OWN ((H + NSM - 1) / NSM)
#define OWN_QKV ((NQKV + NSM - 1) / NSM)
#define SPLIT_BLOCKS 4           // of the context, at least, that a multiprocessor is given
#define TABLE 256
#define ABSENT 0xffffffffu          // in two halves: no bf16 or float that arithmetic gives
#define ROWS 16                     // tokens a buffer has room for
#define AHEAD 2                     // stages of activations that are loaded ahead
#define LANES (CONSUMERS / MT)   // threads that add up one token's squares
#define PARTS ((NSM + LANES - 1) / LANES)
#define PARTS_A_LANE 5           // of a split context that one lane adds up: 32 lanes have room for NSM

struct Layer {
    const u16 *weights[4];  // by Kind: qkv, out, gate and up, down
    const u16 *qkv_bias, *o_bias, *norm1, *norm2, *qnorm, *knorm;
    u16 *k, *v;
    u64 keys, values;  // where the tensor maps of k and v lie: [position, KV head, HD]
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

// The batch, as the host or the previous kernel left it: see `decode_data.py`.
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
    int table[TABLE];                       // blocks of its first item of attention, for the producer
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
