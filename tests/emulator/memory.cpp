// memory.cpp: shared memory, atomics and fences, asynchronous copies, and what threads learn of each other.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "state.hpp"

namespace emulator {
namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in every int
constexpr int64_t kStaticLimit = 48 * 1024;

// A malloc for each variable and block: AddressSanitizer gets red zones around it, the checker an own region.
void allocate(SharedVariable& variable, const void* key, size_t bytes, const char* name, int grain) {
  void* data = nullptr;
  if (posix_memalign(&data, 128, bytes)) abort();
  std::memset(data, kPoison, bytes);
  variable = SharedVariable{key, static_cast<unsigned char*>(data), bytes, grain, name};
  if (checker) checker->add_region(data, bytes, Use::Out, name, grain);
}

void release(SharedVariable& variable) {
  if (!variable.data) return;
  if (checker) checker->drop_region(variable.data);
  std::memset(variable.data, kPoison, variable.bytes);
  free(variable.data);
  variable.data = nullptr;
}

unsigned char* variable_of(Block& block, const void* key, size_t bytes, const char* name, int grain) {
  for (const SharedVariable& variable : block.variables)
    if (variable.key == key) return variable.data;
  const bool was_busy = emulator_busy;
  emulator_busy = true;
  block.static_bytes += bytes;
  if (int64_t(block.static_bytes) > kStaticLimit)
    fail("%zu bytes of static shared memory; a block can have 48 KiB", block.static_bytes);
  if (int64_t(block.static_bytes + grid.config.shared) > options.shared_limit)
    fail("%zu bytes of shared memory are too much for a block", block.static_bytes + grid.config.shared);
  block.variables.emplace_back();
  allocate(block.variables.back(), key, bytes, name, grain);
  emulator_busy = was_busy;
  return block.variables.back().data;
}

// An atomic at this address reads what others published there and publishes what this thread has released.
void meet_atomic(const void* address, size_t bytes, void* caller) {
  Thread* self = running();
  SharedKnowledge& published = grid.published[address];
  learn(self->acquired, published);
  learn(published, self->released);
  if (checker) checker->access(address, bytes, true, true, caller);
}

bool contains(const SharedVariable& variable, const unsigned char* address) {
  return variable.data && address >= variable.data && address < variable.data + variable.bytes;
}

}  // namespace

// ---- knowledge

uint32_t Knowledge::of(uint64_t key) const {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), key,
                                   [](const Entry& entry, uint64_t wanted) { return entry.key < wanted; });
  return at != entries_.end() && at->key == key ? at->epoch : 0;
}

void Knowledge::learn(uint64_t key, uint32_t epoch) {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), key,
                                   [](const Entry& entry, uint64_t wanted) { return entry.key < wanted; });
  if (at != entries_.end() && at->key == key) {
    at->epoch = std::max(at->epoch, epoch);
  } else {
    entries_.insert(at, Entry{key, epoch});
  }
}

bool Knowledge::covers(const Knowledge& other) const {
  size_t i = 0;
  for (const Entry& entry : other.entries_) {
    while (i < entries_.size() && entries_[i].key < entry.key) ++i;
    if (i == entries_.size() || entries_[i].key != entry.key || entries_[i].epoch < entry.epoch) return false;
  }
  return true;
}

void Knowledge::learn(const Knowledge& other) {
  std::vector<Entry> both;
  both.reserve(entries_.size() + other.entries_.size());
  size_t i = 0, j = 0;
  while (i < entries_.size() || j < other.entries_.size()) {
    if (j == other.entries_.size() || (i < entries_.size() && entries_[i].key < other.entries_[j].key)) {
      both.push_back(entries_[i++]);
    } else if (i == entries_.size() || other.entries_[j].key < entries_[i].key) {
      both.push_back(other.entries_[j++]);
    } else {
      both.push_back(Entry{entries_[i].key, std::max(entries_[i].epoch, other.entries_[j].epoch)});
      ++i, ++j;
    }
  }
  entries_ = std::move(both);
}

void learn(SharedKnowledge& into, const SharedKnowledge& from) {
  if (!from || into == from) return;
  if (!into || from->covers(*into)) {
    into = from;
  } else if (!into->covers(*from)) {
    auto both = std::make_shared<Knowledge>(*into);
    both->learn(*from);
    into = std::move(both);
  }
}

// ---- global memory

void add_region(void* data, size_t bytes, Use use, const char* name, int grain) {
  if (checker) checker->add_region(data, bytes, use, name, grain);
}

void drop_region(void* data) {
  if (checker) checker->drop_region(data);
}

void require_written(void* data) {
  if (checker) checker->require_written(data);
}

void zero(void* data, size_t bytes) {
  if (checker) checker->host_writes(data, bytes);
  std::memset(data, 0, bytes);
}

// ---- shared memory

void* static_shared(const void* key, size_t bytes, const char* name, int grain) {
  if (!current) fail("shared memory outside a kernel");
  return variable_of(*running()->owner, key, bytes, name, grain);
}

void start_dynamic_shared(Block& block, size_t bytes) {
  allocate(block.dynamic, nullptr, bytes, "dynamic shared memory", 2);
}

void* dynamic_shared() {
  if (!current) fail("shared memory outside a kernel");
  Block* block = running()->owner;
  if (!block->dynamic.data) fail("dynamic shared memory is used, but the launch gave none");
  return block->dynamic.data;
}

void release_shared(Block& block) {
  for (SharedVariable& variable : block.variables) release(variable);
  release(block.dynamic);
}

void* map_to_rank(void* shared, int rank) {
  Block* own = running()->owner;
  const auto& blocks = own->cluster->blocks;
  if (rank < 0 || rank >= int(blocks.size())) fail("cluster_map: rank %d is outside the cluster", rank);
  Block* other = blocks[size_t(rank)].get();
  if (other->alive == 0) fail("cluster_map: block %d of the cluster has exited", rank);
  const auto address = static_cast<const unsigned char*>(shared);
  if (contains(own->dynamic, address)) return other->dynamic.data + (address - own->dynamic.data);
  for (const SharedVariable& variable : own->variables)
    if (contains(variable, address)) {
      const SharedVariable found = variable;  // the other block may be this one, and its list may grow
      return variable_of(*other, found.key, found.bytes, found.name, found.grain) + (address - found.data);
    }
  fail("cluster_map: not an address in this block's shared memory");
}

// ---- order between blocks

void fence() {
  Thread* self = running();
  learn(self->known, self->acquired);
  self->acquired = nullptr;
  auto released = self->known ? std::make_shared<Knowledge>(*self->known) : std::make_shared<Knowledge>();
  released->learn(Knowledge::key(Scope::thread, self->id), ++self->clock);
  released->learn(Knowledge::key(Scope::warp, self->warp->id), self->warp_epoch);
  released->learn(Knowledge::key(Scope::block, self->owner->id), self->block_epoch);
  released->learn(Knowledge::key(Scope::cluster, self->owner->cluster->id), self->cluster_epoch);
  self->released = std::move(released);
  self->moment = 0;
}

void atomic_begin(void* address, size_t bytes) {
  if (!current) fail("device atomic outside a kernel");
  maybe_yield(options.yield_percent * 10'000);
  grid.idle_spins = 0;
  meet_atomic(address, bytes, __builtin_return_address(0));
}

unsigned load_acquire(const unsigned* address) {
  if (!current) fail("device atomic outside a kernel");
  if (reinterpret_cast<uintptr_t>(address) % sizeof *address) fail("misaligned atomic");
  meet_atomic(address, sizeof *address, __builtin_return_address(0));
  const unsigned value = *address;
  fence();
  spin();
  return value;
}

// ---- asynchronous copies: they land at the wait and not before, so that an early read meets poison

void copy_async(void* shared, const void* global, int bytes, int source_bytes) {
  Thread* self = running();
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % unsigned(bytes))
    fail("misaligned asynchronous copy");
  if (source_bytes < 0 || source_bytes > bytes) fail("asynchronous copy of %d bytes", source_bytes);
  void* const caller = __builtin_return_address(0);
  if (checker && source_bytes) checker->access(global, size_t(source_bytes), false, false, caller);
  if (checker) {
    checker->access(shared, size_t(bytes), true, false, caller);
    checker->forget(shared, size_t(bytes));
  }
  Copy copy = {shared, {}, bytes, self->copy_group};
  std::memcpy(copy.value, global, size_t(source_bytes));
  std::memset(shared, kPoison, size_t(bytes));
  self->copies.push_back(copy);
}

void copy_async_commit() { ++running()->copy_group; }

void copy_async_wait(int pending) {
  Thread* self = running();
  void* const caller = __builtin_return_address(0);
  size_t kept = 0;
  for (const Copy& copy : self->copies) {
    if (copy.group >= self->copy_group - pending) {
      self->copies[kept++] = copy;
      continue;
    }
    if (checker) checker->access(copy.shared, size_t(copy.bytes), true, false, caller);
    std::memcpy(copy.shared, copy.value, size_t(copy.bytes));
  }
  self->copies.resize(kept);
}

}  // namespace emulator

namespace nk {

int zero_async(void* data, size_t bytes, void*) {
  try {
    emulator::zero(data, bytes);
    return 0;
  } catch (const std::exception& error) {
    emulator::set_last_error(error.what());
    return 999;
  }
}

}  // namespace nk
