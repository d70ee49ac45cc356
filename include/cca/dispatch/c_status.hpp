#pragma once

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

#include "../detail/base/target.hpp"
#include "cca.h"

namespace cca { inline namespace CCA_TARGET { namespace detail {

/// The text of this thread's last error; "" where there was none.
struct error_text {
  char text[1024] = "";
};
inline thread_local error_text last_error;

inline cca_status failed(cca_status status, const char* what) {
  std::snprintf(last_error.text, sizeof last_error.text, "%s", what);
  return status;
}

/// Runs `f()`: what it throws becomes a status and a text.
template <class F>
cca_status guarded(const F& f) noexcept {
  try {
    last_error.text[0] = '\0';
    f();
    return CCA_OK;
  } catch (const std::invalid_argument& e) {
    return failed(CCA_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return failed(CCA_OUT_OF_MEMORY, "cca: out of memory");
  } catch (const std::exception& e) {
    return failed(CCA_FAILED, e.what());
  } catch (...) {
    return failed(CCA_FAILED, "cca: an exception that says nothing");
  }
}

}}}  // namespace cca::CCA_TARGET::detail
