// How a sequence's KV is split for decode: by position alone, whatever the batch.
#pragma once

constexpr int SPLIT_TOKENS = 512;

__device__ __forceinline__ int split_of(int position) { return position / SPLIT_TOKENS; }

__device__ __forceinline__ int split_start(int split) { return split * SPLIT_TOKENS; }

// The oldest position that a row at the end of the sequence sees.
__device__ __forceinline__ int oldest_visible(int seq_len, int window) {
    return window > 0 && seq_len > window ? seq_len - window : 0;
}
