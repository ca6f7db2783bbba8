#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

// Which of its two neighbours a buffer lies next to.
enum class Edge { kStart, kEnd };

// Elements that lie, to the byte or as close as their alignment lets them, next to a page that nobody may touch: the
// processor sees what the sanitizers don't, such as the masked loads of AVX-512. What is left of the buffer's own pages
// is poisoned for the address sanitizer, and looked at in the end.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, size_t alignment, Edge edge)
      : bytes_(static_cast<size_t>(count) * sizeof(T)), inner_((bytes_ + kPage - 1) / kPage * kPage) {
    if (inner_ == 0) inner_ = kPage;
    void* pages = mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) fail("mmap");
    pages_ = static_cast<unsigned char*>(pages);
    if (mprotect(pages_ + kPage, inner_, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    std::memset(pages_ + kPage, kCanary, inner_);
    const size_t from = edge == Edge::kStart ? 0 : (inner_ - bytes_) / alignment * alignment;
    data_ = reinterpret_cast<T*>(pages_ + kPage + from);
    std::memset(static_cast<void*>(data_), 0xFF, bytes_);  // NaN in every type of floating-point numbers
    ASAN_POISON_MEMORY_REGION(pages_ + kPage, from);
    ASAN_POISON_MEMORY_REGION(pages_ + kPage + from + bytes_, inner_ - from - bytes_);
  }

  Buffer(Buffer&& other) noexcept
      : bytes_(other.bytes_), inner_(other.inner_), pages_(std::exchange(other.pages_, nullptr)), data_(other.data_) {}
  Buffer& operator=(Buffer&&) = delete;

  ~Buffer() {
    if (pages_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(pages_ + kPage, inner_);
    const auto* data = reinterpret_cast<unsigned char*>(data_);
    for (const unsigned char* at = pages_ + kPage; at < pages_ + kPage + inner_; ++at) {
      if (at == data && bytes_ > 0) at += bytes_;
      if (at < pages_ + kPage + inner_ && *at != kCanary) fail("written next to a buffer");
    }
    munmap(pages_, inner_ + 2 * kPage);
  }

  // From here on a write is an error, too.
  void freeze() {
    if (mprotect(pages_ + kPage, inner_, PROT_READ) != 0) fail("mprotect");
  }

  T* data() const { return data_; }
  int64_t size() const { return static_cast<int64_t>(bytes_ / sizeof(T)); }
  T& operator[](int64_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size(); }

 private:
  static constexpr size_t kPage = 4096;
  static constexpr unsigned char kCanary = 0xA5;

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "buffer.h: %s\n", what);
    std::abort();
  }

  size_t bytes_, inner_;
  unsigned char* pages_ = nullptr;
  T* data_ = nullptr;
};
