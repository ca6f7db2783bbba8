#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

// What GCC's OpenMP pragmas call, as far as the kernels need it, made of the standard library's threads: the thread
// sanitizer knows how these wait for one another. It takes the futexes of GCC's own library for no waiting at all.
// (The functions' contracts: libgomp, gcc/omp-builtins.def and libgomp/libgomp_g.h of GCC 12.)
namespace {

// The threads of one region, and the loop that they share.
struct Team {
  explicit Team(unsigned size) : size(size) {}

  void start_loop(long first, long last, long by, long at_once) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (started) return;
    started = true;
    next.store(first, std::memory_order_relaxed);
    end = last;
    step = by;
    chunk = at_once;
  }

  // Relaxed, so that a race between two threads isn't hidden by the order in which they take their work.
  bool take(long* first, long* last) {
    const long begin = next.fetch_add(chunk * step, std::memory_order_relaxed);
    if (begin >= end) return false;
    *first = begin;
    *last = begin + chunk * step < end ? begin + chunk * step : end;
    return true;
  }

  void end_loop() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned long now = generation;
    if (++waiting == size) {
      waiting = 0;
      started = false;
      ++generation;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return generation != now; });
    }
  }

  const unsigned size;
  std::mutex mutex;
  std::condition_variable changed;
  bool started = false;
  unsigned waiting = 0;
  unsigned long generation = 0;
  std::atomic<long> next{0};
  long end = 0, step = 1, chunk = 1;
};

thread_local Team* own_team = nullptr;
thread_local int own_number = 0;

void run(Team* team, int number, void (*function)(void*), void* data) {
  own_team = team;
  own_number = number;
  function(data);
  own_team = nullptr;
  own_number = 0;
}

}  // namespace

bool in_parallel() { return own_team != nullptr; }

extern "C" {

int omp_get_thread_num() { return own_number; }

int omp_get_num_threads() { return own_team == nullptr ? 1 : static_cast<int>(own_team->size); }

void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned) {
  if (num_threads == 0 || in_parallel()) {
    std::fputs("a region of any number of threads, or one in another: parallel.cpp has no such\n", stderr);
    std::abort();
  }
  Team team(num_threads);
  std::vector<std::thread> others;
  for (unsigned number = 1; number < num_threads; ++number) others.emplace_back(run, &team, number, function, data);
  run(&team, 0, function, data);
  for (auto& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long* from, long* to) {
  own_team->start_loop(first, last, step, chunk);
  return own_team->take(from, to);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return own_team->take(from, to); }

void GOMP_loop_end() { own_team->end_loop(); }

}
