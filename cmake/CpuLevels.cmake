# Compiles one list of sources once for each CPU instruction level.
#
# curvax_add_cpu_levels(<prefix> SOURCES ...) makes the object libraries <prefix>_<level> and sets
# CURVAX_CPU_LEVELS in the caller. Every level compiles with CURVAX_LEVEL=<level>, the name of the
# namespace that all its functions live in: an inline function shared by two levels would be merged
# by the linker into whichever it met first, AVX-512 code on a machine without it included.
function(curvax_add_cpu_levels prefix)
  cmake_parse_arguments(ARG "" "" "SOURCES" ${ARGN})
  set(levels base)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND levels v3 v4)
  endif()
  set(flags_base "")
  set(flags_v3 -march=x86-64-v3)
  # 256-bit registers are GCC's default preference even here; the kernels ask for 512 by type.
  set(flags_v4 -march=x86-64-v4 -mprefer-vector-width=512)
  foreach(level IN LISTS levels)
    set(target ${prefix}_${level})
    add_library(${target} OBJECT ${ARG_SOURCES})
    target_compile_definitions(${target} PRIVATE CURVAX_LEVEL=${level})
    target_compile_options(${target} PRIVATE -O3 -fopenmp-simd -fno-exceptions -fno-rtti
      -fno-math-errno -fno-trapping-math -Wno-psabi -Wno-unknown-pragmas
      ${flags_${level}} ${CURVAX_WARNINGS})
    target_include_directories(${target} PRIVATE
      "${PROJECT_SOURCE_DIR}/kernels/include" "${PROJECT_SOURCE_DIR}/kernels")
  endforeach()
  set(CURVAX_CPU_LEVELS ${levels} PARENT_SCOPE)
endfunction()
