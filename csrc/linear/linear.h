#pragma once

#include <cstdint>

// y = f(x Wᵀ + bias). f is nothing, GELU (Hendrycks and Gimpel, arXiv:1606.08415), or the addition of another tensor.
namespace fastbert::linear {

enum class Post : int { kNone = 0, kGeluErf = 1, kGeluTanh = 2, kAdd = 3 };

// What depth and features are multiples of.
constexpr int64_t kMultiple = 32;

// T is float, or uint16_t that holds bfloat16.
template <typename T>
struct Linear {
  const T* x;       // [rows, depth], contiguous
  const T* weight;  // as the kernel's pack function writes it
  const T* bias;    // [features], or null
  const T* other;   // [rows, features], contiguous: what kAdd adds
  T* y;             // [rows, features], at an address that is a multiple of 64
  int64_t rows;
  int64_t depth;
  int64_t features;
  Post post;
};

}  // namespace fastbert::linear
