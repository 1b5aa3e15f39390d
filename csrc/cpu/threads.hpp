// Teams of threads that run one function together.
#pragma once

#include <atomic>
#include <functional>

namespace rpsft {

// One member's view of its team.
class Team {
 public:
  struct Shared {
    std::atomic<int> arrived{0}, round{0};
  };

  Team(int rank, int size, Shared& shared) : rank_(rank), size_(size), shared_(shared) {}

  int rank() const { return rank_; }
  int size() const { return size_; }

  // A barrier: returns when every member has called it. What the others wrote before is then visible.
  void wait();

 private:
  int rank_, size_;
  Shared& shared_;
};

// Calls `work` on at most `threads` threads, including this one, and returns when all are done. `work` must not throw.
// Uses the threads of GNU's OpenMP runtime where the process has loaded it (torch does on Linux). A second pool would
// compete with OpenMP's threads, which keep spinning for a while after each torch operation.
void run_team(int threads, const std::function<void(Team&)>& work);

// "OpenMP" or "threads".
const char* team_kind();

}  // namespace rpsft
