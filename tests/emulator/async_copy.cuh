// In place of cuda/async_copy.cuh: copies are done when their group is waited for, no sooner.
#pragma once
#include <deque>

#include "memory.cuh"
struct Piece16 {
  uint4* to;
  const uint4* from;
};
using Groups16 = std::deque<std::vector<Piece16>>;
inline Groups16& my_groups() {
  static std::map<Lane*, Groups16> groups_of;
  static long launch_of_groups;
  if (launch_of_groups != num_launches) groups_of.clear(), launch_of_groups = num_launches;
  Groups16& groups = groups_of[lane_now];
  if (groups.empty()) groups.emplace_back();
  return groups;
}
inline void copy_async(void* to, const void* from, bool is_valid) {
  will_write(to, sizeof(uint4));
  Unwatched unwatched;
  static const uint4 zeros = {};
  my_groups().back().push_back({(uint4*)aligned((const uint4*)to), is_valid ? aligned((const uint4*)from) : &zeros});
}
inline unsigned shared_address(const void* p) { return (const char*)p - shared_memory; }
inline void copy_async(unsigned to, const void* from, bool is_valid) { copy_async(shared_memory + to, from, is_valid); }
inline void copy_last(unsigned to, const void* from, bool is_valid) { copy_async(shared_memory + to, from, is_valid); }
inline void commit_copies() {
  Unwatched unwatched;
  my_groups().emplace_back();
}
template <int pending>
void wait_copies() {
  std::vector<Piece16> arriving;
  {
    Unwatched unwatched;
    Groups16& groups = my_groups();
    for (; (int)groups.size() > pending + 1; groups.pop_front())
      arriving.insert(arriving.end(), groups.front().begin(), groups.front().end());
  }
  for (Piece16& piece : arriving) *piece.to = *piece.from;
}
