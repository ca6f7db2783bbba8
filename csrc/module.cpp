#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/amx.h"
#include "attention/dropout.h"
#include "attention/simd.h"
#include "bias_dropout_residual/bias_dropout_residual.h"
#include "bias_dropout_residual_layer_norm/bias_dropout_residual_layer_norm.h"
#include "common/amx.h"
#include "common/build.h"
#include "common/dropout.h"
#include "common/dtype.h"
#include "common/philox_host.h"
#include "common/processor.h"
#include "common/simd.h"
#include "encoder_layer/encoder_layer.h"
#include "linear/amx.h"
#include "linear/checksum.h"
#include "linear/simd.h"

namespace py = pybind11;

namespace fastbert {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT: Python owns the memory and hands over its address
}

template <typename Function>
void dispatch(int dtype, Function&& function) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32: return function(float{});
    case DType::kFloat16: return function(Half{});
    case DType::kBFloat16: return function(BFloat16{});
  }
  throw std::invalid_argument("dtype is " + std::to_string(dtype) + "; it may be FLOAT32, FLOAT16 or BFLOAT16");
}

void check_at_least(const char* name, int64_t value, int64_t smallest) {
  if (value < smallest) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it may be " +
                                std::to_string(smallest) + " or more");
  }
}

void check_finite(const char* name, float value) {
  if (!std::isfinite(value)) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it may be any finite number");
  }
}

void check_eps(float eps) {
  if (!std::isfinite(eps) || eps < 0.0f) {
    throw std::invalid_argument("eps is " + std::to_string(eps) + "; it may be 0 or more");
  }
}

// The number of elements of a tensor whose sizes, 0 or more, are these.
int64_t elements_of(std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) {
    if (!__builtin_mul_overflow(elements, size, &elements)) continue;
    std::string shape;
    for (const int64_t one : sizes) shape += (shape.empty() ? "" : " x ") + std::to_string(one);
    throw std::invalid_argument("a tensor of " + shape + " elements is too large");
  }
  return elements;
}

// What Python hands over for a tensor: the address of its first element and the number of its bytes; or None.
using Memory = std::optional<std::pair<std::uintptr_t, int64_t>>;

// Where the kernels write, and what they pack, lies at a multiple of this.
constexpr size_t kAligned = 64;

enum class Length { kExact, kOrMore };

// The address of `elements` elements. Throws std::invalid_argument if the memory is not theirs.
template <typename T>
T* pointer(const std::string& name, const Memory& memory, int64_t elements, size_t alignment = alignof(T),
           Length length = Length::kExact) {
  const int64_t bytes = elements_of({elements, static_cast<int64_t>(sizeof(T))});
  const char* const more = length == Length::kOrMore ? " or more" : "";
  if (!memory || (length == Length::kExact ? memory->second != bytes : memory->second < bytes)) {
    const std::string is = memory ? " has " + std::to_string(memory->second) + " bytes" : " is None";
    throw std::invalid_argument(name + is + "; it must have " + std::to_string(bytes) + (memory ? more : " bytes"));
  }
  if (bytes == 0) return nullptr;
  if (memory->first == 0) throw std::invalid_argument(name + " is a null address");
  if (memory->first % alignment != 0) {
    throw std::invalid_argument(name + " is at an address that is no multiple of " + std::to_string(alignment));
  }
  return pointer<T>(memory->first);
}

// The same where None means that there is no such tensor.
template <typename T>
T* pointer_or_null(const std::string& name, const Memory& memory, int64_t elements) {
  return memory ? pointer<T>(name, memory, elements) : nullptr;
}

// The number of elements.
int64_t check_shape(int64_t rows, int64_t cols) {
  check_at_least("rows", rows, 0);
  check_at_least("cols", cols, 0);
  if (cols > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("cols is " + std::to_string(cols) + "; it may be 2147483647 or less");
  }
  return elements_of({rows, cols});
}

// Whether offsets [sequences + 1] ascend from 0 to at most rows, in steps of at most max_seqlen.
bool ascends(const int32_t* offsets, int64_t rows, int64_t sequences, int64_t max_seqlen) {
  bool fits = offsets[0] == 0 && offsets[sequences] <= rows;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = int64_t{offsets[i + 1]} - offsets[i];
    fits = fits && 0 <= length && length <= max_seqlen;
  }
  return fits;
}

// The seed lies in the memory of the device that computes.
// Of keep_all draws, threshold keep an element.
Dropout make_dropout(const Memory& seed, int64_t threshold, float scale, uint32_t keep_all = kKeepAll) {
  if (threshold < 0 || threshold > keep_all) {
    throw std::invalid_argument("threshold is " + std::to_string(threshold) + "; it may be 0 to " +
                                std::to_string(keep_all));
  }
  check_finite("scale", scale);
  const bool drops = threshold != keep_all;
  return {drops ? pointer<const int64_t>("seed", seed, 1) : nullptr, static_cast<uint32_t>(threshold), scale};
}

template <typename Launch>
void run_forward(const Memory& x, const Memory& bias, const Memory& residual, const Memory& out, int64_t rows,
                 int64_t cols, int dtype, const Memory& seed, int64_t threshold, float scale, Launch&& launch) {
  const int64_t elements = check_shape(rows, cols);
  const auto dropout = make_dropout(seed, threshold, scale);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const bias_dropout_residual::Forward<T> args{pointer<const T>("x", x, elements),
                                                 pointer_or_null<const T>("bias", bias, cols),
                                                 pointer<const T>("residual", residual, elements),
                                                 pointer<T>("out", out, elements),
                                                 rows,
                                                 cols,
                                                 dropout};
    if (elements == 0) return;
    const py::gil_scoped_release release;
    launch(args);
  });
}

template <typename Launch>
void run_backward(const Memory& dy, const Memory& dx, const Memory& dbias, const Memory& scratch, int64_t rows,
                  int64_t cols, int dtype, const Memory& seed, int64_t threshold, float scale, Launch&& launch) {
  namespace bdr = bias_dropout_residual;
  const int64_t elements = check_shape(rows, cols);
  const auto dropout = make_dropout(seed, threshold, scale);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    const bdr::Backward<T> args{pointer<const T>("dy", dy, elements),
                                pointer_or_null<T>("dx", dx, elements),
                                pointer_or_null<T>("dbias", dbias, cols),
                                dbias ? pointer<float>("scratch", scratch, bdr::partials(rows) * cols) : nullptr,
                                rows,
                                cols,
                                dropout};
    if (cols == 0) return;
    const py::gil_scoped_release release;
    launch(args);
  });
}

// Binds the forward and the backward of bias_dropout_residual_layer_norm for one build: `runner` is the number of
// threads or the stream, and forward(args, runner) and backward(args, runner) run them.
template <typename Runner, typename Forward, typename Backward>
void bind_bias_dropout_residual_layer_norm(py::module_& m, const std::string& build, const char* runner_name,
                                           Forward forward, Backward backward) {
  using py::arg;
  namespace fused = bias_dropout_residual_layer_norm;
  const auto check = [](int64_t rows, int64_t cols, int dtype, int parameter_dtype) {
    if (parameter_dtype != dtype && parameter_dtype != static_cast<int>(DType::kFloat32)) {
      throw std::invalid_argument("parameter_dtype is " + std::to_string(parameter_dtype) +
                                  "; it may be dtype or FLOAT32");
    }
    return check_shape(rows, cols);
  };
  // A parameter [cols] of the LayerNorm, or its gradient, float where it is wide and otherwise of the type of `element`.
  const auto parameter = [](const char* name, const Memory& memory, int64_t cols, bool wide, auto element) -> void* {
    if (wide) return pointer<float>(name, memory, cols);
    return pointer<decltype(element)>(name, memory, cols);
  };

  m.def(("bias_dropout_residual_layer_norm_forward_" + build).c_str(),
        [=](const Memory& x, const Memory& bias, const Memory& residual, const Memory& weight, const Memory& ln_bias,
            int parameter_dtype, float eps, const Memory& out, const Memory& hidden, const Memory& mean,
            const Memory& rstd, int64_t rows, int64_t cols, int dtype, const Memory& seed, int64_t threshold,
            float scale, Runner runner) {
          const int64_t elements = check(rows, cols, dtype, parameter_dtype);
          check_eps(eps);
          const auto dropout = make_dropout(seed, threshold, scale);
          dispatch(dtype, [&](auto element) {
            using T = decltype(element);
            const bool wide = parameter_dtype == static_cast<int>(DType::kFloat32);
            const fused::Forward<T> args{pointer<const T>("x", x, elements),
                                         pointer_or_null<const T>("bias", bias, cols),
                                         pointer<const T>("residual", residual, elements),
                                         parameter("weight", weight, cols, wide, element),
                                         parameter("ln_bias", ln_bias, cols, wide, element),
                                         wide,
                                         eps,
                                         pointer<T>("out", out, elements),
                                         pointer_or_null<T>("hidden", hidden, elements),
                                         pointer_or_null<float>("mean", mean, rows),
                                         pointer_or_null<float>("rstd", rstd, rows),
                                         rows,
                                         cols,
                                         dropout};
            if (elements == 0) return;
            const py::gil_scoped_release release;
            forward(args, runner);
          });
        },
        arg("x"), arg("bias"), arg("residual"), arg("weight"), arg("ln_bias"), arg("parameter_dtype"), arg("eps"),
        arg("out"), arg("hidden"), arg("mean"), arg("rstd"), arg("rows"), arg("cols"), arg("dtype"), arg("seed"),
        arg("threshold"), arg("scale"), arg(runner_name),
        "hidden = residual + scale * mask * (x + bias) and out = LayerNorm(hidden), with its mean and rstd; a "
        "hidden, mean or rstd that is None is not stored.");

  m.def(("bias_dropout_residual_layer_norm_backward_" + build).c_str(),
        [=](const Memory& dy, const Memory& dy2, const Memory& hidden, const Memory& weight, int parameter_dtype,
            const Memory& mean, const Memory& rstd, const Memory& dresidual, const Memory& dx, const Memory& dbias,
            const Memory& dweight, const Memory& dln_bias, const Memory& scratch, int64_t rows, int64_t cols, int dtype,
            const Memory& seed, int64_t threshold, float scale, Runner runner) {
          const int64_t elements = check(rows, cols, dtype, parameter_dtype);
          const auto dropout = make_dropout(seed, threshold, scale);
          dispatch(dtype, [&](auto element) {
            using T = decltype(element);
            const bool wide = parameter_dtype == static_cast<int>(DType::kFloat32);
            const auto gradient = [&](const char* name, const Memory& memory) -> void* {
              return memory ? parameter(name, memory, cols, wide, element) : nullptr;
            };
            const bool sums = dbias || dweight || dln_bias;
            const int64_t floats = elements_of({fused::partials(rows), fused::kSums, cols});
            const fused::Backward<T> args{pointer<const T>("dy", dy, elements),
                                          pointer_or_null<const T>("dy2", dy2, elements),
                                          pointer<const T>("hidden", hidden, elements),
                                          parameter("weight", weight, cols, wide, element),
                                          wide,
                                          pointer<const float>("mean", mean, rows),
                                          pointer<const float>("rstd", rstd, rows),
                                          pointer<T>("dresidual", dresidual, elements),
                                          pointer_or_null<T>("dx", dx, elements),
                                          pointer_or_null<T>("dbias", dbias, cols),
                                          gradient("dweight", dweight),
                                          gradient("dln_bias", dln_bias),
                                          sums ? pointer<float>("scratch", scratch, floats) : nullptr,
                                          rows,
                                          cols,
                                          dropout};
            if (cols == 0) return;
            const py::gil_scoped_release release;
            backward(args, runner);
          });
        },
        arg("dy"), arg("dy2"), arg("hidden"), arg("weight"), arg("parameter_dtype"), arg("mean"), arg("rstd"), arg("dresidual"),
        arg("dx"), arg("dbias"), arg("dweight"), arg("dln_bias"), arg("scratch"), arg("rows"), arg("cols"),
        arg("dtype"), arg("seed"), arg("threshold"), arg("scale"), arg(runner_name),
        "The gradients from dy (and dy2, if not None) and what the forward stored; no dx, dbias, dweight or dln_bias that is None.");
}

py::dict build_info() {
  const Build build = this_build();
  py::dict info;
  info["version"] = build.version;
  info["compiler"] = build.compiler;
  info["cuda"] = build.cuda_absent == nullptr;
  info["cuda_version"] = build.cuda_version;  // a null pointer is None
  info["cuda_architectures"] = build.cuda_architectures;
  info["cuda_absent"] = build.cuda_absent;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(FASTBERT_HAVE_CLONES)
  info["cpu_clones"] = true;
#else
  info["cpu_clones"] = false;
#endif
  return info;
}

py::dict processor_words() {
  const Processor processor = this_processor();
  py::dict words;
  words["leaf1_ecx"] = processor.leaf1_ecx;
  words["leaf7_ebx"] = processor.leaf7_ebx;
  words["leaf7_edx"] = processor.leaf7_edx;
  words["leaf7_1_eax"] = processor.leaf7_1_eax;
  words["extended1_ecx"] = processor.extended1_ecx;
  words["xcr0"] = processor.xcr0;
  return words;
}

py::dict instructions_of(uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_edx, uint32_t leaf7_1_eax,
                         uint32_t extended1_ecx, uint32_t xcr0) {
  const Processor processor{leaf1_ecx, leaf7_ebx, leaf7_edx, leaf7_1_eax, extended1_ecx, xcr0};
  py::dict instructions;
  instructions["AVX2"] = has_v3(processor);
  instructions["AVX512"] = has_v4(processor);
  instructions["AMX"] = has_amx(processor);
  return instructions;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  philox4x32_7(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return counter;
}

py::bytes philox_draws(int64_t seed, int64_t start, int64_t count) {
  check_at_least("start", start, 0);
  check_at_least("count", count, 0);
  const int64_t skip = start % kDrawsPerCall;
  std::vector<uint16_t> draws((skip + count + kDrawsPerRun - 1) / kDrawsPerRun * kDrawsPerRun);
  hidden_draws(static_cast<uint64_t>(seed), start / kDrawsPerCall, skip + count, draws.data());
  return {reinterpret_cast<const char*>(draws.data() + skip), static_cast<size_t>(count) * sizeof(uint16_t)};
}

// What the host kernels of attention and linear layers are made of: bfloat16 on AMX, float32 on the others.
constexpr int kAmx = 5;

// Calls function(T{}) with the type that the kernels for these instructions compute in.
template <typename Function>
auto with_instructions(int instructions, Function&& function) {
  if (instructions == kAmx) {
    if (const char* reason = amx_missing()) throw std::runtime_error(reason);
    return function(uint16_t{});
  }
  if (instructions != static_cast<int>(Simd::kV3) && instructions != static_cast<int>(Simd::kV4)) {
    throw std::invalid_argument("instructions is " + std::to_string(instructions) + "; it may be AVX2, AVX512 or AMX");
  }
  if (instructions > simd_level()) throw std::runtime_error("this build or this processor lacks these instructions");
  return function(float{});
}

void check_multiple(const char* name, int64_t size) {
  if (size < 1 || size % linear::kMultiple != 0) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(size) + "; it may be a positive multiple of " +
                                std::to_string(linear::kMultiple));
  }
}

linear::Post post_of(int post) {
  if (post < 0 || post > static_cast<int>(linear::Post::kAdd)) {
    throw std::invalid_argument("post is " + std::to_string(post) + "; it may be one of POST_*");
  }
  return static_cast<linear::Post>(post);
}

linear::Post gelu_of(int gelu) {
  const auto post = static_cast<linear::Post>(gelu);
  if (post != linear::Post::kGeluErf && post != linear::Post::kGeluTanh) {
    throw std::invalid_argument("gelu is " + std::to_string(gelu) + "; it may be POST_GELU_ERF or POST_GELU_TANH");
  }
  return post;
}

void linear_pack(const Memory& weight, const Memory& packed, int64_t features, int64_t depth, int instructions) {
  check_multiple("features", features);
  check_multiple("depth", depth);
  const int64_t elements = elements_of({features, depth});
  with_instructions(instructions, [&](auto element) {
    using T = decltype(element);
    const auto* from = pointer<const T>("weight", weight, elements);
    auto* to = pointer<T>("packed", packed, elements, kAligned);
    const py::gil_scoped_release release;
    if constexpr (std::is_same_v<T, float>) {
      linear::simd_pack(from, to, features, depth, static_cast<Simd>(instructions));
    } else {
      linear::amx_pack(from, to, features, depth);
    }
  });
}

void linear_forward(const Memory& x, const Memory& packed, const Memory& bias, const Memory& other, const Memory& y,
                    int64_t rows, int64_t depth, int64_t features, int post, int instructions, int num_threads) {
  check_at_least("rows", rows, 0);
  check_multiple("depth", depth);
  check_multiple("features", features);
  check_at_least("num_threads", num_threads, 1);
  const auto f = post_of(post);
  const bool adds = f == linear::Post::kAdd;
  with_instructions(instructions, [&](auto element) {
    using T = decltype(element);
    const linear::Linear<T> args{pointer<const T>("x", x, elements_of({rows, depth})),
                                 pointer<const T>("packed", packed, elements_of({features, depth}), kAligned),
                                 pointer_or_null<const T>("bias", bias, features),
                                 adds ? pointer<const T>("other", other, elements_of({rows, features})) : nullptr,
                                 pointer<T>("y", y, elements_of({rows, features}), kAligned),
                                 rows,
                                 depth,
                                 features,
                                 f};
    if (rows == 0) return;
    const py::gil_scoped_release release;
    if constexpr (std::is_same_v<T, float>) {
      linear::simd_forward(args, static_cast<Simd>(instructions), num_threads);
    } else {
      linear::amx_forward(args, num_threads);
    }
  });
}

void check_address(const char* name, int64_t address, int64_t multiple) {
  if (address > 0 && address % multiple == 0) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(address) +
                              "; it must be an address that is a multiple of " + std::to_string(multiple));
}

linear::Rows* matrices_of(const Memory& matrices, int64_t count) {
  check_at_least("count", count, 0);
  auto* rows = pointer<linear::Rows>("matrices", matrices, count);
  for (int64_t i = 0; i < count; ++i) {
    const linear::Rows& matrix = rows[i];
    check_at_least("rows", matrix.rows, 0);
    if (matrix.rows == 0) continue;
    const int64_t bytes = matrix.element_bytes;
    if (bytes != 2 && bytes != 4) {
      throw std::invalid_argument("element_bytes is " + std::to_string(bytes) + "; it may be 2 or 4");
    }
    check_at_least("row_bytes", matrix.row_bytes, bytes);
    if (matrix.row_bytes % bytes != 0) {
      throw std::invalid_argument("row_bytes is " + std::to_string(matrix.row_bytes) + "; it must be a multiple of " +
                                  std::to_string(bytes));
    }
    if (matrix.rows > (int64_t{1} << 33) / matrix.row_bytes) {
      throw std::invalid_argument("rows is " + std::to_string(matrix.rows) + "; a matrix has at most 2^33 bytes");
    }
    check_address("address", matrix.address, bytes);
    check_address("samples", matrix.samples, alignof(linear::Sample));
    check_address("checksums", matrix.checksums, alignof(uint64_t));
  }
  return rows;
}

// The offsets [sequences + 1], or null where they don't fit.
const int32_t* offsets_of(const Memory& cu_seqlens, int64_t rows, int64_t sequences, int64_t max_seqlen) {
  check_at_least("rows", rows, 0);
  check_at_least("sequences", sequences, 0);
  const auto* offsets = pointer<const int32_t>("cu_seqlens", cu_seqlens, sequences + 1);
  return ascends(offsets, rows, sequences, max_seqlen) ? offsets : nullptr;
}

bool attention_forward(const Memory& qkv, const Memory& cu_seqlens, const Memory& out, const Memory& lse, int64_t rows,
                       int64_t sequences, int64_t heads, int64_t size, int64_t max_seqlen, float scale, int instructions,
                       int num_threads) {
  check_at_least("heads", heads, 0);
  check_at_least("size", size, 1);
  check_finite("scale", scale);
  check_at_least("num_threads", num_threads, 1);
  return with_instructions(instructions, [&](auto element) {
    using T = decltype(element);
    const auto* offsets = offsets_of(cu_seqlens, rows, sequences, max_seqlen);
    const attention::Packed<T> args{pointer<const T>("qkv", qkv, elements_of({rows, 3, heads, size})),
                                    offsets,
                                    pointer<T>("out", out, elements_of({rows, heads, size})),
                                    pointer<float>("lse", lse, elements_of({heads, rows})),
                                    rows,
                                    sequences,
                                    heads,
                                    size,
                                    scale};
    if (offsets == nullptr) return false;
    if (rows == 0 || heads == 0) return true;
    const py::gil_scoped_release release;
    if constexpr (std::is_same_v<T, float>) {
      attention::simd_forward(args, static_cast<Simd>(instructions), num_threads);
    } else {
      attention::amx_forward(args, num_threads);
    }
    return true;
  });
}

bool encoder_layer_forward(const Memory& x, const Memory& y, const Memory& cu_seqlens,
                           const std::array<Memory, 8>& weights, const std::array<Memory, 4>& norms, bool float_norms,
                           const std::array<float, 2>& eps, int gelu, const Memory& scratch, const Memory& lse,
                           int64_t rows, int64_t sequences, int64_t max_seqlen, int64_t heads, int64_t head_size,
                           int64_t hidden, int64_t features, float scale, int instructions, int num_threads) {
  check_multiple("hidden", hidden);
  check_multiple("features", features);
  check_at_least("heads", heads, 1);
  check_at_least("head_size", head_size, 1);
  if (elements_of({heads, head_size}) != hidden) {
    throw std::invalid_argument(std::to_string(heads) + " heads of size " + std::to_string(head_size) +
                                " are not the " + std::to_string(hidden) + " of hidden");
  }
  check_finite("scale", scale);
  for (const float one : eps) check_eps(one);
  check_at_least("num_threads", num_threads, 1);
  const auto f = gelu_of(gelu);
  return with_instructions(instructions, [&](auto element) {
    using T = decltype(element);
    const auto* offsets = offsets_of(cu_seqlens, rows, sequences, max_seqlen);
    const auto name = [](const char* list, size_t i) { return list + ("[" + std::to_string(i) + "]"); };
    const auto linear_of = [&](size_t i, int64_t outputs, int64_t inputs) {
      return encoder_layer::Weights<T>{
          pointer<const T>(name("weights", 2 * i), weights[2 * i], elements_of({outputs, inputs}), kAligned),
          pointer_or_null<const T>(name("weights", 2 * i + 1), weights[2 * i + 1], outputs)};
    };
    const auto norm_of = [&](size_t i) {
      const auto parameter = [&](size_t j) -> const void* {
        if (float_norms) return pointer<const float>(name("norms", j), norms[j], hidden);
        return pointer<const T>(name("norms", j), norms[j], hidden);
      };
      return encoder_layer::Norm{parameter(2 * i), parameter(2 * i + 1), float_norms, eps[i]};
    };
    const int64_t states = elements_of({rows, hidden});
    const int64_t columns = encoder_layer::scratch_columns(hidden, features);
    const encoder_layer::Layer<T> layer{
        pointer<const T>("x", x, states),
        pointer<T>("y", y, states, kAligned),
        offsets,
        linear_of(0, elements_of({3, hidden}), hidden),
        linear_of(1, hidden, hidden),
        linear_of(2, features, hidden),
        linear_of(3, hidden, features),
        norm_of(0),
        norm_of(1),
        f,
        pointer<T>("scratch", scratch, elements_of({rows, columns}), kAligned, Length::kOrMore),
        pointer<float>("lse", lse, elements_of({heads, rows}), alignof(float), Length::kOrMore),
        rows,
        sequences,
        heads,
        hidden,
        features,
        scale};
    if (offsets == nullptr) return false;
    if (rows == 0) return true;
    const py::gil_scoped_release release;
    if constexpr (std::is_same_v<T, float>) {
      encoder_layer::simd_forward(layer, static_cast<Simd>(instructions), num_threads);
    } else {
      encoder_layer::amx_forward(layer, num_threads);
    }
    return true;
  });
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace fastbert;
  using py::arg;
  namespace bdr = bias_dropout_residual;

  m.doc() =
      "Compiled kernels of fastbert. Arguments are the memory of tensors, (address, bytes) or None, sizes, and a stream "
      "handle. The bytes are compared with the sizes.";
  m.attr("FLOAT32") = static_cast<int>(DType::kFloat32);
  m.attr("FLOAT16") = static_cast<int>(DType::kFloat16);
  m.attr("BFLOAT16") = static_cast<int>(DType::kBFloat16);

  m.def("build_info", &build_info,
        "What was built, and with what; cuda_absent says why there are no CUDA kernels.");
  m.def("philox4x32_7", &philox, arg("counter"), arg("key"),
        "Four 32-bit words from a four-word counter and a two-word key.");
  m.def("philox_draws", &philox_draws, arg("seed"), arg("start"), arg("count"),
        "The 16-bit draws of elements start .. start + count - 1 of a hidden state, as native uint16 bytes.");

  m.def("attention_dropout_host",
        [](const Memory& probabilities, int64_t first_sequence, int64_t sequences, int64_t heads, int64_t queries,
           int64_t keys, const Memory& seed, int64_t threshold, float scale, int num_threads) {
          check_at_least("first_sequence", first_sequence, 0);
          check_at_least("sequences", sequences, 0);
          check_at_least("heads", heads, 0);
          check_at_least("queries", queries, 0);
          check_at_least("keys", keys, 0);
          check_at_least("num_threads", num_threads, 1);
          const int64_t elements = elements_of({sequences, heads, queries, keys});
          auto* values = pointer<float>("probabilities", probabilities, elements);
          const auto dropout = make_dropout(seed, threshold, scale, kAttentionDraws);
          if (elements == 0 || dropout.seed == nullptr) return;
          const py::gil_scoped_release release;
          attention::dropout_host({values, first_sequence, sequences, heads, queries, keys,
                                   *dropout.seed, dropout.threshold, dropout.scale},
                                  num_threads);
        },
        arg("probabilities"), arg("first_sequence"), arg("sequences"), arg("heads"), arg("queries"), arg("keys"),
        arg("seed"), arg("threshold"), arg("scale"), arg("num_threads"),
        "probabilities [sequences, heads, queries, keys], float32, *= scale * mask, in place.");

  m.def("processor", &processor_words, "The words of CPUID that tell what this processor can do, and its XCR0.");
  m.def("instructions_of", &instructions_of, py::kw_only(), arg("leaf1_ecx"), arg("leaf7_ebx"), arg("leaf7_edx"),
        arg("leaf7_1_eax"), arg("extended1_ecx"), arg("xcr0"),
        "Whether a processor that tells this can run the kernels for AVX2, AVX512 and AMX, by their names.");
  m.def("amx_missing", &amx_missing, "Why the kernels for AMX can't run, or None.");
  m.attr("AVX2") = static_cast<int>(Simd::kV3);
  m.attr("AVX512") = static_cast<int>(Simd::kV4);
  m.attr("AMX") = kAmx;
  m.def("simd_level", &simd_level, "AVX512 or AVX2, whichever this build and this processor have, or 0.");
  m.def("attention_forward", &attention_forward, arg("qkv"), arg("cu_seqlens"), arg("out"), arg("lse"), arg("rows"),
        arg("sequences"), arg("heads"), arg("size"), arg("max_seqlen"), arg("scale"), arg("instructions"),
        arg("num_threads"),
        "out [rows, heads, size] and lse [heads, rows] of qkv [rows, 3, heads, size], bfloat16 with AMX, otherwise "
        "float32; False and nothing computed when cu_seqlens [sequences + 1] doesn't ascend from 0 to at most rows in "
        "steps of at most max_seqlen.");

  m.attr("LINEAR_MULTIPLE") = linear::kMultiple;
  m.attr("POST_NONE") = static_cast<int>(linear::Post::kNone);
  m.attr("POST_GELU_ERF") = static_cast<int>(linear::Post::kGeluErf);
  m.attr("POST_GELU_TANH") = static_cast<int>(linear::Post::kGeluTanh);
  m.attr("POST_ADD") = static_cast<int>(linear::Post::kAdd);
  m.def("linear_pack", &linear_pack, arg("weight"), arg("packed"), arg("features"), arg("depth"), arg("instructions"),
        "A weight [features, depth], bfloat16 with AMX, otherwise float32, in the order that linear_forward reads.");
  m.def("linear_forward", &linear_forward, arg("x"), arg("packed"), arg("bias"), arg("other"), arg("y"), arg("rows"),
        arg("depth"), arg("features"), arg("post"), arg("instructions"), arg("num_threads"),
        "y = post(x [rows, depth] times the packed weight + bias), in the dtype of linear_pack.");

  m.attr("CHECKSUM_TURNS") = linear::kTurns;
  m.def("checksums_remember",
        [](const Memory& matrices, int64_t count) {
          auto* rows = matrices_of(matrices, count);
          const py::gil_scoped_release release;
          for (int64_t i = 0; i < count; ++i) linear::remember(rows[i]);
        },
        arg("matrices"), arg("count"),
        "matrices is int64 [count, 7]: address, rows, bytes of a row and of an element, the address of two uint32 for each "
        "row and column, the number of these that is filled, and the address of one uint64 for each row, filled too.");
  m.def("checksums_unchanged",
        [](const Memory& matrices, int64_t count, int64_t turn, int num_threads) {
          check_at_least("turn", turn, 0);
          check_at_least("num_threads", num_threads, 1);
          const auto* rows = matrices_of(matrices, count);
          const py::gil_scoped_release release;
          return linear::unchanged(rows, count, turn, num_threads);
        },
        arg("matrices"), arg("count"), arg("turn"), arg("num_threads"),
        "Whether matrices are what they were when they were remembered: a row or column of which all numbers have changed "
        "is seen at once, and an element within CHECKSUM_TURNS turns.");

  m.def("encoder_layer_scratch",
        [](int64_t hidden, int64_t features) {
          check_multiple("hidden", hidden);
          check_multiple("features", features);
          return encoder_layer::scratch_columns(hidden, features);
        },
        arg("hidden"), arg("features"), "The number of elements of scratch that a row needs.");
  m.def("encoder_layer_forward", &encoder_layer_forward, py::kw_only(), arg("x"), arg("y"), arg("cu_seqlens"), arg("weights"),
        arg("norms"), arg("float_norms"), arg("eps"), arg("gelu"), arg("scratch"), arg("lse"), arg("rows"),
        arg("sequences"), arg("max_seqlen"), arg("heads"), arg("head_size"), arg("hidden"), arg("features"),
        arg("scale"), arg("instructions"), arg("num_threads"),
        "y [rows, hidden] of x through an encoder layer without dropout, in the dtype of linear_pack; weights are the "
        "packed weight and the bias of query, key and value, of attention's output, and of the two layers after it; norms "
        "weight and bias. False and nothing computed when cu_seqlens doesn't ascend as attention_forward wants it.");

  m.def("bias_dropout_residual_backward_scratch",
        [](int64_t rows, int64_t cols) {
          check_shape(rows, cols);
          return bdr::partials(rows) * cols;
        },
        arg("rows"), arg("cols"), "The number of floats of scratch that the backward needs for dbias.");

  m.def("bias_dropout_residual_forward_host",
        [](const Memory& x, const Memory& bias, const Memory& residual, const Memory& out, int64_t rows, int64_t cols,
           int dtype, const Memory& seed, int64_t threshold, float scale, int num_threads) {
          check_at_least("num_threads", num_threads, 1);
          run_forward(x, bias, residual, out, rows, cols, dtype, seed, threshold, scale,
                      [=](const auto& args) { bdr::forward_host(args, num_threads); });
        },
        arg("x"), arg("bias"), arg("residual"), arg("out"), arg("rows"), arg("cols"), arg("dtype"), arg("seed"),
        arg("threshold"), arg("scale"), arg("num_threads"), "out = residual + scale * mask * (x + bias).");
  m.def("bias_dropout_residual_backward_host",
        [](const Memory& dy, const Memory& dx, const Memory& dbias, const Memory& scratch, int64_t rows, int64_t cols,
           int dtype, const Memory& seed, int64_t threshold, float scale, int num_threads) {
          check_at_least("num_threads", num_threads, 1);
          run_backward(dy, dx, dbias, scratch, rows, cols, dtype, seed, threshold, scale,
                       [=](const auto& args) { bdr::backward_host(args, num_threads); });
        },
        arg("dy"), arg("dx"), arg("dbias"), arg("scratch"), arg("rows"), arg("cols"), arg("dtype"), arg("seed"),
        arg("threshold"), arg("scale"), arg("num_threads"),
        "dx = scale * mask * dy and dbias = its column sums; no dx or dbias that is None.");

  m.def("bias_dropout_residual_layer_norm_backward_scratch",
        [](int64_t rows, int64_t cols) {
          check_shape(rows, cols);
          return bias_dropout_residual_layer_norm::partials(rows) * bias_dropout_residual_layer_norm::kSums * cols;
        },
        arg("rows"), arg("cols"), "The number of floats of scratch that the backward needs for its column sums.");
  bind_bias_dropout_residual_layer_norm<int>(
      m, "host", "num_threads",
      [](const auto& args, int num_threads) {
        check_at_least("num_threads", num_threads, 1);
        bias_dropout_residual_layer_norm::forward_host(args, num_threads);
      },
      [](const auto& args, int num_threads) {
        check_at_least("num_threads", num_threads, 1);
        bias_dropout_residual_layer_norm::backward_host(args, num_threads);
      });

#if defined(FASTBERT_HAVE_CUDA)
  m.def("device_error", &bdr::device_error, "Why the current device can't run the CUDA kernels, or None.");
  m.def("bias_dropout_residual_forward_device",
        [](const Memory& x, const Memory& bias, const Memory& residual, const Memory& out, int64_t rows, int64_t cols,
           int dtype, const Memory& seed, int64_t threshold, float scale, std::uintptr_t stream) {
          run_forward(x, bias, residual, out, rows, cols, dtype, seed, threshold, scale,
                      [=](const auto& args) { bdr::forward_device(args, pointer<void>(stream)); });
        },
        arg("x"), arg("bias"), arg("residual"), arg("out"), arg("rows"), arg("cols"), arg("dtype"), arg("seed"),
        arg("threshold"), arg("scale"), arg("stream"),
        "out = residual + scale * mask * (x + bias) on the current device; seed is an address in its memory.");
  m.def("bias_dropout_residual_backward_device",
        [](const Memory& dy, const Memory& dx, const Memory& dbias, const Memory& scratch, int64_t rows, int64_t cols,
           int dtype, const Memory& seed, int64_t threshold, float scale, std::uintptr_t stream) {
          run_backward(dy, dx, dbias, scratch, rows, cols, dtype, seed, threshold, scale,
                       [=](const auto& args) { bdr::backward_device(args, pointer<void>(stream)); });
        },
        arg("dy"), arg("dx"), arg("dbias"), arg("scratch"), arg("rows"), arg("cols"), arg("dtype"), arg("seed"),
        arg("threshold"), arg("scale"), arg("stream"),
        "dx = scale * mask * dy and dbias = its column sums on the current device; no dx or dbias that is None.");
  bind_bias_dropout_residual_layer_norm<std::uintptr_t>(
      m, "device", "stream",
      [](const auto& args, std::uintptr_t stream) {
        bias_dropout_residual_layer_norm::forward_device(args, pointer<void>(stream));
      },
      [](const auto& args, std::uintptr_t stream) {
        bias_dropout_residual_layer_norm::backward_device(args, pointer<void>(stream));
      });
#endif
}
