#pragma once

// AMX for machines without it: tests run kernels of tiles on any x86-64 Linux. Instructions that the processor does not
// know raise SIGILL, whose handler executes those of AMX on tiles in memory. Only what traps gets there: where the
// processor has AMX, and the system lets the process use it, nothing traps and all of this stays unused.
//
// Semantics and encodings are those of Intel's manual: LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD,
// TILELOADDT1, TILESTORED, TDPBF16PS and TDPFP16PS. Where the processor would raise a fault, the process is aborted with
// a message that names it.

#include <cstdint>

namespace cca::test {

/// Installs the handler, for all threads, in front of the one that there is: what is not AMX goes to that. True also
/// where it is installed already, false where it cannot be: elsewhere than on x86-64 Linux.
bool install_amx_emulator();

/// Instructions that were emulated, of all threads.
struct amx_counts {
  std::uint64_t loads, stores, products, configurations;
};
amx_counts amx_instructions();

/// Whether this thread's tiles are as it found them: not configured, or released.
bool amx_state_is_initial();

}  // namespace cca::test
