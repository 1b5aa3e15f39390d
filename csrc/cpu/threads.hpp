// Threads that run one function together.
#pragma once

#include <atomic>
#include <functional>

namespace rpsft {

// One member's handle on its team.
class Team {
 public:
  struct Shared {
    std::atomic<int> arrived{0}, round{0};
  };

  Team(int rank, int size, Shared& shared) : rank_(rank), size_(size), shared_(shared) {}

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Returns when every member has called it; what the others wrote before is then visible.
  void wait();

 private:
  int rank_, size_;
  Shared& shared_;
};

// Calls `work` on at most `threads` threads, this one among them, and returns when all are done. `work` must not
// throw. Where the process has loaded GNU's OpenMP runtime (torch brings it on Linux), its threads are used: a second
// pool would compete with the first, whose threads go on spinning for a while after each of torch's operations.
void run_team(int threads, const std::function<void(Team&)>& work);

// "OpenMP" or "threads".
const char* team_kind();

}  // namespace rpsft
