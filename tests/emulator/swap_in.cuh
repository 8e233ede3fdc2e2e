// In place of cuda/swap_in.cuh.
#pragma once
#include "element.cuh"
inline void wait_for_value(const u64* word, u64 value) {
  Unwatched unwatched;
  lane_now->block->has_waited = true;
  num_waiting++;
  wait_until([&] { return *word >= value; });
  num_waiting--;
  acquire(word);
}
inline void fence_bulk_copies() { lane_now->is_fenced = true; }
