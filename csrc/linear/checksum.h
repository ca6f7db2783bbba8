#pragma once

#include <cstdint>

// Whether a weight still is what it was packed from. Its packed copy is what the products read, and torch doesn't tell
// of every change: writes through .data, or through an array of numpy that shares the memory, leave no trace.
namespace fastbert::linear {

// One word of a matrix, or one half of a word where its rows have no whole number of words, as it was.
struct Sample {
  uint32_t place;  // counted from the first of the matrix
  uint32_t value;
};

// A matrix of floating-point numbers in memory, contiguous.
struct Rows {
  int64_t address;
  int64_t rows;
  int64_t row_bytes;      // a multiple of element_bytes
  int64_t element_bytes;  // two or four
  int64_t samples;        // address of Sample [rows + columns], of which sample_count are in use
  int64_t sample_count;
  int64_t checksums;      // address of uint64_t [rows]
};

// A matrix is read once in that many calls of `unchanged`.
constexpr int64_t kTurns = 64;

// Fills samples, sample_count and checksums.
void remember(Rows& matrix);

// Compares the samples, and every element of the rows whose turn it is. A row that becomes zero is seen at once, since
// one of its elements that is not zero is a sample; so is a column, of which a sample or a row of every turn has one. A
// changed element is seen within kTurns calls with turns one after the other.
bool unchanged(const Rows* matrices, int64_t count, int64_t turn, int num_threads);

}  // namespace fastbert::linear
