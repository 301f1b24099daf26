// collectives.cpp: what several threads do together: barriers of a block, cluster or grid, and warp collectives.
#include <cstring>

#include "state.hpp"

namespace emulator {
namespace {

enum class Level { block, cluster, grid };

const char* barrier_name(Level level) {
  return level == Level::block ? "__syncthreads" : level == Level::cluster ? "cluster_sync" : "grid_sync";
}

void meet(Barrier& barrier, int64_t alive, int64_t exited, Level level, Site site) {
  Thread* self = running();
  const char* name = barrier_name(level);
  if (exited)
    fail("%s at %s:%d after %lld thread(s) have exited", name, site.file, site.line, static_cast<long long>(exited));
  if (barrier.arrived && (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file)))
    fail("divergent barrier: %s at %s:%d while others wait at %s:%d", name, site.file, site.line, barrier.site.file,
         barrier.site.line);
  barrier.site = site;
  learn(barrier.gathered, self->known);
  if (++barrier.arrived < alive) {
    barrier.waiting.push_back(self);
    wait_for(name, site);
  } else {
    barrier.arrived = 0;
    barrier.result = std::move(barrier.gathered);  // the next round gathers anew while this one is still handed out
    barrier.gathered = nullptr;
    for (Thread* other : barrier.waiting) make_ready(other);
    barrier.waiting.clear();
    yield();
  }
  learn(self->known, barrier.result);
  ++self->block_epoch;
  if (level != Level::block) ++self->cluster_epoch;
  if (level == Level::grid) ++self->grid_epoch;
  ++self->clock;
  self->moment = 0;
}

constexpr const char* kSync = "__syncwarp";
constexpr const char* kShuffle = "a warp shuffle";
constexpr const char* kVote = "a warp vote";
constexpr const char* kReduce = "a warp reduction";

std::vector<std::unique_ptr<Meeting>> spare;

Meeting* join(uint32_t mask, const char* name, Site site) {
  Thread* self = running();
  Warp& warp = *self->warp;
  const uint32_t own = 1u << self->lane;
  if (!(mask & own)) fail("%s at %s:%d: lane %d calls with mask %08x", name, site.file, site.line, self->lane, mask);
  for (auto& open : warp.open) {
    if (open->mask != mask || open->complete || (open->arrived & own)) continue;
    if (open->name != name || open->site.line != site.line)
      fail("divergent warp collective: %s at %s:%d meets %s at %s:%d", name, site.file, site.line, open->name,
           open->site.file, open->site.line);
    return open.get();
  }
  if (spare.empty()) spare.push_back(std::make_unique<Meeting>());
  warp.open.push_back(std::move(spare.back()));
  spare.pop_back();
  Meeting* meeting = warp.open.back().get();
  meeting->name = name;
  meeting->site = site;
  meeting->mask = mask;
  meeting->arrived = meeting->left = meeting->votes = 0;
  meeting->complete = false;
  meeting->gathered = nullptr;
  std::memset(meeting->value, 0xff, sizeof meeting->value);  // what an absent lane is read as: NaN in every float type
  return meeting;
}

void complete(Warp& warp, Meeting* meeting, uint32_t waiting) {
  meeting->complete = true;
  for (; waiting; waiting &= waiting - 1) make_ready(warp.lane[__builtin_ctz(waiting)]);
}

// Brings this lane's part and returns when all lanes of the mask have brought theirs.
Meeting* gather(uint32_t mask, const char* name, const void* value, size_t bytes, bool vote, Site site) {
  Thread* self = running();
  Meeting* meeting = join(mask, name, site);
  const uint32_t own = 1u << self->lane;
  if (bytes) std::memcpy(meeting->value[self->lane], value, bytes);
  meeting->arrived |= own;
  if (vote) meeting->votes |= own;
  if (meeting->arrived == (mask & self->warp->alive)) {
    complete(*self->warp, meeting, meeting->arrived & ~own);
    yield();
  } else {
    wait_for(name, site);
  }
  return meeting;
}

void leave(Meeting* meeting) {
  Thread* self = running();
  meeting->left |= 1u << self->lane;
  if (meeting->left != meeting->arrived) return;
  auto& open = self->warp->open;
  for (auto& entry : open) {
    if (entry.get() != meeting) continue;
    spare.push_back(std::move(entry));
    if (&entry != &open.back()) entry = std::move(open.back());
    open.pop_back();
    return;
  }
}

}  // namespace

void block_barrier(Site site) {
  Block* block = running()->owner;
  meet(block->barrier, block->alive, block->exited, Level::block, site);
}

void cluster_barrier(Site site) {
  Cluster* cluster = running()->owner->cluster;
  meet(cluster->barrier, cluster->alive, cluster->exited, Level::cluster, site);
}

void grid_barrier(Site site) {
  if (!grid.config.cooperative) fail("grid_sync at %s:%d without a cooperative launch", site.file, site.line);
  meet(grid.barrier, grid.alive, grid.exited, Level::grid, site);
}

void warp_barrier(uint32_t mask, Site site) {
  Thread* self = running();
  const bool whole_warp = (mask & self->warp->born) == self->warp->born;
  Meeting* meeting = join(mask, kSync, site);
  learn(meeting->gathered, self->known);
  if (!whole_warp) {  // the lanes of the mask order each other: no epoch of the warp says that
    auto own = std::make_shared<Knowledge>();
    own->learn(Knowledge::key(Scope::thread, self->id), ++self->clock);
    learn(meeting->gathered, own);
  }
  gather(mask, kSync, nullptr, 0, false, site);
  learn(self->known, meeting->gathered);
  leave(meeting);
  if (whole_warp) ++self->warp_epoch;
  ++self->clock;
  self->moment = 0;
}

void shuffle_bytes(uint32_t mask, void* value, size_t bytes, int source, Site site) {
  Meeting* meeting = gather(mask, kShuffle, value, bytes, false, site);
  std::memcpy(value, meeting->value[source], bytes);
  leave(meeting);
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  Meeting* meeting = gather(mask, kVote, nullptr, 0, predicate, site);
  const uint32_t votes = meeting->votes;
  leave(meeting);
  return votes;
}

int64_t reduce(uint32_t mask, int64_t value, Reduction how, Site site) {
  Meeting* meeting = gather(mask, kReduce, &value, sizeof value, false, site);
  int64_t result = value;
  for (int lane = 0; lane < 32; ++lane) {
    if (lane == running()->lane || !(meeting->arrived >> lane & 1)) continue;
    int64_t other;
    std::memcpy(&other, meeting->value[lane], sizeof other);
    if (how == Reduction::add) result += other;
    if (how == Reduction::min && other < result) result = other;
    if (how == Reduction::max && other > result) result = other;
  }
  leave(meeting);
  return result;
}

void thread_exits(Thread* self) {
  Block* block = self->owner;
  Cluster* cluster = block->cluster;
  self->done = true;
  grid.idle_spins = 0;
  self->warp->alive &= ~(1u << self->lane);
  --block->alive, ++block->exited;
  --cluster->alive, ++cluster->exited;
  --grid.alive, ++grid.exited;
  const auto note = [&](const std::string& what) {
    if (grid.error.empty()) grid.error = what + "; in kernel " + kernel_name() + ", " + name_of(self->id);
  };
  for (const Barrier* barrier : {&block->barrier, &cluster->barrier, &grid.barrier})
    if (barrier->arrived)
      note("thread exited while others wait at the barrier at " + std::string(barrier->site.file) + ":" +
           std::to_string(barrier->site.line));
  if (!self->copies.empty()) note("thread exited with asynchronous copies that have not landed");
  for (auto& meeting : self->warp->open)
    if (!meeting->complete && meeting->arrived == (meeting->mask & self->warp->alive))
      complete(*self->warp, meeting.get(), meeting->arrived);
  if (block->alive == 0) release_shared(*block);  // a later access through the cluster is a use after free
}

}  // namespace emulator
