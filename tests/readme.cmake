# The README is compiled: its first C++ block is examples/quickstart.cpp to the letter, and each other one is a statement
# of readme_test.cpp, which runs them; what it prints then is in readme_test.output. The README's picture of the partition is
# what examples/partition.cpp prints.

include(code_blocks.cmake)

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/README.md
                                                               ${PROJECT_SOURCE_DIR}/examples/partition.output
                                                               ${PROJECT_SOURCE_DIR}/examples/quickstart.cpp)
file(READ ${PROJECT_SOURCE_DIR}/README.md rest)
file(READ ${PROJECT_SOURCE_DIR}/examples/partition.output picture)
string(FIND "${rest}" "```text\n${picture}```\n" start)
if(start EQUAL -1)
  message(FATAL_ERROR "README.md does not show examples/partition.output as it is")
endif()
file(READ ${PROJECT_SOURCE_DIR}/examples/quickstart.cpp quickstart)

string(FIND "${rest}" "```cpp\n${quickstart}```\n" start)
if(start EQUAL -1)
  message(FATAL_ERROR "README.md does not show examples/quickstart.cpp as it is")
endif()
string(LENGTH "```cpp\n${quickstart}```\n" length)
math(EXPR end "${start} + ${length}")
string(SUBSTRING "${rest}" ${end} -1 rest)

set(snippets "")
while(TRUE)
  string(FIND "${rest}" "```cpp\n" start)
  if(start EQUAL -1)
    break()
  endif()
  math(EXPR start "${start} + 7")
  string(SUBSTRING "${rest}" ${start} -1 rest)
  string(FIND "${rest}" "```" end)
  string(SUBSTRING "${rest}" 0 ${end} snippet)
  string(APPEND snippets "  {\n${snippet}  }\n")
  math(EXPR end "${end} + 3")
  string(SUBSTRING "${rest}" ${end} -1 rest)
endwhile()

configure_file(readme_test.cpp.in readme_test.cpp @ONLY)
cca_add_program(readme_test native ${CMAKE_CURRENT_BINARY_DIR}/readme_test.cpp)
target_link_libraries(readme_test PRIVATE $<TARGET_NAME_IF_EXISTS:OpenMP::OpenMP_CXX>)
add_test(NAME readme COMMAND ${CMAKE_COMMAND} -D PROGRAM=$<TARGET_FILE:readme_test>
                             -D GOLDEN=${CMAKE_CURRENT_SOURCE_DIR}/readme_test.output
                             -P ${CMAKE_CURRENT_SOURCE_DIR}/golden.cmake)

# The lines of the kernel that its page explains.
set(tile ${PROJECT_SOURCE_DIR}/include/cca/detail/engine/query_tile.hpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${tile})
file(READ ${tile} code)
string(REGEX REPLACE "[ \n]+" " " code "${code}")
cca_code_blocks(${PROJECT_SOURCE_DIR}/cmake/docs/kernel.md c++ quoted)
string(REGEX REPLACE "[ \n]+" " " quoted "${quoted_0}")
string(FIND "${code}" "${quoted}" found)
if(found EQUAL -1 OR NOT quoted_count EQUAL 1)
  message(FATAL_ERROR "kernel.md does not quote ${tile}: ${quoted}")
endif()
