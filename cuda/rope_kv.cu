// Adds delta, norms the heads of q and k (QK_NORM), rotates them, and writes K and V to their slots.
// qkv, delta [rows, heads + 2 kv_heads, head_dim] (delta may be null), q [rows, heads, head_dim],
// rotation [rows, head_dim / 2] (cos, sin) fp32, qk_norm [heads + kv_heads, head_dim],
// keys, values: a layer's views of the pool, where slot = page * PAGE_TOKENS + token lies at row page * page_rows + token.
// A warp per head of a row: a lane holds pairs of neighbours in the head's first half, and what they rotate with in its
// second. Rows beyond counts[1] are padding of a graph: nothing of theirs is written to the pool.
#include "sync.cuh"
#include "vectors.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int WIDTH = HALF % 2 ? 1 : 2;
constexpr int PIECES = (HALF + 32 * WIDTH - 1) / (32 * WIDTH);
constexpr int NUM_HEADS = HEADS + 2 * KV_HEADS;

struct alignas(sizeof(element) * WIDTH) Piece {
    element at[WIDTH];
};

struct Half {
    float at[PIECES][WIDTH];

    __device__ void load(const element* source, int lane, bool is_added) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int d = (p * 32 + lane) * WIDTH;
            if (d < HALF) {
                const Piece piece = *reinterpret_cast<const Piece*>(source + d);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) at[p][i] = (is_added ? at[p][i] : 0.0f) + to_float(piece.at[i]);
            } else if (!is_added) {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) at[p][i] = 0.0f;
            }
        }
    }

    __device__ void store(element* target, int lane) const {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int d = (p * 32 + lane) * WIDTH;
            if (d < HALF) {
                Piece piece;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) from_float(at[p][i], piece.at[i]);
                *reinterpret_cast<Piece*>(target + d) = piece;
            }
        }
    }

    __device__ float squares() const {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum += at[p][i] * at[p][i];
        return sum;
    }

    __device__ void scale(float factor, const element* weight, int lane) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int d = (p * 32 + lane) * WIDTH;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (d < HALF) at[p][i] *= factor * to_float(weight[d + i]);
        }
    }
};

__device__ __forceinline__ void rotate(Half& low, Half& high, const float2* rotation, int lane) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int d = (p * 32 + lane) * WIDTH;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (d < HALF) {
                const float2 angle = rotation[d + i];
                const float a = low.at[p][i], b = high.at[p][i];
                low.at[p][i] = a * angle.x - b * angle.y;
                high.at[p][i] = b * angle.x + a * angle.y;
            }
        }
    }
}

extern "C" __global__ void rope_kv(
    const element* __restrict__ qkv, const element* __restrict__ delta, element* __restrict__ q,
    element* __restrict__ keys, element* __restrict__ values, const float2* __restrict__ rotation,
    const int* __restrict__ slots, const int* __restrict__ counts, const element* __restrict__ qk_norm, float eps,
    int page_rows) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int row = blockIdx.x, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const bool is_padding = row >= counts[1];
    const int slot = is_padding ? 0 : slots[row];
    const size_t pool_row = static_cast<size_t>(slot / PAGE_TOKENS) * page_rows + slot % PAGE_TOKENS;
    for (int head = blockIdx.y * warps + threadIdx.x / 32; head < NUM_HEADS; head += gridDim.y * warps) {
        const size_t at = (static_cast<size_t>(row) * NUM_HEADS + head) * HEAD_DIM;
        Half low, high;
        low.load(qkv + at, lane, false);
        high.load(qkv + at + HALF, lane, false);
        if (delta) {
            low.load(delta + at, lane, true);
            high.load(delta + at + HALF, lane, true);
        }
        const bool is_value = head >= HEADS + KV_HEADS;
        if (QK_NORM && !is_value) {
            float squares = low.squares() + high.squares();
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
            const float factor = 1.0f / sqrtf(squares / HEAD_DIM + eps);
            low.scale(factor, qk_norm + head * HEAD_DIM, lane);
            high.scale(factor, qk_norm + head * HEAD_DIM + HALF, lane);
        }
        if (!is_value) rotate(low, high, rotation + static_cast<size_t>(row) * HALF, lane);
        element* target = q + (static_cast<size_t>(row) * HEADS + head) * HEAD_DIM;
        if (head >= HEADS) {
            if (is_padding) continue;
            const int kv_head = is_value ? head - HEADS - KV_HEADS : head - HEADS;
            target = (is_value ? values : keys) + (pool_row * KV_HEADS + kv_head) * HEAD_DIM;
        }
        low.store(target, lane);
        high.store(target + HALF, lane);
    }
}
