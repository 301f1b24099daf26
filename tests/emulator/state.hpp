// state.hpp: what the parts of the emulator share: threads, warps, blocks, clusters and what each knows of the others.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.hpp"
#include "fiber.hpp"

namespace emulator {

struct Warp;
struct Block;
struct Cluster;

// The ordering of CUDA's memory model, as clocks. A barrier starts a new epoch of its scope; whatever ran in an older
// epoch of a scope that two threads share is ordered before. Work of other scopes is ordered only where an atomic
// between two fences brought Knowledge of it: "all of scope s before epoch e".
enum class Scope : uint64_t { thread, warp, block, cluster };
class Knowledge {
 public:
  static uint64_t key(Scope scope, uint32_t id) { return uint64_t(scope) << 32 | id; }
  // The epoch up to which the scope is known; 0: nothing.
  uint32_t of(uint64_t key) const;
  void learn(uint64_t key, uint32_t epoch);
  bool covers(const Knowledge& other) const;
  void learn(const Knowledge& other);

 private:
  struct Entry {
    uint64_t key;
    uint32_t epoch;
  };
  std::vector<Entry> entries_;  // sorted by key
};
using SharedKnowledge = std::shared_ptr<const Knowledge>;  // null: nothing
void learn(SharedKnowledge& into, const SharedKnowledge& from);

// A 16-byte copy that was asked for and has not landed.
struct Copy {
  void* shared;
  unsigned char value[16];
  int bytes, group;
};

struct Thread : ThreadView {
  Fiber fiber;
  Warp* warp = nullptr;
  Block* owner = nullptr;
  uint32_t id = 0;  // in the grid
  bool done = true;
  const char* waits_in = nullptr;  // the collective, for reports
  Site site = {};
  uint32_t clock = 0, warp_epoch = 0, block_epoch = 0, cluster_epoch = 0, grid_epoch = 0;
  uint32_t moment = 0;       // the checker's number for these clocks, 0 when they have changed
  SharedKnowledge known;     // ordered before whatever this thread does now
  SharedKnowledge acquired;  // read by an atomic: known after the next fence
  SharedKnowledge released;  // what the last fence lets an atomic publish
  std::vector<Copy> copies;
  int copy_group = 0;
};

// Threads that meet at one barrier.
struct Barrier {
  int arrived = 0;
  Site site = {};
  std::vector<Thread*> waiting;
  SharedKnowledge gathered, result;
};

// Lanes that meet in one warp collective.
struct Meeting {
  const char* name = nullptr;
  Site site = {};
  uint32_t mask = 0, arrived = 0, left = 0, votes = 0;
  bool complete = false;
  SharedKnowledge gathered;
  alignas(8) unsigned char value[32][8];
};

struct Warp {
  uint32_t id = 0;               // in the grid
  uint32_t born = 0, alive = 0;  // masks of lanes
  Thread* lane[32] = {};
  std::vector<std::unique_ptr<Meeting>> open;
};

struct SharedVariable {
  const void* key = nullptr;
  unsigned char* data = nullptr;
  size_t bytes = 0;
  int grain = 1;
  const char* name = nullptr;
};

struct Block {
  Cluster* cluster = nullptr;
  uint3 index = {};
  uint32_t id = 0;  // in the grid
  int alive = 0, exited = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<SharedVariable> variables;
  SharedVariable dynamic;
  size_t static_bytes = 0;
};

struct Cluster {
  uint32_t id = 0;
  int alive = 0, exited = 0;
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread*> threads;
};

// The grid that runs now.
struct Grid {
  LaunchConfig config;
  Call call = {};
  std::string error;  // the first find
  int64_t alive = 0, exited = 0;
  int64_t idle_spins = 0;  // turns of waiting loops since anything else happened
  Barrier barrier;
  std::unordered_map<const void*, SharedKnowledge> published;  // what atomics left at each address
};
extern Grid grid;

// The access checker, where the build has one (checker.cpp).
class Checker {
 public:
  virtual ~Checker() = default;
  virtual void add_region(void* data, size_t bytes, Use use, const char* name, int grain) = 0;
  virtual void drop_region(void* data) = 0;
  virtual void begin_launch() = 0;
  virtual void access(const void* address, size_t bytes, bool write, bool atomic, void* caller) = 0;
  virtual void forget(const void* address, size_t bytes) = 0;       // its content is not initialized any more
  virtual void host_writes(const void* address, size_t bytes) = 0;  // between launches
  virtual void require_written(void* data) = 0;
};
extern Checker* checker;    // null in builds without one
extern bool emulator_busy;  // the emulator itself is at work: its accesses are not the kernel's

inline Thread* running() { return static_cast<Thread*>(current); }
std::string name_of(uint32_t thread);  // "block (1,0,0) thread (5,0,0)"
// Source lines of a code address, innermost first: "platform.cuh:310 < reduce.cuh:80".
std::string lines_of(const void* code);
std::string function_at(const void* code);
std::string kernel_name();
size_t volume(dim3 size);

void make_ready(Thread* thread);
void yield();                                      // lets other threads run
void wait_for(const char* collective, Site site);  // runs others until someone makes this thread ready
void maybe_yield(int ppm);
void spin();  // one turn of a loop that waits: lets others run, and fails where nothing but waiting goes on
uint64_t random_number();

void thread_exits(Thread* thread);  // tells barriers and warp collectives
void release_shared(Block& block);
void start_dynamic_shared(Block& block, size_t bytes);

}  // namespace emulator
