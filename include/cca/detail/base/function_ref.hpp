#pragma once

#include <type_traits>

#include "target.hpp"

namespace cca { inline namespace CCA_TARGET { namespace detail {

template <class Signature>
class function_ref;

/// A callable that outlives it, by what it takes and returns alone: what calls one per task or per sequence is compiled once
/// for all of them. (Not `std::function`, which copies it, and costs more to compile than it saves.)
template <class Result, class... Arguments>
class function_ref<Result(Arguments...)> {
 public:
  template <class F>
  requires(!std::is_same_v<F, function_ref>) function_ref(const F& f)
      : self_(&f), call_([](const void* self, Arguments... arguments) -> Result {
          return (*static_cast<const F*>(self))(arguments...);
        }) {}

  Result operator()(Arguments... arguments) const { return call_(self_, arguments...); }

 private:
  const void* self_;
  Result (*call_)(const void*, Arguments...);
};

}}}  // namespace cca::CCA_TARGET::detail
