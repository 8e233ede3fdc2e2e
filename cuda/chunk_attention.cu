// Causal attention of prefill rows (chunks with cached context) over pages, 16-bit, on tensor cores.
// q, out [rows, HEADS, HEAD_DIM]; keys, values: a layer's views of the pool, token t of page p at row p * page_rows + t of
// [KV_HEADS, HEAD_DIM]. work: items (request, row tile), see step.cu.
// A block takes (item, KV head) pairs in turn under a constant grid. The 64 rows of its product are the query heads of a
// KV head for 64 / GROUP tokens, 16 rows a warp; tiles of K and V are shared and double-buffered.
// In a step with decode rows it runs beside paged_attention, launched before it: that one lets it start only when q, keys
// and values are there. So it does not wait, and bypasses L1, which may have what was there before them.
#include "quad.cuh"
#include "sync.cuh"
#include "tensor_core.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int WARPS = 4;
constexpr int TOKENS = 16 * WARPS / GROUP;  // of a row tile
constexpr int KV_TILE = HEAD_DIM > 128 ? 32 : 64;
constexpr int STRIDE = HEAD_DIM + 8;  // padded: rows of a matrix lie in different banks
constexpr int CHUNKS = HEAD_DIM / 8;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int OUTS = HEAD_DIM / 8;
constexpr unsigned STAGE = 2 * KV_TILE * STRIDE * sizeof(element);
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 256 && TOKENS >= 1, "shape");

struct Request {
    const int* pages;
    int first_row, query_len, seq_len;
};

__device__ __forceinline__ void copy_tile(
    unsigned target, const element* keys, const element* values, const Request& request, int position, int kv_head,
    int page_rows) {
    for (int chunk = threadIdx.x; chunk < KV_TILE * CHUNKS; chunk += WARPS * 32) {
        const int token = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        const bool is_valid = position + token < request.seq_len;
        const int kv_token = is_valid ? position + token : request.seq_len - 1;
        const size_t row = static_cast<size_t>(request.pages[kv_token / PAGE_TOKENS]) * page_rows + kv_token % PAGE_TOKENS;
        const size_t at = (row * KV_HEADS + kv_head) * HEAD_DIM + column;
        const unsigned place = target + (token * STRIDE + column) * sizeof(element);
        copy_async(place, keys + at, is_valid);
        copy_async(place + KV_TILE * STRIDE * sizeof(element), values + at, is_valid);
    }
    commit_copies();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) chunk_attention(
    const element* __restrict__ q, element* __restrict__ out, const element* __restrict__ keys,
    const element* __restrict__ values, const int* __restrict__ num_items, const int4* __restrict__ work,
    const int* __restrict__ query_indptr, const int* __restrict__ seq_lens, const int* __restrict__ page_indptr,
    const int* __restrict__ page_indices, int page_rows, int window, float scale, int is_beside_decode) {
    if (!is_beside_decode) wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned ring = shared_address(shared_memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int total = num_items[1] * KV_HEADS;
    for (int unit = blockIdx.x; unit < total; unit += gridDim.x) {
        const int4 item = work[unit / KV_HEADS];
        const int kv_head = unit % KV_HEADS;
        Request request;
        request.first_row = query_indptr[item.x];
        request.query_len = query_indptr[item.x + 1] - request.first_row;
        request.seq_len = seq_lens[item.x];
        request.pages = page_indices + page_indptr[item.x];
        const int cached = request.seq_len - request.query_len;
        const int first_token = item.y * TOKENS, last_token = min(first_token + TOKENS, request.query_len) - 1;

        // rows g and g + 8 of this warp: their token (clamped), head, and place in q
        int position[2];
        size_t place[2];
        bool is_row[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = warp * 16 + half * 8 + g;
            const int token = min(first_token + r / GROUP, last_token);
            is_row[half] = r < TOKENS * GROUP && first_token + r / GROUP <= last_token;
            position[half] = cached + token;
            const int head = kv_head * GROUP + r % GROUP;
            place[half] = (static_cast<size_t>(request.first_row + token) * HEADS + head) * HEAD_DIM;
        }
        unsigned query[STEPS][4];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const int column = k * 16 + t * 2;
            query[k][0] = __ldcg(reinterpret_cast<const unsigned*>(q + place[0] + column));
            query[k][1] = __ldcg(reinterpret_cast<const unsigned*>(q + place[1] + column));
            query[k][2] = __ldcg(reinterpret_cast<const unsigned*>(q + place[0] + column + 8));
            query[k][3] = __ldcg(reinterpret_cast<const unsigned*>(q + place[1] + column + 8));
        }
        float sums[2] = {}, most[2] = {-INFINITY, -INFINITY}, acc[OUTS][4] = {};
        const int oldest = window > 0 ? max(cached + first_token - window + 1, 0) : 0;
        const int end = cached + last_token + 1;
        int stage = 0;
        int kv = oldest / KV_TILE * KV_TILE;
        copy_tile(ring, keys, values, request, kv, kv_head, page_rows);
        for (; kv < end; kv += KV_TILE) {
            if (kv + KV_TILE < end) {
                copy_tile(ring + (1 - stage) * STAGE, keys, values, request, kv + KV_TILE, kv_head, page_rows);
                wait_copies<1>();
            } else {
                wait_copies<0>();
            }
            __syncthreads();
            const unsigned tile = ring + stage * STAGE;
            float scores[KV_TILE / 8][4] = {};
            const unsigned key_at = tile + ((lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8) * sizeof(element);
#pragma unroll
            for (int k = 0; k < STEPS; ++k)
#pragma unroll
                for (int n = 0; n < KV_TILE / 8; n += 2) {
                    unsigned b[4];
                    load_matrices(b, key_at + (n * 8 * STRIDE + k * 16) * sizeof(element));
                    multiply_add(scores[n], query[k], b[0], b[1]);
                    multiply_add(scores[n + 1], query[k], b[2], b[3]);
                }
            const bool is_masked = kv + KV_TILE > cached + first_token + 1 || window > 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float now = -INFINITY;
#pragma unroll
                for (int n = 0; n < KV_TILE / 8; ++n)
#pragma unroll
                    for (int i = half * 2; i < half * 2 + 2; ++i) {
                        scores[n][i] *= scale;
                        if (is_masked) {
                            const int token = kv + n * 8 + t * 2 + i % 2;
                            const bool is_visible =
                                token <= position[half] && (window <= 0 || token > position[half] - window);
                            if (!is_visible) scores[n][i] = -INFINITY;
                        }
                        now = fmaxf(now, scores[n][i]);
                    }
                const float next = fmaxf(most[half], quad_max(now));
                const float base = next == -INFINITY ? 0.0f : next;  // a row that sees nothing of this tile
                const float shrink = exp2f(most[half] - base);
                most[half] = next;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KV_TILE / 8; ++n)
#pragma unroll
                    for (int i = half * 2; i < half * 2 + 2; ++i) {
                        scores[n][i] = exp2f(scores[n][i] - base);
                        sum += scores[n][i];
                    }
                sums[half] = sums[half] * shrink + sum;
#pragma unroll
                for (int n = 0; n < OUTS; ++n) {
                    acc[n][half * 2] *= shrink;
                    acc[n][half * 2 + 1] *= shrink;
                }
            }
            const unsigned value_at =
                tile + ((KV_TILE + lane / 8 % 2 * 8 + lane % 8) * STRIDE + lane / 16 * 8) * sizeof(element);
#pragma unroll
            for (int k = 0; k < KV_TILE / 16; ++k) {
                const unsigned weights[4] = {
                    pack(scores[2 * k][0], scores[2 * k][1]), pack(scores[2 * k][2], scores[2 * k][3]),
                    pack(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
                for (int n = 0; n < OUTS; n += 2) {
                    unsigned b[4];
                    load_matrices_transposed(b, value_at + (k * 16 * STRIDE + n * 8) * sizeof(element));
                    multiply_add(acc[n], weights, b[0], b[1]);
                    multiply_add(acc[n + 1], weights, b[2], b[3]);
                }
            }
            __syncthreads();
            stage = 1 - stage;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float norm = 1.0f / quad_sum(sums[half]);
            if (is_row[half]) {
#pragma unroll
                for (int n = 0; n < OUTS; ++n)
                    *reinterpret_cast<unsigned*>(out + place[half] + n * 8 + t * 2) =
                        pack(acc[n][half * 2] * norm, acc[n][half * 2 + 1] * norm);
            }
        }
    }
    // Whoever waits for this kernel relies on decode, too; the other blocks make room for those still to come.
    if (is_beside_decode && blockIdx.x == 0) wait_for_previous_kernel();
}
