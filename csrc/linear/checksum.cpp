#include "checksum.h"

#include <algorithm>
#include <cstddef>

#include "../common/macros.h"

namespace fastbert::linear {
namespace {

// What a word of memory may be read as, whatever its elements are.
using Word = uint32_t __attribute__((may_alias));
using Half = uint16_t __attribute__((may_alias));

// Rows of several matrices make up a task, so that threads have alike amounts of work.
constexpr int64_t kRowsOfTask = 256;

// The sum of the words times odd numbers, modulo 2^64. A word that changes alone changes it by a product of a number
// below 2^32 and an odd one below 2^32, which is no multiple of 2^64.
template <typename T>
FASTBERT_HD uint64_t checksum_of(const T* row, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += uint64_t{row[i]} * (static_cast<uint32_t>(i) * 2246822519u | 1u);
  return sum;
}

FASTBERT_CLONES uint64_t checksum_of_words(const Word* row, int64_t count) { return checksum_of(row, count); }
FASTBERT_CLONES uint64_t checksum_of_halves(const Half* row, int64_t count) { return checksum_of(row, count); }

bool has_words(const Rows& matrix) { return matrix.row_bytes % 4 == 0 && matrix.address % 4 == 0; }

uint64_t checksum(const Rows& matrix, int64_t row) {
  const int64_t address = matrix.address + row * matrix.row_bytes;
  return has_words(matrix)
             ? checksum_of_words(reinterpret_cast<const Word*>(address), matrix.row_bytes / 4)  // NOLINT: an address
             : checksum_of_halves(reinterpret_cast<const Half*>(address), matrix.row_bytes / 2);
}

// The last element of an even row and the first of an odd one: two neighbours in memory, for one look-up of a page.
template <typename T>
uint32_t end_of(const Rows& matrix, int64_t row) {
  const auto* elements = reinterpret_cast<const T*>(matrix.address + row * matrix.row_bytes);
  const int64_t count = matrix.row_bytes / static_cast<int64_t>(sizeof(T));
  return elements[row % 2 == 0 ? count - 1 : 0];
}

template <typename T>
bool same_ends(const Rows& matrix, int64_t begin, int64_t end) {
  const auto* before = reinterpret_cast<const uint32_t*>(matrix.ends);
  uint32_t difference = 0;
  for (int64_t row = begin; row < end; ++row) difference |= end_of<T>(matrix, row) ^ before[row];
  return difference == 0;
}

bool same(const Rows& matrix, int64_t begin, int64_t end, int64_t turn) {
  if (!(has_words(matrix) ? same_ends<Word>(matrix, begin, end) : same_ends<Half>(matrix, begin, end))) return false;
  // Rows at a time, and turns until all have had theirs.
  const int64_t step = (matrix.rows + kTurns - 1) / kTurns;
  const int64_t first = turn % ((matrix.rows + step - 1) / step) * step;
  const auto* before = reinterpret_cast<const uint64_t*>(matrix.checksums);
  for (int64_t row = std::max(begin, first); row < std::min(end, first + step); ++row) {
    if (checksum(matrix, row) != before[row]) return false;
  }
  return true;
}

}  // namespace

void remember(const Rows& matrix) {
  auto* ends = reinterpret_cast<uint32_t*>(matrix.ends);
  auto* checksums = reinterpret_cast<uint64_t*>(matrix.checksums);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    ends[row] = has_words(matrix) ? end_of<Word>(matrix, row) : end_of<Half>(matrix, row);
    checksums[row] = checksum(matrix, row);
  }
}

bool unchanged(const Rows* matrices, int64_t count, int64_t turn, int num_threads) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) tasks += (matrices[i].rows + kRowsOfTask - 1) / kRowsOfTask;
  int changed = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(| : changed)
  for (int64_t task = 0; task < tasks; ++task) {
    const Rows* matrix = matrices;
    int64_t block = task;
    for (int64_t blocks; block >= (blocks = (matrix->rows + kRowsOfTask - 1) / kRowsOfTask); ++matrix) block -= blocks;
    const int64_t begin = block * kRowsOfTask;
    changed |= same(*matrix, begin, std::min(begin + kRowsOfTask, matrix->rows), turn) ? 0 : 1;
  }
  return changed == 0;
}

}  // namespace fastbert::linear
