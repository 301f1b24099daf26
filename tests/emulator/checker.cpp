// checker.cpp: holds every memory access of a kernel against CUDA's rules.
//
// Kernel files are compiled with -fsanitize=thread, which puts a call of __tsan_* before each load and store, and are
// linked with the functions of this file instead of the sanitizer's library. Found are, on whatever schedule ran:
// races by CUDA's own ordering (see Knowledge in state.hpp), accesses out of bounds at any distance, reads of what was
// never written, writes to inputs, misaligned accesses.
#include <algorithm>

#include "state.hpp"

// The linker's: this library's image lies between them.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

namespace emulator {
namespace {

// Who made an access, and how far its clocks were.
struct Moment {
  uint32_t thread, warp, block, cluster;
  uint32_t clock, warp_epoch, block_epoch, cluster_epoch, grid_epoch;
};

// The last accesses to one grain of memory, as moments and return addresses (offsets into the image). Two readers are
// kept, from as different places as possible.
struct Cell {
  uint32_t writer = 0, reader = 0, other_reader = 0;
  uint32_t write_code = 0, read_code = 0;
  bool written = false, by_atomic = false;
};

struct Region {
  uintptr_t first, last;  // [first, last)
  Use use;
  int shift;  // log2 of the grain
  std::string name;
  std::vector<Cell> cells;

  size_t cell_of(uintptr_t address) const { return (address - first) >> shift; }
};

class AccessChecker final : public Checker {
 public:
  void add_region(void* data, size_t bytes, Use use, const char* name, int grain) override {
    auto region = std::make_unique<Region>();
    region->first = reinterpret_cast<uintptr_t>(data);
    region->last = region->first + bytes;
    region->use = use;
    region->shift = grain == 8 ? 3 : grain == 4 ? 2 : grain == 2 ? 1 : 0;
    region->name = name;
    Cell cell;
    cell.written = use != Use::Out;
    region->cells.assign((bytes + size_t(grain) - 1) / size_t(grain), cell);
    const auto after = std::upper_bound(regions_.begin(), regions_.end(), region,
                                        [](const auto& a, const auto& b) { return a->first < b->first; });
    regions_.insert(after, std::move(region));
  }

  void drop_region(void* data) override {
    recent_[0] = recent_[1] = recent_[2] = nullptr;
    const uintptr_t first = reinterpret_cast<uintptr_t>(data);
    const auto at = std::find_if(regions_.begin(), regions_.end(), [&](const auto& r) { return r->first == first; });
    if (at != regions_.end()) regions_.erase(at);
  }

  void begin_launch() override {
    constexpr uint32_t kRestart = 3'000'000'000u;
    first_moment_ += uint32_t(moments_.size());  // whatever older launches did is ordered before
    moments_.clear();
    if (first_moment_ < kRestart) return;
    first_moment_ = 1;
    for (auto& region : regions_)
      for (Cell& cell : region->cells) cell.writer = cell.reader = cell.other_reader = 0;
  }

  void access(const void* address, size_t bytes, bool write, bool atomic, void* caller) override {
    if (write) {
      atomic ? touch<true, true>(address, bytes, caller) : touch<true, false>(address, bytes, caller);
    } else {
      touch<false, false>(address, bytes, caller);
    }
  }

  void forget(const void* address, size_t bytes) override {
    const uintptr_t first = reinterpret_cast<uintptr_t>(address);
    if (Region* region = find(first))
      for (size_t i = region->cell_of(first); i <= region->cell_of(first + bytes - 1); ++i)
        region->cells[i].written = false;
  }

  void host_writes(const void* address, size_t bytes) override {
    if (bytes == 0) return;
    const uintptr_t first = reinterpret_cast<uintptr_t>(address);
    Region* region = find(first);
    if (!region || first + bytes > region->last) fail("out of bounds: a memset of %zu bytes", bytes);
    if (region->use == Use::In) fail("write to read-only %s by a memset", region->name.c_str());
    for (size_t i = region->cell_of(first); i <= region->cell_of(first + bytes - 1); ++i) {
      Cell fresh;
      fresh.written = true;
      region->cells[i] = fresh;
    }
  }

  void require_written(void* data) override {
    Region* region = find(reinterpret_cast<uintptr_t>(data));
    if (!region) return;
    for (size_t i = 0; i < region->cells.size(); ++i)
      if (!region->cells[i].written) fail("%s + %zu bytes was never written", region->name.c_str(), i << region->shift);
  }

  // A load or store of the kernel, from a hook.
  template <bool write>
  __attribute__((always_inline)) inline void hook(const void* address, size_t bytes, size_t alignment, void* caller) {
    if (!current || emulator_busy) return;
    const Thread* self = running();
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at - reinterpret_cast<uintptr_t>(self->fiber.stack) < self->fiber.bytes) return;
    if (options.preempt_ppm) maybe_yield(options.preempt_ppm);
    if (at & (alignment - 1)) fail("misaligned %zu-byte access at %s", bytes, lines_of(caller).c_str());
    touch<write, false>(address, bytes, caller);
  }

 private:
  std::vector<std::unique_ptr<Region>> regions_;  // by address
  Region* recent_[3] = {};
  std::vector<Moment> moments_;
  uint32_t first_moment_ = 1;  // number of moments_[0]; what is smaller belongs to an older launch

  const Moment& moment(uint32_t number) const { return moments_[number - first_moment_]; }

  uint32_t now(Thread& thread) {
    if (thread.moment == 0) {
      thread.moment = first_moment_ + uint32_t(moments_.size());
      moments_.push_back(Moment{thread.id, thread.warp->id, thread.owner->id, thread.owner->cluster->id, thread.clock,
                                thread.warp_epoch, thread.block_epoch, thread.cluster_epoch, thread.grid_epoch});
    }
    return thread.moment;
  }

  // Did that access end before anything this thread does now begins?
  bool ordered(uint32_t number, const Thread& thread) const {
    if (number < first_moment_ || number == thread.moment) return true;
    const Moment& m = moment(number);
    if (m.thread == thread.id || m.grid_epoch < thread.grid_epoch) return true;
    if (m.block == thread.owner->id && m.block_epoch < thread.block_epoch) return true;
    if (m.warp == thread.warp->id && m.warp_epoch < thread.warp_epoch) return true;
    if (m.cluster == thread.owner->cluster->id && m.cluster_epoch < thread.cluster_epoch) return true;
    const Knowledge* known = thread.known.get();
    return known && (known->of(Knowledge::key(Scope::block, m.block)) > m.block_epoch ||
                     known->of(Knowledge::key(Scope::warp, m.warp)) > m.warp_epoch ||
                     known->of(Knowledge::key(Scope::cluster, m.cluster)) > m.cluster_epoch ||
                     known->of(Knowledge::key(Scope::thread, m.thread)) > m.clock);
  }

  // 2: different blocks, 1: different warps, 0: the same warp.
  int distance(uint32_t a, uint32_t b) const {
    const Moment &x = moment(a), &y = moment(b);
    return x.block != y.block ? 2 : x.warp != y.warp ? 1 : 0;
  }

  Region* find(uintptr_t address) {
    for (Region* region : recent_)
      if (region && address - region->first < region->last - region->first) return region;
    auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                  [](uintptr_t a, const auto& region) { return a < region->first; });
    if (after == regions_.begin()) return nullptr;
    Region* region = std::prev(after)->get();
    if (address >= region->last) return nullptr;
    recent_[2] = recent_[1];
    recent_[1] = recent_[0];
    recent_[0] = region;
    return region;
  }

  // Memory that is neither a region nor an error: the thread's own view, launch arguments, constants of this library.
  bool is_host_memory(uintptr_t at, size_t bytes, bool write) const {
    const auto inside = [&](const void* first, const void* last) {
      return at >= reinterpret_cast<uintptr_t>(first) && at + bytes <= reinterpret_cast<uintptr_t>(last);
    };
    if (write) return false;
    return inside(current, current + 1) || inside(__ehdr_start, _end) ||
           inside(grid.call.arguments, static_cast<char*>(grid.call.arguments) + grid.call.argument_bytes);
  }

  template <bool write, bool atomic>
  void touch(const void* address, size_t bytes, void* caller) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    Region* region = find(at);
    if (!region || at + bytes > region->last) {
      if (is_host_memory(at, bytes, write)) return;
      report_out_of_bounds(at, bytes, write, caller);
    }
    if (write && region->use == Use::In)
      report("write to read-only " + region->name + offset_text(*region, at) + " at " + lines_of(caller));
    Thread& self = *running();
    const uint32_t own = now(self);
    const uint32_t code = uint32_t(static_cast<char*>(caller) - __ehdr_start);
    Cell* cell = &region->cells[region->cell_of(at)];
    Cell* const end = &region->cells[region->cell_of(at + bytes - 1)] + 1;
    for (; cell != end; ++cell) {
      if (!write || atomic) {
        if (!cell->written) report_uninitialized(*region, *cell, caller);
        if (!(atomic && cell->by_atomic) && !ordered(cell->writer, self))
          report_race(atomic ? "atomic" : "read", *region, *cell, cell->writer, "write", cell->write_code, caller);
      }
      if (!write) {
        note_reader(*cell, own, self);
        cell->read_code = code;
        continue;
      }
      const char* kind = atomic ? "atomic" : "write";
      if (!atomic && !ordered(cell->writer, self))
        report_race(kind, *region, *cell, cell->writer, "write", cell->write_code, caller);
      for (const uint32_t reader : {cell->reader, cell->other_reader})
        if (!ordered(reader, self)) report_race(kind, *region, *cell, reader, "read", cell->read_code, caller);
      cell->writer = own;
      cell->write_code = code;
      cell->by_atomic = atomic;
      cell->written = true;
    }
  }

  void note_reader(Cell& cell, uint32_t own, const Thread& self) {
    if (ordered(cell.reader, self)) {
      cell.reader = own;
    } else if (ordered(cell.other_reader, self) ||
               distance(cell.reader, own) > distance(cell.reader, cell.other_reader)) {
      cell.other_reader = own;
    }
  }

  static std::string offset_text(const Region& region, uintptr_t at) {
    return " + " + std::to_string(at - region.first) + " bytes";
  }
  static std::string offset_text(const Region& region, const Cell& cell) {
    return " + " + std::to_string(size_t(&cell - region.cells.data()) << region.shift) + " bytes";
  }

  [[noreturn]] void report(const std::string& text) {
    emulator_busy = true;
    fail("%s", text.c_str());
  }

  __attribute__((noinline)) [[noreturn]] void report_uninitialized(const Region& region, const Cell& cell,
                                                                   void* caller) {
    emulator_busy = true;
    report("uninitialized read of " + region.name + offset_text(region, cell) + " at " + lines_of(caller));
  }

  __attribute__((noinline)) [[noreturn]] void report_race(const char* kind, const Region& region, const Cell& cell,
                                                          uint32_t other, const char* other_kind, uint32_t other_code,
                                                          void* caller) {
    emulator_busy = true;
    report(std::string("race: ") + kind + " of " + region.name + offset_text(region, cell) + " at " + lines_of(caller) +
           " with the " + other_kind + " by " + name_of(moment(other).thread) + " at " +
           lines_of(__ehdr_start + other_code) + "; no barrier or fence orders them");
  }

  __attribute__((noinline)) [[noreturn]] void report_out_of_bounds(uintptr_t at, size_t bytes, bool write,
                                                                   void* caller) {
    emulator_busy = true;
    const Region *below = nullptr, *above = nullptr;
    for (const auto& region : regions_) {
      if (region->first <= at) {
        below = region.get();
      } else {
        above = region.get();
        break;
      }
    }
    if (below && above && above->first - at < at - below->last) below = nullptr;
    std::string where = "no buffer is near";
    if (below) {
      where = std::to_string(at - below->first) + " bytes past the start of " + below->name + " (" +
              std::to_string(below->last - below->first) + " bytes)";
    } else if (above) {
      where = std::to_string(above->first - at) + " bytes before " + above->name;
    }
    report("out of bounds: " + std::to_string(bytes) + "-byte " + (write ? "write" : "read") + " at " +
           lines_of(caller) + ", " + where);
  }
};

AccessChecker instance;
const bool installed = (checker = &instance, true);

}  // namespace
}  // namespace emulator

// ---- what the compiler calls

#define CALLER __builtin_return_address(0)
#define READ(bytes, alignment) emulator::instance.hook<false>(address, bytes, alignment, CALLER)
#define WRITE(bytes, alignment) emulator::instance.hook<true>(address, bytes, alignment, CALLER)
#define HOOKS_FOR_SIZE(N, alignment)                                    \
  void __tsan_read##N(void* address) { READ(N, alignment); }            \
  void __tsan_write##N(void* address) { WRITE(N, alignment); }          \
  void __tsan_volatile_read##N(void* address) { READ(N, alignment); }   \
  void __tsan_volatile_write##N(void* address) { WRITE(N, alignment); } \
  void __tsan_unaligned_read##N(void* address) { READ(N, 1); }          \
  void __tsan_unaligned_write##N(void* address) { WRITE(N, 1); }        \
  void __tsan_unaligned_volatile_read##N(void* address) { READ(N, 1); } \
  void __tsan_unaligned_volatile_write##N(void* address) { WRITE(N, 1); }

extern "C" {
HOOKS_FOR_SIZE(1, 1)
HOOKS_FOR_SIZE(2, 2)
HOOKS_FOR_SIZE(4, 4)
HOOKS_FOR_SIZE(8, 8)
HOOKS_FOR_SIZE(16, 1)  // a pair of doubles counts as one: loads of Vec are checked by check_aligned
void __tsan_read_range(void* address, unsigned long bytes) { READ(bytes, 1); }
void __tsan_write_range(void* address, unsigned long bytes) { WRITE(bytes, 1); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of host-side static variables.
char __tsan_atomic8_load(const volatile char* address, int) { return __atomic_load_n(address, __ATOMIC_SEQ_CST); }
void __tsan_atomic_thread_fence(int) {}
}
