# Finds XLA's FFI headers in the installed jaxlib, without importing jax.
#
# Sets CURVAX_XLA_INCLUDE_DIR and the interface target curvax_xla_ffi. A handler is refused by a
# runtime whose FFI version is below that of the headers, so a newer header than the pinned one is
# refused here rather than on a user's machine.
set(CURVAX_XLA_INCLUDE_DIR "" CACHE PATH "Folder that holds xla/ffi/api/ffi.h")
set(CURVAX_MAX_FFI_API_MINOR 3 CACHE STRING "Highest FFI API minor version to build against")

if(NOT CURVAX_XLA_INCLUDE_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util, pathlib; s = importlib.util.find_spec('jaxlib'); print(pathlib.Path(s.origin).parent / 'include')"
    OUTPUT_VARIABLE _curvax_include
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE _curvax_found)
  if(NOT _curvax_found EQUAL 0)
    message(FATAL_ERROR "curvax: jaxlib is not importable by ${Python_EXECUTABLE}; "
                        "install it or set CURVAX_XLA_INCLUDE_DIR")
  endif()
  set(CURVAX_XLA_INCLUDE_DIR "${_curvax_include}" CACHE PATH "" FORCE)
endif()

set(_curvax_c_api "${CURVAX_XLA_INCLUDE_DIR}/xla/ffi/api/c_api.h")
if(NOT EXISTS "${_curvax_c_api}")
  message(FATAL_ERROR "curvax: ${_curvax_c_api} does not exist; set CURVAX_XLA_INCLUDE_DIR")
endif()
file(STRINGS "${_curvax_c_api}" _curvax_minor REGEX "^#define XLA_FFI_API_MINOR")
string(REGEX REPLACE "[^0-9]" "" _curvax_minor "${_curvax_minor}")
message(STATUS "curvax: XLA FFI API 0.${_curvax_minor} from ${CURVAX_XLA_INCLUDE_DIR}")
if(_curvax_minor GREATER CURVAX_MAX_FFI_API_MINOR)
  message(FATAL_ERROR
    "curvax: FFI API 0.${_curvax_minor} headers would make a module that older jaxlib releases "
    "refuse; build against jaxlib 0.10.2 or raise CURVAX_MAX_FFI_API_MINOR knowingly")
endif()

add_library(curvax_xla_ffi INTERFACE)
target_include_directories(curvax_xla_ffi SYSTEM INTERFACE "${CURVAX_XLA_INCLUDE_DIR}")
