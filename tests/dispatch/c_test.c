/* The C interface, from C99: every function against what the others say or a textbook, and every refusal. */

#include <cca/dispatch/cca.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define EXPECT(condition)                                                     \
  do {                                                                        \
    if (!(condition)) {                                                       \
      printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, cca_error()); \
      ++failures;                                                             \
    }                                                                         \
  } while (0)

/* The sizes of all tests. */
enum { B = 2, H = 4, HKV = 2, L = 19, D = 3, DV = 2, G = 3, WINDOW = 4 };
enum { CORES = L / G };

/* A compact tensor of doubles or int64, of up to 4 extents; `dl` is what the library sees. */
typedef struct tensor {
  DLTensor dl;
  int64_t shape[4], strides[4], count;
  double* x;
} tensor;

static tensor* all_made[1000];
static size_t made_count = 0;

static tensor* make(int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  tensor* t = calloc(1, sizeof *t);
  all_made[made_count++] = t;
  t->count = 1;
  for (int i = ndim; i-- > 0;) {
    t->shape[i] = shape[i];
    t->strides[i] = t->count;
    t->count *= shape[i];
  }
  t->x = calloc((size_t)t->count + 1, sizeof *t->x);
  t->dl.data = t->x;
  t->dl.device.device_type = kDLCPU;
  t->dl.ndim = ndim;
  t->dl.dtype.code = kDLFloat;
  t->dl.dtype.bits = 64;
  t->dl.dtype.lanes = 1;
  t->dl.shape = t->shape;
  t->dl.strides = t->strides;
  return t;
}

static tensor* filled(tensor* t) {
  static unsigned state = 1;
  for (int64_t i = 0; i < t->count; ++i) {
    state = state * 1664525u + 1013904223u;
    t->x[i] = (double)(state >> 8) / (1 << 23) - 1;
  }
  return t;
}

static tensor* counts(int64_t count, const int64_t* values) {
  tensor* t = make(1, count, 0, 0, 0);
  t->dl.dtype.code = kDLInt;
  memcpy(t->x, values, (size_t)count * sizeof *values);
  return t;
}

static void free_all(void) {
  while (made_count > 0) {
    free(all_made[--made_count]->x);
    free(all_made[made_count]);
  }
}

static double* at(const tensor* t, int64_t b, int64_t h, int64_t i) {
  return t->x + b * t->strides[0] + h * t->strides[1] + i * t->strides[2];
}

static double distance(const tensor* a, const tensor* b) {
  double most = 0;
  for (int64_t i = 0; i < a->count; ++i)
    if (!(fabs(a->x[i] - b->x[i]) <= most)) most = fabs(a->x[i] - b->x[i]);
  return a->count == b->count ? most : INFINITY;
}
static int same(const tensor* a, const tensor* b) {
  return a->count == b->count && memcmp(a->x, b->x, (size_t)a->count * sizeof *a->x) == 0;
}

static tensor* queries(void) { return make(4, B, H, L, D); }
static tensor* outs(void) { return make(4, B, H, L, DV); }
static tensor* rows(void) { return make(3, B, H, L, 0); }

/* Operands, options and results of a call. */
typedef struct example {
  tensor *q, *k, *v, *out, *lse;
  cca_options options;
  cca_call call;
} example;

static void connect(example* e) {
  e->call.query = &e->q->dl;
  e->call.key = &e->k->dl;
  e->call.value = &e->v->dl;
  e->call.out = &e->out->dl;
  e->call.lse = &e->lse->dl;
  e->call.options = &e->options;
}

static void set_up(example* e) {
  const cca_options defaults = CCA_OPTIONS;
  memset(e, 0, sizeof *e);
  e->q = filled(queries());
  e->k = filled(make(4, B, HKV, L, D));
  e->v = filled(make(4, B, HKV, L, DV));
  e->out = outs();
  e->lse = rows();
  e->options = defaults;
  e->options.group_size = G;
  e->options.window = WINDOW;
  e->call.struct_size = sizeof e->call;
}

static void test_against_textbook(void) {
  example e;
  set_up(&e);
  connect(&e);
  e.call.options = NULL;
  EXPECT(cca_attention(&e.call) == CCA_OK);
  EXPECT(strcmp(cca_error(), "") == 0);
  double most = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < L; ++i) {
        double sum = 0, out[DV] = {0};
        for (int64_t j = 0; j <= i; ++j) {
          double x = 0;
          for (int d = 0; d < D; ++d) x += at(e.q, b, h, i)[d] * at(e.k, b, h / (H / HKV), j)[d] / sqrt(D);
          sum += exp(x);
          for (int d = 0; d < DV; ++d) out[d] += exp(x) * at(e.v, b, h / (H / HKV), j)[d];
        }
        most = fmax(most, fabs(log(sum) - *at(e.lse, b, h, i)));
        for (int d = 0; d < DV; ++d) most = fmax(most, fabs(out[d] / sum - at(e.out, b, h, i)[d]));
      }
  EXPECT(most < 1e-12);
}

/* Tasks in reverse. */
static void in_reverse(void* self, int64_t n, void (*task)(void*, int64_t), void* context) {
  *(int64_t*)self += n;
  while (n-- > 0) task(context, n);
}

static void test_threads_and_workspace(void) {
  example e;
  set_up(&e);
  connect(&e);
  tensor* want = e.out;
  EXPECT(cca_attention(&e.call) == CCA_OK);
  int64_t tasks = 0;
  for (int way = 0; way < 2; ++way) {
    e.out = outs();
    connect(&e);
    e.call.threads = 3;
    if (way == 1) {
      e.call.parallel_for = in_reverse;
      e.call.parallel_for_self = &tasks;
    }
    EXPECT(cca_attention(&e.call) == CCA_OK);
    EXPECT(same(e.out, want));
    EXPECT((tasks > 1) == (way == 1));
  }
  e.call.threads = 0;
  EXPECT(cca_attention(&e.call) == CCA_INVALID_ARGUMENT);
  e.call.threads = 2;
  size_t bytes = 0;
  EXPECT(cca_workspace_size(&e.call, &bytes) == CCA_OK && bytes > 0);
  e.call.workspace = malloc(bytes);
  e.call.workspace_size = bytes;
  EXPECT(cca_attention(&e.call) == CCA_OK);
  e.call.workspace_size = 1;
  EXPECT(cca_attention(&e.call) == CCA_INVALID_ARGUMENT);
  free(e.call.workspace);
}

/* The cores as a caller's far context give what `cca_attention` gives; in two parts that are merged, too. Gradients are
   compared in the same way, and those of `cca_attention` with differences. */
static void test_far_and_gradients(void) {
  example e;
  set_up(&e);
  connect(&e);
  EXPECT(cca_attention(&e.call) == CCA_OK);
  tensor *want = e.out, *want_lse = e.lse;

  tensor *core_key = make(4, B, H, CORES, D), *core_value = make(4, B, H, CORES, DV);
  cca_options pooling = CCA_OPTIONS;
  pooling.group_size = G;
  cca_call pool = {.struct_size = sizeof pool};
  pool.query = &e.q->dl;
  pool.key = &e.k->dl;
  pool.value = &e.v->dl;
  pool.options = &pooling;
  pool.core_key = &core_key->dl;
  pool.core_value = &core_value->dl;
  EXPECT(cca_pool(&pool) == CCA_OK);

  int64_t seen[B * H * L];
  for (int64_t i = 0; i < B * H * L; ++i) seen[i] = i % L + 1 > WINDOW ? (i % L + 1 - WINDOW) / G : 0;
  tensor* seen_tensor = counts(B * H * L, seen);
  int64_t seen_shape[3] = {B, H, L};
  seen_tensor->dl.ndim = 3;
  seen_tensor->dl.shape = seen_shape;
  seen_tensor->dl.strides = NULL;
  e.out = outs();
  e.lse = rows();
  connect(&e);
  e.call.far_key = &core_key->dl;
  e.call.far_value = &core_value->dl;
  e.call.seen = &seen_tensor->dl;
  EXPECT(cca_attend(&e.call) == CCA_OK);
  EXPECT(distance(e.out, want) < 1e-12 && distance(e.lse, want_lse) < 1e-12);

  /* Far rows alone, merged with the window alone. */
  cca_call far_alone = e.call, near_alone = e.call, merge = {.struct_size = sizeof merge};
  tensor *out_a = outs(), *out_b = outs(), *lse_a = rows(), *lse_b = rows(), *merged = outs(), *merged_lse = rows();
  tensor *no_key = make(4, B, HKV, 0, D), *no_value = make(4, B, HKV, 0, DV);
  tensor *no_far_key = make(4, B, H, 0, D), *no_far_value = make(4, B, H, 0, DV), *none = rows();
  none->dl.dtype.code = kDLInt;
  far_alone.key = &no_key->dl;
  far_alone.value = &no_value->dl;
  far_alone.out = merge.out_a = &out_a->dl;
  far_alone.lse = merge.lse_a = &lse_a->dl;
  near_alone.far_key = &no_far_key->dl;
  near_alone.far_value = &no_far_value->dl;
  near_alone.seen = &none->dl;
  near_alone.out = merge.out_b = &out_b->dl;
  near_alone.lse = merge.lse_b = &lse_b->dl;
  merge.out = &merged->dl;
  merge.lse = &merged_lse->dl;
  EXPECT(cca_attend(&far_alone) == CCA_OK);
  EXPECT(cca_attend(&near_alone) == CCA_OK);
  EXPECT(cca_merge(&merge) == CCA_OK);
  EXPECT(distance(merged, want) < 1e-12 && distance(merged_lse, want_lse) < 1e-12);
  merge.options = &e.options;
  EXPECT(cca_merge(&merge) == CCA_INVALID_ARGUMENT);

  tensor *grad_out = filled(outs()), *grad_lse = filled(rows());
  tensor *gq = queries(), *gk = make(4, B, HKV, L, D), *gv = make(4, B, HKV, L, DV);
  cca_call gradient = e.call;
  gradient.far_key = gradient.far_value = gradient.seen = NULL;
  gradient.grad_out = &grad_out->dl;
  gradient.grad_lse = &grad_lse->dl;
  gradient.grad_query = &gq->dl;
  gradient.grad_key = &gk->dl;
  gradient.grad_value = &gv->dl;
  size_t bytes = 0;
  EXPECT(cca_gradient_workspace_size(&gradient, &bytes) == CCA_OK && bytes > 0);
  EXPECT(cca_attention_gradient(&gradient) == CCA_OK);

  const struct {
    tensor *of, *gradient;
  } checked[] = {{e.q, gq}, {e.k, gk}, {e.v, gv}};
  tensor *changed = outs(), *changed_lse = rows();
  cca_call forward = {.struct_size = sizeof forward};
  forward.query = &e.q->dl;
  forward.key = &e.k->dl;
  forward.value = &e.v->dl;
  forward.options = &e.options;
  forward.out = &changed->dl;
  forward.lse = &changed_lse->dl;
  for (int operand = 0; operand < 3; ++operand)
    for (int64_t i = 5; i < checked[operand].of->count; i += 23) {
      double* x = checked[operand].of->x + i;
      const double before = *x, step = 1e-5;
      double difference = 0;
      for (int side = -1; side <= 1; side += 2) {
        *x = before + side * step;
        EXPECT(cca_attention(&forward) == CCA_OK);
        for (int64_t j = 0; j < changed->count; ++j) difference += side * changed->x[j] * grad_out->x[j];
        for (int64_t j = 0; j < changed_lse->count; ++j) difference += side * changed_lse->x[j] * grad_lse->x[j];
      }
      *x = before;
      EXPECT(fabs(difference / (2 * step) - checked[operand].gradient->x[i]) < 1e-7);
    }

  /* d attention = d attend, and d pool of what that says of the far rows. */
  tensor *aq = queries(), *ak = make(4, B, HKV, L, D), *av = make(4, B, HKV, L, DV);
  tensor *pq = queries(), *pk = make(4, B, HKV, L, D), *pv = make(4, B, HKV, L, DV);
  tensor *gck = make(4, B, H, CORES, D), *gcv = make(4, B, H, CORES, DV);
  gradient.far_key = &core_key->dl;
  gradient.far_value = &core_value->dl;
  gradient.seen = &seen_tensor->dl;
  gradient.grad_query = &aq->dl;
  gradient.grad_key = &ak->dl;
  gradient.grad_value = &av->dl;
  gradient.grad_far_key = &gck->dl;
  gradient.grad_far_value = &gcv->dl;
  EXPECT(cca_gradient_workspace_size(&gradient, &bytes) == CCA_OK && bytes > 0);
  EXPECT(cca_attend_gradient(&gradient) == CCA_OK);
  pool.core_key = pool.core_value = NULL;
  pool.grad_core_key = &gck->dl;
  pool.grad_core_value = &gcv->dl;
  pool.grad_query = &pq->dl;
  pool.grad_key = &pk->dl;
  pool.grad_value = &pv->dl;
  EXPECT(cca_pool_gradient(&pool) == CCA_OK);
  for (int64_t i = 0; i < aq->count; ++i) aq->x[i] += pq->x[i];
  for (int64_t i = 0; i < ak->count; ++i) ak->x[i] += pk->x[i];
  for (int64_t i = 0; i < av->count; ++i) av->x[i] += pv->x[i];
  EXPECT(distance(aq, gq) < 1e-12 && distance(ak, gk) < 1e-12 && distance(av, gv) < 1e-12);
}

/* What is added to scores is taken from its own place, and so are its gradients. */
static void test_score_terms(void) {
  example e;
  set_up(&e);
  e.options.group_size = 0;
  connect(&e);
  tensor *sinks = filled(make(1, H, 0, 0, 0)), *slopes = filled(make(3, 1, H, 1, 0)), *bias = filled(make(3, B, HKV, L, 0));
  tensor *gs = make(1, H, 0, 0, 0), *gl = make(3, 1, H, 1, 0), *gb = make(3, B, HKV, L, 0);
  tensor *grad_out = filled(outs()), *gq = queries(), *gk = make(4, B, HKV, L, D), *gv = make(4, B, HKV, L, DV);
  e.call.sink_logits = &sinks->dl;
  e.call.alibi_slopes = &slopes->dl;
  e.call.key_bias = &bias->dl;
  cca_call gradient = e.call;
  gradient.grad_out = &grad_out->dl;
  gradient.grad_query = &gq->dl;
  gradient.grad_key = &gk->dl;
  gradient.grad_value = &gv->dl;
  gradient.grad_sink_logits = &gs->dl;
  gradient.grad_alibi_slopes = &gl->dl;
  gradient.grad_key_bias = &gb->dl;
  EXPECT(cca_attention(&e.call) == CCA_OK);
  EXPECT(cca_attention_gradient(&gradient) == CCA_OK);
  const struct {
    tensor *of, *gradient;
  } checked[] = {{sinks, gs}, {slopes, gl}, {bias, gb}};
  for (int term = 0; term < 3; ++term) {
    double* x = checked[term].of->x + 2;
    const double before = *x, step = 1e-5;
    double difference = 0;
    for (int side = -1; side <= 1; side += 2) {
      *x = before + side * step;
      EXPECT(cca_attention(&e.call) == CCA_OK);
      for (int64_t j = 0; j < e.out->count; ++j) difference += side * e.out->x[j] * grad_out->x[j];
    }
    *x = before;
    EXPECT(difference != 0 && fabs(difference / (2 * step) - checked[term].gradient->x[2]) < 1e-7);
  }
}

/* What `cca_attend` and its gradient write for a call, in the order of `far_results`. */
enum { FAR_RESULTS = 7 };
static void attend_both_ways(const cca_call* given, tensor* results[FAR_RESULTS]) {
  tensor *made[FAR_RESULTS] = {outs(), rows(), queries(), make(4, B, HKV, L, D), make(4, B, HKV, L, DV),
                               make(4, B, H, CORES, D), make(4, B, H, CORES, DV)};
  memcpy(results, made, sizeof made);
  cca_call call = *given;
  size_t bytes = 0;
  call.out = &made[0]->dl;
  call.lse = &made[1]->dl;
  EXPECT(cca_attend(&call) == CCA_OK);
  EXPECT(cca_workspace_size(&call, &bytes) == CCA_OK && bytes > 0);
  call.grad_out = given->out;
  call.grad_query = &made[2]->dl;
  call.grad_key = &made[3]->dl;
  call.grad_value = &made[4]->dl;
  call.grad_far_key = &made[5]->dl;
  call.grad_far_value = &made[6]->dl;
  EXPECT(cca_attend_gradient(&call) == CCA_OK);
  EXPECT(cca_gradient_workspace_size(&call, &bytes) == CCA_OK && bytes > 0);
}

/* Who sees which far row, said by positions or by lists, is what the counts say that mean the same. */
static void test_visible_rows(void) {
  enum { END = 13, BLOCK_ROWS = 2, BLOCK_QUERIES = 3, LISTS = (L + BLOCK_QUERIES - 1) / BLOCK_QUERIES, MOST = 3 };
  example e;
  set_up(&e);
  connect(&e);
  e.options.group_size = 0;
  filled(e.out); /* the gradient that comes in */
  tensor *far_key = filled(make(4, B, H, CORES, D)), *far_value = filled(make(4, B, H, CORES, DV));
  e.call.lse = NULL;
  e.call.far_key = &far_key->dl;
  e.call.far_value = &far_value->dl;

  int64_t growing[L], ending[L], from[CORES], until[CORES], lists[LISTS * MOST];
  for (int64_t i = 0; i < L; ++i) {
    growing[i] = i / BLOCK_QUERIES < CORES ? i / BLOCK_QUERIES : CORES;
    ending[i] = i < END ? growing[i] : 0;
  }
  for (int64_t j = 0; j < CORES; ++j) {
    from[j] = (j + 1) * BLOCK_QUERIES;
    until[j] = END;
  }
  for (int64_t i = 0; i < LISTS; ++i)
    for (int64_t block = 0; block < MOST; ++block)
      lists[i * MOST + block] = block * BLOCK_ROWS < growing[i * BLOCK_QUERIES] ? block : -1;

  /* The same for every sequence and head. */
  int64_t counts_shape[] = {B, H, L}, rows_shape[] = {1, 1, CORES}, lists_shape[] = {1, 1, LISTS, MOST};
  int64_t shared_strides[] = {0, 0, 1}, list_strides[] = {0, 0, MOST, 1};
  const DLDataType int64 = {kDLInt, 64, 1};
  DLTensor seen = {growing, {kDLCPU, 0}, 3, int64, counts_shape, shared_strides, 0}, seen_until = seen;
  DLTensor visible_from = {from, {kDLCPU, 0}, 3, int64, rows_shape, NULL, 0}, visible_until = visible_from;
  DLTensor selected = {lists, {kDLCPU, 0}, 4, int64, lists_shape, list_strides, 0};
  seen_until.data = ending;
  visible_until.data = until;

  cca_call by_seen = e.call, by_position = e.call, by_list = e.call;
  for (int way = 0; way < 3; ++way) {
    tensor *want[FAR_RESULTS], *got[FAR_RESULTS];
    by_seen.seen = way == 1 ? &seen_until : &seen;
    by_position.visible_from = &visible_from;
    by_position.visible_until = way == 1 ? &visible_until : NULL;
    by_list.selected_blocks = &selected;
    by_list.seen = &seen; /* cuts a block in two */
    by_list.block_rows = BLOCK_ROWS;
    by_list.block_queries = BLOCK_QUERIES;
    attend_both_ways(&by_seen, want);
    attend_both_ways(way < 2 ? &by_position : &by_list, got);
    for (int i = 0; i < FAR_RESULTS; ++i) EXPECT(distance(want[i], got[i]) < 1e-12);
  }

  /* Each is taken from its own place, and refused where the function has no use for it. */
  const struct {
    const DLTensor** place;
    const char* name;
  } tensors[] = {{&e.call.visible_from, "far.visible_from: got [1, 1, 1]"},
                 {&e.call.visible_until, "far.visible_until: got [1, 1, 1]"},
                 {&e.call.selected_blocks, "selected_blocks: got 3 dimensions, wants 4"}};
  const cca_call none = e.call;
  rows_shape[2] = 1;
  for (int i = 0; i < 3; ++i) {
    *tensors[i].place = &visible_from;
    EXPECT(cca_attend(&e.call) == CCA_INVALID_ARGUMENT && strstr(cca_error(), tensors[i].name));
    e.call.far_key = e.call.far_value = NULL;
    EXPECT(cca_attention(&e.call) == CCA_INVALID_ARGUMENT && strstr(cca_error(), ": got a tensor, wants none"));
    size_t bytes = 77;
    EXPECT(cca_workspace_size(&e.call, &bytes) == CCA_INVALID_ARGUMENT && bytes == 77);
    e.call = none;
  }
  by_list.block_rows = -1;
  EXPECT(cca_attend(&by_list) == CCA_INVALID_ARGUMENT && strstr(cca_error(), "block_rows: got -1"));
  by_seen.block_queries = 2;
  EXPECT(cca_attend(&by_seen) == CCA_INVALID_ARGUMENT && strstr(cca_error(), "block_queries: got 2"));
  e.call.far_key = e.call.far_value = NULL;
  e.call.block_rows = 2;
  EXPECT(cca_attention(&e.call) == CCA_INVALID_ARGUMENT && strstr(cca_error(), "block_rows: got 2, wants 0"));
}

/* A batch padded behind or before, and a packed one, give what each sequence gives alone, and write nothing else. */
static void test_lengths(void) {
  const int64_t lengths[B] = {7, 12}, offsets[B + 1] = {0, 7, 19}, begins[B] = {12, 7};
  for (int layout = 0; layout < 3; ++layout) {
    const int packed = layout == 1, left = layout == 2;
    example e;
    set_up(&e);
    connect(&e);
    if (packed) e.q->shape[0] = e.k->shape[0] = e.v->shape[0] = e.out->shape[0] = e.lse->shape[0] = 1;
    for (int64_t i = 0; i < e.out->count; ++i) e.out->x[i] = -77;
    if (packed)
      e.call.query_offsets = e.call.key_offsets = &counts(B + 1, offsets)->dl;
    else
      e.call.query_lengths = e.call.key_lengths = &counts(B, lengths)->dl;
    if (left) e.call.query_begins = e.call.key_begins = &counts(B, begins)->dl;
    EXPECT(cca_attention(&e.call) == CCA_OK);
    for (int64_t b = 0; b < B; ++b) {
      example one = e;
      one.out = outs();
      one.lse = rows();
      connect(&one);
      one.call.query_offsets = one.call.key_offsets = one.call.query_lengths = one.call.key_lengths = NULL;
      one.call.query_begins = one.call.key_begins = NULL;
      DLTensor* parts[] = {&one.q->dl, &one.k->dl, &one.v->dl, &one.out->dl, &one.lse->dl};
      DLTensor kept[5];
      int64_t shapes[5][4];
      const int64_t first = packed ? offsets[b] : left ? begins[b] : 0, row = packed ? 0 : b;
      for (int i = 0; i < 5; ++i) {
        kept[i] = *parts[i];
        for (int d = 0; d < parts[i]->ndim; ++d) shapes[i][d] = d == 0 ? 1 : d == 2 ? lengths[b] : parts[i]->shape[d];
        parts[i]->byte_offset = (uint64_t)(row * parts[i]->strides[0] + first * parts[i]->strides[2]) * sizeof(double);
        parts[i]->shape = shapes[i];
      }
      EXPECT(cca_attention(&one.call) == CCA_OK);
      for (int i = 0; i < 5; ++i) *parts[i] = kept[i];
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = first; i < first + lengths[b]; ++i)
          EXPECT(memcmp(at(e.out, row, h, i), at(one.out, row, h, i), DV * sizeof(double)) == 0);
    }
    EXPECT(*(packed ? at(e.out, 1, 0, 0) : left ? at(e.out, 1, 3, 6) : at(e.out, 0, 0, 7)) == -77);
  }
}

typedef struct memory_file {
  char bytes[100000];
  size_t size, place;
} memory_file;
static size_t write_memory(void* self, const void* data, size_t size) {
  memory_file* f = self;
  if (size > sizeof f->bytes - f->size) return 0;
  memcpy(f->bytes + f->size, data, size);
  f->size += size;
  return size;
}
static size_t read_memory(void* self, void* data, size_t size) {
  memory_file* f = self;
  if (size > f->size - f->place) size = f->size - f->place;
  memcpy(data, f->bytes + f->place, size);
  f->place += size;
  return size;
}

static cca_call part_of(const example* e, DLTensor dl[5], int64_t shapes[5][4], int64_t first, int64_t count) {
  const tensor* from[] = {e->q, e->k, e->v, e->out, e->lse};
  cca_call call = {.struct_size = sizeof call};
  for (int i = 0; i < 5; ++i) {
    dl[i] = from[i]->dl;
    memcpy(shapes[i], from[i]->shape, sizeof from[i]->shape);
    shapes[i][2] = count;
    dl[i].shape = shapes[i];
    dl[i].byte_offset = (uint64_t)(first * from[i]->strides[2]) * sizeof(double);
  }
  call.query = &dl[0];
  call.key = &dl[1];
  call.value = &dl[2];
  call.out = &dl[3];
  call.lse = &dl[4];
  return call;
}

static void test_cache(void) {
  example e;
  set_up(&e);
  connect(&e);
  EXPECT(cca_attention(&e.call) == CCA_OK);
  tensor* want = e.out;
  e.out = outs();

  cca_cache_shape shape = {.struct_size = sizeof shape, .batch = B, .heads = H, .kv_heads = HKV, .dim = D,
                           .value_dim = DV, .rewind = 2};
  cca_cache *cache = NULL, *loaded = NULL;
  EXPECT(cca_cache_make(&cache, &shape, e.q->dl.dtype, &e.options) == CCA_OK);
  DLTensor dl[5];
  int64_t shapes[5][4];
  cca_call call = part_of(&e, dl, shapes, 0, 10);
  EXPECT(cca_cache_attend(cache, CCA_ALL_SEQUENCES, &call) == CCA_OK);
  call = part_of(&e, dl, shapes, 10, 2);
  call.out = call.lse = NULL;
  EXPECT(cca_cache_append(cache, CCA_ALL_SEQUENCES, &call) == CCA_OK);
  for (int64_t b = 0; b < B; ++b) EXPECT(cca_cache_truncate(cache, b, 10) == CCA_OK);
  EXPECT(cca_cache_truncate(cache, 0, 1) == CCA_INVALID_ARGUMENT && strstr(cca_error(), "length"));

  static memory_file file;
  EXPECT(cca_cache_save(cache, write_memory, &file) == CCA_OK);
  EXPECT(cca_cache_load(&loaded, e.q->dl.dtype, CCA_UNIT_NONE, read_memory, &file) == CCA_OK);
  EXPECT(file.place == file.size);
  for (int64_t i = 10; i < L; ++i) {
    call = part_of(&e, dl, shapes, i, 1);
    EXPECT(cca_cache_attend(loaded, CCA_ALL_SEQUENCES, &call) == CCA_OK);
  }
  EXPECT(distance(e.out, want) < 1e-12);
  cca_cache_counts said;
  EXPECT(cca_cache_get_counts(loaded, 1, &said) == CCA_OK);
  EXPECT(said.length == L && said.cores == CORES && said.raw > 0 && said.least_length > 0);
  size_t held = 0, allocated = 0;
  EXPECT(cca_cache_get_bytes(loaded, &held, &allocated) == CCA_OK && held > 0 && allocated >= held);
  cca_cache_shape got = {.struct_size = sizeof got};
  EXPECT(cca_cache_get_shape(loaded, &got) == CCA_OK && got.heads == H && got.value_dim == DV && got.rewind == 2);
  EXPECT(cca_cache_reset(loaded, 0) == CCA_OK && cca_cache_fork(loaded, 1, 0) == CCA_OK);
  EXPECT(cca_cache_get_counts(loaded, 0, &said) == CCA_OK && said.length == L);
  EXPECT(cca_cache_reset(loaded, CCA_ALL_SEQUENCES) == CCA_OK);
  EXPECT(cca_cache_get_counts(loaded, 1, &said) == CCA_OK && said.length == 0);
  EXPECT(cca_cache_get_counts(loaded, 2, &said) == CCA_INVALID_ARGUMENT);
  call.options = &e.options;
  EXPECT(cca_cache_attend(loaded, CCA_ALL_SEQUENCES, &call) == CCA_INVALID_ARGUMENT);
  cca_cache_free(loaded);
  file.place = 3;
  EXPECT(cca_cache_load(&loaded, e.q->dl.dtype, CCA_UNIT_NONE, read_memory, &file) == CCA_FAILED);
  EXPECT(cca_cache_attend(NULL, 0, &call) == CCA_INVALID_ARGUMENT);
  cca_cache_free(cache);
  cca_cache_free(NULL);
}

/* Options that make no sense are refused by their own names: each has come through to its place. */
static void test_options(void) {
  const double negative = -1, infinite = INFINITY;
  const int64_t before_all = -5;
  for (int option = 0; option < 13; ++option) {
    example e;
    set_up(&e);
    connect(&e);
    cca_options* o = &e.options;
    const char* name = "";
    switch (option) {
      case 0: o->group_size = -1, name = "group_size"; break;
      case 1: o->window = 0, name = "window"; break;
      case 2: o->sink_tokens = -1, name = "sink_tokens"; break;
      case 3: o->lookahead = -1, name = "lookahead"; break;
      case 4: o->prefix = -1, name = "prefix"; break;
      case 5: o->pool = 9, name = "pool"; break;
      case 6: o->core_heads = -9, name = "core_heads"; break;
      case 7: o->core_bias = 9, name = "core_bias"; break;
      case 8: o->unit = 9, name = "unit"; break;
      case 9: o->softmax_scale = &infinite, name = "softmax_scale"; break;
      case 10: o->pooling_scale = negative, name = "pooling_scale"; break;
      case 11: o->softcap = negative, name = "softcap"; break;
      case 12: o->first_position = &before_all, name = "first_position"; break;
    }
    EXPECT(cca_attention(&e.call) == CCA_INVALID_ARGUMENT);
    char start[100];
    snprintf(start, sizeof start, "cca: options.%s: got", name);
    if (strncmp(cca_error(), start, strlen(start)) != 0) printf("%s is refused as %s\n", name, cca_error()), ++failures;
  }
}

static void test_refusals(void) {
  for (int fault = 0; fault < 24; ++fault) {
    example e;
    set_up(&e);
    connect(&e);
    const char* text = "";
    const int64_t falling[] = {0, 12, 7}, long_offsets[] = {0, 7, L + 1};
    int64_t short_shape[] = {1};
    tensor *far_key = make(4, B, H, 1, D), *none = make(1, 1, 0, 0, 0);
    switch (fault) {
      case 0: e.q->dl.dtype.lanes = 4, text = "query: got float64 in 4 lanes, wants float32"; break;
      case 1: e.k->dl.dtype.bits = 32, text = "key: got float32, wants float64"; break;
      case 2: e.q->dl.dtype.code = kDLInt, text = "query: got int64, wants float32"; break;
      case 3: e.v->dl.device.device_type = kDLCUDA, text = "value: got memory of DLPack's device type 2"; break;
      case 4: e.out->dl.device.device_type = kDLMetal, text = "out: got memory"; break;
      case 5: e.k->shape[2] = -1, text = "key: got extents [2, 2, -1, 3], wants none below 0"; break;
      case 6: e.k->dl.strides = NULL, e.k->shape[0] = INT64_MAX, e.k->shape[2] = 4, text = "key: got extents"; break;
      case 7: e.v->dl.ndim = 3, text = "value: got 3 dimensions, wants 4"; break;
      case 8: e.q->dl.byte_offset = 4, text = "query: got an address"; break;
      case 9: e.k->dl.data = NULL, text = "key: got a null pointer"; break;
      case 10: e.k->strides[3] = 2, text = "key: got strides"; break;
      case 11: e.call.query = NULL, text = "query: got NULL"; break;
      case 12: e.call.far_key = &far_key->dl, text = "far_key: got a tensor, wants none"; break;
      case 13: e.call.struct_size = sizeof e.call + 8, text = "call.struct_size: got"; break;
      case 14: e.options.struct_size = 3, text = "options.struct_size: got 3"; break;
      case 15: e.call.query_offsets = &counts(3, falling)->dl, text = "query: got a batch of 2, wants 1"; break;
      case 16:
        e.call.key_offsets = &counts(3, long_offsets)->dl;
        e.k->shape[0] = 1;
        text = "key: got sequence 1 up to token 20, wants at most the length of 19";
        break;
      case 17: none->dl.dtype.code = kDLInt, none->dl.shape = short_shape, none->dl.data = NULL,
               e.call.key_offsets = &none->dl, text = "key_offsets: got a null pointer"; break;
      case 20: e.call.key_begins = &counts(2, falling)->dl, text = "key_begins: got begins, wants lengths"; break;
      case 21:
        e.call.key_lengths = &counts(2, long_offsets)->dl;
        e.call.key_begins = &counts(3, falling)->dl;
        text = "key_begins: got [3], wants 2 of them";
        break;
      case 22:
        e.call.key_lengths = &counts(2, falling)->dl;
        e.call.key_lengths->shape[0] = -1;
        text = "key_lengths: got extents [-1], wants none below 0";
        break;
      case 23: e.call.far_lengths = &counts(2, falling)->dl, text = "far_lengths: got a tensor, wants none"; break;
      case 18: e.call.threads = -1, text = "threads: got -1"; break;
      case 19: e.call.lse = e.call.out, text = "lse: got 4 dimensions, wants 3"; break;
    }
    EXPECT(cca_attention(&e.call) == CCA_INVALID_ARGUMENT);
    if (strstr(cca_error(), text) == NULL) printf("fault %d: %s, not %s\n", fault, cca_error(), text), ++failures;
    for (int64_t i = 0; i < e.out->count; ++i) EXPECT(e.out->x[i] == 0);
  }
  EXPECT(cca_attention(NULL) == CCA_INVALID_ARGUMENT);
  EXPECT(cca_use("z80") == CCA_INVALID_ARGUMENT && strstr(cca_error(), "z80"));
  EXPECT(cca_use(cca_architecture()) == CCA_OK);

  /* A caller of an older version, whose structure ends before the options. */
  example e;
  set_up(&e);
  connect(&e);
  e.call.struct_size = offsetof(cca_call, options);
  e.call.options = (const cca_options*)&e;
  EXPECT(cca_attention(&e.call) == CCA_OK);
}

/* Elements of each type come through: a single key is the answer, to the bit. */
static void test_elements(void) {
  static const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLFloat, 64, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
  for (int i = 0; i < 4; ++i) {
    uint16_t value[] = {0x3f80, 0x3f80, 0x3f80, 0x3f80, 0x3f80, 0x3f80, 0x3f80, 0x3f80}, out[8] = {0};
    int64_t shape[] = {1, 1, 1, 8 * 2 / (types[i].bits / 8)}, odd_strides[] = {-7, 9, 11, 1};
    DLTensor t = {value, {kDLCPU, 0}, 4, types[i], shape, NULL, 0}, to = {out, {kDLCPU, 0}, 4, types[i], shape, NULL, 0};
    if (i == 2) t.strides = odd_strides;
    cca_call call = {.struct_size = sizeof call, .query = &t, .key = &t, .value = &t, .out = &to};
    EXPECT(cca_attention(&call) == CCA_OK);
    EXPECT(memcmp(value, out, sizeof out) == 0);
  }
  /* What steps over a single element, or over none, is of no account. */
  double x = 3, answer = 0;
  int64_t one[] = {1, 1, 1, 1}, odd_strides[] = {-7, 9, 11, 5};
  DLTensor t = {&x, {kDLCPU, 0}, 4, types[1], one, odd_strides, 0}, to = {&answer, {kDLCPU, 0}, 4, types[1], one, NULL, 0};
  cca_call call = {.struct_size = sizeof call, .query = &t, .key = &t, .value = &t, .out = &to};
  EXPECT(cca_attention(&call) == CCA_OK && answer == 3);
  int64_t none[] = {1, 1, 0, 2}, no_strides[] = {0, 0, 0, 0};
  t.shape = to.shape = none;
  t.strides = to.strides = no_strides;
  EXPECT(cca_attention(&call) == CCA_OK);
}

/* Rows of int8, whose scales are powers of two: their numbers are float32, and so are the results, to the bit. */
enum { Q_N = 13, Q_D = 6 };
typedef struct q8_rows {
  int8_t elements[Q_N * Q_D];
  float scales[2 * Q_N], numbers[Q_N * Q_D]; /* every second scale is a row's */
} q8_rows;

static void fill_q8(q8_rows* rows, unsigned seed) {
  for (int i = 0; i < 2 * Q_N; ++i) rows->scales[i] = i % 2 == 0 ? ldexpf(1, -9 + (int)(((unsigned)i / 2 + seed) % 4)) : NAN;
  for (int i = 0; i < Q_N * Q_D; ++i) {
    seed = seed * 1664525u + 1013904223u;
    rows->elements[i] = (int8_t)((int)(seed >> 24) - 128);
    rows->numbers[i] = (float)rows->elements[i] * rows->scales[2 * (i / Q_D)];
  }
}

static DLTensor tensor_of(void* data, int code, int bits, int ndim, int64_t* shape, int64_t* strides) {
  DLTensor t = {.data = data, .device = {kDLCPU, 0}, .ndim = ndim, .shape = shape, .strides = strides};
  t.dtype = (DLDataType){(uint8_t)code, (uint8_t)bits, 1};
  return t;
}

static void test_rows_of_8_bits(void) {
  static q8_rows rows[4]; /* key, value, far key, far value */
  int64_t extents[4] = {1, 1, Q_N, Q_D}, of_rows[3] = {1, 1, Q_N}, second[3] = {2 * Q_N, 2 * Q_N, 2};
  float query[Q_N * Q_D], out[2][Q_N * Q_D], lse[2][Q_N];
  int64_t seen[Q_N];
  for (int i = 0; i < Q_N * Q_D; ++i) query[i] = (float)(i % 7 - 3) / 4;
  for (int i = 0; i < Q_N; ++i) seen[i] = i / 2;
  DLTensor q = tensor_of(query, kDLFloat, 32, 4, extents, NULL), s = tensor_of(seen, kDLInt, 64, 3, of_rows, NULL);
  DLTensor elements[4], numbers[4], scales[4], outs_of[2], lse_of[2];
  for (int i = 0; i < 4; ++i) {
    fill_q8(&rows[i], (unsigned)i + 1);
    elements[i] = tensor_of(rows[i].elements, kDLInt, 8, 4, extents, NULL);
    numbers[i] = tensor_of(rows[i].numbers, kDLFloat, 32, 4, extents, NULL);
    scales[i] = tensor_of(rows[i].scales, kDLFloat, 32, 3, of_rows, second);
  }
  for (int i = 0; i < 2; ++i) {
    outs_of[i] = tensor_of(out[i], kDLFloat, 32, 4, extents, NULL);
    lse_of[i] = tensor_of(lse[i], kDLFloat, 32, 3, of_rows, NULL);
  }
  cca_options options = CCA_OPTIONS;
  options.window = 5;
  for (int far_rows = 0; far_rows < 2; ++far_rows)
    for (int in_bytes = 1; in_bytes < (far_rows ? 4 : 2); ++in_bytes) { /* bit 0: tokens, bit 1: far rows */
      for (int way = 0; way < 2; ++way) {
        const int tokens = way == 1 && (in_bytes & 1), far = way == 1 && (in_bytes & 2);
        cca_call call = {.struct_size = sizeof call, .query = &q, .options = &options};
        call.out = &outs_of[way];
        call.lse = &lse_of[way];
        call.key = tokens ? &elements[0] : &numbers[0];
        call.value = tokens ? &elements[1] : &numbers[1];
        if (tokens) call.key_scales = &scales[0], call.value_scales = &scales[1];
        if (far_rows) {
          call.seen = &s;
          call.far_key = far ? &elements[2] : &numbers[2];
          call.far_value = far ? &elements[3] : &numbers[3];
          if (far) call.far_key_scales = &scales[2], call.far_value_scales = &scales[3];
        }
        size_t bytes = 0;
        EXPECT(cca_workspace_size(&call, &bytes) == CCA_OK && bytes > 0);
        call.workspace = malloc(bytes);
        call.workspace_size = bytes;
        EXPECT((far_rows ? cca_attend(&call) : cca_attention(&call)) == CCA_OK);
        free(call.workspace);
      }
      EXPECT(memcmp(out[0], out[1], sizeof out[0]) == 0 && memcmp(lse[0], lse[1], sizeof lse[0]) == 0);
    }

  const struct {
    const char* text;
    int change;
  } refusals[] = {{"cca: key_scales: got none", 0},
                  {"cca: value_scales: got [", 1},
                  {"cca: value: got float32, wants int8", 2},
                  {"cca: far_key_scales: got a tensor, wants none", 3},
                  {"cca: key_scales: got a tensor, wants none", 4},
                  {"cca: key: got int8, wants float64", 5},
                  {"cca: query: got int8", 6},
                  {"cca: key_scales: got float64, wants float32", 7}};
  for (size_t i = 0; i < sizeof refusals / sizeof *refusals; ++i) {
    int64_t fewer[3] = {1, 1, Q_N - 1};
    DLTensor short_scales = tensor_of(rows[1].scales, kDLFloat, 32, 3, fewer, second);
    DLTensor doubles = tensor_of(query, kDLFloat, 64, 4, extents, NULL);
    DLTensor wide_scales = tensor_of(rows[0].scales, kDLFloat, 64, 3, of_rows, NULL);
    cca_call call = {.struct_size = sizeof call, .query = &q, .key = &elements[0], .value = &elements[1],
                     .out = &outs_of[0], .key_scales = &scales[0], .value_scales = &scales[1]};
    switch (refusals[i].change) {
      case 0: call.key_scales = NULL; break;
      case 1: call.value_scales = &short_scales; break;
      case 2: call.value = &numbers[1]; break;
      case 3: call.far_key_scales = &scales[2]; break;
      case 4: call.key = &numbers[0], call.value = &numbers[1]; break;
      case 5: call.query = &doubles; break;
      case 6: call.query = &elements[2]; break;
      default: call.key_scales = &wide_scales;
    }
    EXPECT(cca_attention(&call) == CCA_INVALID_ARGUMENT);
    EXPECT(strncmp(cca_error(), refusals[i].text, strlen(refusals[i].text)) == 0);
  }

  /* What is rounded is what a cache keeps: of the rounded numbers it answers the same. */
  static q8_rows made;
  for (int i = 0; i < Q_N * Q_D; ++i) made.numbers[i] = (float)(i * 37 % 101 - 50) / 9;
  DLTensor from = tensor_of(made.numbers, kDLFloat, 32, 4, extents, NULL);
  DLTensor to = tensor_of(made.elements, kDLInt, 8, 4, extents, NULL);
  DLTensor to_scales = tensor_of(made.scales, kDLFloat, 32, 3, of_rows, NULL);
  EXPECT(cca_quantize(&from, &to, &to_scales) == CCA_OK);
  float rounded[Q_N * Q_D];
  int largest = 0;
  for (int i = 0; i < Q_N * Q_D; ++i) {
    rounded[i] = (float)made.elements[i] * made.scales[i / Q_D];
    EXPECT(fabsf(rounded[i] - made.numbers[i]) <= 0.501f * made.scales[i / Q_D]);
    if (abs(made.elements[i]) > largest) largest = abs(made.elements[i]);
  }
  EXPECT(largest == 127);
  EXPECT(cca_quantize(&from, &from, &to_scales) == CCA_INVALID_ARGUMENT);
  EXPECT(strcmp(cca_error(), "cca: to: got float32, wants int8") == 0);
  EXPECT(cca_quantize(NULL, &to, &to_scales) == CCA_INVALID_ARGUMENT);
  DLTensor again = tensor_of(rounded, kDLFloat, 32, 4, extents, NULL);
  const DLTensor* tokens[2] = {&from, &again};
  for (int way = 0; way < 2; ++way) {
    cca_cache_shape shape = {.struct_size = sizeof shape, .batch = 1, .heads = 1, .kv_heads = 1, .dim = Q_D};
    cca_cache* cache = NULL;
    EXPECT(cca_cache_make(&cache, &shape, to.dtype, NULL) == CCA_OK);
    cca_call call = {.struct_size = sizeof call, .query = &q, .key = tokens[way], .value = tokens[way],
                     .out = &outs_of[way]};
    EXPECT(cca_cache_attend(cache, CCA_ALL_SEQUENCES, &call) == CCA_OK);
    size_t held = 0, allocated = 0;
    EXPECT(cca_cache_get_bytes(cache, &held, &allocated) == CCA_OK && held < sizeof rounded);
    cca_cache_free(cache);
  }
  for (int i = 0; i < Q_N * Q_D; ++i) EXPECT(fabsf(out[0][i] - out[1][i]) < 1e-5f);
}

/* A cache of int8 keeps rows with scales as they are: its file is that of a cache that rounded the numbers to them. */
static void test_cache_of_rounded_rows(void) {
  static q8_rows rows;
  static float query[Q_N * Q_D], out[2][Q_N * Q_D];
  static memory_file files[2];
  int64_t extents[4] = {1, 1, Q_N, Q_D}, of_rows[3] = {1, 1, Q_N}, second[3] = {2 * Q_N, 2 * Q_N, 2};
  fill_q8(&rows, 7);
  for (int i = 0; i < Q_N; ++i) { /* as they are rounded: up to 127 */
    for (int d = 0; d < Q_D; ++d)
      if (d == i % Q_D || rows.elements[i * Q_D + d] == -128) rows.elements[i * Q_D + d] = 127;
    for (int d = 0; d < Q_D; ++d)
      rows.numbers[i * Q_D + d] = (float)rows.elements[i * Q_D + d] * rows.scales[2 * i];
  }
  for (int i = 0; i < Q_N * Q_D; ++i) query[i] = (float)(i % 7 - 3) / 4;
  DLTensor q = tensor_of(query, kDLFloat, 32, 4, extents, NULL), scales = tensor_of(rows.scales, kDLFloat, 32, 3, of_rows, second);
  DLTensor numbers = tensor_of(rows.numbers, kDLFloat, 32, 4, extents, NULL);
  DLTensor elements = tensor_of(rows.elements, kDLInt, 8, 4, extents, NULL);
  cca_cache_shape shape = {.struct_size = sizeof shape, .batch = 1, .heads = 1, .kv_heads = 1, .dim = Q_D};
  cca_options options = CCA_OPTIONS;
  options.group_size = 3;
  options.window = 4;
  for (int way = 0; way < 2; ++way) {
    DLTensor o = tensor_of(out[way], kDLFloat, 32, 4, extents, NULL);
    const DLTensor* tokens = way == 0 ? &numbers : &elements;
    cca_cache* cache = NULL;
    EXPECT(cca_cache_make(&cache, &shape, elements.dtype, &options) == CCA_OK);
    cca_call call = {.struct_size = sizeof call, .query = &q, .key = tokens, .value = tokens, .out = &o};
    if (way == 1) call.key_scales = call.value_scales = &scales;
    EXPECT(cca_cache_attend(cache, CCA_ALL_SEQUENCES, &call) == CCA_OK);
    call.out = NULL;
    EXPECT(cca_cache_append(cache, 0, &call) == CCA_OK);

    if (way == 1) call.value_scales = NULL;
    if (way == 0) call.key_scales = &scales;
    EXPECT(cca_cache_append(cache, 0, &call) == CCA_INVALID_ARGUMENT);
    EXPECT(strstr(cca_error(), way == 1 ? "cca: value_scales: got none" : "cca: key_scales: got a tensor") == cca_error());
    EXPECT(cca_cache_save(cache, write_memory, &files[way]) == CCA_OK);
    cca_cache_free(cache);
  }
  EXPECT(memcmp(out[0], out[1], sizeof out[0]) == 0);
  EXPECT(files[0].size == files[1].size && memcmp(files[0].bytes, files[1].bytes, files[0].size) == 0);

  cca_cache* floats = NULL;
  EXPECT(cca_cache_make(&floats, &shape, numbers.dtype, &options) == CCA_OK);
  cca_call call = {.struct_size = sizeof call, .query = &q, .key = &elements, .value = &elements,
                   .key_scales = &scales, .value_scales = &scales};
  EXPECT(cca_cache_append(floats, 0, &call) == CCA_INVALID_ARGUMENT);
  EXPECT(strcmp(cca_error(), "cca: key: got int8, wants float32") == 0);
  cca_cache_free(floats);
}

int main(void) {
  test_against_textbook();
  test_threads_and_workspace();
  test_far_and_gradients();
  test_score_terms();
  test_visible_rows();
  test_lengths();
  test_cache();
  test_options();
  test_refusals();
  test_rows_of_8_bits();
  test_cache_of_rounded_rows();
  test_elements();
  free_all();
  printf("%s, %s: %d failures\n", cca_version(), cca_architecture(), failures);
  return failures != 0;
}
