# The tests of the host kernels as a program, built with the sanitizers of FASTBERT_SANITIZE.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT OpenMP_CXX_FOUND)
  message(FATAL_ERROR "FASTBERT_SANITIZE is '${FASTBERT_SANITIZE}', which takes GCC and its OpenMP")
endif()

add_executable(host_kernels tests/native/host_kernels.cpp tests/native/parallel.cpp)
target_link_libraries(host_kernels PRIVATE host)
target_include_directories(host_kernels PRIVATE csrc)
# The pragmas call parallel.cpp: GCC's own OpenMP isn't linked, because the thread sanitizer can't see what it does.
target_compile_options(host_kernels PRIVATE ${OpenMP_CXX_FLAGS} -g -fno-omit-frame-pointer -Wno-maybe-uninitialized
  -fsanitize=${FASTBERT_SANITIZE} -fno-sanitize-recover=all)
target_link_options(host_kernels PRIVATE -fsanitize=${FASTBERT_SANITIZE} -pthread)
# Tiles in memory that the sanitizers watch, on processors without AMX too.
set_source_files_properties(csrc/attention/amx.cpp csrc/linear/amx.cpp PROPERTIES
  COMPILE_OPTIONS "-include;${CMAKE_CURRENT_SOURCE_DIR}/tests/native/tiles.h")
