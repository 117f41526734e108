/* What a processor computes: one table of functions for each instruction set, filled by kernels.cpp. */
#ifndef PASTALM_KERNELS_H
#define PASTALM_KERNELS_H
#include <cstdint>

#include "pastalm.h"

namespace pastalm {

constexpr int BLOCK = 16;     /* outputs of a matrix that lie together */
constexpr int GROUP = 32;     /* inputs with one scale */
constexpr int PAGE = PASTALM_PAGE;
constexpr int MOST_ROWS = 24; /* query rows that attention takes together */

constexpr bool in_bytes(int32_t type) { return type == PASTALM_Q4 || type == PASTALM_Q8; }

/* Bytes of one block of a packed matrix, 0 for a type or a width that there is not. */
inline int64_t block_bytes(int32_t type, int64_t inputs) {
  const int64_t groups = inputs / GROUP, scales = (groups * 2 * BLOCK + 63) / 64 * 64;
  if (inputs <= 0 || inputs % (in_bytes(type) ? GROUP : 2)) return 0;
  switch (type) {
    case PASTALM_Q4: return groups * 256 + scales;
    case PASTALM_Q8: return groups * 512 + scales;
    case PASTALM_BF16: case PASTALM_F16: return inputs * 2 * BLOCK;
    case PASTALM_F32: return inputs * 4 * BLOCK;
    default: return 0;
  }
}
inline int64_t blocks(const pastalm_matrix &m) { return (m.outputs + BLOCK - 1) / BLOCK; }

/* Rows of activations, as floats or, for Q4 and Q8, as bytes: x = scale * q in groups of 32. Bytes lie in panels of 8
 * rows, group by group, so that a tile of rows is read in one run: q [panel][group][8 rows][32]; scale, offset
 * [panel][group][8 rows]; offset is -8 times the group's sum of q. */
constexpr int PANEL_ROWS = 8;
struct Rows {
  int32_t width = 0;
  float *x = nullptr; /* [rows][width] */
  int8_t *q = nullptr;
  float *scale = nullptr;
  int32_t *offset = nullptr;
};

/* Where attention reads: keys and values of one layer and one key head, the pages of one request.
 *   keys    [page][head_dim / 2][16 slots][2], float32: [page][head_dim][16 slots]
 *   values  [page][16 / 2 slots][head_dim][2], float32: [page][16 slots][head_dim] */
struct Cache {
  const void *keys, *values;
  int32_t head_dim;
};

/* Query rows that are computed together: of tokens first .. of one request, `heads` heads of each. */
struct Tile {
  const float *queries[MOST_ROWS];    /* [head_dim] each */
  const uint16_t *visible[MOST_ROWS]; /* [pages] each */
  int32_t rows;
  float *partials[MOST_ROWS]; /* [2 + head_dim]: largest score, sum of weights, weighted sum of values */
};

inline int64_t scratch_of(int64_t pages, int64_t head_dim) { return MOST_ROWS * (pages * PAGE + 2 * head_dim); }

/* The largest of a row's logits so far, and its id: of equal ones the first. */
struct Likeliest {
  float logit = 0;
  int32_t id = -1; /* none yet */
  bool finite = true;
};

struct Kernels {
  const char *name;
  /* out[row * stride + output], for blocks first_block .. last_block - 1 of the matrix (the first output of which is
   * out's first) and some rows; added to what stands there. bias: of all of the matrix's outputs, or none. */
  void (*product)(const pastalm_matrix &m, const Rows &rows, int64_t first_row, int64_t last_row, int64_t first_block,
                  int64_t last_block, float *out, int64_t stride, bool add, const float *bias);
  /* activation(gate) * up of `width` outputs into rows of activations. */
  void (*gated)(const float *gate, const float *up, int32_t activation, int64_t row, int64_t column, bool bytes,
                const Rows &into);
  /* x / rms(x) * weight. */
  void (*norm)(const float *x, const float *weight, int64_t width, float epsilon, float *out);
  /* Floats of one row as bytes, from column to column + width - 1. */
  void (*bytes)(const Rows &rows, int64_t row, int64_t column, int64_t width);
  void (*embed)(const pastalm_matrix &m, int64_t token, float scale, float *out);
  void (*rotate)(float *head, const float *cosine, const float *sine, int64_t half);
  void (*softcap)(float *x, int64_t count, float cap);
  /* Takes into account the logits of ids first .. first + count - 1, in any order of calls. */
  void (*rank)(const float *logits, int64_t count, int64_t first, Likeliest &best);
  void (*write)(const pastalm_pool &pool, int64_t slot, int32_t layer, int32_t head, const float *key, const float *value);
  /* Some of the pages (ascending, of the request's) for one tile. scratch: [scratch_of(count, head_dim)]. */
  void (*attend)(int32_t type, const Cache &cache, const Tile &tile, const int32_t *pages, int64_t count, float softcap,
                 float *scratch);
  /* The partials of one query row as one: [splits][2 + head_dim] -> [head_dim]. */
  void (*merge)(const float *partials, int64_t splits, int64_t apart, int64_t head_dim, float *out);
};

const Kernels *plain_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512_kernels();     /* with VNNI: products of bytes */
const Kernels *avx512bf16_kernels(); /* and products of bfloat16, for attention */
const Kernels *neon_kernels();

}  // namespace pastalm

/* Keys and values by slot: [layer][keys, values][key head][page]. */
struct pastalm_pool {
  int64_t slots, bytes;
  int32_t type, layers, kv_heads, head_dim;
  char *data;
  int32_t *positions; /* of each slot's token */

  int64_t element() const { return type == PASTALM_F32 ? 4 : 2; }
  int64_t page_bytes() const { return element() * PASTALM_PAGE * head_dim; }
  int64_t head_bytes() const { return page_bytes() * (slots / PASTALM_PAGE); }
  /* which: 0 keys, 1 values */
  char *at(int64_t layer, int which, int64_t head, int64_t page) const {
    return data + ((layer * 2 + which) * kv_heads + head) * head_bytes() + page * page_bytes();
  }
};
#endif
