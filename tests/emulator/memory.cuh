// In place of cuda/memory.cuh.
#pragma once
inline uint4 load_once(const void* from) { return *aligned((const uint4*)from); }
inline uint4 load_if(bool is_valid, const void* from) { return is_valid ? load_once(from) : uint4{}; }
inline void prefetch(const void* at) { aligned((const uint4*)at); }
