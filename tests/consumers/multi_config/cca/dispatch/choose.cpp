#include "../../configuration.hpp"

extern "C" {
#if defined(__x86_64__)
extern const bool cca_dispatch_here_avx512, cca_dispatch_here_avx2_fma, cca_dispatch_here_sse4_2,
    cca_dispatch_here_sse2;
#else
extern const bool cca_dispatch_here_neon64;
#endif
}

int kernels_of_a(bool release) {
#if defined(__x86_64__)
  const bool tables[] = {cca_dispatch_here_avx512, cca_dispatch_here_avx2_fma, cca_dispatch_here_sse4_2,
                         cca_dispatch_here_sse2};
#else
  const bool tables[] = {cca_dispatch_here_neon64};
#endif
  int count = 0;
  for (const bool table : tables)
    if (table != release)
      return 0;
    else
      ++count;
  return count;
}
