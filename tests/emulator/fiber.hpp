// fiber.hpp: stacks and the switch between them.
#pragma once

#include <cstddef>

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest address
  size_t bytes = 0;
  void* sanitizer_frame = nullptr;  // what AddressSanitizer keeps for a stack that is not running
};

// Makes the fiber start in `entry`, which never returns, on its next switch. Its stack is allocated once and kept.
void prepare(Fiber& fiber, void (*entry)());
// Describes the stack of the calling OS thread, so that fibers can switch back to it.
void adopt_this_stack(Fiber& fiber);
void switch_fiber(Fiber& from, Fiber& to);
// First thing in `entry`.
void enter_fiber();
// Switches away for good.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);
bool stack_overflowed(const Fiber& fiber);

}  // namespace emulator
