// Attention of decode rows over pages, 16-bit, on tensor cores.
// q, out [rows, HEADS, HEAD_DIM]; keys, values: a layer's views of the pool, token t of page p at row p * page_rows + t of
// [KV_HEADS, HEAD_DIM]; row r of the step is request r.
// work: items (request, split), see step.cu; splits lie at fixed positions, whatever the batch. Under a constant grid each
// warp takes one (item, KV head) unit after the other, by a ticket, and a unit's tiles of 16 tokens in turn, from a ring
// of copies that runs on into its next unit: warps never wait for each other. Query heads of a KV head are rows of the
// product, 16 at most. The warp that finishes the last split of a request merges them all, in their order.
#include "splits.cuh"
#include "sync.cuh"
#include "tensor_core.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int HEAD_TILES = (GROUP + 15) / 16;
constexpr int ROWS = GROUP < 16 ? GROUP : 16;  // of a product, at most
constexpr int UNITS = KV_HEADS * HEAD_TILES;   // of an item
constexpr int WARPS = 4;              // of a block
constexpr int TILE = 16;              // tokens
constexpr int STRIDE = HEAD_DIM + 8;  // padded: rows of a matrix lie in different banks
constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes, of a row
constexpr int STEPS = HEAD_DIM / 16;  // of the product with q
constexpr int OUTS = HEAD_DIM / 8;    // 8-column tiles of the output
constexpr bool HAS_HIGH_ROWS = ROWS > 8;
constexpr int QUEUE = 8;              // units between the copies and the arithmetic: at most one for each stage
constexpr unsigned STAGE = 2 * TILE * STRIDE * sizeof(element);
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "head dimension");
static_assert(PAGE_TOKENS % TILE == 0 && MAX_SPLIT_TOKENS / TILE <= 32, "a tile lies in one page; a lane knows one page");

// What a unit covers: positions [first, end) of a sequence of which [visible, seq_len) is seen.
struct Span {
    int first, end, visible, seq_len, start;
    __device__ Span(const int4& item, int window) {
        seq_len = item.w;
        visible = oldest_visible(seq_len, window);
        const int split = split_of(visible) + (item.y & 0xffff);
        start = split_start(split);  // item.z is its page
        first = max(start, visible / TILE * TILE);
        end = min(split_start(split + 1), seq_len);
    }
};

// Units that a warp's copies have begun, for its arithmetic; `unit` beyond the last one: there are no more.
struct Queue {
    int4 items[QUEUE];
    int units[QUEUE];
};

struct Copies {  // runs through the tiles of all units of a warp, ahead of the arithmetic
    const int4* work;
    const int* page_indices;
    const element *keys, *values;
    size_t page_elements;
    Queue* queue;
    int* tickets;
    int window, lane, total, num_warps;
    int unit, ticket, num_begun;  // the next unit, and the one after it, which has been asked for
    int4 item;                    // of the next unit
    int first, end, position, visible, seq_len, kv_head, page_of_lane;

    __device__ void ask() {
        if (unit < total && lane == 0) ticket = num_warps + atomicAdd(tickets, 1);
    }

    __device__ void start_unit() {
        const int place = num_begun++ % QUEUE;
        if (lane == 0) {
            queue->items[place] = item;
            queue->units[place] = unit;
        }
        first = position = end = 0;
        if (unit >= total) return;
        const Span span(item, window);
        first = position = span.first;
        end = span.end;
        visible = span.visible;
        seq_len = span.seq_len;
        kv_head = unit % UNITS / HEAD_TILES;
        const int mine = first + lane * TILE;
        page_of_lane = mine < end ? page_indices[item.z + mine / PAGE_TOKENS - span.start / PAGE_TOKENS] : 0;
        unit = __shfl_sync(~0u, ticket, 0);
        if (unit < total) item = work[unit / UNITS];
        ask();
    }

    __device__ void issue(unsigned target) {
        if (position < end) {
            const int page = __shfl_sync(~0u, page_of_lane, (position - first) / TILE);
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
                    copy_async(place, keys + at, is_valid);
                    copy_async(place + TILE * STRIDE * sizeof(element), values + at, is_valid);
                }
            }
            position += TILE;
            if (position >= end) start_unit();
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

// Attention over a unit's tiles: rows g and g + 8 of the product are query heads. Scores are in units of log2.
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

// What a split leaves for the merge: [ROWS][HEAD_DIM] weighted sums, [ROWS] maxima, [ROWS] sums of weights.
constexpr int PARTIAL = ROWS * HEAD_DIM + (2 * ROWS + 3) / 4 * 4;

__device__ __forceinline__ void store_pair(float low, float high, element* target) {
    *reinterpret_cast<unsigned*>(target) = pack(low, high);
}

// out [ROWS][HEAD_DIM] of the state: the weighted means.
__device__ __forceinline__ void finish(const State& state, int num_heads, int lane, element* out) {
#pragma unroll
    for (int half = 0; half < (HAS_HIGH_ROWS ? 2 : 1); ++half) {
        const int row = lane / 4 + half * 8;
        const float factor = 1.0f / quad_sum(state.sum[half]);
        if (row < num_heads)
#pragma unroll
            for (int n = 0; n < OUTS; ++n)
                store_pair(
                    state.out[n][half * 2] * factor, state.out[n][half * 2 + 1] * factor,
                    out + row * HEAD_DIM + n * 8 + lane % 4 * 2);
    }
}

__device__ __forceinline__ void leave(const State& state, int num_heads, int lane, float* partial) {
#pragma unroll
    for (int half = 0; half < (HAS_HIGH_ROWS ? 2 : 1); ++half) {
        const int row = lane / 4 + half * 8;
        const float sum = quad_sum(state.sum[half]);
        if (row < num_heads) {
#pragma unroll
            for (int n = 0; n < OUTS; ++n)
                __stcg(
                    reinterpret_cast<float2*>(partial + row * HEAD_DIM + n * 8 + lane % 4 * 2),
                    make_float2(state.out[n][half * 2], state.out[n][half * 2 + 1]));
            if (lane % 4 == 0) {
                __stcg(partial + ROWS * HEAD_DIM + row, state.max[half]);
                __stcg(partial + ROWS * HEAD_DIM + ROWS + row, sum);
            }
        }
    }
}

// out [num_heads][HEAD_DIM] of all splits of a request, `stride` apart. A lane has every 32nd group of four columns, a few
// of them at a time.
__device__ void merge(const float* partials, int splits, size_t stride, int num_heads, int lane, element* out) {
    constexpr int GROUPS = ROWS * HEAD_DIM / 4, MINE = GROUPS < 128 ? (GROUPS + 31) / 32 : 4;
    const float* maxima = partials + ROWS * HEAD_DIM;
    for (int first = lane; first < num_heads * HEAD_DIM / 4; first += MINE * 32) {
        float most[MINE], norm[MINE];
        float4 sum[MINE];
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
            most[j] = -INFINITY;
            norm[j] = 0.0f;
            sum[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        const auto row_of = [&](int j) { return min((first + j * 32) / (HEAD_DIM / 4), num_heads - 1); };
#pragma unroll 4
        for (int s = 0; s < splits; ++s)
#pragma unroll
            for (int j = 0; j < MINE; ++j) most[j] = fmaxf(most[j], __ldcg(maxima + s * stride + row_of(j)));
#pragma unroll 4
        for (int s = 0; s < splits; ++s)
#pragma unroll
            for (int j = 0; j < MINE; ++j) {
                const float* one = partials + s * stride + row_of(j) * HEAD_DIM + (first + j * 32) * 4 % HEAD_DIM;
                const float factor = exp2f(__ldcg(maxima + s * stride + row_of(j)) - most[j]);
                const float4 v = __ldcg(reinterpret_cast<const float4*>(one));
                norm[j] += __ldcg(maxima + s * stride + ROWS + row_of(j)) * factor;
                sum[j].x += v.x * factor;
                sum[j].y += v.y * factor;
                sum[j].z += v.z * factor;
                sum[j].w += v.w * factor;
            }
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
            const int at = (first + j * 32) * 4;
            if (at < num_heads * HEAD_DIM) {
                const float factor = 1.0f / norm[j];
                store_pair(sum[j].x * factor, sum[j].y * factor, out + at);
                store_pair(sum[j].z * factor, sum[j].w * factor, out + at + 2);
            }
        }
    }
}

// tickets: [0] of the next unit to be dealt, [1] warps that are done; both are 0 between launches.
__device__ __forceinline__ void leave_launch(int* tickets, int num_warps, int lane) {
    if (lane == 0 && atomicAdd(tickets + 1, 1) == num_warps - 1) tickets[0] = tickets[1] = 0;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) paged_attention(
    const element* __restrict__ q, element* __restrict__ out, const element* __restrict__ keys,
    const element* __restrict__ values, const int* __restrict__ num_items, const int4* __restrict__ work,
    const int* __restrict__ page_indices, float* __restrict__ partials, int* __restrict__ finished,
    int* __restrict__ tickets, int page_rows, int window, float scale) {
    extern __shared__ __align__(16) unsigned char shared[];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned ring = shared_address(shared) + warp * STAGES * STAGE;
    const int total = num_items[0] * UNITS, num_warps = gridDim.x * WARPS;
    const int begin = warp * gridDim.x + blockIdx.x;  // few units lie on different multiprocessors
    if (begin >= total) {
        leave_launch(tickets, num_warps, lane);
        return;
    }
    __shared__ Queue queues[WARPS];
    Queue& queue = queues[warp];
    Copies copies;
    copies.work = work;
    copies.page_indices = page_indices;
    copies.keys = keys;
    copies.values = values;
    copies.page_elements = static_cast<size_t>(page_rows) * KV_HEADS * HEAD_DIM;
    copies.queue = &queue;
    copies.tickets = tickets;
    copies.window = window;
    copies.lane = lane;
    copies.total = total;
    copies.num_warps = num_warps;
    copies.num_begun = 0;
    copies.unit = begin;
    copies.item = work[begin / UNITS];
    copies.ask();
    copies.start_unit();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) copies.issue(ring + s * STAGE);

    int stage = 0;
    State state;
    for (int taken = 0;; ++taken) {
        __syncwarp();
        const int unit = queue.units[taken % QUEUE];
        if (unit >= total) break;
        const int4 item = queue.items[taken % QUEUE];
        const int part = unit % UNITS, splits = item.y >> 16, request = item.x;
        const int first_head = part / HEAD_TILES * GROUP + part % HEAD_TILES * 16;
        const int num_heads = min(GROUP - part % HEAD_TILES * 16, 16);
        const size_t row = (static_cast<size_t>(request) * HEADS + first_head) * HEAD_DIM;
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
        const Span span(item, window);
        const int split = item.y & 0xffff;
        state.reset();
        for (int position = span.first; position < span.end; position += TILE) {
            wait_copies<STAGES - 2>();
            __syncwarp();
            copies.issue(ring + (stage + STAGES - 1) % STAGES * STAGE);
            state.add_tile(query, ring + stage * STAGE, position, span.visible, span.seq_len, scale, lane);
            stage = (stage + 1) % STAGES;
            __syncwarp();
        }
        if (splits == 1) {
            finish(state, num_heads, lane, out + row);
            continue;
        }
        float* partial = partials + static_cast<size_t>(unit) * PARTIAL;
        leave(state, num_heads, lane, partial);
        __threadfence();
        __syncwarp();
        int* counter = finished + static_cast<size_t>(request) * UNITS + part;
        const bool is_last = __shfl_sync(~0u, lane == 0 ? atomicAdd(counter, 1) : 0, 0) == splits - 1;
        if (is_last) {
            __threadfence();
            const size_t step = static_cast<size_t>(UNITS) * PARTIAL;
            merge(partial - split * step, splits, step, num_heads, lane, out + row);
            if (lane == 0) *counter = 0;  // for the next layer
        }
    }
    wait_copies<0>();
    leave_launch(tickets, num_warps, lane);
}
