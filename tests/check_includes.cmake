# cmake -P check_includes.cmake [include folder]: every header includes only headers above it in this list, which is the
# order in which the library is read, and xsimd and Eigen come in at one place each.

cmake_minimum_required(VERSION 3.25)

set(order
    # The words: no arithmetic on data yet.
    detail/target.hpp version.hpp detail/matrix_units.hpp tensor_view.hpp partition.hpp options.hpp executor.hpp
    # Vectors, rows, blocks of rows.
    detail/simd.hpp detail/convert.hpp detail/rows.hpp detail/transpose.hpp detail/row.hpp detail/tile.hpp
    detail/source.hpp detail/scratch.hpp
    # Matrix units: their products, and operands in pairs.
    detail/unit_product.hpp detail/pairs.hpp detail/unit_rows.hpp
    # The kernels of queries, and the engine around them.
    detail/query_tile.hpp detail/unit_tile.hpp detail/query_rows.hpp detail/query_stack.hpp detail/forward.hpp
    # What users call.
    pooling.hpp attention.hpp merge.hpp
    # The same backwards.
    detail/turn.hpp detail/gradient_tile.hpp detail/gradient_stack.hpp detail/unit_gradient_tile.hpp detail/unit_gradient_stack.hpp detail/backward.hpp
    detail/group_gradient.hpp
    gradient.hpp
    # Decoding.
    cache_shape.hpp detail/row_store.hpp kv_cache.hpp kv_cache_file.hpp
    # The textbook and the whole.
    reference.hpp cca.hpp
    # Compiled kernels behind the same functions.
    dispatch/plain.hpp dispatch/to_plain.hpp dispatch/kv_cache.hpp dispatch.hpp)

# Where what is not ours comes in.
set(home_of_xsimd detail/simd.hpp)
set(home_of_Eigen reference.hpp)

set(root ${CMAKE_CURRENT_LIST_DIR}/../include)
if(DEFINED CMAKE_ARGV3)
  set(root ${CMAKE_ARGV3})
endif()
cmake_path(ABSOLUTE_PATH root NORMALIZE)

set(faults "")
file(GLOB_RECURSE headers RELATIVE ${root}/cca ${root}/cca/*.hpp)
foreach(header IN LISTS headers)
  list(FIND order ${header} place)
  if(place EQUAL -1)
    list(APPEND faults "${header} has no place in the order of tests/check_includes.cmake")
  endif()
  cmake_path(GET header PARENT_PATH folder)
  file(STRINGS ${root}/cca/${header} lines REGEX "^ *#include ")
  foreach(line IN LISTS lines)
    if(line MATCHES "#include \"(.*)\"")
      set(included ${root}/cca/${folder}/${CMAKE_MATCH_1})
      cmake_path(NORMAL_PATH included)
      cmake_path(RELATIVE_PATH included BASE_DIRECTORY ${root}/cca)
      list(FIND order ${included} included_place)
      if(NOT included_place LESS place)
        list(APPEND faults "${header} includes ${included}, which is not above it")
      endif()
    elseif(line MATCHES "#include <(xsimd|Eigen)/")
      set(home ${home_of_${CMAKE_MATCH_1}})
      if(NOT header STREQUAL home)
        list(APPEND faults "${header} includes ${CMAKE_MATCH_1}, which is for ${home} to include")
      endif()
    elseif(line MATCHES "#include <cca/")
      list(APPEND faults "${header} includes a header of the library as if it were installed: ${line}")
    endif()
  endforeach()
endforeach()

foreach(header IN LISTS order)
  if(NOT header IN_LIST headers)
    list(APPEND faults "${header} is in the order, but not in include/cca")
  endif()
endforeach()

if(faults)
  list(JOIN faults "\n" faults)
  message(FATAL_ERROR "${faults}")
endif()
list(LENGTH headers count)
message(STATUS "${count} headers include downwards")
