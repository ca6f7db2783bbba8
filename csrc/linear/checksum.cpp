#include "checksum.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "../common/macros.h"

namespace fastbert::linear {
namespace {

// What a word of memory may be read as, whatever its elements are.
using Word = uint32_t __attribute__((may_alias));
using Half = uint16_t __attribute__((may_alias));

// Samples of several matrices make up a thread's share, so that threads have alike amounts of work.
constexpr int64_t kSamplesOfTask = 256;

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

template <typename T>
const T* elements_of(const Rows& matrix) {
  return reinterpret_cast<const T*>(matrix.address);  // NOLINT: an address
}

template <typename T>
int64_t row_size(const Rows& matrix) {
  return matrix.row_bytes / static_cast<int64_t>(sizeof(T));
}

uint64_t checksum(const Rows& matrix, int64_t row) {
  const int64_t words = row_size<Word>(matrix), halves = row_size<Half>(matrix);
  return has_words(matrix) ? checksum_of_words(elements_of<Word>(matrix) + row * words, words)
                           : checksum_of_halves(elements_of<Half>(matrix) + row * halves, halves);
}

// How many turns read a matrix. A turn takes rows that lie this far apart, since alike ones are neighbours: a pruned
// head's are all zero.
int64_t turns_of(const Rows& matrix) {
  const int64_t rows_of_turn = (matrix.rows + kTurns - 1) / kTurns;
  return (matrix.rows + rows_of_turn - 1) / rows_of_turn;
}

// The bits of the numbers in a T, the second of which is 0 where there is but one. Without their signs: -0.0 is zero.
template <typename T>
struct Numbers {
  T first, second;
  explicit Numbers(const Rows& matrix)
      : first(static_cast<T>(matrix.element_bytes == 4 ? 0x7fffffff : 0x7fff)),
        second(static_cast<T>(sizeof(T) == 4 && matrix.element_bytes == 2 ? 0x7fff0000 : 0)) {}
  T both() const { return first | second; }
  // The bits of those that are zero.
  T zeros(T value) const {
    return static_cast<T>(((value & first) == 0 ? first : 0) | ((value & second) == 0 ? second : 0));
  }
};

// Where a row has a number that is not zero, if it has one: the last of an even row and the first of an odd one, two
// neighbours in memory, for one look-up of a page, unless they are zero.
template <typename T>
int64_t place_in_row(const Rows& matrix, int64_t row) {
  const int64_t size = row_size<T>(matrix);
  const T* elements = elements_of<T>(matrix) + row * size;
  const int64_t first = row % 2 == 0 ? size - 1 : 0, step = row % 2 == 0 ? -1 : 1;
  const T numbers = Numbers<T>(matrix).both();
  for (int64_t place = first; 0 <= place && place < size; place += step) {
    if (elements[place] & numbers) return place;
  }
  return first;
}

// The bits of the numbers, for each T of a row, that are zero in all rows of some turn.
template <typename T>
std::vector<T> columns_unread(const Rows& matrix) {
  const int64_t size = row_size<T>(matrix), turns = turns_of(matrix);
  const Numbers<T> numbers(matrix);
  std::vector<T> unread(size), read(size);
  for (int64_t turn = 0; turn < turns; ++turn) {
    std::fill(read.begin(), read.end(), T{0});
    for (int64_t row = turn; row < matrix.rows; row += turns) {
      const T* elements = elements_of<T>(matrix) + row * size;
      for (int64_t i = 0; i < size; ++i) read[i] |= elements[i];
    }
    for (int64_t i = 0; i < size; ++i) unread[i] |= numbers.zeros(read[i]);
  }
  return unread;
}

template <typename T>
void sample(Rows& matrix) {
  const int64_t size = row_size<T>(matrix);
  const T* elements = elements_of<T>(matrix);
  auto* samples = reinterpret_cast<Sample*>(matrix.samples);  // NOLINT: an address
  int64_t count = 0;
  const auto add = [&](int64_t place) { samples[count++] = {static_cast<uint32_t>(place), elements[place]}; };
  for (int64_t row = 0; row < matrix.rows; ++row) add(row * size + place_in_row<T>(matrix, row));
  // Each number is sought in one row after the other until one has it; a dense matrix has none to be sought.
  const Numbers<T> numbers(matrix);
  std::vector<T> unread = columns_unread<T>(matrix);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const T* values = elements + row * size;
    T found = 0;
    for (int64_t i = 0; i < size; ++i) found |= values[i] & unread[i];
    if (found == 0) continue;
    for (int64_t i = 0; i < size; ++i) {
      for (const T number : {numbers.first, numbers.second}) {
        if ((values[i] & unread[i] & number) == 0) continue;
        add(row * size + i);
        unread[i] &= static_cast<T>(~number);
      }
    }
  }
  matrix.sample_count = count;
}

template <typename T>
bool same_samples(const Rows& matrix, int64_t begin, int64_t end) {
  const T* elements = elements_of<T>(matrix);
  const auto* samples = reinterpret_cast<const Sample*>(matrix.samples);  // NOLINT: an address
  uint32_t difference = 0;
  for (int64_t i = begin; i < end; ++i) difference |= elements[samples[i].place] ^ samples[i].value;
  return difference == 0;
}

// Samples begin .. end - 1, and the rows of these numbers whose turn it is.
bool same(const Rows& matrix, int64_t begin, int64_t end, int64_t turn) {
  if (!(has_words(matrix) ? same_samples<Word>(matrix, begin, end) : same_samples<Half>(matrix, begin, end))) {
    return false;
  }
  const int64_t turns = turns_of(matrix), first = begin + (turn % turns - begin % turns + turns) % turns;
  const auto* before = reinterpret_cast<const uint64_t*>(matrix.checksums);  // NOLINT: an address
  for (int64_t row = first; row < std::min(end, matrix.rows); row += turns) {
    if (checksum(matrix, row) != before[row]) return false;
  }
  return true;
}

}  // namespace

void remember(Rows& matrix) {
  if (matrix.rows == 0) return;
  if (has_words(matrix)) {
    sample<Word>(matrix);
  } else {
    sample<Half>(matrix);
  }
  auto* checksums = reinterpret_cast<uint64_t*>(matrix.checksums);  // NOLINT: an address
  for (int64_t row = 0; row < matrix.rows; ++row) checksums[row] = checksum(matrix, row);
}

bool unchanged(const Rows* matrices, int64_t count, int64_t turn, int num_threads) {
  const auto tasks_of = [](const Rows& matrix) { return (matrix.sample_count + kSamplesOfTask - 1) / kSamplesOfTask; };
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) tasks += tasks_of(matrices[i]);
  int changed = 0;
#pragma omp parallel for num_threads(num_threads) schedule(static) reduction(| : changed)
  for (int64_t task = 0; task < tasks; ++task) {
    const Rows* matrix = matrices;
    int64_t block = task;
    for (int64_t blocks; block >= (blocks = tasks_of(*matrix)); ++matrix) block -= blocks;
    const int64_t begin = block * kSamplesOfTask;
    changed |= same(*matrix, begin, std::min(begin + kSamplesOfTask, matrix->sample_count), turn) ? 0 : 1;
  }
  return changed == 0;
}

}  // namespace fastbert::linear
