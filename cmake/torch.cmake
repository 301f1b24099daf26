# Defines `torch_stable`: libtorch's stable ABI, for binaries that load under NORMKERN_TORCH_TARGET and later.
#
# Only paths are needed: torch is never imported, and find_package(Torch) is not used, because under a CUDA build of
# torch it demands the whole CUDA toolkit even for a CPU library.
if(NOT NORMKERN_TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE NORMKERN_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT EXISTS "${NORMKERN_TORCH_DIR}/version.py")
  message(FATAL_ERROR "normkern: PyTorch was not found; install torch>=${NORMKERN_TORCH_TARGET} first, or set "
    "NORMKERN_TORCH_DIR to its directory (now '${NORMKERN_TORCH_DIR}')")
endif()

file(STRINGS "${NORMKERN_TORCH_DIR}/version.py" NK_TORCH_LINES REGEX "^(__version__|cuda)")
string(REGEX MATCH "__version__ = '([^']+)'" NK_MATCH "${NK_TORCH_LINES}")
set(NK_TORCH_VERSION "${CMAKE_MATCH_1}")
string(REGEX MATCH "cuda[^=]*= '([0-9.]+)'" NK_MATCH "${NK_TORCH_LINES}")
set(NK_TORCH_CUDA "${CMAKE_MATCH_1}")  # empty for a CPU build
if(NK_TORCH_VERSION VERSION_LESS NORMKERN_TORCH_TARGET)
  message(FATAL_ERROR "normkern: PyTorch ${NK_TORCH_VERSION} is too old; install torch>=${NORMKERN_TORCH_TARGET}")
endif()

# TORCH_TARGET_VERSION is what makes a build against a newer torch load under an older one; it also turns every
# include of an unstable torch header into an error. The format is 0xMMmm000000000000.
string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" NK_MATCH "${NORMKERN_TORCH_TARGET}")
math(EXPR NK_TORCH_TARGET_CODE "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${NORMKERN_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE "TORCH_TARGET_VERSION=${NK_TORCH_TARGET_CODE}ULL")
target_link_libraries(torch_stable INTERFACE "${NORMKERN_TORCH_DIR}/lib/libtorch_cpu.so")
message(STATUS "torch ${NK_TORCH_VERSION} (CUDA '${NK_TORCH_CUDA}') at ${NORMKERN_TORCH_DIR}, "
  "binaries for ${NORMKERN_TORCH_TARGET} and later")

# Defines `torch_exact`: all of this torch, for what its stable ABI leaves out. Such a binary loads under no other.
add_library(torch_exact INTERFACE)
target_include_directories(torch_exact SYSTEM INTERFACE
  "${NORMKERN_TORCH_DIR}/include" "${NORMKERN_TORCH_DIR}/include/torch/csrc/api/include")
foreach(library torch_python torch_cpu c10)
  target_link_libraries(torch_exact INTERFACE "${NORMKERN_TORCH_DIR}/lib/lib${library}.so")
endforeach()
