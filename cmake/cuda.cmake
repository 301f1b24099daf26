# Decides NK_CUDA, and before the language is enabled also the compiler and the architectures.
find_program(NORMKERN_NVCC nvcc
  HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED ENV{CUDACXX})
  set(NORMKERN_NVCC "$ENV{CUDACXX}")
endif()

if(NOT NORMKERN_CUDA STREQUAL "AUTO")
  set(NK_CUDA ${NORMKERN_CUDA})
elseif(NORMKERN_TORCH AND NOT NK_TORCH_CUDA)
  set(NK_CUDA OFF)
elseif(NORMKERN_NVCC)
  set(NK_CUDA ON)
else()
  set(NK_CUDA OFF)
  if(NORMKERN_TORCH)
    message(WARNING "normkern: PyTorch is a CUDA build but nvcc was not found, so only the CPU kernels are built; "
      "install the CUDA ${NK_TORCH_CUDA} toolkit or set CUDACXX")
  endif()
endif()
if(NK_CUDA AND NOT NORMKERN_NVCC)
  message(FATAL_ERROR "normkern: NORMKERN_CUDA asks for the CUDA kernels but nvcc was not found; install the CUDA "
    "toolkit, put nvcc on PATH or set CUDACXX, or set NORMKERN_CUDA=0 for the CPU kernels alone")
endif()

# TORCH_CUDA_ARCH_LIST in torch's notation ("8.0;9.0+PTX"), else the GPUs of this machine, else one of each generation.
# The result is a plain variable, not a cached one: a changed list must count in an old build directory. CMake's own
# default would be a single old architecture.
function(nk_cuda_architectures result)
  set(list "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT list)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE list ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(failed OR NOT list MATCHES "^[0-9]")
      set(list "8.0;9.0;10.0+PTX")
    endif()
  endif()
  string(REGEX REPLACE "[ ,\n]+" ";" list "${list}")
  list(REMOVE_DUPLICATES list)
  set(architectures "")
  foreach(entry IN LISTS list)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9]+[af]?)(\\+PTX)?$")
      message(FATAL_ERROR "normkern: TORCH_CUDA_ARCH_LIST holds '${entry}', which is not like 9.0, 9.0a or 9.0+PTX")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    if(CMAKE_MATCH_3)
      list(APPEND architectures ${number})  # machine code and PTX
    else()
      list(APPEND architectures ${number}-real)
    endif()
  endforeach()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

# One process holds torch's CUDA runtime and ours: they must be of one major version. A CPU build of torch has none.
function(nk_check_cuda_major)
  string(REGEX MATCH "^[0-9]+" ours "${CMAKE_CUDA_COMPILER_VERSION}")
  string(REGEX MATCH "^[0-9]+" theirs "${NK_TORCH_CUDA}")
  if(theirs AND NOT ours STREQUAL theirs)
    message(FATAL_ERROR "normkern: nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION} but PyTorch is built for CUDA "
      "${NK_TORCH_CUDA}; set CUDACXX to the nvcc of a CUDA ${theirs} toolkit, or NORMKERN_CUDA=0 for the CPU kernels "
      "alone")
  endif()
endfunction()

if(NK_CUDA)
  if(NOT DEFINED CACHE{CMAKE_CUDA_ARCHITECTURES})
    nk_cuda_architectures(CMAKE_CUDA_ARCHITECTURES)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "${NORMKERN_NVCC}")
  endif()
endif()
