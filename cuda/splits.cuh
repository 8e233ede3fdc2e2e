// How a sequence's KV is split for decode: by position alone, whatever the batch. Splits hold 64 tokens up to position
// 1024, 128 up to 4096, then 512: short sequences spread over the chip, long ones are merged quickly.
#pragma once

constexpr int MAX_SPLIT_TOKENS = 512;

__device__ __forceinline__ int split_of(int position) {
    return position < 1024 ? position / 64 : position < 4096 ? 16 + (position - 1024) / 128 : 40 + (position - 4096) / 512;
}

__device__ __forceinline__ int split_start(int split) {
    return split < 16 ? split * 64 : split < 40 ? 1024 + (split - 16) * 128 : 4096 + (split - 40) * 512;
}

// The oldest position that a row at the end of the sequence sees.
__device__ __forceinline__ int oldest_visible(int seq_len, int window) {
    return window > 0 && seq_len > window ? seq_len - window : 0;
}
