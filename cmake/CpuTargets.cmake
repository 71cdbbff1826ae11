# Compiles one list of sources once for each CPU target: a set of instructions that they may use.
#
# curvax_add_cpu_targets(<prefix> SOURCES ...) makes the object libraries <prefix>_<target> and sets
# CURVAX_CPU_TARGETS in the caller. Each is compiled with CURVAX_TARGET=<target>, the name of the
# namespace that all its functions live in: an inline function shared by two targets would be merged
# by the linker into whichever it met first, AVX-512 code on a machine without it included.
function(curvax_add_cpu_targets prefix)
  cmake_parse_arguments(ARG "" "" "SOURCES" ${ARGN})
  set(targets base)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND targets v3 v4)
  endif()
  set(flags_base "")
  set(flags_v3 -march=x86-64-v3)
  # 256-bit registers are GCC's default preference even here; the kernels ask for 512 by type.
  set(flags_v4 -march=x86-64-v4 -mprefer-vector-width=512)
  foreach(target IN LISTS targets)
    set(library ${prefix}_${target})
    add_library(${library} OBJECT ${ARG_SOURCES})
    target_compile_definitions(${library} PRIVATE CURVAX_TARGET=${target})
    target_compile_options(${library} PRIVATE -O3 -fopenmp-simd -fno-exceptions -fno-rtti
      -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-unknown-pragmas
      ${flags_${target}} ${CURVAX_WARNINGS})
    target_include_directories(${library} PRIVATE
      "${PROJECT_SOURCE_DIR}/kernels/include" "${PROJECT_SOURCE_DIR}/kernels")
  endforeach()
  set(CURVAX_CPU_TARGETS ${targets} PARENT_SCOPE)
endfunction()
