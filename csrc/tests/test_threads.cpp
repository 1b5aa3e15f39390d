// Teams of threads: every member runs once, and what is written before wait() is seen after it.
#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cpu/threads.hpp"

namespace {

void every_member_runs_once() {
  for (int threads : {1, 2, 3, 7}) {
    std::vector<std::atomic<int>> runs(threads);
    std::atomic<int> size{0};
    rpsft::run_team(threads, [&](rpsft::Team& team) {
      ++runs[team.rank()];
      size = team.size();
    });
    CHECK(size >= 1 && size <= threads, "%d of %d", size.load(), threads);
    for (int rank = 0; rank < size; ++rank) CHECK(runs[rank] == 1, "member %d ran %d times", rank, runs[rank].load());
  }
}

void waiting_publishes() {
  for (int threads : {2, 3, 5}) {
    std::vector<int> values(threads, 0);
    std::atomic<int> wrong{0};
    rpsft::run_team(threads, [&](rpsft::Team& team) {
      for (int round = 1; round <= 500; ++round) {
        values[team.rank()] = round;
        team.wait();
        for (int other = 0; other < team.size(); ++other) wrong += values[other] != round;
        team.wait();
      }
    });
    CHECK(wrong == 0, "%d stale values with %d threads", wrong.load(), threads);
  }
}

void teams_side_by_side() {
  std::atomic<int> members{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int call = 0; call < 20; ++call) rpsft::run_team(2, [&](rpsft::Team& team) { members += team.rank() == 0; });
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(members == 80, "%d", members.load());
}

}  // namespace

int main() {
  every_member_runs_once();
  waiting_publishes();
  teams_side_by_side();
  return failures() != 0;
}
