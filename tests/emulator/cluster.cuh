// In place of cuda/cluster.cuh.
#pragma once
#include "element.cuh"
inline int cluster_rank() { return lane_now->block - blocks.data(); }
inline void init_barrier(u64* barrier) {
  Unwatched unwatched;
  lane_now->block->barriers[barrier] = {};
}
inline void complete(Barrier& barrier) {
  if (barrier.has_arrived && barrier.bytes == 0) barrier.phase++, barrier.has_arrived = false, progress++;
}
inline void expect_bytes(u64* at, int bytes) {
  Unwatched unwatched;
  Barrier& barrier = lane_now->block->barriers.at(at);
  if (barrier.has_arrived) fail("too many arrivals");
  publish(barrier.place(barrier.phase % 2));
  barrier.has_arrived = true, barrier.bytes += bytes;
  complete(barrier);
}
inline void wait_barrier(u64* at, int parity) {
  Unwatched unwatched;
  Barrier& barrier = lane_now->block->barriers.at(at);
  wait_until([&] { return barrier.phase % 2 != parity; });
  acquire(barrier.place(parity));
}
template <typename T>
T* of_block(T* p, int rank) {
  return (T*)((char*)p - shared_memory + (char*)blocks[rank].shared.data());
}
inline void issue(Copy copy) {
  publish(copy.issued.get());
  copies.push_back(copy);
}
inline void store_to_block(float* to, float4 v, u64* barrier, int rank) {
  Unwatched unwatched;
  aligned((const float4*)to);
  if (rank < 0 || rank >= (int)blocks.size() || rank == cluster_rank()) fail("a store to no other block of the cluster");
  issue({to ? of_block(to, rank) : nullptr, nullptr, sizeof(v), &blocks[rank], &blocks[rank].barriers.at(of_block(barrier, rank)), v});
}
inline void mark_block(float* unread, u64* barrier, int rank) { store_to_block(nullptr, {}, barrier, rank); }
inline void arrive_in_cluster() {}
inline void wait_for_cluster() { sync_cluster(); }
inline void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
  Unwatched unwatched;
  aligned((const uint4*)to), aligned((const uint4*)from);
  if (lane_now->block->has_waited && !lane_now->is_fenced) fail("a bulk copy of what was waited for, without a fence");
  if (bytes <= 0 || bytes % 16) fail("a bulk copy of a wrong size");
  issue({to, from, bytes, lane_now->block, &lane_now->block->barriers.at(barrier), {}});
}
inline void finish_copies() {
  for (size_t n = chance() % (copies.size() + 1); n > 0; n--) {
    std::swap(copies[chance() % copies.size()], copies.back());
    Copy copy = copies.back();
    copies.pop_back();
    if (copy.block->num_done == copy.block->num_threads) fail("something arrives at a block that has ended");
    beside_lanes(copy_threads, [&] {
      acquire(copy.issued.get());
      if (copy.to) memcpy(copy.to, copy.from ? copy.from : &copy.value, copy.bytes);
      publish(copy.barrier->place(copy.barrier->phase % 2));
    });
    copy.barrier->bytes -= copy.bytes;
    complete(*copy.barrier);
    progress++;
  }
}
