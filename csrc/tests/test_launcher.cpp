// The launcher over the stand-in for the driver (cuda_stub.cpp), whose path RPSFT_CUDA_DRIVER must hold.
#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "launcher/launcher.hpp"

namespace {

using rpsft::cuda::Driver;
using rpsft::cuda::Kernel;

struct Stub {
  void (*reset)() = nullptr;
  void (*fail)(const char*, int) = nullptr;
  void (*meet)(int) = nullptr;
  int (*log)(char*, int) = nullptr;
  int (*depth)() = nullptr;
  void (*capture)(int) = nullptr;
  int (*capture_mode)() = nullptr;

  explicit Stub(const char* path) {
    void* library = dlopen(path, RTLD_NOW);
    if (library == nullptr) return;
    find(library, "stub_reset", reset);
    find(library, "stub_fail", fail);
    find(library, "stub_meet", meet);
    find(library, "stub_log", log);
    find(library, "stub_depth", depth);
    find(library, "stub_capture", capture);
    find(library, "stub_capture_mode", capture_mode);
  }

  template <class Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
  }

  // Calls of a name since the last reset, and lines that hold a text.
  int count(const std::string& text) const {
    std::string all(static_cast<std::size_t>(log(nullptr, 0)) + 1, '\0');
    log(all.data(), static_cast<int>(all.size()));
    int found = 0;
    for (std::size_t at = all.find(text); at != std::string::npos; at = all.find(text, at + 1)) ++found;
    return found;
  }
};

std::unique_ptr<Kernel> kernel(const char* image, std::int64_t shared = 0,
                               std::vector<rpsft::cuda::Parameter> layout = {}) {
  return std::make_unique<Kernel>(image, "entry", "tested", 128, shared, std::move(layout));
}

template <class Failing>
std::string message(Failing failing) {
  try {
    failing();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void opens_after_a_failure(const std::string& path) {
  setenv("RPSFT_CUDA_DRIVER", "/nowhere/libcuda.so", 1);
  const std::string said = message([] { rpsft::cuda::driver_version(); });
  CHECK(holds(said, "/nowhere/libcuda.so"), "%s", said.c_str());
  setenv("RPSFT_CUDA_DRIVER", path.c_str(), 1);
  CHECK(rpsft::cuda::driver_version() == 12040, "%d", rpsft::cuda::driver_version());
}

void packs_by_the_layout(const Stub& stub) {
  stub.reset();
  // Out of order, with a gap before the byte and one after.
  const auto own = kernel("entry packs", 0, {{16, 8}, {0, 4}, {9, 1}, {10, 2}});
  own->launch(0, 7, {3, 2, 1}, {0x1122334455667788u, 0xa0b0c0d0u, 0xee, 0x1234});
  CHECK(stub.count("\"parameters\": \"d0c0b0a00000000000ee341200000000""8877665544332211\"") == 1, "other bytes");
  CHECK(stub.count("\"grid\": [3, 2, 1], \"block\": [128, 1, 1], \"shared\": 0, \"stream\": 7") == 1, "other launch");
  kernel("entry bare")->launch(0, 0, {1, 1, 1}, {});
  CHECK(stub.count("\"parameters\": \"\"") == 1, "a kernel without parameters");
}

void loads_once_and_launches_together(const Stub& stub) {
  constexpr int threads = 8;
  for (int round = 0; round < 10; ++round) {
    stub.reset();
    // Every launch waits for all others: a lock held around one would leave them waiting.
    stub.meet(threads);
    const auto own = kernel("entry together", 100000, {{0, 8}});
    std::vector<std::thread> callers;
    for (int caller = 0; caller < threads; ++caller)
      callers.emplace_back([&, caller] {
        const std::string said =
            message([&] { own->launch(caller % 2, 0, {1, 1, 1}, {static_cast<std::uint64_t>(caller)}); });
        CHECK(said.empty(), "%s", said.c_str());
        CHECK(stub.depth() == 0, "%d contexts left", stub.depth());
      });
    for (std::thread& caller : callers) caller.join();
    CHECK(stub.count("\"cuModuleLoadDataEx\"") == 2, "%d loads", stub.count("\"cuModuleLoadDataEx\""));
    CHECK(stub.count("\"cuFuncSetAttribute\"") == 4, "%d changes", stub.count("\"cuFuncSetAttribute\""));
    CHECK(stub.count("\"cuLaunchKernel\"") == threads, "%d launches", stub.count("\"cuLaunchKernel\""));
  }
}

void failures_leave_nothing(const Stub& stub) {
  for (const char* call : {"cuInit", "cuThreadExchangeStreamCaptureMode", "cuCtxGetCurrent", "cuCtxPushCurrent_v2",
                           "cuModuleLoadDataEx", "cuModuleGetFunction", "cuFuncGetAttribute", "cuFuncSetAttribute",
                           "cuLaunchKernel"}) {
    stub.reset();
    stub.fail(call, 2);
    const auto own = kernel("entry fails", 100000);
    // cuInit is called for a device that is used for the first time.
    const auto launch = [&] { own->launch(2, 0, {1, 1, 1}, {}); };
    for (int attempt = 0; attempt < 2; ++attempt) {
      const std::string said = message(launch);
      CHECK(holds(said, "kernel 'tested' on CUDA device 2"), "%s: %s", call, said.c_str());
      CHECK(holds(said, "CUDA_ERROR_OUT_OF_MEMORY (2), out of memory"), "%s: %s", call, said.c_str());
      CHECK(stub.depth() == 0, "%s: %d contexts left", call, stub.depth());
    }
    const bool loaded = std::string(call) == "cuLaunchKernel";
    const int left = stub.count("\"cuModuleLoadDataEx\", \"result\": 0") - stub.count("\"cuModuleUnload\"");
    CHECK(left == (loaded ? 1 : 0), "%s: %d modules left", call, left);
    stub.fail(call, 0);
    CHECK(message(launch).empty(), "%s: %s", call, message(launch).c_str());
  }
}

void loads_while_a_graph_is_captured(const Stub& stub) {
  stub.reset();
  stub.capture(1);
  const auto own = kernel("entry captured");
  const std::string said = message([&] { own->launch(0, 5, {1, 1, 1}, {}); });
  CHECK(said.empty(), "%s", said.c_str());
  CHECK(stub.capture_mode() == 0, "mode %d stays", stub.capture_mode());
  CHECK(stub.count("\"cuThreadExchangeStreamCaptureMode\"") == 2, "another exchange");
}

void an_image_that_does_not_suit_has_an_error_of_its_own(const Stub& stub) {
  for (const int code : rpsft::cuda::unfit) {
    stub.reset();
    stub.fail("cuModuleLoadDataEx", code);
    bool refused = false;
    try {
      kernel("entry")->launch(0, 0, {1, 1, 1}, {});
    } catch (const rpsft::cuda::LoadError& error) {
      refused = holds(error.what(), "kernel 'tested' on CUDA device 0 (Stub GPU 0): cuModuleLoadDataEx failed with");
    }
    CHECK(refused, "%d", code);
  }
  stub.reset();
}

void threads_that_fail_together(const Stub& stub) {
  stub.reset();
  const auto own = kernel("bad entry");
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      const std::string said = message([&] { own->launch(1, 0, {1, 1, 1}, {}); });
      CHECK(holds(said, "CUDA_ERROR_INVALID_PTX") && holds(said, "no such instruction"), "%s", said.c_str());
    });
  for (std::thread& caller : callers) caller.join();
}

void refuses_what_it_cannot_pack() {
  const std::vector<rpsft::cuda::Parameter> wrong[] = {{{0, 3}}, {{-8, 8}}, {{4, 8}}, {{0, 8}, {4, 4}}, {{32760, 16}},
                                                       {{32768, 8}}, {{INT64_MAX - 7, 8}}, {{INT64_MIN, 8}}};
  for (const auto& layout : wrong)
    CHECK(holds(message([&] { kernel("entry", 0, layout); }), "layout"), "offset %lld",
          static_cast<long long>(layout[0].offset));
  CHECK(holds(message([] { kernel("entry", 0, {{0, 4}})->launch(0, 0, {1, 1, 1}, {1ull << 32}); }), "fit"), "too wide");
}

}  // namespace

int main() {
  const char* path = std::getenv("RPSFT_CUDA_DRIVER");
  const Stub stub(path != nullptr ? path : "");
  if (stub.log == nullptr) {
    std::printf("RPSFT_CUDA_DRIVER must hold the path of the stand-in for the driver, as ctest sets it\n");
    return 1;
  }
  opens_after_a_failure(path);
  failures_leave_nothing(stub);
  packs_by_the_layout(stub);
  loads_once_and_launches_together(stub);
  threads_that_fail_together(stub);
  loads_while_a_graph_is_captured(stub);
  an_image_that_does_not_suit_has_an_error_of_its_own(stub);
  refuses_what_it_cannot_pack();
  return failures() != 0;
}
