# cmake -P check_includes.cmake [include folder]: every header includes only headers above it in this list, which is the
# order in which the library is read, and xsimd and Eigen come in at one place each.

cmake_minimum_required(VERSION 3.25)

set(order
    # Words that callers use: no arithmetic on data yet.
    detail/base/language.hpp version.hpp detail/base/target.hpp detail/base/function_ref.hpp detail/base/numbers.hpp detail/base/refuse.hpp
    detail/base/float_mode.hpp element.hpp tensor_view.hpp partition.hpp options.hpp executor.hpp call.hpp
    # Words that kernels use, and the checks of what callers say.
    detail/base/processor.hpp detail/product/choose_unit.hpp
    detail/base/validate_options.hpp detail/base/validate_views.hpp detail/base/validate_selection.hpp
    detail/base/validate.hpp
    detail/base/scratch.hpp detail/base/turn.hpp detail/base/checked_stream.hpp
    # Vectors.
    detail/simd/arch.hpp detail/simd/simd.hpp detail/simd/convert.hpp detail/simd/wanted_memory.hpp detail/simd/transpose.hpp detail/context/row_span.hpp
    detail/simd/register_block.hpp detail/simd/dot.hpp
    # Who sees which rows, and which task does what.
    detail/context/source.hpp detail/context/far_visible.hpp detail/context/tasks.hpp detail/context/sources.hpp detail/context/visible.hpp
    detail/context/row_store.hpp
    # From scores to weights.
    detail/softmax/row_softmax.hpp detail/softmax/score_shift.hpp detail/softmax/score_rule.hpp detail/softmax/lane_softmax.hpp
    detail/softmax/scaled_softmax.hpp
    # What multiplies.
    detail/product/vector_rows.hpp detail/product/vectors.hpp detail/product/operands.hpp detail/product/amx.hpp detail/product/avx512_bf16.hpp
    detail/product/multiply_pairs.hpp detail/product/pairs.hpp detail/product/staged_rows.hpp
    detail/product/sixteen_bit_parts.hpp detail/product/sixteen_bit_gradients.hpp detail/product/sixteen_bits.hpp
    detail/product/avx_vnni.hpp detail/product/vnni.hpp detail/product/byte_rows.hpp detail/product/staged_bytes.hpp detail/product/eight_bits.hpp
    detail/product/list.hpp
    # From groups to cores.
    detail/pool/observers.hpp detail/pool/group_rows.hpp detail/pool/observing.hpp
    detail/pool/last_query.hpp detail/pool/max.hpp detail/pool/mean.hpp detail/pool/select.hpp detail/pool/pooler.hpp
    # The kernels of queries, and the engines around them.
    detail/engine/gathered_rows.hpp detail/engine/partial_result.hpp detail/engine/query_tile.hpp
    detail/engine/stack.hpp detail/engine/few_queries.hpp detail/engine/sequence_shape.hpp detail/engine/forward.hpp
    detail/engine/gradient_tile.hpp detail/engine/backward.hpp detail/engine/bias_sums.hpp
    # What users call.
    pooling.hpp detail/engine/plan.hpp attention.hpp merge.hpp detail/engine/gradient_plan.hpp gradient.hpp cache_shape.hpp
    quantize.hpp detail/context/step_observers.hpp detail/context/cached_sequences.hpp detail/context/kept_tokens.hpp kv_cache.hpp kv_cache_file.hpp
    # The textbook and the whole.
    reference_operands.hpp reference_pooling.hpp reference.hpp reference_gradient.hpp cca.hpp
    # The same across machines.
    mpi/layout.hpp mpi/plan.hpp mpi/cost.hpp mpi/communicator.hpp mpi/agreement.hpp mpi/validate.hpp mpi/exchange.hpp mpi/rows.hpp mpi/rank_call.hpp
    mpi/forward.hpp mpi/far_rows.hpp mpi/backward.hpp mpi/merge.hpp mpi/prompt.hpp mpi/cache_share.hpp mpi/kv_cache.hpp mpi.hpp
    # Compiled kernels behind the same functions.
    dispatch/plain.hpp dispatch/to_plain.hpp dispatch/kv_cache.hpp dispatch.hpp
    dispatch/c_tensors.hpp dispatch/c_arguments.hpp dispatch/c_status.hpp)

# Where what is not ours comes in.
set(home_of_xsimd detail/simd/arch.hpp)
set(home_of_Eigen reference_pooling.hpp)

set(root ${CMAKE_CURRENT_LIST_DIR}/../../include)
if(DEFINED CMAKE_ARGV3)
  set(root ${CMAKE_ARGV3})
endif()
cmake_path(ABSOLUTE_PATH root NORMALIZE)

set(faults "")
file(GLOB_RECURSE headers RELATIVE ${root}/cca ${root}/cca/*.hpp)
foreach(header IN LISTS headers)
  list(FIND order ${header} place)
  if(place EQUAL -1)
    list(APPEND faults "${header} has no place in the order of tests/tools/check_includes.cmake")
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
