// Attention of decode rows over pages, 16-bit, on tensor cores.
// q, out [rows, HEADS, HEAD_DIM]; keys, values: a layer's views of the pool, token t of page p at row p * page_rows + t of
// [KV_HEADS, HEAD_DIM]; row r of the step is request r.
// work: items (request, split), see step.cu; splits lie at fixed positions, whatever the batch. A block takes (item, KV
// head) units in turn under a constant grid; its warps take the split's tiles of 16 tokens in turn, each with a ring of
// copies that runs on into the next unit. Query heads of a KV head are rows of the product, 16 at most.
// What a request's splits leave is merged by a second kernel, a block per query head: a fence between blocks would wait for
// the copies in flight. Keys and values give way to it in the cache: written to memory, its one or two percent of the bytes
// cost up to nine of the time.
// The kernel before writes q, and the keys and values of the newest tokens. All else was there before that one began, and is
// on its way while it runs.
#include "quad.cuh"
#include "splits.cuh"
#include "sync.cuh"
#include "tensor_core.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int HEAD_TILES = (GROUP + 15) / 16;
constexpr int ROWS = GROUP < 16 ? GROUP : 16;  // of a product, at most
constexpr int UNITS = KV_HEADS * HEAD_TILES;   // of an item
constexpr int WARPS = 4;
constexpr int TILE = 16;              // tokens
constexpr int STRIDE = HEAD_DIM + 8;  // padded: rows of a matrix lie in different banks
constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes, of a row
constexpr int STEPS = HEAD_DIM / 16;  // of the product with q
constexpr int OUTS = HEAD_DIM / 8;    // 8-column tiles of the output
constexpr bool HAS_HIGH_ROWS = ROWS > 8;
constexpr int MERGE_WARPS = 4;
constexpr unsigned STAGE = 2 * TILE * STRIDE * sizeof(element);
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head dimension");
static_assert(PAGE_TOKENS % TILE == 0 && SPLIT_TOKENS / TILE <= 32 * WARPS, "a tile lies in one page; a lane knows one page");

// What a warp sees of a unit: the tiles at positions first, first + WARPS * TILE, .. before `end`, of a sequence of which
// [visible, seq_len) is seen.
struct Span {
    int first, end, visible, seq_len, start;
    __device__ Span(const int4& item, int window, int warp) {
        seq_len = item.w;
        visible = oldest_visible(seq_len, window);
        const int split = split_of(visible) + (item.y & 0xffff);
        start = split_start(split);  // item.z is its page
        first = max(start, visible / TILE * TILE) + warp * TILE;
        end = min(split_start(split + 1), seq_len);
    }
};

struct Copies {  // runs through a warp's tiles of all units of its block, ahead of the arithmetic
    const int4* work;
    const int* page_indices;
    const element *keys, *values;
    size_t page_elements;
    int window, warp, lane, total;
    int unit;   // the next one
    int4 item;  // its item, read ahead
    int first, end, position, visible, seq_len, kv_head, page_of_lane;

    __device__ void start_unit() {  // the next one in which this warp has a tile
        position = end = 0;
        while (unit < total) {
            const Span span(item, window, warp);
            if (span.first < span.end) {
                first = position = span.first;
                end = span.end;
                visible = span.visible;
                seq_len = span.seq_len;
                kv_head = unit % UNITS / HEAD_TILES;
                const int mine = first + lane * WARPS * TILE;
                page_of_lane = mine < end ? page_indices[item.z + mine / PAGE_TOKENS - span.start / PAGE_TOKENS] : 0;
            }
            unit += gridDim.x;
            if (unit < total) item = work[unit / UNITS];
            if (position < end) return;
        }
    }

    __device__ bool is_newest() const { return position < end && position + TILE >= seq_len; }

    __device__ void issue(unsigned target) {
        if (position < end) {
            const int page = __shfl_sync(~0u, page_of_lane, (position - first) / (WARPS * TILE));
            const size_t row = static_cast<size_t>(page) * page_elements
                + (static_cast<size_t>(position % PAGE_TOKENS) * KV_HEADS + kv_head) * HEAD_DIM;
#pragma unroll
            for (int i = 0; i < (TILE * CHUNKS + 31) / 32; ++i) {
                const int chunk = i * 32 + lane;
                if (TILE * CHUNKS % 32 == 0 || chunk < TILE * CHUNKS) {
                    const int token = chunk / CHUNKS, column = chunk % CHUNKS * 8;
                    const bool is_valid = position + token < seq_len && position + token >= visible;
                    const size_t at = row + static_cast<size_t>(token) * KV_HEADS * HEAD_DIM + column;
                    const unsigned place = target + (token * STRIDE + column) * sizeof(element);
                    copy_last(place, keys + at, is_valid);
                    copy_last(place + TILE * STRIDE * sizeof(element), values + at, is_valid);
                }
            }
            position += WARPS * TILE;
            if (position >= end) start_unit();
        }
        commit_copies();
    }
};

// Attention over a warp's tiles: rows g and g + 8 of the product are query heads. Scores are in units of log2.
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

// What a split leaves for the merge: [ROWS][HEAD_DIM] weighted sums, [ROWS] maxima, [ROWS] sums of weights.
constexpr int PARTIAL = ROWS * HEAD_DIM + (2 * ROWS + 3) / 4 * 4;

__device__ __forceinline__ void store4(const float4& v, float factor, element* target) {
    *reinterpret_cast<uint2*>(target) = make_uint2(pack(v.x * factor, v.y * factor), pack(v.z * factor, v.w * factor));
}

__device__ __forceinline__ void add_scaled(float4& sum, const float4& v, float factor) {
    sum.x += v.x * factor;
    sum.y += v.y * factor;
    sum.z += v.z * factor;
    sum.w += v.w * factor;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) paged_attention(
    const element* __restrict__ q, element* __restrict__ out, const element* __restrict__ keys,
    const element* __restrict__ values, const int* __restrict__ num_items, const int4* __restrict__ work,
    const int* __restrict__ page_indices, float* __restrict__ partials, int page_rows, int window, float scale) {
    Merge& merge = *reinterpret_cast<Merge*>(shared_memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned ring = shared_address(shared_memory) + (sizeof(Merge) + 15) / 16 * 16 + warp * STAGES * STAGE;
    const int total = num_items[0] * UNITS;
    bool has_waited = false;
    if (static_cast<int>(blockIdx.x) >= total) {
        wait_once(has_waited);  // whoever waits for this kernel relies on the one before, too
        return;
    }

    Copies copies;
    copies.work = work;
    copies.page_indices = page_indices;
    copies.keys = keys;
    copies.values = values;
    copies.page_elements = static_cast<size_t>(page_rows) * KV_HEADS * HEAD_DIM;
    copies.window = window;
    copies.warp = warp;
    copies.lane = lane;
    copies.total = total;
    copies.unit = blockIdx.x;
    copies.item = work[blockIdx.x / UNITS];
    copies.start_unit();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (copies.is_newest()) wait_once(has_waited);
        copies.issue(ring + s * STAGE);
    }
    wait_once(has_waited);
    let_next_kernel_start();  // not before the wait: chunk_attention relies on it

    int stage = 0;
    State state;
    int4 next = work[blockIdx.x / UNITS];
    for (int unit = blockIdx.x; unit < total; unit += gridDim.x) {
        const int4 item = next;
        const int part = unit % UNITS;
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
        if (unit + static_cast<int>(gridDim.x) < total) next = work[(unit + gridDim.x) / UNITS];
        state.reset();
        const Span span(item, window, warp);
        for (int position = span.first; position < span.end; position += WARPS * TILE) {
            wait_copies<STAGES - 2>();
            __syncwarp();
            copies.issue(ring + (stage + STAGES - 1) % STAGES * STAGE);
            state.add_tile(query, ring + stage * STAGE, position, span.visible, span.seq_len, scale, lane);
            stage = (stage + 1) % STAGES;
            __syncwarp();
        }
        merge.put(state, warp, lane);
        __syncthreads();

        const bool is_whole = item.y >> 16 == 1;
        float* partial = partials + static_cast<size_t>(unit) * PARTIAL;
        for (int i = threadIdx.x; i < num_heads * (HEAD_DIM / 4); i += WARPS * 32) {
            const int r = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
            float most = -INFINITY, norm = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, merge.max[w][r]);
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float factor = exp2f(merge.max[w][r] - most);
                norm += merge.sum[w][r] * factor;
                add_scaled(sum, *reinterpret_cast<const float4*>(&merge.out[w][r][column]), factor);
            }
            if (is_whole) {
                store4(sum, 1.0f / norm, out + row + r * HEAD_DIM + column);
            } else {
                *reinterpret_cast<float4*>(partial + r * HEAD_DIM + column) = sum;
                if (column == 0) {
                    partial[ROWS * HEAD_DIM + r] = most;
                    partial[ROWS * HEAD_DIM + ROWS + r] = norm;
                }
            }
        }
        __syncthreads();  // the next unit writes `merge`
    }
    wait_copies<0>();
}

// The query heads of requests with several splits: spans [num_decode] (first item, splits).
// A head's splits are dealt to the warps in turn, and the warps' sums are added in order.
extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32) merge_splits(
    element* __restrict__ out, const int* __restrict__ counts, const int2* __restrict__ spans,
    const float* __restrict__ partials) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ float4 sums[MERGE_WARPS][HEAD_DIM / 4];
    __shared__ float norms[MERGE_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int total = counts[2] * HEADS;
    for (int i = blockIdx.x; i < total; i += gridDim.x) {
        const int2 span = spans[i / HEADS];
        if (span.y == 1) continue;
        const int head = i % HEADS, in_group = head % GROUP, r = in_group % 16;
        const int part = head / GROUP * HEAD_TILES + in_group / 16;
        const float* first = partials + (static_cast<size_t>(span.x) * UNITS + part) * PARTIAL;
        const float* maxima = first + ROWS * HEAD_DIM + r;
        constexpr size_t STEP = static_cast<size_t>(UNITS) * PARTIAL;
        float most = -INFINITY;
        for (int s = lane; s < span.y; s += 32) most = fmaxf(most, maxima[s * STEP]);
        for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
        for (int column = lane * 4; column < HEAD_DIM; column += 128) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float norm = 0.0f;
#pragma unroll 8
            for (int s = warp; s < span.y; s += MERGE_WARPS) {
                const float factor = exp2f(maxima[s * STEP] - most);
                norm += maxima[s * STEP + ROWS] * factor;
                add_scaled(sum, *reinterpret_cast<const float4*>(first + s * STEP + r * HEAD_DIM + column), factor);
            }
            sums[warp][column / 4] = sum;
            if (column == 0) norms[warp] = norm;
        }
        __syncthreads();
        for (int c = threadIdx.x; c < HEAD_DIM / 4; c += MERGE_WARPS * 32) {
            float4 sum = sums[0][c];
            float norm = norms[0];
#pragma unroll
            for (int w = 1; w < MERGE_WARPS; ++w) {
                add_scaled(sum, sums[w][c], 1.0f);
                norm += norms[w];
            }
            store4(sum, 1.0f / norm, out + static_cast<size_t>(i) * HEAD_DIM + c * 4);
        }
        __syncthreads();  // the next head's sums
    }
}
