// residual = x + residual + delta; normed = residual / rms(residual) * weight.
// x, residual, delta, normed [rows, hidden] (delta, residual may be null; x receives the sum), weight [hidden].
// One block per row: the row stays in registers between the sum and the norm, so each tensor is touched once.
#include "sync.cuh"
#include "vectors.cuh"

// HIDDEN: the row length; THREADS: of a block.
constexpr int WIDTH = HIDDEN % VECTOR ? 1 : VECTOR;
constexpr int PIECES = (HIDDEN / WIDTH + THREADS - 1) / THREADS;

template <int N>
__device__ __forceinline__ void load_piece(const element* source, float (&out)[N], bool is_added) {
    if constexpr (N == VECTOR) {
        if (is_added) add(source, out); else load(source, out);
    } else {
        out[0] = (is_added ? out[0] : 0.0f) + to_float(*source);
    }
}

template <int N>
__device__ __forceinline__ void store_piece(const float (&values)[N], element* target) {
    if constexpr (N == VECTOR) store(values, target); else from_float(values[0], *target);
}

__device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) total += sums[warp];
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    element* __restrict__ x, const element* __restrict__ residual, const element* __restrict__ delta,
    const element* __restrict__ weight, element* __restrict__ normed, float eps) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t row = static_cast<size_t>(blockIdx.x) * HIDDEN;
    float values[PIECES][WIDTH];
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int column = (p * THREADS + threadIdx.x) * WIDTH;
        if (column < HIDDEN) {
            load_piece(x + row + column, values[p], false);
            if (delta) load_piece(delta + row + column, values[p], true);
            if (residual) load_piece(residual + row + column, values[p], true);
            if (delta || residual) store_piece(values[p], x + row + column);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                values[p][i] = rounded(values[p][i]);
                squares += values[p][i] * values[p][i];
            }
        }
    }
    const float scale = 1.0f / sqrtf(block_sum(squares) / HIDDEN + eps);
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int column = (p * THREADS + threadIdx.x) * WIDTH;
        if (column < HIDDEN) {
            float factor[WIDTH];
            load_piece(weight + column, factor, false);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) values[p][i] = values[p][i] * scale * factor[i];
            store_piece(values[p], normed + row + column);
        }
    }
}
