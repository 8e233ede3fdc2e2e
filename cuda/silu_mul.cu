// out = silu(gate) * up of gate_up + delta.
// gate_up, delta [rows, 2 inner] (delta may be null), out [rows, inner].
// A thread per vector of `out`, grid-stride: one pass over memory.
#include "silu.cuh"
#include "sync.cuh"
#include "vectors.cuh"

constexpr bool IS_FAST = sizeof(element) == 2;

template <int N>
__device__ __forceinline__ void silu_mul_piece(
    const element* gate_up, const element* delta, element* out, size_t row, int column, int inner) {
    const size_t gate_at = row * 2 * inner + column, up_at = gate_at + inner;
    if constexpr (N == VECTOR) {
        float gate[VECTOR], up[VECTOR];
        load(gate_up + gate_at, gate);
        load(gate_up + up_at, up);
        if (delta) {
            add(delta + gate_at, gate);
            add(delta + up_at, up);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) gate[i] = silu_mul<IS_FAST>(gate[i], up[i]);
        store(gate, out + row * inner + column);
    } else {
        float gate = to_float(gate_up[gate_at]), up = to_float(gate_up[up_at]);
        if (delta) {
            gate += to_float(delta[gate_at]);
            up += to_float(delta[up_at]);
        }
        from_float(silu_mul<IS_FAST>(gate, up), out[row * inner + column]);
    }
}

extern "C" __global__ void silu_mul(
    const element* __restrict__ gate_up, const element* __restrict__ delta, element* __restrict__ out, int rows,
    int inner) {
    constexpr int N = IS_VECTOR ? VECTOR : 1;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int pieces = inner / N;
    const size_t total = static_cast<size_t>(rows) * pieces;
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step)
        silu_mul_piece<N>(gate_up, delta, out, i / pieces, static_cast<int>(i % pieces) * N, inner);
}
