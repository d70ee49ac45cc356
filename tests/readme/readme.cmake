# The README and the pages of the documentation are compiled. The README's first C++ block is examples/quickstart.cpp to the
# letter, and its picture of the partition is what examples/partition.cpp prints. Each other C++ block is a statement of
# readme_test.cpp, which runs them all; what it prints then is in readme_test.output. A block of "c++" quotes a header.

include(tools/code_blocks.cmake)
set(pages ${PROJECT_SOURCE_DIR}/cmake/docs)

cca_code_blocks(${PROJECT_SOURCE_DIR}/README.md text picture)
cca_code_blocks(${PROJECT_SOURCE_DIR}/README.md cpp block)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/examples/partition.output
                                                               ${PROJECT_SOURCE_DIR}/examples/quickstart.cpp)
file(READ ${PROJECT_SOURCE_DIR}/examples/partition.output partition)
if(NOT picture_0 STREQUAL partition)
  message(FATAL_ERROR "README.md does not show examples/partition.output as it is")
endif()
file(READ ${PROJECT_SOURCE_DIR}/examples/quickstart.cpp quickstart)
if(NOT block_0 STREQUAL quickstart)
  message(FATAL_ERROR "README.md does not begin with examples/quickstart.cpp as it is")
endif()

set(snippets "")
set(first 1)  # behind the quickstart
foreach(page IN ITEMS ${PROJECT_SOURCE_DIR}/README.md ${pages}/threads.md ${pages}/decoding.md ${pages}/matrix_units.md ${pages}/models.md)
  cca_code_blocks(${page} cpp block)
  if(block_count LESS_EQUAL first)
    message(FATAL_ERROR "${page} has no snippet that could be compiled")
  endif()
  math(EXPR last "${block_count} - 1")
  foreach(i RANGE ${first} ${last})
    string(APPEND snippets "  {\n${block_${i}}  }\n")
  endforeach()
  set(first 0)
endforeach()

configure_file(readme/readme_test.cpp.in readme_test.cpp @ONLY)
cca_add_program(readme_test native ${CMAKE_CURRENT_BINARY_DIR}/readme_test.cpp)
target_link_libraries(readme_test PRIVATE $<TARGET_NAME_IF_EXISTS:OpenMP::OpenMP_CXX>)
add_test(NAME readme COMMAND ${CMAKE_COMMAND} -D PROGRAM=$<TARGET_FILE:readme_test>
                             -D GOLDEN=${CMAKE_CURRENT_SOURCE_DIR}/readme/readme_test.output
                             -P ${CMAKE_CURRENT_SOURCE_DIR}/tools/golden.cmake)

# The lines of the kernel that its page explains.
set(tile ${PROJECT_SOURCE_DIR}/include/cca/detail/engine/query_tile.hpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${tile})
file(READ ${tile} code)
string(REGEX REPLACE "[ \n]+" " " code "${code}")
cca_code_blocks(${pages}/kernel.md c++ quoted)
string(REGEX REPLACE "[ \n]+" " " quoted "${quoted_0}")
string(FIND "${code}" "${quoted}" found)
if(found EQUAL -1 OR NOT quoted_count EQUAL 1)
  message(FATAL_ERROR "kernel.md does not quote ${tile}: ${quoted}")
endif()
