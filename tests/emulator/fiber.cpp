// fiber.cpp: stacks and the switch between them, in assembly: a switch costs some 10 ns where swapcontext costs 400.
#include "fiber.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what the ABI calls preserved registers on the running stack, stores the stack pointer in *save, and does the
// reverse with the stack pointer `resume`.
extern "C" void emulator_switch_stack(void** save, void* resume);

#if defined(__x86_64__)
asm(R"(
.text
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
constexpr size_t kFrameWords = 8, kReturnWord = 6;  // six registers, the return address, and one word for alignment
#elif defined(__aarch64__)
asm(R"(
.text
.type emulator_switch_stack, %function
emulator_switch_stack:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
constexpr size_t kFrameWords = 20, kReturnWord = 1;
#else
#error "the emulator knows how to switch stacks on x86-64 and aarch64 only"
#endif

namespace emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;  // red zones and unoptimized frames
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kStacksPerMapping = 64;
constexpr char kCanary[] = "emulator canary";

// Stacks are carved from large mappings (the system limits their number) and never given back.
char* new_stack() {
  static char* next = nullptr;
  static size_t left = 0;
  if (left == 0) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mapping = mmap(nullptr, kStackBytes * kStacksPerMapping, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapping == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of so many threads");
    next = static_cast<char*>(mapping);
    left = kStacksPerMapping;
  }
  --left;
  char* stack = next;
  next += kStackBytes;
  return stack;
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) {
    fiber.stack = new_stack();
    fiber.bytes = kStackBytes;
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, fiber.bytes);
#endif
  std::memcpy(fiber.stack, kCanary, sizeof kCanary);
  // Stacks start at different offsets within a page, or all hot frames would compete for the same few cache sets.
  const size_t color = reinterpret_cast<uintptr_t>(fiber.stack) / kStackBytes % 64 * 64;
  void** frame = reinterpret_cast<void**>(fiber.stack + fiber.bytes - 64 - color) - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof(void*));
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = frame;
  fiber.sanitizer_frame = nullptr;
}

void adopt_this_stack(Fiber& fiber) {
  if (fiber.stack) return;
  pthread_attr_t attributes;
  void* stack = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes)) abort();
  pthread_attr_getstack(&attributes, &stack, &fiber.bytes);
  pthread_attr_destroy(&attributes);
  fiber.stack = static_cast<char*>(stack);
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.sanitizer_frame, to.stack, to.bytes);
#endif
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.sanitizer_frame, nullptr, nullptr);
#endif
}

void enter_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void leave_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.bytes);
#endif
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
  abort();
}

bool stack_overflowed(const Fiber& fiber) { return std::memcmp(fiber.stack, kCanary, sizeof kCanary) != 0; }

}  // namespace emulator
