// What orders accesses of lanes to memory, and what does not: ThreadSanitizer must know it. Each case without its order is
// a race.
#include "emulator.h"
#define DTYPE 0
#include "async_copy.cuh"
#include "cluster.cuh"
#include "swap_in.cuh"

namespace {
int* words() { return (int*)shared_memory + 64; }
u64* barriers() { return (u64*)shared_memory; }
void read(int* at) { *(volatile int*)at; }

void block(bool is_ordered) {
  words()[threadIdx.x] = 1;
  if (is_ordered) __syncthreads();
  else __syncwarp();
  read(&words()[(threadIdx.x + 32) % 64]);
}

void warp(bool is_ordered) {
  words()[threadIdx.x] = 1;
  if (is_ordered) __syncwarp();
  else __shfl_sync(~0u, 1, 0);
  words()[threadIdx.x / 32 * 32 + 31 - threadIdx.x % 32] = 2;
}

// A stage is filled, read, and filled again.
void bulk_copy(bool waits_for_bytes, bool waits_for_readers) {
  static uint4 source[2];
  if (threadIdx.x == 0) init_barrier(barriers());
  __syncthreads();
  for (int turn = 0; turn < 2; turn++) {
    if (threadIdx.x == 0) {
      expect_bytes(barriers(), sizeof(uint4));
      copy_bulk(words(), &source[turn], sizeof(uint4), barriers());
    }
    if (waits_for_bytes || threadIdx.x == 0) wait_barrier(barriers(), turn);
    read(&words()[threadIdx.x % 4]);
    if (waits_for_readers) __syncthreads();
  }
}

void group_of_copies(bool waits_for_bytes, bool waits_for_readers) {
  static uint4 source[64];
  for (int turn = 0; turn < 2; turn++) {
    copy_async(words() + 4 * threadIdx.x, &source[threadIdx.x], true);
    commit_copies();
    if (!waits_for_bytes) __syncthreads();
    wait_copies<0>();
    if (waits_for_bytes) __syncthreads();
    read(&words()[4 * (threadIdx.x + 1) % 256]);
    if (waits_for_readers) __syncthreads();
  }
}

void store_to_another_block(bool is_ordered) {
  if (threadIdx.x == 0) {
    init_barrier(barriers());
    expect_bytes(barriers(), sizeof(float4));
  }
  sync_cluster();
  if (threadIdx.x == 32) store_to_block((float*)words(), {1, 2, 3, 4}, barriers(), 1 - cluster_rank());
  if (is_ordered || threadIdx.x == 0) wait_barrier(barriers(), 0);
  read(&words()[threadIdx.x % 4]);
}

int page[4], source_page[4];
u64 arrived;
void swap_in(bool is_ordered) {
  if (is_ordered || threadIdx.x == 0) wait_for_value(&arrived, 1);
  read(&page[threadIdx.x % 4]);
}
}  // namespace

extern "C" void run(int which, bool is_ordered) {
  const std::function<void()> cases[] = {
      [=] { block(is_ordered); },
      [=] { warp(is_ordered); },
      [=] { bulk_copy(is_ordered, true); },
      [=] { bulk_copy(true, is_ordered); },
      [=] { group_of_copies(is_ordered, true); },
      [=] { group_of_copies(true, is_ordered); },
      [=] { store_to_another_block(is_ordered); },
      [=] { swap_in(is_ordered); },
  };
  swap_ins.push_back({page, source_page, sizeof(page), &arrived, 1});
  launch(2, 64, cases[which], 2);
}
