#include "cpu/threads.hpp"

#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace rpsft {

void Team::wait() {
  if (size_ == 1) return;
  const int round = shared_.round.load(std::memory_order_acquire);
  if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    shared_.arrived.store(0, std::memory_order_relaxed);
    shared_.round.store(round + 1, std::memory_order_release);
    return;
  }
  // The members' shares of work are about equal, so spin first. On a busy machine, then yield to other work.
  for (int spins = 0; shared_.round.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < 4096) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }
}

namespace {

struct OpenMp {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Number = int (*)();
  Parallel parallel = nullptr;
  Number rank = nullptr, size = nullptr;

  OpenMp() {
#if defined(__linux__) && !defined(RPSFT_NO_OPENMP)
    parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    rank = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    size = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }

  explicit operator bool() const { return parallel && rank && size; }
};

const OpenMp& open_mp() {
  static const OpenMp runtime;
  return runtime;
}

struct Job {
  const std::function<void(Team&)>& work;
  Team::Shared shared;
};

void run_member(void* job) {
  Job& own = *static_cast<Job*>(job);
  // Inside another parallel region the runtime may give fewer threads than asked for.
  Team team(open_mp().rank(), open_mp().size(), own.shared);
  own.work(team);
}

}  // namespace

const char* team_kind() { return open_mp() ? "OpenMP" : "threads"; }

void run_team(int threads, const std::function<void(Team&)>& work) {
  Job job{work, {}};
  if (threads <= 1) {
    Team alone(0, 1, job.shared);
    work(alone);
  } else if (open_mp()) {
    open_mp().parallel(run_member, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    // Set after the last thread has started: if the system refuses a thread, the team is smaller.
    std::atomic<int> size{0};
    const auto start = [&](int rank) {
      while (size.load(std::memory_order_acquire) == 0) std::this_thread::yield();
      Team team(rank, size.load(std::memory_order_acquire), job.shared);
      work(team);
    };
    try {
      for (int rank = 1; rank < threads; ++rank) others.emplace_back(start, rank);
    } catch (const std::exception&) {
    }
    size.store(static_cast<int>(others.size()) + 1, std::memory_order_release);
    start(0);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace rpsft
