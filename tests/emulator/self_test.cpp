// self_test.cpp: the emulator's own tests. Good kernels must give the right numbers, and each bad kernel must fail with
// the words that name its fault, whatever the schedule. Built once per mode.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "self_test_kernels.hpp"

#if defined(EMULATOR_CHECKED)
constexpr bool kChecked = true, kAsan = false;
#elif defined(__SANITIZE_ADDRESS__)
constexpr bool kChecked = false, kAsan = true;
#else
constexpr bool kChecked = false, kAsan = false;
#endif

// ---- the tests

struct Buffers {
  std::vector<int> out = std::vector<int>(256), partial = std::vector<int>(256);
  std::vector<float> x = std::vector<float>(4096), y = std::vector<float>(4096);
  std::vector<double> wide = std::vector<double>(64);
  unsigned flag = 0;

  Buffers() {
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 97);
    using emulator::Use;
    emulator::add_region(out.data(), out.size() * 4, Use::Out, "out", 4);
    emulator::add_region(partial.data(), partial.size() * 4, Use::Out, "partial", 4);
    emulator::add_region(x.data(), x.size() * 4, Use::In, "x", 2);
    emulator::add_region(y.data(), y.size() * 4, Use::Out, "y", 2);
    emulator::add_region(wide.data(), wide.size() * 8, Use::Out, "wide", 8);
    emulator::add_region(&flag, 4, Use::InOut, "flag", 4);
  }
  ~Buffers() {
    for (void* data : {static_cast<void*>(out.data()), static_cast<void*>(partial.data()), static_cast<void*>(x.data()),
                       static_cast<void*>(y.data()), static_cast<void*>(wide.data()), static_cast<void*>(&flag)})
      emulator::drop_region(data);
  }
};

LaunchConfig blocks_of(unsigned blocks, unsigned threads) { return LaunchConfig{dim3(blocks), dim3(threads)}; }
LaunchConfig together(unsigned blocks, unsigned threads) {
  LaunchConfig config = blocks_of(blocks, threads);
  config.cooperative = true;
  return config;
}
LaunchConfig cluster_of(unsigned size, unsigned blocks, unsigned threads) {
  LaunchConfig config = blocks_of(blocks, threads);
  config.cluster = dim3(size);
  return config;
}
LaunchConfig with_shared(size_t bytes) {
  LaunchConfig config = blocks_of(1, 64);
  config.shared = bytes;
  return config;
}

struct Test {
  std::string name;
  std::string words;  // what the error must contain; empty: there must be none
  std::function<int(Buffers&)> launch;
  std::function<bool(const Buffers&)> right = nullptr;
};

const std::vector<Test>& tests() {
  static const std::vector<Test> all = {
      {"partial warp", "", [](Buffers& b) { return launch(blocks_of(1, 48), nullptr, partial_warp, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 8 && b.out[1] == int(0xaaaaaaaa) && b.out[65] == 0xaaaa; }},
      {"half warps", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, half_warps, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 120 * 16 * 16 && b.out[16] == 376; }},
      {"votes", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, votes, b.out.data()); },
       [](const Buffers& b) { return b.out[3] == 1 + 2 + 8 * 32 + 512 * 31; }},
      {"a struct with initializers", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, spread_in_shared, b.wide.data()); },
       [](const Buffers& b) { return b.wide[0] == 15.5 && b.wide[1] == 85.25; }},
      {"grid_sync", "",
       [](Buffers& b) { return launch(together(5, 40), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 200 && b.out[1] == 205 && b.out[2] == 210; }},
      {"grid_sync, word not zeroed", "was not zeroed",
       [](Buffers& b) {
         b.flag = 3;
         return launch(together(5, 40), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data());
       }},
      {"grid_sync without a cooperative launch", "without a cooperative launch",
       [](Buffers& b) { return launch(blocks_of(5, 40), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data()); }},
      {"cooperative grid too large", "cannot be resident at once",
       [](Buffers& b) {
         return launch(together(132 * 2 + 1, 1024), nullptr, grid_sum, &b.flag, b.partial.data(), b.out.data());
       }},
      {"acquire and release", "",
       [](Buffers& b) {
         return launch(together(2, 64), nullptr, flag_between_blocks, &b.flag, b.partial.data(), b.out.data());
       },
       [](const Buffers& b) { return b.out[63] == 7; }},
      {"acquire and release by a warp", "",
       [](Buffers& b) {
         return launch(together(2, 32), nullptr, warp_flag_between_blocks, &b.flag, b.partial.data(), b.out.data());
       },
       [](const Buffers& b) { return b.out[31] == 7; }},
      {"last block sums", "",
       [](Buffers& b) {
         return launch(blocks_of(4, 64), nullptr, last_block_sums<Ticket::right>, &b.flag, b.partial.data(),
                       b.out.data());
       },
       [](const Buffers& b) { return b.out[63] == 6; }},
      {"100000 bytes of dynamic shared memory", "",
       [](Buffers& b) { return launch(with_shared(100000), nullptr, fill_dynamic, b.y.data(), 25000); },
       [](const Buffers& b) { return b.y[0] == 24999.f; }},
      {"asynchronous copies", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_pipeline<true>, b.x.data(), b.y.data(), 8); },
       [](const Buffers& b) {
         float sum = 0;
         for (size_t t = 0; t < 8; ++t) sum += b.x[t * 128 + 127];
         return b.y[0] == sum;
       }},
      {"asynchronous copy of 8 bytes", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_with_zeros, b.x.data(), b.y.data()); },
       [](const Buffers& b) { return b.y[5] == b.x[21]; }},
      {"__syncwarp", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, warp_exchange<true>, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 31; }},
      {"__syncwarp of half a warp", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, half_warp_exchange<true>, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 15 && b.out[31] == 16; }},
      {"neighbouring flags", "",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, block_flags, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == 1 && b.out[1] == 0; }},
      {"distributed shared memory", "",
       [](Buffers& b) { return launch(cluster_of(2, 4, 32), nullptr, cluster_neighbor<true>, b.y.data()); },
       [](const Buffers& b) { return b.y[0] == 2.f && b.y[1] == 1.f && b.y[2] == 2.f; }},
      {"vector of float", "",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, square<float>, b.x.data(), b.y.data()); },
       [](const Buffers& b) { return b.y[96] == 96.f * 96.f && b.y[97] == 0.f; }},
      {"vector of half", "",
       [](Buffers& b) {
         const auto x = reinterpret_cast<const __half*>(b.x.data());
         return launch(blocks_of(1, 32), nullptr, square<__half>, x, reinterpret_cast<__half*>(b.y.data()));
       },
       [](const Buffers& b) { return b.y[0] == 0.f; }},

      // Found in every mode.
      {"absent lane", "", [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, absent_lane, b.out.data()); },
       [](const Buffers& b) { return b.out[0] == -1 && b.out[16] == 5; }},
      {"lane outside the mask", "calls with mask 7fffffff",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, lane_outside_mask, b.out.data()); }},
      {"shuffle in a branch", "divergent warp collective",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, shuffle_in_a_branch, b.out.data()); }},
      {"barrier in a branch", "exited",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, barrier_in_a_branch, b.out.data()); }},
      {"two barriers", "divergent barrier",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, two_barriers, b.out.data()); }},
      {"early return", "exited",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, early_return, b.out.data()); }},
      {"dynamic shared memory too large", "too much for a block",
       [](Buffers& b) { return launch(with_shared(300000), nullptr, fill_dynamic, b.y.data(), 75000); }},
      {"dynamic shared memory missing", "the launch gave none",
       [](Buffers& b) { return launch(with_shared(0), nullptr, fill_dynamic, b.y.data(), 4); }},
      {"static shared memory too large", "static shared memory",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, too_much_static, b.y.data()); }},
      {"block too large", "cannot have 2000 threads",
       [](Buffers& b) { return launch(blocks_of(1, 2000), nullptr, votes, b.out.data()); }},
      {"empty grid", "bad grid size",
       [](Buffers& b) { return launch(blocks_of(0, 32), nullptr, votes, b.out.data()); }},
      {"cluster does not divide the grid", "bad cluster size",
       [](Buffers& b) { return launch(cluster_of(2, 3, 32), nullptr, cluster_neighbor<true>, b.y.data()); }},
      {"cluster too large", "bad cluster size",
       [](Buffers& b) { return launch(cluster_of(32, 32, 32), nullptr, cluster_neighbor<true>, b.y.data()); }},
      {"misaligned vector", "misaligned 16-byte access",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, misaligned, b.x.data(), b.y.data()); }},
      {"copies pending at the end", "have not landed",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, pending_copy, b.x.data()); }},
      {"endless wait", "waits for ever",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, endless_wait, &b.flag); }},
  };
  return all;
}

// Found by the access checker.
const std::vector<Test>& checker_tests() {
  static const auto ticket = [](auto kernel) {
    return [kernel](Buffers& b) {
      return launch(blocks_of(4, 64), nullptr, kernel, &b.flag, b.partial.data(), b.out.data());
    };
  };
  static const std::vector<Test> all = {
      {"ticket: no fence before", "race: read of partial", ticket(last_block_sums<Ticket::no_fence_before>)},
      {"ticket: no fence after", "race: read of partial", ticket(last_block_sums<Ticket::no_fence_after>)},
      {"ticket: no barrier", "race: read of partial", ticket(last_block_sums<Ticket::no_barrier>)},
      {"ticket: not atomic", "race: read of flag", ticket(last_block_sums<Ticket::not_atomic>)},
      {"release without a fence", "race: read of partial",
       [](Buffers& b) {
         return launch(together(2, 32), nullptr, flag_without_release, &b.flag, b.partial.data(), b.out.data());
       }},
      {"no __syncthreads", "slot",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, block_exchange_without_barrier, b.out.data()); }},
      {"no __syncthreads, struct", "partial",
       [](Buffers& b) { return launch(blocks_of(1, 64), nullptr, spread_without_barrier, b.wide.data()); }},
      {"no __syncwarp", "slot",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, warp_exchange<false>, b.out.data()); }},
      {"__syncwarp of the wrong half", "slot",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, half_warp_exchange<false>, b.out.data()); }},
      {"two blocks write one place", "race: write of out",
       [](Buffers& b) { return launch(blocks_of(2, 1), nullptr, same_output, b.out.data()); }},
      {"copy over what others read", "buffer",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_pipeline<false>, b.x.data(), b.y.data(), 8); }},
      {"read before the copy landed", "uninitialized read of buffer",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, copy_without_wait, b.x.data(), b.y.data()); }},
      {"unwritten shared memory", "uninitialized read of slot",
       [](Buffers& b) { return launch(blocks_of(1, 4), nullptr, unwritten_shared, b.y.data()); }},
      {"unwritten global memory", "uninitialized read of y",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, read_and_write, b.y.data(), b.y.data(), 9L); }},
      {"write past the end", "past the start of y",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, touch, b.y.data(), 4096L); }},
      {"read before the start", "out of bounds: 4-byte read",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, read_and_write, b.x.data(), b.y.data(), -1L); }},
      {"read far away", "out of bounds",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, read_and_write, b.x.data(), b.y.data(), 1L << 30); }},
      {"shared memory past the end", "past the start of slot",
       [](Buffers& b) { return launch(blocks_of(1, 32), nullptr, shared_past_the_end, b.y.data()); }},
      {"write to an input", "write to read-only x",
       [](Buffers& b) { return launch(blocks_of(1, 1), nullptr, write_input, b.x.data()); }},
      {"owner of distributed shared memory exits", "",
       [](Buffers& b) {
         const int error = launch(cluster_of(2, 2, 32), nullptr, cluster_neighbor<false>, b.y.data());
         const std::string text = emulator::last_error();
         const bool named = text.find("has exited") != std::string::npos || text.find("out of bounds") == 0;
         return error && named ? 0 : 1;
       }},
  };
  return all;
}

int failures = 0;

void report(bool ok, uint64_t seed, const std::string& name, const std::string& text) {
  if (ok) return;
  ++failures;
  printf("FAIL seed %d: %s: %s\n", int(seed), name.c_str(), text.empty() ? "no error" : text.c_str());
}

void run_test(const Test& test, uint64_t seed) {
  emulator::options.seed = seed;
  Buffers buffers;
  emulator::set_last_error("");
  const int error = test.launch(buffers);
  const std::string text = emulator::last_error();
  if (!test.words.empty()) {
    report(error && text.find(test.words) != std::string::npos, seed, test.name, text);
  } else {
    report(!error && (!test.right || test.right(buffers)), seed, test.name, error ? text : "wrong result");
  }
}

// AddressSanitizer ends the process, so each of its finds gets a process of its own.
void run_fatal(const Test& test) {
  int ends[2];
  if (pipe(ends)) abort();
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    Buffers buffers;
    test.launch(buffers);
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) text.append(part, size_t(got));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool died = !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  const bool named = text.find("heap-buffer-overflow") != std::string::npos ||
                     text.find("out of bounds for type") != std::string::npos;
  report(died && named, 0, test.name, text.substr(0, 300));
}

// Reports name the kernel, the file, the line and both threads.
void check_report() {
  emulator::options.seed = 0;
  Buffers buffers;
  launch(blocks_of(2, 1), nullptr, same_output, buffers.out.data());
  const std::string text = emulator::last_error();
  for (const char* words :
       {"kernel same_output", "at self_test_kernels.hpp:", "with the write by block (0,0,0) thread (0,0,0)",
        ", block (1,0,0) thread (0,0,0)", "no barrier or fence orders them"})
    report(text.find(words) != std::string::npos, 0, std::string("the report says '") + words + "'", text);
}

// Memory that no one wrote is known by its address.
void check_written() {
  Buffers buffers;
  launch(blocks_of(1, 4), nullptr, same_output, buffers.out.data());
  launch(blocks_of(1, 1), nullptr, touch, buffers.y.data(), 0L);
  try {
    emulator::require_written(buffers.y.data());
    report(false, 0, "unwritten output", "");
  } catch (const std::exception& error) {
    report(std::string(error.what()) == "y + 4 bytes was never written", 0, "unwritten output", error.what());
  }
}

int main() {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    for (const Test& test : tests()) run_test(test, seed);
    if (kChecked)
      for (const Test& test : checker_tests()) run_test(test, seed);
  }
  if (kChecked) {
    check_report();
    check_written();
  }
  if (kAsan) {
    for (const Test& test : checker_tests())
      if (test.words == "past the start of y" || test.words == "past the start of slot" ||
          test.name == "read before the start")
        run_fatal(test);
  }
  printf("%zu tests, %d failures, %lld switches\n", tests().size() + (kChecked ? checker_tests().size() : 0), failures,
         emulator::switches());
  return failures != 0;
}
