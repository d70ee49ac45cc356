# cmake -P check_pages.cmake [folder of the project]: what the pages of Markdown link to is there, their tables have a header,
# and the README is short.

cmake_minimum_required(VERSION 3.25)

set(root ${CMAKE_CURRENT_LIST_DIR}/../..)
if(DEFINED CMAKE_ARGV3)
  set(root ${CMAKE_ARGV3})
endif()
cmake_path(ABSOLUTE_PATH root NORMALIZE)

set(faults "")
set(count 0)
file(GLOB_RECURSE pages RELATIVE ${root} ${root}/README.md ${root}/.github/*.md ${root}/bench/*.md ${root}/cmake/*.md
     ${root}/examples/*.md)
foreach(page IN LISTS pages)
  cmake_path(GET page PARENT_PATH folder)
  file(READ ${root}/${page} text)
  if(text MATCHES "\n\n(\\|[-:| ]*-[-:| ]*\\|)\n")
    list(APPEND faults "${page} has a table without a header: ${CMAKE_MATCH_1}")
  endif()
  # A bracket would hold elements of a list together. A lambda expression, which looks alike, has spaces in its parameters.
  string(REPLACE "](" "\n@link " text "${text}")
  string(REGEX MATCHALL "\n@link [^ )]*\\)" links "${text}")
  foreach(link IN LISTS links)
    string(REGEX REPLACE "\n@link |\\)|#.*" "" link "${link}")
    math(EXPR count "${count} + 1")
    if(NOT link MATCHES "^https?://|^$" AND NOT EXISTS ${root}/${folder}/${link})
      list(APPEND faults "${page} links to ${link}, which is not there")
    endif()
  endforeach()
endforeach()

file(READ ${root}/README.md text)
string(REGEX MATCHALL "\n" lines "${text}")
list(LENGTH lines length)
if(length GREATER 160)
  list(APPEND faults "README.md has ${length} lines, at most 160 are read")
endif()

if(faults)
  list(JOIN faults "\n" faults)
  message(FATAL_ERROR "${faults}")
endif()
list(LENGTH pages pages)
message(STATUS "${count} links of ${pages} pages")
