#ifndef CCA_MPI_CCA_MPI_H
#define CCA_MPI_CCA_MPI_H

#include "../dispatch/cca.h"

/**
 * @file
 * cca/mpi.hpp for C, and for every language that calls C: attention, its gradients and caches across the ranks of an MPI
 * communicator. Link `cca::c_mpi`, the shared library libcca_mpi. It needs nothing of libcca, and its kernels are those of
 * the one instruction set that it was compiled for.
 *
 * Structures are those of cca.h. A rank's tensors hold a sequence for each of its segments, as in cca/mpi.hpp; most easily
 * one after the other, with `query_offsets` and `key_offsets`. Functions that take ranks, and those of caches but for the
 * counts, are collective: every rank calls them. Where one refuses its arguments, all of them do. There is no workspace.
 */

#ifdef __cplusplus
extern "C" {
#endif

/** As `cca_error`, of this library. */
const char* cca_mpi_error(void);

/** What `MPI_Get_library_version` says of the MPI that this library calls, whose communicators it takes. */
const char* cca_mpi_library(void);

/** `cca::mpi::communicator` */
typedef struct cca_mpi_ranks cca_mpi_ranks;

/** Makes `*ranks` of the caller's `MPI_Comm`, which is at this address. */
cca_status cca_mpi_ranks_make(cca_mpi_ranks** ranks, const void* communicator);
/** Collective. Nothing for NULL. */
void cca_mpi_ranks_free(cca_mpi_ranks* ranks);

/** `cca::mpi::segment`: the tokens `[begin, end)` of a sequence, which a rank holds. */
typedef struct cca_mpi_segment {
  int64_t rank;
  int64_t sequence;
  int64_t begin;
  int64_t end;
} cca_mpi_segment;

/** Who has made the segments of a layout: the caller, or the function of `cca::mpi::layout` of this name. */
enum cca_mpi_split { CCA_MPI_SEGMENTS, CCA_MPI_CONTIGUOUS, CCA_MPI_HEAD_TO_TAIL, CCA_MPI_CONCATENATED };

/** `cca::mpi::layout`, the same on every rank. */
typedef struct cca_mpi_layout cca_mpi_layout;

/**
 * Makes `*layout` for so many ranks and sequences of these lengths. With CCA_MPI_SEGMENTS of `count` segments, in the order of
 * their ranks; else there are none. Not collective.
 */
cca_status cca_mpi_layout_make(cca_mpi_layout** layout, int32_t split, int64_t ranks, const int64_t* lengths,
                               int64_t sequences, const cca_mpi_segment* segments, int64_t count);
/** Nothing for NULL. */
void cca_mpi_layout_free(cca_mpi_layout* layout);
/** How many segments there are. */
cca_status cca_mpi_layout_segments(const cca_mpi_layout* layout, int64_t* count);
/** Segment i of them. */
cca_status cca_mpi_layout_segment(const cca_mpi_layout* layout, int64_t i, cca_mpi_segment* segment);

/** `cca::mpi::attention`: what `cca_attention` takes. overlap: 0 or 1, see `cca::mpi::context_parallel`. */
cca_status cca_mpi_attention(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                             const cca_call* call);
/** `cca::mpi::attend`: what `cca_attend` takes. The far rows of a segment are a sequence. */
cca_status cca_mpi_attend(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                          const cca_call* call);
/** `cca::mpi::attention_gradient`: what `cca_attention_gradient` takes. */
cca_status cca_mpi_attention_gradient(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, int32_t overlap,
                                      const cca_call* call);
/** `cca::mpi::pool`: what `cca_pool` takes. The cores of a segment are a sequence: those of the groups whose last token it has. */
cca_status cca_mpi_pool(const cca_mpi_ranks* ranks, const cca_mpi_layout* layout, const cca_call* call);
/** `cca::mpi::merge`: out_a, lse_a of the rank's part; out, lse of the whole. */
cca_status cca_mpi_merge(const cca_mpi_ranks* ranks, const cca_call* call);
/** Takes this rank's part in a call, whichever the others make, that it cannot make itself: they refuse it with this text, and so
 * does this one. */
cca_status cca_mpi_refuse(const cca_mpi_ranks* ranks, const char* why);

/** `cca::mpi::kv_cache` */
typedef struct cca_mpi_cache cca_mpi_cache;

/** Makes `*cache`, of these elements, for as long as the ranks. */
cca_status cca_mpi_cache_make(cca_mpi_cache** cache, const cca_mpi_ranks* ranks, const cca_cache_shape* shape,
                              DLDataType elements, const cca_options* options, int64_t window_rank);
/** Not collective. Nothing for NULL. */
void cca_mpi_cache_free(cca_mpi_cache* cache);
/** query, key, value of a prompt that lies across the ranks. */
cca_status cca_mpi_cache_append(cca_mpi_cache* cache, const cca_mpi_layout* layout, const cca_call* call);
/** query, key, value, sink_logits, alibi_slopes, the same on every rank; out, lse. */
cca_status cca_mpi_cache_attend(cca_mpi_cache* cache, const cca_call* call);
/** Of each sequence, and what this rank keeps of it. Nothing can be taken back: `least_length` is the length. */
cca_status cca_mpi_cache_get_counts(const cca_mpi_cache* cache, cca_cache_counts* counts);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* CCA_MPI_CCA_MPI_H */
