// scheduler.cpp: runs a grid: starts clusters, picks the next fiber, notices deadlocks, reports the first find.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "state.hpp"

namespace emulator {

ThreadView* current = nullptr;
Options options;
Grid grid;
Checker* checker = nullptr;
bool emulator_busy = false;

namespace {

constexpr int64_t kIdleSpins = 300'000;

// Threads that can run. Fibers come and go at every collective, so both ends cost a few instructions.
class ReadyList {
 public:
  bool empty() const { return first_ == threads_.size(); }
  void clear() {
    threads_.clear();
    first_ = 0;
  }
  void add(Thread* thread) { threads_.push_back(thread); }
  void add_first(Thread* thread) { threads_.insert(threads_.begin() + ptrdiff_t(first_), thread); }
  Thread* take(uint64_t seed) {
    if (seed == 0) {
      Thread* thread = threads_[first_++];
      if (first_ == threads_.size()) {
        clear();
      } else if (first_ >= 4096 && first_ * 2 >= threads_.size()) {
        threads_.erase(threads_.begin(), threads_.begin() + ptrdiff_t(first_));
        first_ = 0;
      }
      return thread;
    }
    if (seed > 1) std::swap(threads_[random_number() % threads_.size()], threads_.back());
    Thread* thread = threads_.back();
    threads_.pop_back();
    return thread;
  }

 private:
  std::vector<Thread*> threads_;
  size_t first_ = 0;
};

Fiber host;  // the stack that called run()
ReadyList ready;
std::vector<std::unique_ptr<Cluster>> resident;
std::vector<std::unique_ptr<Thread>> threads;  // all that ever were; idle ones wait for reuse with their stacks
std::vector<Thread*> idle;
uint64_t random_state = 0;
long long switch_count = 0;
bool running_kernel = false;
std::string last_error_text;

Fiber& next_fiber() {
  if (!grid.error.empty() || ready.empty()) {
    current = nullptr;
    return host;
  }
  Thread* next = ready.take(options.seed);
  current = next;
  return next->fiber;
}

// Gives the CPU to another fiber, or to the host where a kernel has failed or no thread can run.
void reschedule() {
  Thread* self = running();
  Fiber& next = next_fiber();
  if (&next == &self->fiber) return;
  ++switch_count;
  switch_fiber(self->fiber, next);
}

void run_thread() {
  enter_fiber();
  grid.call.body(grid.call.arguments);
  emulator_busy = true;
  Thread* self = running();
  thread_exits(self);
  Cluster* cluster = self->owner->cluster;
  emulator_busy = false;
  if (cluster->alive == 0 || !grid.error.empty()) {
    current = nullptr;
    leave_fiber(self->fiber, host);
  }
  leave_fiber(self->fiber, next_fiber());
}

Thread* take_thread() {
  if (idle.empty()) {
    threads.push_back(std::make_unique<Thread>());
    idle.push_back(threads.back().get());
  }
  Thread* thread = idle.back();
  idle.pop_back();
  prepare(thread->fiber, run_thread);
  thread->done = false;
  thread->waits_in = nullptr;
  // Epochs start at 1: knowing a scope up to epoch 0 is knowing nothing.
  thread->clock = thread->warp_epoch = thread->block_epoch = thread->cluster_epoch = thread->grid_epoch = 1;
  thread->moment = 0;
  thread->known = thread->acquired = thread->released = nullptr;
  thread->copies.clear();
  thread->copy_group = 0;
  return thread;
}

std::unique_ptr<Block> start_block(Cluster& cluster, uint3 index, int rank) {
  const dim3 size = grid.config.block, blocks = grid.config.grid;
  const unsigned count = unsigned(volume(size));
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->index = index;
  block->id = index.x + blocks.x * (index.y + blocks.y * index.z);
  block->alive = int(count);
  block->warps.resize((count + 31) / 32);
  if (grid.config.shared) start_dynamic_shared(*block, grid.config.shared);
  for (unsigned i = 0; i < count; ++i) {
    Thread* thread = take_thread();
    static_cast<ThreadView&>(*thread) = ThreadView{uint3{i % size.x, i / size.x % size.y, i / (size.x * size.y)},
                                                   index,
                                                   size,
                                                   blocks,
                                                   grid.config.cluster,
                                                   int(i % 32),
                                                   rank};
    Warp& warp = block->warps[i / 32];
    warp.id = block->id * unsigned(block->warps.size()) + i / 32;
    warp.born |= 1u << (i % 32);
    warp.alive = warp.born;
    warp.lane[i % 32] = thread;
    thread->warp = &warp;
    thread->owner = block.get();
    thread->id = block->id * count + i;
    cluster.threads.push_back(thread);
    ready.add(thread);
  }
  return block;
}

void start_cluster(uint3 origin, uint32_t id) {
  const dim3 shape = grid.config.cluster;
  auto cluster = std::make_unique<Cluster>();
  cluster->id = id;
  for (unsigned i = 0; i < volume(shape); ++i) {
    const uint3 index{origin.x + i % shape.x, origin.y + i / shape.x % shape.y, origin.z + i / (shape.x * shape.y)};
    cluster->blocks.push_back(start_block(*cluster, index, int(i)));
  }
  cluster->alive = int(cluster->threads.size());
  grid.alive += cluster->alive;
  resident.push_back(std::move(cluster));
}

void retire_finished_clusters() {
  for (size_t i = 0; i < resident.size();) {
    if (resident[i]->alive) {
      ++i;
      continue;
    }
    for (Thread* thread : resident[i]->threads) {
      if (stack_overflowed(thread->fiber)) grid.error = "a thread needs more stack than the emulator gives it";
      idle.push_back(thread);
    }
    std::swap(resident[i], resident.back());
    resident.pop_back();
  }
}

// After an error: fibers that never ended are dropped where they stand.
void drop_everything() {
  for (auto& cluster : resident) {
    for (auto& block : cluster->blocks) release_shared(*block);
    for (Thread* thread : cluster->threads) idle.push_back(thread);
  }
  resident.clear();
  ready.clear();
}

std::string deadlock_report() {
  std::map<std::string, int> places;
  for (auto& cluster : resident)
    for (Thread* thread : cluster->threads)
      if (!thread->done && thread->waits_in)
        ++places[std::string(thread->waits_in) + " at " + thread->site.file + ":" + std::to_string(thread->site.line)];
  std::string report = "deadlock:";
  for (auto& place : places) report += " [" + std::to_string(place.second) + " threads wait in " + place.first + "]";
  return report + " in kernel " + kernel_name();
}

void check_launch(const LaunchConfig& config) {
  const size_t threads_per_block = volume(config.block), cluster = volume(config.cluster);
  const auto refuse = [](const std::string& why) {
    throw std::runtime_error("launch of " + kernel_name() + ": " + why);
  };
  const auto number = [](auto value) { return std::to_string(value); };
  if (threads_per_block < 1 || threads_per_block > 1024 || config.block.z > 64)
    refuse("a block cannot have " + number(threads_per_block) + " threads");
  if (!volume(config.grid) || config.grid.x > 0x7fffffffu || config.grid.y > 65535 || config.grid.z > 65535)
    refuse("bad grid size " + number(config.grid.x) + " x " + number(config.grid.y) + " x " + number(config.grid.z));
  if (cluster < 1 || cluster > 16 || config.grid.x % config.cluster.x || config.grid.y % config.cluster.y ||
      config.grid.z % config.cluster.z)
    refuse("bad cluster size " + number(cluster) + " for this grid");
  if (int64_t(config.shared) > options.shared_limit)
    refuse(number(config.shared) + " bytes of dynamic shared memory are too much for a block");
  if (!can_be_resident(config))
    refuse("a grid of " + number(volume(config.grid)) + " blocks in clusters of " + number(cluster) +
           " cannot be resident at once");
}

std::vector<uint3> cluster_origins(const LaunchConfig& config) {
  std::vector<uint3> origins;
  for (unsigned z = 0; z < config.grid.z; z += config.cluster.z)
    for (unsigned y = 0; y < config.grid.y; y += config.cluster.y)
      for (unsigned x = 0; x < config.grid.x; x += config.cluster.x) origins.push_back(uint3{x, y, z});
  if (options.seed == 0) std::reverse(origins.begin(), origins.end());  // they are taken from the back
  if (options.seed > 1)
    for (size_t i = origins.size(); i > 1; --i) std::swap(origins[i - 1], origins[random_number() % i]);
  return origins;
}

void run_clusters(const LaunchConfig& config) {
  std::vector<uint3> origins = cluster_origins(config);
  size_t wanted = 1;
  if (options.seed > 1) wanted = 1 + random_number() % size_t(std::max(1, options.resident_clusters));
  if (config.cooperative) wanted = origins.size();
  uint32_t started = 0;
  while (grid.error.empty()) {
    retire_finished_clusters();
    for (; resident.size() < wanted && !origins.empty(); origins.pop_back()) start_cluster(origins.back(), ++started);
    if (resident.empty() || !grid.error.empty()) break;
    if (ready.empty()) {
      grid.error = deadlock_report();
      break;
    }
    ++switch_count;
    switch_fiber(host, next_fiber());
  }
}

}  // namespace

bool can_be_resident(const LaunchConfig& config) {
  if (int64_t(volume(config.cluster)) > options.largest_cluster) return false;
  if (!config.cooperative) return true;
  constexpr int64_t kReserved = 1024;  // what the system takes of each block's shared memory
  const int64_t per_sm = std::min({int64_t(2048 / volume(config.block)), int64_t(32),
                                   options.shared_per_sm / (int64_t(config.shared) + kReserved)});
  return int64_t(volume(config.grid)) <= per_sm * (options.sms - options.busy_sms);
}

size_t volume(dim3 size) { return size_t(size.x) * size.y * size.z; }

uint64_t random_number() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void make_ready(Thread* thread) {
  grid.idle_spins = 0;
  ready.add(thread);
}

void yield() {
  ready.add(running());
  reschedule();
}

void wait_for(const char* collective, Site site) {
  Thread* self = running();
  self->waits_in = collective;
  self->site = site;
  reschedule();
  self->waits_in = nullptr;
}

void maybe_yield(int ppm) {
  if (current && options.seed > 1 && int(random_number() % 1'000'000) < ppm) yield();
}

void spin() {
  if (++grid.idle_spins > kIdleSpins) fail("a loop waits for ever");
  if (options.seed == 1) {  // last in, first out would choose this thread again
    ready.add_first(running());
    reschedule();
  } else {
    yield();
  }
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!current) throw std::runtime_error(text);
  emulator_busy = true;
  Thread* self = running();
  if (grid.error.empty()) grid.error = std::string(text) + "; in kernel " + kernel_name() + ", " + name_of(self->id);
  current = nullptr;
  leave_fiber(self->fiber, host);
}

void run(const LaunchConfig& config, const Call& call) {
  if (running_kernel) throw std::runtime_error("a kernel cannot launch a kernel");
  grid = Grid{};
  grid.config = config;
  grid.call = call;
  random_state = options.seed;
  check_launch(config);
  adopt_this_stack(host);
  if (checker) checker->begin_launch();
  running_kernel = true;
  emulator_busy = false;
  run_clusters(config);
  running_kernel = false;
  emulator_busy = false;
  drop_everything();
  if (!grid.error.empty()) throw std::runtime_error(grid.error);
}

void set_last_error(const char* message) { last_error_text = message; }
const char* last_error() { return last_error_text.c_str(); }
long long switches() { return switch_count; }

}  // namespace emulator
