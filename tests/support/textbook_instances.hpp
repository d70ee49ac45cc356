#pragma once

// The textbook is compiled once for all tests of an instruction set, in textbook_instances.cpp: that takes longer than
// most of the tests do.

#include <cca/reference.hpp>
#include <cca/reference_gradient.hpp>

#if !defined(CCA_TEST_INSTANCE)
#define CCA_TEST_INSTANCE extern template
#endif

#define CCA_TEST_TEXTBOOK(Scalar)                                                                                      \
  CCA_TEST_INSTANCE Scalar softmax(vector<Scalar>&, Scalar);                                                           \
  CCA_TEST_INSTANCE std::pair<tensor<Scalar>, tensor<Scalar>> pool(const operands<Scalar>&, const options&);           \
  CCA_TEST_INSTANCE tensor<Scalar> core_biases(const operands<Scalar>&, const options&);                               \
  CCA_TEST_INSTANCE row_terms<Scalar> raw_terms(const operands<Scalar>&);                                              \
  CCA_TEST_INSTANCE row_terms<Scalar> far_terms(const far_operands<Scalar>&, std::int64_t);                            \
  CCA_TEST_INSTANCE row_terms<Scalar> core_terms(const options&, const tensor<Scalar>&, std::int64_t);                 \
  CCA_TEST_INSTANCE result<Scalar> attend(const operands<Scalar>&, tensor_view<const Scalar>,                          \
                                          tensor_view<const Scalar>, const options&, const seen_rows_of&,              \
                                          const raw_tokens_of&, const row_terms<Scalar>&);                             \
  CCA_TEST_INSTANCE result<Scalar> local_attention(const operands<Scalar>&, const options&);                           \
  CCA_TEST_INSTANCE result<Scalar> attention(const operands<Scalar>&, const options&);                                 \
  CCA_TEST_INSTANCE result<Scalar> attend(const operands<Scalar>&, const far_operands<Scalar>&, const options&);       \
  CCA_TEST_INSTANCE gradient<Scalar> pool_gradient(const operands<Scalar>&, tensor_view<const Scalar>,                 \
                                                   tensor_view<const Scalar>, const options&,                          \
                                                   const lse_view<const Scalar>&);                                     \
  CCA_TEST_INSTANCE gradient<Scalar> local_attention_gradient(                                                         \
      const operands<Scalar>&, const incoming_numbers<Scalar>&, const options&);                                       \
  CCA_TEST_INSTANCE gradient<Scalar> attention_gradient(const operands<Scalar>&, const incoming_numbers<Scalar>&,      \
                                                        const options&);                                               \
  CCA_TEST_INSTANCE gradient<Scalar> attend_gradient(const operands<Scalar>&, const far_operands<Scalar>&,             \
                                                     const incoming_numbers<Scalar>&, const options&);

namespace cca { inline namespace CCA_TARGET { namespace reference {
CCA_TEST_TEXTBOOK(float)
CCA_TEST_TEXTBOOK(double)
CCA_TEST_TEXTBOOK(long double)
}}}  // namespace cca::CCA_TARGET::reference

#undef CCA_TEST_TEXTBOOK
#undef CCA_TEST_INSTANCE
