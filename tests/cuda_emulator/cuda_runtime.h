// A GPU made of host threads: enough of CUDA that csrc/cuda compiles unchanged as C++20 and runs.
//
// A block is an OS thread, its CUDA threads are fibers (ucontext) inside it. A fiber runs until the
// next barrier; when all fibers of a block wait, the barrier is passed. So a read that a barrier
// should have ordered after another thread's write does come before it, and tests see it: fibers
// run in ascending order up to one barrier, and in descending order up to the next.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

// After the standard headers, which use the same words for themselves.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __isGlobal(p) true
#define __builtin_assume(condition) ((void)(condition))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr int kProcessors = 4;  // of the device, one block each
constexpr size_t kStackBytes = 256 << 10;

enum class Wait { kNone, kBlock, kGrid, kEnd };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait = Wait::kNone;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};
inline thread_local Block* block;

inline void wait(Wait what) {
  Fiber* self = block->current;
  self->wait = what;
  swapcontext(&self->context, &block->scheduler);
}

inline void enter_fiber() {
  block->body(block->argument);
  wait(Wait::kEnd);
}

[[noreturn]] inline void divergent() {
  std::fputs("cuda_emulator: threads of a block wait at different barriers\n", stderr);
  std::abort();
}

// Runs one block: all fibers from barrier to barrier.
inline void run_block(Block* mine, unsigned index, unsigned threads, std::barrier<>* grid) {
  block = mine;
  blockIdx = dim3(index);
  mine->fibers.resize(threads);
  for (Fiber& fiber : mine->fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
    fiber.wait = Wait::kNone;
  }
  for (bool ascending = true;; ascending = !ascending) {
    Wait all = Wait::kNone;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = ascending ? i : threads - 1 - i;
      Fiber& fiber = mine->fibers[t];
      mine->current = &fiber;
      threadIdx = dim3(t);
      swapcontext(&mine->scheduler, &fiber.context);
      if (i > 0 && fiber.wait != all) divergent();
      all = fiber.wait;
    }
    if (all == Wait::kGrid) grid->arrive_and_wait();
    if (all == Wait::kEnd) return;
  }
}

// Runs a kernel to its end. One launch at a time: its blocks' shared memory is static.
template <class Argument>
void run_grid(void (*kernel)(Argument), unsigned blocks, unsigned threads, Argument* argument) {
  static std::mutex one_launch;
  static std::vector<Block> pool(kProcessors);
  const std::lock_guard lock(one_launch);
  struct Call {
    void (*kernel)(Argument);
    Argument* argument;
  } call{kernel, argument};
  std::barrier<> grid(blocks);
  std::vector<std::thread> workers;
  for (unsigned b = 0; b < blocks; ++b) {
    pool[b].body = [](void* p) {
      const Call* c = static_cast<Call*>(p);
      c->kernel(*c->argument);
    };
    pool[b].argument = &call;
    workers.emplace_back([&, b] {
      gridDim = dim3(blocks);
      blockDim = dim3(threads);
      run_block(&pool[b], b, threads, &grid);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace cuda_emulator

inline void __syncthreads() { cuda_emulator::wait(cuda_emulator::Wait::kBlock); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicAdd(unsigned* p, unsigned n) {
  return std::atomic_ref<unsigned>(*p).fetch_add(n);
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}

#include "machine.h"
