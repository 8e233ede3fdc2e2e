// Attention of decode rows over pages, 16-bit, on tensor cores.
// q, out [rows, HEADS, HEAD_DIM]; keys, values: a layer's views of the pool, token t of page p at row p * page_rows + t of
// [KV_HEADS, HEAD_DIM]; row r of the step is request r.
// work: items (request, split), see step.cu; splits lie at fixed positions, whatever the batch. A block takes (item,
// KV head) pairs in turn under a constant grid; its warps take the split's tiles of 16 tokens in turn, each with a ring
// of copies in flight that runs on into the next item. The block that finishes a request's last split merges them all,
// in their order. Query heads of a KV head are the 16 rows of the tensor-core product.
#include "tensor_core.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int HEAD_TILES = (GROUP + 15) / 16;
constexpr int ROWS = GROUP < 16 ? GROUP : 16;  // of a product, at most
constexpr int UNITS = KV_HEADS * HEAD_TILES;   // of an item
constexpr int WARPS = 4;
constexpr int TILE = 16;  // tokens
constexpr int STRIDE = HEAD_DIM + 8;  // padded: rows of a matrix lie in different banks
constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes, of a row
constexpr int STEPS = HEAD_DIM / 16;  // of the product with q
constexpr int OUTS = HEAD_DIM / 8;    // 8-column tiles of the output
constexpr bool HAS_HIGH_ROWS = ROWS > 8;
constexpr int SLOTS_PER_WARP = (SPLIT_TOKENS / TILE + WARPS - 1) / WARPS;
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head dimension");
static_assert(PAGE_TOKENS % TILE == 0 && SLOTS_PER_WARP <= 32, "a tile lies in one page");

struct Tiles {  // of one split that a warp sees: TILE-aligned positions [first, end) step WARPS * TILE
    int first, end;
    __device__ Tiles(const int4& item, int window, int warp) {
        const int seq_len = item.w, visible = window > 0 && seq_len > window ? seq_len - window : 0;
        const int start = (visible / SPLIT_TOKENS + (item.y & 0xffff)) * SPLIT_TOKENS;
        first = max(start, visible / TILE * TILE) + warp * TILE;
        end = min(start + SPLIT_TOKENS, seq_len);
    }
};

struct Copies {  // runs through a warp's tiles of all items of its block, ahead of the arithmetic
    const int4* work;
    const int* page_indices;
    const element *keys, *values;
    size_t page_elements;
    int window, warp, lane, unit, total, first, last, position, end, visible, page_of_lane;

    __device__ void start_unit() {
        while (unit < total) {
            const int4 item = work[unit / UNITS];
            const Tiles tiles(item, window, warp);
            if (tiles.first < tiles.end) {
                position = first = tiles.first;
                end = item.w;
                visible = window > 0 && end > window ? end - window : 0;
                const int origin = (visible / SPLIT_TOKENS + (item.y & 0xffff)) * SPLIT_TOKENS / PAGE_TOKENS;
                const int mine = first + lane * WARPS * TILE;
                page_of_lane = mine < tiles.end ? page_indices[item.z + mine / PAGE_TOKENS - origin] : 0;
                last = tiles.end;
                return;
            }
            unit += gridDim.x;
        }
    }

    __device__ void issue(unsigned target) {
        if (unit < total) {
            const int page = __shfl_sync(~0u, page_of_lane, (position - first) / (WARPS * TILE));
            const int kv_head = unit % UNITS / HEAD_TILES;
            const size_t row = static_cast<size_t>(page) * page_elements
                + (static_cast<size_t>(position % PAGE_TOKENS) * KV_HEADS + kv_head) * HEAD_DIM;
#pragma unroll
            for (int i = 0; i < (TILE * CHUNKS + 31) / 32; ++i) {
                const int chunk = i * 32 + lane;
                if (TILE * CHUNKS % 32 == 0 || chunk < TILE * CHUNKS) {
                    const int token = chunk / CHUNKS, column = chunk % CHUNKS * 8;
                    const bool is_valid = position + token < end && position + token >= visible;
                    const size_t at = row + static_cast<size_t>(token) * KV_HEADS * HEAD_DIM + column;
                    const unsigned place = target + (token * STRIDE + column) * sizeof(element);
                    copy_async(place, keys + at, is_valid);
                    copy_async(place + TILE * STRIDE * sizeof(element), values + at, is_valid);
                }
            }
            position += WARPS * TILE;
            if (position >= last) {
                unit += gridDim.x;
                start_unit();
            }
        }
        commit_copies();
    }
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Attention of one warp's tiles: rows g and g + 8 of the product are query heads. Scores are in units of log2.
struct State {
    float out[OUTS][4];
    float max[2], sum[2];

    __device__ void reset() {
#pragma unroll
        for (int n = 0; n < OUTS; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
    }

    __device__ void add_tile(
        const unsigned (&query)[STEPS][4], unsigned tile, int position, int visible, int end, float scale, int lane) {
        float scores[2][4] = {};
        const unsigned key_at = tile + ((lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8) * sizeof(element);
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            unsigned b[4];
            load_matrices(b, key_at + k * 16 * sizeof(element));
            multiply_add(scores[0], query[k], b[0], b[1]);
            multiply_add(scores[1], query[k], b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = position + n * 8 + lane % 4 * 2 + i % 2;
                scores[n][i] = token < end && token >= visible ? scores[n][i] * scale : -INFINITY;
            }
#pragma unroll
        for (int half = 0; half < (HAS_HIGH_ROWS ? 2 : 1); ++half) {
            float* low = &scores[0][half * 2];
            float* high = &scores[1][half * 2];
            const float now = quad_max(fmaxf(fmaxf(low[0], low[1]), fmaxf(high[0], high[1])));
            const float next = fmaxf(max[half], now);  // finite: a tile has at least one visible token
            const float shrink = exp2f(max[half] - next);
            max[half] = next;
            low[0] = exp2f(low[0] - next);
            low[1] = exp2f(low[1] - next);
            high[0] = exp2f(high[0] - next);
            high[1] = exp2f(high[1] - next);
            sum[half] = sum[half] * shrink + (low[0] + low[1]) + (high[0] + high[1]);
#pragma unroll
            for (int n = 0; n < OUTS; ++n) {
                out[n][half * 2] *= shrink;
                out[n][half * 2 + 1] *= shrink;
            }
        }
        if (!HAS_HIGH_ROWS) scores[0][2] = scores[0][3] = scores[1][2] = scores[1][3] = 0.0f;
        const unsigned weights[4] = {
            pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
            pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
        const unsigned value_at =
            tile + ((TILE + lane / 8 % 2 * 8 + lane % 8) * STRIDE + lane / 16 * 8) * sizeof(element);
#pragma unroll
        for (int n = 0; n < OUTS; n += 2) {
            unsigned b[4];
            load_matrices_transposed(b, value_at + n * 8 * sizeof(element));
            multiply_add(out[n], weights, b[0], b[1]);
            multiply_add(out[n + 1], weights, b[2], b[3]);
        }
    }
};

// Merged accumulators of a block: [WARPS][ROWS][HEAD_DIM], [WARPS][ROWS] maxima, sums.
struct Merge {
    float out[WARPS][ROWS][HEAD_DIM];
    float max[WARPS][ROWS], sum[WARPS][ROWS];

    __device__ void put(State& state, int warp, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int half = 0; half < (HAS_HIGH_ROWS ? 2 : 1); ++half) {
            const int row = g + half * 8;
            const float total = quad_sum(state.sum[half]);
            if (row < ROWS) {
                if (t == 0) {
                    max[warp][row] = state.max[half];
                    sum[warp][row] = total;
                }
#pragma unroll
                for (int n = 0; n < OUTS; ++n)
                    *reinterpret_cast<float2*>(&out[warp][row][n * 8 + t * 2]) =
                        make_float2(state.out[n][half * 2], state.out[n][half * 2 + 1]);
            }
        }
    }
};

// What a split leaves for the merge: [ROWS][HEAD_DIM] weighted sums, [ROWS] maxima, [ROWS] sums.
constexpr int PARTIAL = ROWS * HEAD_DIM + (2 * ROWS + 3) / 4 * 4;

__device__ __forceinline__ void store4(const float4& v, element* target) {
    alignas(8) element e[4];
    from_float(v.x, e[0]);
    from_float(v.y, e[1]);
    from_float(v.z, e[2]);
    from_float(v.w, e[3]);
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(e);
}

__device__ __forceinline__ void multiply_add(float4& sum, const float4& v, float factor) {
    sum.x += v.x * factor;
    sum.y += v.y * factor;
    sum.z += v.z * factor;
    sum.w += v.w * factor;
}

__device__ __forceinline__ void scale_by(float4& v, float factor) {
    v.x *= factor;
    v.y *= factor;
    v.z *= factor;
    v.w *= factor;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) paged_attention(
    const element* __restrict__ q, element* __restrict__ out, const element* __restrict__ keys,
    const element* __restrict__ values, const int* __restrict__ num_items, const int4* __restrict__ work,
    const int* __restrict__ page_indices, float* __restrict__ partials, int* __restrict__ finished, int page_rows,
    int window, float scale) {
    extern __shared__ __align__(16) unsigned char shared[];
    Merge& merge = *reinterpret_cast<Merge*>(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    constexpr unsigned STAGE = 2 * TILE * STRIDE * sizeof(element);
    const unsigned ring = shared_address(shared) + ((sizeof(Merge) + 15) / 16 * 16) + warp * STAGES * STAGE;
    const int total = num_items[0] * UNITS;

    Copies copies;
    copies.work = work;
    copies.page_indices = page_indices;
    copies.keys = keys;
    copies.values = values;
    copies.page_elements = static_cast<size_t>(page_rows) * KV_HEADS * HEAD_DIM;
    copies.window = window;
    copies.warp = warp;
    copies.lane = lane;
    copies.unit = blockIdx.x;
    copies.total = total;
    copies.start_unit();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) copies.issue(ring + s * STAGE);

    int stage = 0;
    State state;
    for (int unit = blockIdx.x; unit < total; unit += gridDim.x) {
        const int index = unit / UNITS, part = unit % UNITS;
        const int4 item = work[index];
        const int first_head = part / HEAD_TILES * GROUP + part % HEAD_TILES * 16;
        const int num_heads = min(GROUP - part % HEAD_TILES * 16, 16);
        const size_t row = (static_cast<size_t>(item.x) * HEADS + first_head) * HEAD_DIM;
        unsigned query[STEPS][4];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const element* at = q + row + k * 16 + t * 2;
            const bool low = g < num_heads, high = HAS_HIGH_ROWS && g + 8 < num_heads;
            query[k][0] = low ? *reinterpret_cast<const unsigned*>(at + g * HEAD_DIM) : 0u;
            query[k][1] = high ? *reinterpret_cast<const unsigned*>(at + (g + 8) * HEAD_DIM) : 0u;
            query[k][2] = low ? *reinterpret_cast<const unsigned*>(at + g * HEAD_DIM + 8) : 0u;
            query[k][3] = high ? *reinterpret_cast<const unsigned*>(at + (g + 8) * HEAD_DIM + 8) : 0u;
        }
        state.reset();
        const Tiles tiles(item, window, warp);
        const int visible = window > 0 && item.w > window ? item.w - window : 0;
        for (int position = tiles.first; position < tiles.end; position += WARPS * TILE) {
            wait_copies<STAGES - 2>();
            __syncwarp();
            copies.issue(ring + (stage + STAGES - 1) % STAGES * STAGE);
            state.add_tile(query, ring + stage * STAGE, position, visible, item.w, scale, lane);
            stage = (stage + 1) % STAGES;
            __syncwarp();
        }
        merge.put(state, warp, lane);
        __syncthreads();

        const int splits = item.y >> 16;
        float* partial = partials + (static_cast<size_t>(index) * UNITS + part) * PARTIAL;
        for (int i = threadIdx.x; i < num_heads * (HEAD_DIM / 4); i += WARPS * 32) {
            const int r = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
            float most = -INFINITY;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, merge.max[w][r]);
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float norm = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float factor = exp2f(merge.max[w][r] - most);
                norm += merge.sum[w][r] * factor;
                multiply_add(sum, *reinterpret_cast<const float4*>(&merge.out[w][r][column]), factor);
            }
            if (splits == 1) {
                scale_by(sum, 1.0f / norm);
                store4(sum, out + row + r * HEAD_DIM + column);
            } else {
                __stcg(reinterpret_cast<float4*>(partial + r * HEAD_DIM + column), sum);
                if (column == 0) {
                    __stcg(partial + ROWS * HEAD_DIM + r, most);
                    __stcg(partial + ROWS * HEAD_DIM + ROWS + r, norm);
                }
            }
        }
        if (splits > 1) {
            __shared__ bool is_last;
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) {
                int* counter = finished + static_cast<size_t>(item.x) * UNITS + part;
                is_last = atomicAdd(counter, 1) == splits - 1;
                if (is_last) *counter = 0;  // for the next layer
            }
            __syncthreads();
            if (is_last) {
                __threadfence();
                const size_t stride = static_cast<size_t>(UNITS) * PARTIAL;
                const float* all = partial - (item.y & 0xffff) * stride;
                for (int i = threadIdx.x; i < num_heads * (HEAD_DIM / 4); i += WARPS * 32) {
                    const int r = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
                    float most = -INFINITY, norm = 0.0f;
                    for (int s = 0; s < splits; ++s) most = fmaxf(most, __ldcg(all + s * stride + ROWS * HEAD_DIM + r));
                    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
                    for (int s = 0; s < splits; ++s) {
                        const float* one = all + s * stride;
                        const float factor = exp2f(__ldcg(one + ROWS * HEAD_DIM + r) - most);
                        norm += __ldcg(one + ROWS * HEAD_DIM + ROWS + r) * factor;
                        multiply_add(sum, __ldcg(reinterpret_cast<const float4*>(one + r * HEAD_DIM + column)), factor);
                    }
                    scale_by(sum, 1.0f / norm);
                    store4(sum, out + row + r * HEAD_DIM + column);
                }
            }
        }
        __syncthreads();  // the next item writes `merge`
    }
    wait_copies<0>();
}
