// What each thread of a parallel region must share with its caller, and how many there may be.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace fusedopt::cpu {

// How a thread rounds and whether it flushes subnormal numbers. OpenMP's threads have the mode of
// the moment in which they were started, whatever the caller has set since.
class FloatingMode {
 public:
  static FloatingMode of_this_thread() {
#if defined(__x86_64__)
    return FloatingMode(_mm_getcsr() & ~kRaised);
#elif defined(__aarch64__)
    uint64_t fpcr;
    asm volatile("mrs %0, fpcr" : "=r"(fpcr));
    return FloatingMode(fpcr);
#else
    return FloatingMode(static_cast<uint64_t>(std::fegetround()));
#endif
  }

  void set() const {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(bits_) | (_mm_getcsr() & kRaised));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(bits_));
#else
    std::fesetround(static_cast<int>(bits_));
#endif
  }

  bool operator!=(const FloatingMode& other) const { return bits_ != other.bits_; }

 private:
  static constexpr unsigned kRaised = 0x3f;  // of MXCSR: exceptions that were raised so far
  explicit FloatingMode(uint64_t bits) : bits_(bits) {}
  uint64_t bits_;
};

// The thread works in another's mode while this lives; it belongs to OpenMP's pool, which runs
// torch's loops, too, and gets its own mode back.
class InFloatingMode {
 public:
  explicit InFloatingMode(const FloatingMode& mode) : own_(FloatingMode::of_this_thread()) {
    changed_ = mode != own_;
    if (changed_) mode.set();
  }
  ~InFloatingMode() {
    if (changed_) own_.set();
  }
  InFloatingMode(const InFloatingMode&) = delete;
  InFloatingMode& operator=(const InFloatingMode&) = delete;

 private:
  const FloatingMode own_;
  bool changed_;
};

// The most threads that a region may have in this process. A forked child has a copy of OpenMP's
// pool and none of its threads: a region of more than one would wait for them for ever.
inline std::atomic<int> thread_limit{1 << 16};

inline int allowed_threads(int asked) {
  return std::min(asked, thread_limit.load(std::memory_order_relaxed));
}

}  // namespace fusedopt::cpu
