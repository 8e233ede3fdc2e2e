// In place of cuda/barrier.cuh.
#pragma once
inline void init_barrier(u64* barrier, int count) { barriers[barrier] = {count, count, 0, 0}; }
inline void fence_barrier_init() {}
inline void arrive_expecting(u64* at, int bytes) {
  Barrier& barrier = barriers.at(at);
  barrier.bytes += bytes;
  if (--barrier.pending < 0) fail("too many arrivals");
  complete(barrier);
  progress++;
}
inline void arrive(u64* at) { arrive_expecting(at, 0); }
inline void wait_barrier(u64* at, int parity) {
  while (barriers.at(at).phase % 2 == parity) yield();
}
inline void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
  aligned((const uint4*)to), aligned((const uint4*)from);
  if (bytes <= 0 || bytes % 16) fail("a bulk copy of a wrong size");
  copies.push_back({to, from, bytes, barrier});
  progress++;
}
