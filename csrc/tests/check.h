// check.h: the few lines that a plain main() needs to be a test.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace normkern::test {

inline int checks = 0, failures = 0;

// Counts, and prints the first failures.
inline bool check(bool ok, const char* format, ...) __attribute__((format(printf, 2, 3)));
inline bool check(bool ok, const char* format, ...) {
  ++checks;
  if (ok) return true;
  if (++failures <= 20) {
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "FAILED: ");
    std::vfprintf(stderr, format, arguments);
    std::fprintf(stderr, "\n");
    va_end(arguments);
  }
  return false;
}

inline int report(const char* name) {
  std::printf("%s: %d checks, %d failures\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace normkern::test
