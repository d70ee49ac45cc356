// Stands for the kernels of one instruction set: a table that says for which configuration it was compiled.
#include "../../configuration.hpp"

extern "C" {
extern const bool table __asm__("cca_dispatch_here_" CCA_DISPATCH_TARGET);
const bool table = of_a_release;
}
