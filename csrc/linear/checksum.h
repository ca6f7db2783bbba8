#pragma once

#include <cstdint>

// Whether a weight still is what it was packed from. Its packed copy is what the products read, and torch doesn't tell
// of every change: writes through .data, or through an array of numpy that shares the memory, leave no trace.
namespace fastbert::linear {

// A matrix in memory, contiguous, whose elements have two bytes or four.
struct Rows {
  int64_t address;
  int64_t rows;
  int64_t row_bytes;  // a multiple of two
  int64_t ends;       // address of uint32_t [rows]: one element of each row as it was
  int64_t checksums;  // address of uint64_t [rows]
};

// A matrix is read once in that many calls of `unchanged`.
constexpr int64_t kTurns = 64;

// Fills ends and checksums.
void remember(const Rows& matrix);

// Compares one element of every row, and every element of the rows whose turn it is. A changed row is seen by the first,
// a changed column by the second, at once; a changed element within kTurns calls with turns one after the other.
bool unchanged(const Rows* matrices, int64_t count, int64_t turn, int num_threads);

}  // namespace fastbert::linear
