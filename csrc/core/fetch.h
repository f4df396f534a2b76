// Hints to bring a line of memory into the cache before it is needed.
#pragma once

namespace fusedopt {

// g++ takes a function that does nothing else for one without effects, and drops its calls; the
// empty statement tells it otherwise. Any address will do: a hint cannot fault.
inline __attribute__((always_inline)) void fetch(const void* address) {
  __builtin_prefetch(address);
  asm volatile("" : : "r"(address));
}
inline __attribute__((always_inline)) void fetch_for_write(const void* address) {
  __builtin_prefetch(address, 1);
  asm volatile("" : : "r"(address));
}

}  // namespace fusedopt
