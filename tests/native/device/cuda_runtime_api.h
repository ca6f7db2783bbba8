#pragma once

// What the CUDA sources use of CUDA, for a compiler of C++ and one thread of the host: device.cu runs as it stands.
//
// The blocks of a grid run one after the other. The threads of a block are fibers, which run until they come to a
// barrier or a shuffle, in ascending or in descending order: a missing barrier shows as another result in one of the
// two. A block whose threads wait for what can't come any more ends the program.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Blocks run one after the other, and each fiber sees the memory of the present one.
#define __shared__ static

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few, so that blocks of a small problem go on to further rows.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename T>
T min(T a, T b) {
  return std::min(a, b);
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

namespace on_host {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

enum class State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  dim3 thread;
  State state = State::kReady;
  // What it gave to its last two shuffles: a lane may be one ahead of the others.
  uint64_t given[2] = {};
  unsigned shuffles = 0;
  void* fake_stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

inline Block* block = nullptr;
// The order in which the threads of a block run.
inline bool descending = false;

// The address sanitizer has to be told which stack is in use.
inline void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom,
                          [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}

inline void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom,
                         [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

// The stack of a thread of the block. All blocks use the same ones.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  if (stacks.size() <= thread) stacks.resize(thread + 1);
  if (stacks[thread] == nullptr) stacks[thread] = std::make_unique<char[]>(kStack);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks[thread].get(), kStack);  // what the last fiber left
#endif
  return stacks[thread].get();
}

// From a fiber to the scheduler, which comes back when what is waited for has happened.
inline void wait(State state) {
  Fiber& fiber = *block->running;
  fiber.state = state;
  before_switch(state == State::kDone ? nullptr : &fiber.fake_stack, block->bottom, block->size);
  swapcontext(&fiber.context, &block->scheduler);
  after_switch(fiber.fake_stack, nullptr, nullptr);
}

inline void enter() {
  after_switch(nullptr, &block->bottom, &block->size);
  block->body();
  wait(State::kDone);
}

inline void run(Fiber& fiber) {
  block->running = &fiber;
  threadIdx = fiber.thread;
  before_switch(&block->fake_stack, fiber.stack, kStack);
  swapcontext(&block->scheduler, &fiber.context);
  after_switch(block->fake_stack, nullptr, nullptr);
}

// Makes the fibers ready that have all come to the same place; whether there were any.
inline bool release() {
  std::vector<Fiber>& fibers = block->fibers;
  bool released = false;
  for (size_t first = 0; first < fibers.size(); first += kWarp) {
    const size_t end = std::min(first + kWarp, fibers.size());
    size_t waiting = 0;
    for (size_t lane = first; lane < end; ++lane) waiting += fibers[lane].state == State::kAtShuffle;
    if (waiting == 0) continue;
    // The masks of our shuffles name all lanes.
    if (waiting < end - first || end - first < kWarp) continue;
    for (size_t lane = first; lane < end; ++lane) fibers[lane].state = State::kReady;
    released = true;
  }
  if (released) return true;
  size_t waiting = 0;
  size_t done = 0;
  for (const Fiber& fiber : fibers) {
    waiting += fiber.state == State::kAtBarrier;
    done += fiber.state == State::kDone;
  }
  if (waiting == 0 || waiting + done < fibers.size()) return false;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
  return true;
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
  Block present;
  present.fibers = std::vector<Fiber>(threads);
  present.body = body;
  block = &present;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = present.fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    getcontext(&fiber.context);
    fiber.stack = stack_of(i);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  do {
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = present.fibers[descending ? threads - 1 - i : i];
      if (fiber.state == State::kReady) run(fiber);
    }
  } while (release());
  for (const Fiber& fiber : present.fibers) {
    if (fiber.state != State::kDone) fail("threads wait for others that have ended or wait elsewhere");
  }
  block = nullptr;
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::State::kAtBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xFFFFFFFFu) on_host::fail("a shuffle of some of the lanes");
  on_host::Fiber& fiber = *on_host::block->running;
  const unsigned turn = fiber.shuffles++ % 2;
  std::memcpy(&fiber.given[turn], &value, sizeof(T));
  on_host::wait(on_host::State::kAtShuffle);
  const size_t own = static_cast<size_t>(&fiber - on_host::block->fibers.data());
  const size_t lane = own % on_host::kWarp ^ static_cast<size_t>(lane_mask);
  const on_host::Fiber& other = on_host::block->fibers[own - own % on_host::kWarp + lane];
  T found;
  std::memcpy(&found, &other.given[turn], sizeof(T));
  return found;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  if (threads > 1024 || gridDim.y > 65535 || gridDim.z > 65535) on_host::fail("more threads or blocks than there may be");
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        on_host::run_block(threads, [&] { kernel(arguments...); });
      }
    }
  }
  return cudaSuccess;
}
