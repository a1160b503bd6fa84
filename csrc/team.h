// Threads that stay together through many short phases. A barrier of theirs costs a microsecond: OpenMP's own, with threads
// that sleep while they wait, costs fifty, and a pass through a model has hundreds.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace negotiator {

class Team {
 public:
  // For threads that all go through the same `phases` phases.
  explicit Team(int64_t phases) : counters_(phases) {}

  // One thread's way through the phases.
  class Member {
   public:
    // `threads`: how many members the team has.
    Member(Team& team, int threads) : team_(team), threads_(threads) {}

    // All members call it with the same count; each of 0 .. count-1 is done by one of them, whoever is free. Returns when
    // all are done.
    template <typename Work>
    void for_each(int64_t count, Work work) {
      std::atomic<int64_t>& next = team_.counters_[phase_++].value;
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i);
      team_.wait(threads_);
    }

   private:
    Team& team_;
    const int threads_;
    int64_t phase_ = 0;
  };

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  void wait(int threads) {
    const int64_t round = round_.load();
    if (arrived_.fetch_add(1) + 1 == threads) {
      arrived_.store(0);
      round_.store(round + 1);
      return;
    }
    for (int64_t spins = 0; round_.load() == round; ++spins) pause(spins);
  }

  // Spins at first; then lets others run, who may be what everybody waits for.
  static void pause(int64_t spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#if defined(__linux__)
    if (spins > 2000) sched_yield();
#endif
  }

  std::vector<Counter> counters_;
  std::atomic<int> arrived_{0};
  std::atomic<int64_t> round_{0};
};

}  // namespace negotiator
