// Threads that go through many short phases together. What a phase waits for is its work, not its threads: one that the
// system keeps from running holds nobody up unless it was in the middle of something. Waiting costs a microsecond; at a
// barrier of OpenMP's, whose threads sleep while they wait, it costs fifty, and a pass through a model has hundreds.
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
  explicit Team(int64_t phases) : phases_(phases) {}

 private:
  friend class Member;
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::vector<Phase> phases_;
};

// One thread's way through the phases of a team.
class Member {
 public:
  explicit Member(Team& team) : phase_(team.phases_.data()) {}

  // Every member calls it with the same count. Each of 0 .. count-1 is done by one of them, whoever is free. Returns when
  // all are done, though other members may not have come here yet.
  template <typename Work>
  void for_each(int64_t count, Work work) {
    Team::Phase& phase = *phase_++;
    for (int64_t i = phase.next.fetch_add(1); i < count; i = phase.next.fetch_add(1)) {
      work(i);
      phase.done.fetch_add(1);
    }
    for (int64_t spins = 0; phase.done.load() < count; ++spins) pause(spins);
  }

 private:
  // Spins at first; then lets others run, who may be what everybody waits for.
  static void pause(int64_t spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#if defined(__linux__)
    if (spins > 2000) sched_yield();
#endif
  }

  Team::Phase* phase_;
};

}  // namespace negotiator
