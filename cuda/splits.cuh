// How a sequence's KV is split for decode: by position alone, whatever the batch. Splits hold 128 tokens up to position
// 1024, 256 up to 4096, then 512: short sequences spread over the chip, long ones are merged quickly.
#pragma once

constexpr int MAX_SPLIT_TOKENS = 512;

__device__ __forceinline__ int split_of(int position) {
    return position < 1024 ? position / 128 : position < 4096 ? 8 + (position - 1024) / 256 : 20 + (position - 4096) / 512;
}

__device__ __forceinline__ int split_start(int split) {
    return split < 8 ? split * 128 : split < 20 ? 1024 + (split - 8) * 256 : 4096 + (split - 20) * 512;
}

// The oldest position that a row at the end of the sequence sees.
__device__ __forceinline__ int oldest_visible(int seq_len, int window) {
    return window > 0 && seq_len > window ? seq_len - window : 0;
}
