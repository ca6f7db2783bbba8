#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

// What a kernel works in. It is taken before the threads start: an exception can't leave an OpenMP region.
namespace fastbert {

constexpr int64_t kLineBytes = 64;

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};

template <typename T>
using AlignedArray = std::unique_ptr<T[], FreeAligned>;

// The number of elements of whole cache lines that hold count of them: what each thread gets, so that none waits for
// the writes of another.
template <typename T>
constexpr int64_t whole_lines(int64_t count) {
  constexpr int64_t kElements = kLineBytes / static_cast<int64_t>(sizeof(T));
  return (count + kElements - 1) / kElements * kElements;
}

// count elements, not initialised, at an address that is a multiple of 64. Throws std::bad_alloc.
template <typename T>
AlignedArray<T> aligned_array(int64_t count) {
  int64_t bytes;
  if (__builtin_mul_overflow(whole_lines<T>(count), static_cast<int64_t>(sizeof(T)), &bytes)) throw std::bad_alloc();
  AlignedArray<T> memory(static_cast<T*>(std::aligned_alloc(kLineBytes, static_cast<size_t>(bytes))));
  if (memory == nullptr && bytes > 0) throw std::bad_alloc();
  return memory;
}

}  // namespace fastbert
