#ifndef CCA_DISPATCH_CCA_H
#define CCA_DISPATCH_CCA_H

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

/**
 * @file
 * The library for C, and for every language that calls C: the functions of cca/dispatch.hpp over the tensors of DLPack
 * (https://dmlc.github.io/dlpack). Link `cca::c`, the shared library libcca. Parameters, results and errors of
 * `cca_attention` are those of `cca::attention`, and so on.
 *
 * A call fills in one structure, whatever the function, and leaves what it does not give as 0:
 *
 *     cca_options options = CCA_OPTIONS;
 *     options.group_size = 16;
 *     options.window = 1024;
 *     cca_call call = {.struct_size = sizeof call, .query = &q, .key = &k, .value = &v, .out = &o, .options = &options};
 *     if (cca_attention(&call) != CCA_OK) puts(cca_error());
 *
 * Tensors lie in the processor's memory, at `data + byte_offset`, and stay the caller's. `strides` may be NULL, as DLPack
 * has it; any strides are taken as they are, but the innermost dimension is contiguous. Their elements are float32, float64,
 * bfloat16 or float16, all those of the query; numbers per row and gradients have the type that is computed in, float64 for
 * float64 and float32 for all else; counts, lengths, offsets and positions are int64. Beside a query of float32, rows of
 * `cca_attention` and `cca_attend`, and tokens of a cache of int8, may be int8 with a scale per row, see `key_scales`.
 *
 * The library keeps no threads, and no state but the last error of each thread and the choice of `cca_use`.
 */

#ifdef __cplusplus
extern "C" {
#endif

/** What every function returns. Where it is not `CCA_OK`, nothing was written. */
typedef enum cca_status {
  CCA_OK = 0,
  CCA_INVALID_ARGUMENT = 1, /**< `cca_error` names the argument, what it got and what it wants */
  CCA_OUT_OF_MEMORY = 2,
  CCA_FAILED = 3 /**< a file of a cache that cannot be read or written */
} cca_status;

/** Why the last call of this thread failed; "" where it did not. Good until the thread's next call. */
const char* cca_error(void);

/** "0.1.0", for example. */
const char* cca_version(void);

/** The instruction set in use: "avx512", "avx2_fma", "sse4_2", "sse2" or "neon64". NULL where the processor runs none of those
 * that the library was compiled for: then every call fails, and says so. */
const char* cca_architecture(void);

/** For tests and measurements: from now on every call of the program uses this instruction set; caches keep theirs. */
cca_status cca_use(const char* architecture);

/** As many tokens as there are: the default of `window`. */
#define CCA_UNLIMITED INT64_MAX

/** `cca::pooling` */
enum cca_pooling { CCA_POOL_LAST_QUERY, CCA_POOL_MEAN, CCA_POOL_MAX, CCA_POOL_SELECT, CCA_POOL_SELECT_BY_MASS };
/** `cca::core_heads` */
enum cca_core_heads { CCA_CORES_PER_QUERY_HEAD, CCA_CORES_PER_KV_HEAD };
/** `cca::core_bias` */
enum cca_core_bias { CCA_CORE_BIAS_NONE, CCA_CORE_BIAS_ENTROPY };
/** `cca::matrix_unit` */
enum cca_matrix_unit { CCA_UNIT_NONE, CCA_UNIT_BEST, CCA_UNIT_AVX512_BF16, CCA_UNIT_AMX, CCA_UNIT_VNNI };

/** `cca::options`. New members come at the end; a program that was compiled without them gets their defaults. */
typedef struct cca_options {
  size_t struct_size;            /**< `sizeof(cca_options)` */
  int64_t group_size;            /**< tokens per core; 0: nothing is pooled */
  int64_t window;                /**< tokens that stay raw, the query's own among them */
  int64_t sink_tokens;           /**< first tokens that stay raw for every query */
  int64_t lookahead;             /**< tokens behind the query's own that it sees, too */
  int64_t prefix;                /**< first tokens that every query sees */
  int32_t pool;                  /**< `cca_pooling` */
  int32_t core_heads;            /**< `cca_core_heads` */
  int32_t core_bias;             /**< `cca_core_bias` */
  int32_t unit;                  /**< `cca_matrix_unit` */
  const double* softmax_scale;   /**< NULL: 1 / sqrt(dim) */
  double pooling_scale;          /**< a factor on the scale of the weights of pooling */
  double softcap;                /**< a score x becomes softcap tanh(x / softcap); 0: it stays */
  const int64_t* first_position; /**< of query 0; NULL: the last query is the last key */
} cca_options;

/** The defaults. */
#define CCA_OPTIONS {sizeof(cca_options), 0, CCA_UNLIMITED, 0, 0, 0, 0, 0, 0, 0, NULL, 1.0, 0.0, NULL}

/**
 * Calls `task(context, i)` once for every i in `[0, n)`, in any order and on any threads, and returns when all are done.
 * `self` is the caller's.
 */
typedef void cca_parallel_for(void* self, int64_t n, void (*task)(void* context, int64_t i), void* context);

/**
 * The arguments of every function, 0 where they are not given. An argument that the function does not take is refused.
 *
 * B is the batch, Hq the query's heads, Hkv those of keys and values, Lq and Lk the lengths, D and Dv the dims of keys and
 * values. A number per head, `[1, Hq, 1]`, may have one dimension, `[Hq]`.
 *
 * Sequences of their own lengths have `*_lengths` or `*_offsets`. Lengths, `[B]`, say how many tokens of a padded batch
 * count, from the token that `*_begins`, `[B]`, say, or else from the first. With offsets, `[B + 1]`, the tensors have a
 * batch of 1: sequence b is the tokens `[offsets[b], offsets[b + 1])` of it. Those of the query are for all that has the
 * query's length, those of the key for all that has the key's.
 */
typedef struct cca_call {
  size_t struct_size;           /**< `sizeof(cca_call)` */
  const DLTensor* query;        /**< `[B, Hq, Lq, D]` */
  const DLTensor* key;          /**< `[B, Hkv, Lk, D]` */
  const DLTensor* value;        /**< `[B, Hkv, Lk, Dv]` */
  const DLTensor* sink_logits;  /**< `[1 or B, Hq, 1]` or `[B, Hq, Lq]` */
  const DLTensor* alibi_slopes; /**< `[1 or B, Hq, 1]` */
  const DLTensor* key_bias;     /**< `[1 or B, a divisor of Hq, Lk]` */

  /** @{ Sequences of the queries, see above. */
  const DLTensor* query_lengths;
  const DLTensor* query_begins;
  const DLTensor* query_offsets;
  /** @} */
  /** @{ Sequences of the keys and values. */
  const DLTensor* key_lengths;
  const DLTensor* key_begins;
  const DLTensor* key_offsets;
  /** @} */
  /** @{ Sequences of the far context's rows; in `cca_pool` and its gradient of the cores. */
  const DLTensor* far_lengths;
  const DLTensor* far_begins;
  const DLTensor* far_offsets;
  /** @} */

  const DLTensor* far_key;       /**< `[B, far heads, far length, D]` */
  const DLTensor* far_value;     /**< `[B, far heads, far length, Dv]` */
  const DLTensor* seen;          /**< `[B, Hq, Lq]` of int64; may be missing, see `visible_from` */
  const DLTensor* far_bias;      /**< `[1 or B, a divisor of Hq, far length]` */
  const DLTensor* far_positions; /**< the same of int64 */

  const DLTensor* out; /**< `[B, Hq, Lq, Dv]`; written, and read by gradients */
  const DLTensor* lse; /**< `[B, Hq, Lq]`; where it is not given it is not wanted */
  /** @{ What `cca_merge` reads. */
  const DLTensor* out_a;
  const DLTensor* lse_a;
  const DLTensor* out_b;
  const DLTensor* lse_b;
  /** @} */

  const DLTensor* core_key;   /**< `[B, core heads, groups, D]`, what `cca_pool` writes */
  const DLTensor* core_value; /**< `[B, core heads, groups, Dv]` */

  /** @{ Gradients that are read, of the extents of what they are the gradients of. */
  const DLTensor* grad_out;
  const DLTensor* grad_lse;
  const DLTensor* grad_core_key;
  const DLTensor* grad_core_value;
  /** @} */
  /** @{ Gradients that are written. */
  const DLTensor* grad_query;
  const DLTensor* grad_key;
  const DLTensor* grad_value;
  const DLTensor* grad_far_key;
  const DLTensor* grad_far_value;
  const DLTensor* grad_sink_logits;
  const DLTensor* grad_alibi_slopes;
  const DLTensor* grad_key_bias;
  const DLTensor* grad_far_bias;
  /** @} */

  const cca_options* options; /**< NULL: the defaults */

  /**
   * How many tasks run at once, on as many threads, which live as long as the call; 0 means 1, the calling thread. Results
   * are bitwise the same for any.
   */
  int64_t threads;
  cca_parallel_for* parallel_for; /**< runs the tasks in place of threads made for the call; may be NULL */
  void* parallel_for_self;        /**< its first argument */

  void* workspace;       /**< NULL: memory is allocated. Caches have their own */
  size_t workspace_size; /**< bytes, at least what `cca_workspace_size` says */

  /**
   * @{
   * Which far rows a query sees, beside or in place of `seen`: row j is seen by the queries at the positions
   * `[visible_from[j], visible_until[j])`. Of int64 and the extents of `far_bias`.
   */
  const DLTensor* visible_from;
  const DLTensor* visible_until;
  /** @} */
  /**
   * Or by lists, see `cca::far_selection`: `[1 or B, a divisor of Hq, blocks of queries, most]` of int64, ascending, -1
   * behind the last. The blocks of a sequence's queries count from its first query; where there are `query_offsets`, the
   * lists of the sequences lie one after the other, too.
   */
  const DLTensor* selected_blocks;
  int64_t block_rows;    /**< of the far context; 0 means 1 */
  int64_t block_queries; /**< queries that share a list; 0 means 1 */

  /**
   * @{
   * Of keys and values of int8, and of no others: a scale of float32 per row, whose numbers are `element * scale`. The query
   * and the results are float32. Far rows may be int8 beside others that are not, and the other way round.
   */
  const DLTensor* key_scales;       /**< `[B, Hkv, Lk]` */
  const DLTensor* value_scales;     /**< the same */
  const DLTensor* far_key_scales;   /**< `[B, far heads, far length]` */
  const DLTensor* far_value_scales; /**< the same */
  /** @} */
} cca_call;

/** query, key, value and what belongs to them, out, lse; rows may be int8 */
cca_status cca_attention(const cca_call* call);
/** the same, and far_key, far_value, far_bias, far_positions, seen, visible_from, visible_until or selected_blocks */
cca_status cca_attend(const cca_call* call);
/** query, key, value, core_key, core_value */
cca_status cca_pool(const cca_call* call);
/** out_a, lse_a, out_b, lse_b, out, lse */
cca_status cca_merge(const cca_call* call);
/** those of `cca_attention`, grad_out, grad_lse, and the gradients that are wanted: query, key and value always */
cca_status cca_attention_gradient(const cca_call* call);
/** those of `cca_attend`, and the same; of the far key and value always */
cca_status cca_attend_gradient(const cca_call* call);
/** query, key, value, grad_core_key, grad_core_value, grad_query, grad_key, grad_value */
cca_status cca_pool_gradient(const cca_call* call);

/** Bytes of workspace that `cca_attention`, `cca_attend` where there is a far key, or `cca_pool` is content with. */
cca_status cca_workspace_size(const cca_call* call, size_t* bytes);
/** The same for gradients. */
cca_status cca_gradient_workspace_size(const cca_call* call, size_t* bytes);

/**
 * Rounds rows to int8, as a cache of int8 does, see `cca::quantize`: the scale of a row is its largest magnitude over 127.
 * rows: `[B, heads, length, dim]` of any elements; to: the same of int8; scales: `[B, heads, length]` of float32.
 */
cca_status cca_quantize(const DLTensor* rows, const DLTensor* to, const DLTensor* scales);

/** `cca::kv_cache`. One thread at a time may use a cache. A call that fails leaves it as it was. */
typedef struct cca_cache cca_cache;

/** `cca::cache_shape` */
typedef struct cca_cache_shape {
  size_t struct_size; /**< `sizeof(cca_cache_shape)` */
  int64_t batch;      /**< sequences; at least 1 where it is of use */
  int64_t heads;      /**< of queries */
  int64_t kv_heads;   /**< of keys and values */
  int64_t dim;        /**< of keys */
  int64_t value_dim;  /**< of values; 0: dim */
  int64_t capacity;   /**< tokens per sequence for which memory is taken at once */
  int64_t rewind;     /**< tokens that `cca_cache_truncate` can take back */
} cca_cache_shape;

/** What a cache says about one of its sequences; see the members of `cca::kv_cache` of these names. */
typedef struct cca_cache_counts {
  int64_t length;       /**< tokens appended */
  int64_t cores;        /**< core tokens, per core head */
  int64_t raw;          /**< raw tokens that are kept, per kv head */
  int64_t least_length; /**< the least length to which `cca_cache_truncate` can go */
} cca_cache_counts;

/** In place of a sequence: every one. */
#define CCA_ALL_SEQUENCES (-1)

/** Makes `*cache`, of these elements. Of int8 it holds a scale beside each row, and its calls take and give float32: keys and
 * values that are int8 already it keeps as they are, with their scales. */
cca_status cca_cache_make(cca_cache** cache, const cca_cache_shape* shape, DLDataType elements,
                          const cca_options* options);
/** Nothing for NULL. */
void cca_cache_free(cca_cache* cache);
/** query, key, value, their scales, sink_logits, alibi_slopes, out, lse: appends the tokens, then answers. */
cca_status cca_cache_attend(cca_cache* cache, int64_t sequence, const cca_call* call);
/** query, key, value, their scales: appends without answering. */
cca_status cca_cache_append(cca_cache* cache, int64_t sequence, const cca_call* call);
/** Takes back the tokens of a sequence from `length` on. */
cca_status cca_cache_truncate(cca_cache* cache, int64_t sequence, int64_t length);
/** Empties a sequence, or all. */
cca_status cca_cache_reset(cca_cache* cache, int64_t sequence);
/** Makes sequence `to` a copy of sequence `from`. */
cca_status cca_cache_fork(cca_cache* cache, int64_t from, int64_t to);
/** What it was made with, the defaults filled in. */
cca_status cca_cache_get_shape(const cca_cache* cache, cca_cache_shape* shape);
/** Fills in `*counts`. */
cca_status cca_cache_get_counts(const cca_cache* cache, int64_t sequence, cca_cache_counts* counts);
/** Bytes of what it holds, and of the memory taken for it. */
cca_status cca_cache_get_bytes(const cca_cache* cache, size_t* held, size_t* allocated);

/** Writes bytes to a file; returns how many. Fewer than asked for: it failed. */
typedef size_t cca_write(void* self, const void* data, size_t size);
/** Reads bytes of a file; returns how many. Fewer than asked for: it failed, or the file has ended. */
typedef size_t cca_read(void* self, void* data, size_t size);
/** Writes a cache to a file, by `write(self, ..)`. */
cca_status cca_cache_save(const cca_cache* cache, cca_write* write, void* self);
/** Makes `*cache` of a file, which has to be of these elements. `unit` is not in the file: see `cca_matrix_unit`. */
cca_status cca_cache_load(cca_cache** cache, DLDataType elements, int32_t unit, cca_read* read, void* self);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* CCA_DISPATCH_CCA_H */
