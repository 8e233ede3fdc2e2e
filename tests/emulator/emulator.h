// Runs a kernel's clusters of blocks on the CPU, one after the other: a fiber for each lane, switched where lanes wait for
// each other.
//
// Warps are advanced in random order, some or all of a block now and then not for a while, and copies and stores to other
// blocks arrive at random times, and so do pages that are swapped in meanwhile: what is only ordered by luck shows.
// Included before a kernel's source; the headers of this folder take the place of those with instructions of their own.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "races.h"

using std::isfinite;
using std::max;
using std::min;
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Dim {
  int x, y, z;
};

struct Meeting {
  int num_arrived = 0;
  long generation = 0;
};
struct Warp : Meeting {
  unsigned long long values[32];
  unsigned operands[32][6];
};
struct Barrier {
  int phase = 0;
  bool has_arrived = false;
  long bytes = 0;

  const char* place(int parity) { return (const char*)this + parity; }
};
struct Block : Meeting {
  Dim index;
  int num_threads, num_done = 0, num_votes = 0;
  bool has_waited = false; // for pages
  std::vector<uint4> shared;
  std::map<void*, Barrier> barriers;
};
struct Copy {
  void* to;         // nullptr: nobody reads it
  const void* from; // nullptr: `value` is stored
  int bytes;
  Block* block; // that it goes to
  Barrier* barrier;
  float4 value;
  std::shared_ptr<char> issued = std::make_shared<char>();
};
struct SwapIn {
  void* to;
  const void* from;
  long bytes;
  unsigned long long* word; // set to `value` afterwards, if it is not nullptr
  unsigned long long value;
};
struct Lane {
  ucontext_t context; // its beginning
  jmp_buf place;      // where it waits
  Dim thread;
  Warp* warp;
  Block* block;
  int index;
  bool has_begun = false, is_done = false, is_fenced = false;
  bool (*is_ready)(void*) = nullptr; // of a lane that waits, with `what`
  void* what;
};
constexpr int STACK_BYTES = 1 << 16;

inline std::vector<Lane> lanes;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<Warp> warps;
inline std::vector<Block> blocks; // of the cluster
inline std::vector<Copy> copies;
inline std::deque<SwapIn> swap_ins; // in their order
inline int swap_in_rounds;          // one arrives about so often; 0: while somebody waits
inline int num_waiting;             // for pages
inline Lane* lane_now;
inline jmp_buf scheduler;
// Of ThreadSanitizer: this one, the lanes', that of pages, which arrive one after the other, and those of other copies.
inline Thread main_thread;
inline std::vector<Thread> lane_threads, page_thread, copy_threads;
inline Meeting cluster;
inline long progress;
inline long num_launches; // of clusters
inline std::mt19937 chance(1);
inline std::function<void()> kernel_body;
inline Dim gridDim;
#define threadIdx (lane_now->thread)
#define blockIdx (lane_now->block->index)
#define shared_memory ((char*)lane_now->block->shared.data())

[[noreturn]] inline void fail(const char* what) {
  printf("emulator: %s in block %d\n", what, blockIdx.x);
  fflush(stdout);
  abort();
}
// Jumps rather than swapcontext, which calls the system each time.
inline void yield() {
  if (_setjmp(lane_now->place)) return;
  switch_to(main_thread);
  _longjmp(scheduler, 1);
}
inline void resume(Lane& lane) {
  lane_now = &lane;
  if (_setjmp(scheduler)) return;
  switch_to(lane_threads[&lane - lanes.data()]);
  if (lane.has_begun) _longjmp(lane.place, 1);
  lane.has_begun = true;
  setcontext(&lane.context);
}
template <typename F>
void wait_until(F is_over) {
  if (is_over()) return;
  lane_now->is_ready = [](void* what) { return (*(F*)what)(); };
  lane_now->what = &is_over;
  yield();
  lane_now->is_ready = nullptr;
}
// Lanes wait until `expected` of them are here; `is_order`: what they did before is done before what they do then.
inline void meet(Meeting& at, int expected, bool is_order = true) {
  Unwatched unwatched;
  long before = at.generation;
  const char* place = (const char*)&at + before % 2; // who is ahead by a generation is not waited for
  if (is_order) publish(place);
  if (++at.num_arrived == expected) {
    at.num_arrived = 0, at.generation++, progress++;
  } else {
    wait_until([&] { return at.generation != before; });
  }
  if (is_order) acquire(place);
}
inline void __syncwarp() { meet(*lane_now->warp, 32); }
// Of instructions that all lanes execute at once, but that order no accesses to memory.
inline void exchange() { meet(*lane_now->warp, 32, false); }
inline void __syncthreads() { meet(*lane_now->block, lane_now->block->num_threads); }
inline int __syncthreads_count(bool vote) {
  Unwatched unwatched;
  Block& block = *lane_now->block;
  block.num_votes += vote;
  __syncthreads();
  int count = block.num_votes;
  __syncthreads();
  block.num_votes = 0;
  __syncthreads();
  return count;
}
inline bool __syncthreads_and(bool vote) { return __syncthreads_count(vote) == lane_now->block->num_threads; }
inline void sync_cluster() { meet(cluster, (int)lanes.size(), false); }
template <typename T>
T atomicAdd(T* at, T by) {
  Unwatched unwatched;
  T before = *at;
  *at += by;
  return before;
}
inline int atomicMax(int* at, int other) {
  Unwatched unwatched;
  int before = *at;
  *at = max(before, other);
  return before;
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  Unwatched unwatched;
  Warp& warp = *lane_now->warp;
  memcpy(&warp.values[lane_now->index], &value, sizeof(T));
  exchange();
  memcpy(&value, &warp.values[from % 32], sizeof(T));
  exchange();
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return __shfl_sync(mask, value, max(0, lane_now->index - by));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  return __shfl_sync(mask, value, lane_now->index ^ by);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) votes |= (unsigned)__shfl_sync(~0u, (int)vote, i) << i;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned to = 0;
  for (int i = 0; i < 4; i++) to |= (unsigned)(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return to;
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long __float2ull_rn(float x) { return llrintf(x); }
inline float fmaf(float a, float b, float c) { return a * b + c; }
template <typename To, typename From>
To bits(From x) {
  To to;
  memcpy(&to, &x, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned x) { return bits<float>(x); }
inline float __int_as_float(int x) { return bits<float>(x); }
inline unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
template <typename T>
const T* aligned(const T* at) {
  if ((size_t)at % sizeof(T)) fail("misaligned access");
  return at;
}
template <typename T>
T __ldg(const T* at) {
  return *aligned(at);
}
template <typename T>
T __ldcg(const T* at) {
  return *aligned(at);
}
template <typename T>
void __stcg(T* at, T value) {
  *(T*)aligned(at) = value;
}

// Something besides the lanes, ordered behind what it acquires, and what its thread did before.
template <typename F>
void beside_lanes(const std::vector<Thread>& threads, F work) {
  publish(&main_thread);
  switch_to(threads[chance() % threads.size()]);
  acquire(&main_thread);
  work();
  switch_to(main_thread);
}
inline void swap_in_one() {
  SwapIn one = swap_ins.front();
  swap_ins.pop_front();
  beside_lanes(page_thread, [&] {
    memcpy(one.to, one.from, one.bytes);
    if (one.word) publish(one.word);
  });
  if (one.word) *one.word = one.value;
  progress++;
}
void finish_copies();
inline void run_lane() {
  acquire(&kernel_body);
  kernel_body();
  publish(&lanes);
  {
    Unwatched unwatched;
    lane_now->is_done = true;
    lane_now->block->num_done++, progress++;
  }
  yield();
}
inline void run_cluster(int first_block, int num_blocks, int num_threads) {
  Unwatched unwatched;
  main_thread = this_thread();
  num_launches++, cluster = {};
  int num_lanes = num_blocks * num_threads;
  lanes = std::vector<Lane>(num_lanes);
  while ((int)stacks.size() < num_lanes) stacks.emplace_back(new char[STACK_BYTES]), lane_threads.push_back(new_thread());
  while (page_thread.empty()) page_thread.push_back(new_thread());
  while (copy_threads.size() < 64) copy_threads.push_back(new_thread());
  warps.assign(num_lanes / 32, Warp());
  blocks.assign(num_blocks, Block());
  for (int i = 0; i < num_blocks; i++) {
    blocks[i].index = {first_block + i, 0, 0}, blocks[i].num_threads = num_threads;
    blocks[i].shared.assign(232448 / 16, make_uint4(~0u, ~0u, ~0u, ~0u)); // NaN
  }
  for (int i = 0; i < num_lanes; i++) {
    Lane& lane = lanes[i];
    lane.block = &blocks[i / num_threads], lane.warp = &warps[i / 32], lane.index = i % 32;
    lane.thread = {i % num_threads, 0, 0};
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = stacks[i].get();
    lane.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&lane.context, run_lane, 0);
  }
  publish(&kernel_body);
  int num_warps = warps.size();
  std::vector<long> asleep_until(num_warps);
  long round = 0, late = chance() % num_blocks * (num_threads / 32);
  for (int w = 0; num_blocks > 1 && w < num_threads / 32; w++) asleep_until[late + w] = 1024; // one block begins late
  for (int idle = 0; std::any_of(lanes.begin(), lanes.end(), [](Lane& lane) { return !lane.is_done; }); round++) {
    long before = progress;
    if (num_blocks > 1 && (int)(chance() % 512) < num_warps) {
      int warp = chance() % num_warps, of_block = num_threads / 32, n = chance() % 8 ? 1 : of_block;
      long until = round + (1 << chance() % 11); // some for longer than others take for several units
      for (int w = warp / n * n; w < warp / n * n + n; w++) asleep_until[w] = until;
    }
    for (int w = 0; w < num_warps; w++) {
      int warp = chance() % num_warps;
      if (round < asleep_until[warp]) continue;
      for (int i = 0; i < 32; i++) {
        Lane& lane = lanes[warp * 32 + i];
        if (!lane.is_done && (!lane.is_ready || lane.is_ready(lane.what))) resume(lane);
      }
    }
    if (chance() % 3 == 0) finish_copies();
    if (!swap_ins.empty() && (swap_in_rounds ? chance() % swap_in_rounds == 0 : num_waiting > 0)) swap_in_one();
    idle = progress == before ? idle + 1 : 0;
    if (idle > 10000) fail("deadlock");
  }
  if (!copies.empty()) fail("copies nobody waited for");
  acquire(&lanes);
}
inline void launch(int num_blocks, int num_threads, std::function<void()> body, int cluster = 1) {
  Unwatched unwatched;
  gridDim = {num_blocks, 1, 1};
  kernel_body = body;
  for (int i = 0; i < num_blocks; i += cluster) run_cluster(i, cluster, num_threads);
}
