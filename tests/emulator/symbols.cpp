// symbols.cpp: names for reports: functions and source lines of code addresses, threads of the grid.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.hpp"

namespace emulator {
namespace {

// The lines that addr2line prints for an address of this library; none where there is no addr2line.
std::vector<std::string> ask_addr2line(const char* flags, const void* code) {
  Dl_info info;
  if (!dladdr(const_cast<void*>(code), &info)) return {};
  const size_t offset = size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase));
  char command[4096], line[4096];
  snprintf(command, sizeof command, "addr2line %s -e '%s' 0x%zx 2>/dev/null", flags, info.dli_fname, offset);
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command, "r")) {
    while (fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, "\n")] = 0;
      lines.push_back(line);
    }
    pclose(pipe);
  }
  return lines;
}

}  // namespace

std::string lines_of(const void* code) {
  constexpr size_t kInlineLevels = 3;
  std::string all;
  size_t count = 0;
  // A return address is one past its call.
  for (const std::string& line : ask_addr2line("-i", static_cast<const char*>(code) - 1)) {
    if (++count > kInlineLevels) break;
    const size_t slash = line.rfind('/');
    const std::string name = slash == std::string::npos ? line : line.substr(slash + 1);
    all += (all.empty() ? "" : " < ") + name.substr(0, name.find(' '));
  }
  return all.empty() ? "an unknown line" : all;
}

std::string function_at(const void* code) {
  Dl_info info;
  std::string symbol;
  if (dladdr(const_cast<void*>(code), &info) && info.dli_sname && info.dli_saddr == code) {
    symbol = info.dli_sname;
  } else {  // a local symbol
    const std::vector<std::string> lines = ask_addr2line("-f", code);
    if (lines.empty()) return "?";
    symbol = lines[0];
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : symbol;
  free(demangled);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  int depth = 0;  // of template brackets: the parameter list opens outside them
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0 && name.compare(i, 11, "(anonymous ") != 0) return name.substr(0, i);
  }
  return name;
}

std::string kernel_name() { return function_at(grid.call.kernel); }

std::string name_of(uint32_t thread) {
  const auto triple = [](size_t i, dim3 size) {
    return "(" + std::to_string(i % size.x) + "," + std::to_string(i / size.x % size.y) + "," +
           std::to_string(i / (size_t(size.x) * size.y)) + ")";
  };
  const size_t count = volume(grid.config.block);
  return "block " + triple(thread / count, grid.config.grid) + " thread " + triple(thread % count, grid.config.block);
}

}  // namespace emulator
