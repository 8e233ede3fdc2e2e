// What ThreadSanitizer is told of lanes, if an emulated kernel is built with it: each is a thread, and only what orders
// accesses on a device does so here.
#pragma once
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);

// While one lives, this lane's accesses are the emulator's own.
struct Unwatched {
  Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unwatched() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
};
typedef void* Thread;
constexpr unsigned UNORDERED = 1; // a switch is no order
inline Thread new_thread() { return __tsan_create_fiber(0); }
inline Thread this_thread() { return __tsan_get_current_fiber(); }
inline void switch_to(Thread thread) { __tsan_switch_to_fiber(thread, UNORDERED); }
// What was done before it is published at an address is done before whatever follows its acquisition there.
inline void publish(const void* at) { __tsan_release((void*)at); }
inline void acquire(const void* at) { __tsan_acquire((void*)at); }
extern "C" void __tsan_write_range(void*, unsigned long);
inline void will_write(void* at, int bytes) { __tsan_write_range(at, bytes); }
#else
struct Unwatched {
  Unwatched() {}
};
typedef int Thread;
inline Thread new_thread() { return 0; }
inline Thread this_thread() { return 0; }
inline void switch_to(Thread) {}
inline void publish(const void*) {}
inline void acquire(const void*) {}
inline void will_write(void*, int) {}
#endif
