#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

// The tile instructions of AMX as functions (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2).
// The sanitizers see what these read and write; of an instruction they see nothing.
namespace tiles {

struct Tile {
  unsigned char bytes[16][64];
};

inline thread_local Tile registers[8];
inline thread_local bool configured = false;

inline Tile& tile(int index) {
  if (!configured) std::abort();  // as the processor does
  return registers[index];
}

inline void configure(const void* config) {
  unsigned char bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  for (int index = 0; index < 8; ++index) {
    // Palette 1, and all tiles of full size: what the kernels use, and all that is known here.
    if (bytes[0] != 1 || bytes[16 + 2 * index] != 64 || bytes[17 + 2 * index] != 0 || bytes[48 + index] != 16) std::abort();
    std::memset(&registers[index], 0, sizeof registers[index]);
  }
  configured = true;
}

inline void release() { configured = false; }

inline void load(int index, const void* from, int64_t stride) {
  Tile& to = tile(index);
  for (int row = 0; row < 16; ++row) std::memcpy(to.bytes[row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int index, void* to, int64_t stride) {
  const Tile& from = tile(index);
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, from.bytes[row], 64);
}

inline void clear(int index) { std::memset(&tile(index), 0, sizeof(Tile)); }

// Registers only, so nothing is missed here; and it is most of the work.
__attribute__((no_sanitize("address", "undefined", "thread"), optimize("O3"))) inline void multiply(
    int sums_index, int a_index, int b_index) {
  float sums[16][16];
  uint32_t a[16][16], b[16][16];
  std::memcpy(sums, &tile(sums_index), sizeof sums);
  std::memcpy(a, &tile(a_index), sizeof a);
  std::memcpy(b, &tile(b_index), sizeof b);
  const auto number = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int row = 0; row < 16; ++row) {
    for (int pair = 0; pair < 16; ++pair) {
      const float low = number(a[row][pair] << 16), high = number(a[row][pair] & 0xFFFF0000u);
      for (int column = 0; column < 16; ++column) {
        sums[row][column] += low * number(b[pair][column] << 16) + high * number(b[pair][column] & 0xFFFF0000u);
      }
    }
  }
  std::memcpy(&tile(sums_index), sums, sizeof sums);
}

}  // namespace tiles

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig tiles::configure
#define _tile_release tiles::release
#define _tile_loadd tiles::load
#define _tile_stream_loadd tiles::load
#define _tile_stored tiles::store
#define _tile_zero tiles::clear
#define _tile_dpbf16ps tiles::multiply
