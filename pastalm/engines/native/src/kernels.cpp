/* The arithmetic of a step, compiled once for each instruction set: -DPASTALM_ISA=plain, avx2, avx512,
 * avx512bf16 or neon.
 *
 * Products read each block of weights once for all rows of a tile: further rows cost arithmetic only, which few rows
 * have to spare while weights come from memory. Attention reads each page once for all query rows of a tile; rows
 * that do not see a page at the tile's ends are left out of it.
 */
#include "kernels.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {
using namespace pastalm;

/* ------------------------------------------------------------------------------ products */

template <int M>
using Sums = Floats[M];

/* Where the bytes of a tile of rows begin; all of them lie in one panel. */
struct Bytes {
  const int8_t *q;
  const float *scale;
  const int32_t *offset;

  INLINE Bytes(const Rows &rows, int64_t row) {
    const int64_t panel = row / PANEL_ROWS * PANEL_ROWS, within = row % PANEL_ROWS;
    q = rows.q + panel * rows.width + within * GROUP;
    scale = rows.scale + panel * (rows.width / GROUP) + within;
    offset = rows.offset + panel * (rows.width / GROUP) + within;
  }
  INLINE void advance() { q += PANEL_ROWS * GROUP, scale += PANEL_ROWS, offset += PANEL_ROWS; }
};

/* One group of 32 inputs: sums += scale * rows' scale * sum of products of bytes. */
template <int M, bool NARROW>
INLINE void add_group(const char *quants, const char *scales, const Bytes &own, Floats *sums) {
  ByteSum<NARROW> acc[M];
  UNROLL for (int r = 0; r < M; r++) acc[r].begin(own.offset[r]);
  UNROLL for (int v = 0; v < (NARROW ? 4 : 8); v++) {
    const Ints packed = load_ints(quants + 64 * v);
    if (NARROW) {
      const Ints low = low_nibbles(packed), high = high_nibbles(packed);
      UNROLL for (int r = 0; r < M; r++) {
        acc[r].add_bytes(low, four(own.q + r * GROUP + 8 * v));
        acc[r].add_bytes(high, four(own.q + r * GROUP + 8 * v + 4));
      }
    } else {
      UNROLL for (int r = 0; r < M; r++) acc[r].add_bytes(packed, four(own.q + r * GROUP + 4 * v));
    }
  }
  const Floats by_output = load_halves(scales);
  UNROLL for (int r = 0; r < M; r++)
    add_product(sums[r], as_floats(acc[r].end()), by_output * all(own.scale[r]));
}

/* Weights are asked for this many bytes before they are needed: processors foresee a run up to the end of its page only,
 * and with several rows they look too late. */
constexpr int64_t AHEAD = 4096;

/* A tile of M rows and, if N is not 0, one of N rows behind it. The two take turns group by group: memory brings weights
 * all the while, which it does not while a second tile goes over a block that is there already. */
template <int M, int N, bool NARROW>
INLINE void add_bytes_block(const char *block, const Rows &rows, int64_t row, Floats *sums) {
  const int64_t groups = rows.width / GROUP;
  Bytes first(rows, row), second(rows, row + (N ? M : 0));
  constexpr int64_t size = NARROW ? 256 : 512;
  for (int64_t g = 0; g < groups; g += 2) {
    /* 4 bits come past the second-level cache, which they need not push all else out of. Of 8 bits too much is pushed out of
     * the first before it is used. */
    UNROLL for (int64_t i = 0; i < 64 + 2 * size; i += 64) __builtin_prefetch(block + AHEAD + i, 0, NARROW ? 0 : 1);
    UNROLL for (int i = 0; i < 2; i++) {
      if (g + i >= groups) break;
      const char *quants = block + 64 + i * size, *scales = block + i * 32;
      add_group<M, NARROW>(quants, scales, first, sums);
      if (N) add_group<N ? N : 1, NARROW>(quants, scales, second, sums + M);
      first.advance(), second.advance();
    }
    block += 64 + 2 * size;
  }
}

template <int M, int TYPE>
INLINE void add_floats_block(const char *block, const Rows &rows, int64_t row, Sums<M> &sums) {
  const float *x[M];
  UNROLL for (int r = 0; r < M; r++) x[r] = rows.x + (row + r) * rows.width;
  for (int64_t k = 0; k < rows.width; k += 2) {
    Floats even, odd;
    if (TYPE == PASTALM_BF16) {
      const Ints pair = load_ints(block + k * 2 * BLOCK);
      even = lower_halves(pair), odd = higher_halves(pair);
    } else if (TYPE == PASTALM_F16) {
      even = load_halves(block + k * 2 * BLOCK), odd = load_halves(block + (k + 1) * 2 * BLOCK);
    } else {
      const float *weights = reinterpret_cast<const float *>(block) + k * BLOCK;
      even = load(weights), odd = load(weights + BLOCK);
    }
    UNROLL for (int r = 0; r < M; r++) {
      add_product(sums[r], even, all(x[r][k]));
      add_product(sums[r], odd, all(x[r][k + 1]));
    }
  }
}

/* M + N rows by one block, N of them not 0 for bytes only; outputs past the matrix's last are not written. */
template <int TYPE, int M, int N>
void tile(const char *block, const Rows &rows, int64_t row, float *out, int64_t stride, int64_t outputs, bool add,
          const float *bias) {
  Sums<M + N> sums;
  UNROLL for (int r = 0; r < M + N; r++) sums[r] = all(0);
  if constexpr (TYPE == PASTALM_Q4 || TYPE == PASTALM_Q8)
    add_bytes_block<M, N, TYPE == PASTALM_Q4>(block, rows, row, sums);
  else
    add_floats_block<M, TYPE>(block, rows, row, sums);
  UNROLL for (int r = 0; r < M + N; r++) {
    float *to = out + r * stride;
    if (outputs >= BLOCK) {
      Floats x = sums[r];
      if (bias) x = x + load(bias);
      if (add) x = x + load(to);
      store(to, x);
    } else {
      float lanes[LANES];
      store(lanes, sums[r]);
      for (int64_t i = 0; i < outputs; i++) to[i] = lanes[i] + (bias ? bias[i] : 0) + (add ? to[i] : 0);
    }
  }
}

#if defined(SIMD_AVX512)
constexpr int WIDEST = 8;
constexpr bool PAIRS = true; /* of tiles, for bytes: where arithmetic is faster than memory */
#define EVERY_TILE(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8)
#else
constexpr int WIDEST = 4;
constexpr bool PAIRS = false;
#define EVERY_TILE(DO) DO(1) DO(2) DO(3) DO(4)
#endif

template <int TYPE>
void block_by_rows(const char *block, const Rows &rows, int64_t first, int64_t last, float *out, int64_t stride,
                   int64_t outputs, bool add, const float *bias) {
  for (int64_t row = first; row < last;) {
    const int m = (int)std::min<int64_t>(last - row, WIDEST - row % WIDEST); /* within a panel */
    const int n = PAIRS && in_bytes(TYPE) && m == WIDEST ? (int)std::min<int64_t>(last - row - m, WIDEST) : 0;
    float *to = out + (row - first) * stride;
#define ONE(M) case M: tile<TYPE, M, 0>(block, rows, row, to, stride, outputs, add, bias); break;
#define TWO(N) case N: tile<TYPE, WIDEST, PAIRS && in_bytes(TYPE) ? N : 0>(block, rows, row, to, stride, outputs, add, bias); break;
    if (n)
      switch (n) { EVERY_TILE(TWO) }
    else
      switch (m) { EVERY_TILE(ONE) }
#undef ONE
#undef TWO
    row += m + n;
  }
}

constexpr int64_t CACHED = 192 * 1024; /* bytes of activations that stay in the second-level cache beside weights */

void product(const pastalm_matrix &m, const Rows &rows, int64_t first_row, int64_t last_row, int64_t first_block,
             int64_t last_block, float *out, int64_t stride, bool add, const float *bias) {
  const int64_t size = block_bytes(m.type, m.inputs);
  const int64_t a_row = rows.width * (in_bytes(m.type) ? 1 : 4);
  const int64_t panel = std::max<int64_t>(CACHED / a_row / PANEL_ROWS, 1) * PANEL_ROWS;
  for (int64_t from = first_row; from < last_row; from += panel) {
    const int64_t to = std::min(from + panel, last_row);
    for (int64_t b = first_block; b < last_block; b++) {
      const char *block = static_cast<const char *>(m.data) + b * size;
      const int64_t column = (b - first_block) * BLOCK, outputs = m.outputs - b * BLOCK;
      float *into = out + (from - first_row) * stride + column;
      const float *own = bias ? bias + b * BLOCK : nullptr;
      switch (m.type) {
#define TYPE(T) case T: block_by_rows<T>(block, rows, from, to, into, stride, outputs, add, own); break;
        TYPE(PASTALM_Q4) TYPE(PASTALM_Q8) TYPE(PASTALM_BF16) TYPE(PASTALM_F16) TYPE(PASTALM_F32)
#undef TYPE
      }
    }
  }
}

/* ------------------------------------------------------------------------------ rows of activations */

/* Width is a multiple of 32. Rounds as GGML does: to the nearest, by the largest of the group over 127. */
void bytes(const Rows &rows, int64_t row, int64_t column, int64_t width) {
  const float *x = rows.x + row * rows.width + column;
  const int64_t groups = rows.width / GROUP, panel = row / PANEL_ROWS * groups, within = row % PANEL_ROWS;
  for (int64_t g = column / GROUP; g < (column + width) / GROUP; g++, x += GROUP) {
    const int64_t at = (panel + g) * PANEL_ROWS + within;
    const Floats low = load(x), high = load(x + LANES);
    const float most = largest(larger(absolute(low), absolute(high)));
    const float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
    const Ints first = nearest(low * all(inverse)), second = nearest(high * all(inverse));
    store_bytes(rows.q + at * GROUP, first);
    store_bytes(rows.q + at * GROUP + LANES, second);
    rows.scale[at] = scale;
    rows.offset[at] = -8 * (sum(first) + sum(second));
  }
}

INLINE Floats hyperbolic_tangent(const Floats &x) {
  const Floats limited = larger(smaller(x, all(15)), all(-15));
  const Floats e = exponential(limited + limited);
  return (e - all(1)) / (e + all(1));
}

void gated(const float *gate, const float *up, int32_t activation, int64_t row, int64_t column, bool as_bytes,
           const Rows &into) {
  float *x = into.x + row * into.width + column;
  for (int half = 0; half < GROUP; half += LANES) {
    const Floats g = load(gate + half);
    Floats active;
    if (activation == PASTALM_SILU) {
      active = g / (all(1) + exponential(all(0) - g));
    } else {
      const Floats inner = (g + g * g * g * all(0.044715f)) * all(0.7978845608f);
      active = g * all(0.5f) * (all(1) + hyperbolic_tangent(inner));
    }
    store(x + half, active * load(up + half));
  }
  if (as_bytes) bytes(into, row, column, GROUP);
}

void norm(const float *x, const float *weight, int64_t width, float epsilon, float *out) {
  Floats squares = all(0);
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const Floats v = load(x + i);
    add_product(squares, v, v);
  }
  float total = sum(squares);
  for (; i < width; i++) total += x[i] * x[i];
  const float scale = 1 / std::sqrt(total / (float)width + epsilon);
  for (i = 0; i + LANES <= width; i += LANES) store(out + i, load(x + i) * all(scale) * load(weight + i));
  for (; i < width; i++) out[i] = x[i] * scale * weight[i];
}

/* One row of a packed matrix. */
void embed(const pastalm_matrix &m, int64_t token, float scale, float *out) {
  const int64_t lane = token % BLOCK;
  const char *block = static_cast<const char *>(m.data) + token / BLOCK * block_bytes(m.type, m.inputs);
  const uint16_t *halves = reinterpret_cast<const uint16_t *>(block);
  for (int64_t k = 0; k < m.inputs; k++) {
    float value = 0;
    const int64_t g = k / GROUP, i = k % GROUP;
    if (in_bytes(m.type)) {
      const bool narrow = m.type == PASTALM_Q4;
      const int64_t size = narrow ? 256 : 512;
      const char *pair = block + g / 2 * (64 + 2 * size);
      const unsigned char *quants = reinterpret_cast<const unsigned char *>(pair) + 64 + g % 2 * size;
      uint16_t half;
      memcpy(&half, pair + g % 2 * 32 + lane * 2, 2);
      const int shift = i % 8 < 4 ? 0 : 4;
      const int q = narrow ? (quants[i / 8 * 64 + lane * 4 + i % 4] >> shift & 15) - 8
                           : quants[i / 4 * 64 + lane * 4 + i % 4] - 128;
      value = half_to_float(half) * (float)q;
    } else if (m.type == PASTALM_BF16) {
      const uint32_t bits = (uint32_t)halves[k / 2 * 2 * BLOCK + lane * 2 + k % 2] << 16;
      memcpy(&value, &bits, 4);
    } else if (m.type == PASTALM_F16) {
      value = half_to_float(halves[k * BLOCK + lane]);
    } else {
      value = reinterpret_cast<const float *>(block)[k * BLOCK + lane];
    }
    out[k] = value * scale;
  }
}

void rotate(float *head, const float *cosine, const float *sine, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

void softcap(float *x, int64_t count, float cap) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, hyperbolic_tangent(load(x + i) * all(1 / cap)) * all(cap));
  for (; i < count; i++) x[i] = std::tanh(x[i] / cap) * cap;
}

void rank(const float *logits, int64_t count, int64_t first, Likeliest &best) {
  Floats most = all(-INFINITY), odd = all(0); /* odd: 0 unless a logit is not finite */
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats x = load(logits + i);
    most = larger(most, x);
    odd = odd + (x - x);
  }
  float top = largest(most), rest = sum(odd);
  for (; i < count; i++) top = std::max(top, logits[i]), rest += logits[i] - logits[i];
  if (rest != 0) best.finite = false; /* it is no number */
  if (best.id >= 0 && (top < best.logit || (top == best.logit && first > best.id))) return;
  for (i = 0; i < count; i++)
    if (logits[i] == top) {
      best.logit = top, best.id = (int32_t)(first + i);
      return;
    }
}

/* ------------------------------------------------------------------------------ keys and values */

/* What is no number becomes 0: a hidden slot weighs nothing, but 0 * NaN would spoil who reads its page. */
INLINE float number(float x) { return std::isfinite(x) ? x : 0; }

INLINE uint16_t rounded_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write(const pastalm_pool &pool, int64_t slot, int32_t layer, int32_t head, const float *key, const float *value) {
  const int64_t page = slot / PAGE, s = slot % PAGE, d = pool.head_dim;
  char *keys = pool.at(layer, 0, head, page), *values = pool.at(layer, 1, head, page);
  if (pool.type == PASTALM_F32) {
    float *k = reinterpret_cast<float *>(keys), *v = reinterpret_cast<float *>(values);
    for (int64_t i = 0; i < d; i++) k[i * PAGE + s] = key[i], v[s * d + i] = number(value[i]);
  } else {
    uint16_t *k = reinterpret_cast<uint16_t *>(keys), *v = reinterpret_cast<uint16_t *>(values);
    for (int64_t i = 0; i < d; i++) {
      k[i / 2 * 2 * PAGE + s * 2 + i % 2] = rounded_to_bfloat16(key[i]);
      v[(s / 2 * d + i) * 2 + s % 2] = rounded_to_bfloat16(number(value[i]));
    }
  }
}

/* ------------------------------------------------------------------------------ attention */

/* One tile over some pages, in the memory of one thread. Rows lie beside each other, so that any run of them is read
 * with one address:
 *   queries  [head_dim / 2][MOST_ROWS] pairs
 *   weights  [pages][MOST_ROWS][16]: scores, then in the same place 8 pairs of weights
 *   sums     [head_dim / 16][MOST_ROWS][16]: weighted values */
template <bool BFLOAT16>
struct Attention {
  typedef typename Pairs<BFLOAT16>::One One;
  static constexpr int64_t SIZE = BFLOAT16 ? 2 : 4;
  const Cache &cache;
  const Tile &tile;
  const int32_t *pages;
  const int64_t count;
  One *queries;
  float *weights, *sums;
  Floats most[MOST_ROWS];

  Attention(const Cache &c, const Tile &t, const int32_t *p, int64_t n, float *scratch)
      : cache(c), tile(t), pages(p), count(n), weights(scratch), sums(scratch + n * MOST_ROWS * PAGE) {
    queries = reinterpret_cast<One *>(sums + MOST_ROWS * c.head_dim);
    for (int64_t d = 0; d < c.head_dim; d += 2)
      for (int r = 0; r < t.rows; r++)
        queries[d / 2 * MOST_ROWS + r] = Pairs<BFLOAT16>::one(t.queries[r][d], t.queries[r][d + 1]);
    for (int r = 0; r < t.rows; r++) most[r] = all(-INFINITY);
    for (int64_t i = 0; i < MOST_ROWS * c.head_dim; i += LANES) store(sums + i, all(0));
  }

  float *row(int64_t i, int r) const { return weights + (i * MOST_ROWS + r) * PAGE; }
  const char *page(const void *from, int64_t i) const {
    return static_cast<const char *>(from) + pages[i] * PAGE * cache.head_dim * SIZE;
  }

  /* Which rows see a page: from the first to the last that does. */
  void seers(int64_t i, int &first, int &last) const {
    first = 0, last = tile.rows;
    while (first < last && !tile.visible[first][pages[i]]) first++;
    while (last > first && !tile.visible[last - 1][pages[i]]) last--;
  }

  template <int R>
  void score(int64_t i, int first, float softcap_) {
    Floats own[R];
    UNROLL for (int r = 0; r < R; r++) own[r] = all(0);
    const char *keys = page(cache.keys, i);
    const One *q = queries + first;
    for (int64_t d = 0; d < cache.head_dim; d += 2, keys += 2 * PAGE * SIZE, q += MOST_ROWS) {
      const Pairs<BFLOAT16> pairs = Pairs<BFLOAT16>::at(keys, PAGE);
      UNROLL for (int r = 0; r < R; r++) pairs.add_to(own[r], q[r]);
    }
    UNROLL for (int r = 0; r < R; r++) {
      if (softcap_ > 0) own[r] = hyperbolic_tangent(own[r] * all(1 / softcap_)) * all(softcap_);
      own[r] = hide(own[r], tile.visible[first + r][pages[i]]);
      most[first + r] = larger(most[first + r], own[r]);
      store(row(i, first + r), own[r]);
    }
  }

  /* sums += weights * values of pages i .. end - 1, C columns of 16 at once. */
  template <int R, int C>
  void weigh(int64_t i, int64_t end, int first, int64_t column) {
    Floats own[R][C];
    float *to = sums + (column / LANES * MOST_ROWS + first) * LANES;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) own[r][c] = load(to + (c * MOST_ROWS + r) * LANES);
    for (; i < end; i++) {
      const char *values = page(cache.values, i) + column * SIZE * (BFLOAT16 ? 2 : 1);
      const One *w = reinterpret_cast<const One *>(row(i, first));
      constexpr int64_t stride = PAGE * sizeof(float) / sizeof(One);
      for (int s = 0; s < PAGE / 2; s++, values += 2 * cache.head_dim * SIZE)
        UNROLL for (int c = 0; c < C; c++) {
          const Pairs<BFLOAT16> pairs = Pairs<BFLOAT16>::at(values + c * LANES * SIZE * (BFLOAT16 ? 2 : 1), cache.head_dim);
          UNROLL for (int r = 0; r < R; r++) pairs.add_to(own[r][c], w[r * stride + s]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store(to + (c * MOST_ROWS + r) * LANES, own[r][c]);
  }

  template <int R>
  void weigh_all(int64_t i, int64_t end, int first) {
#if defined(SIMD_AVX512)
    constexpr int C = R <= 6 ? 4 : 2;
#else
    constexpr int C = R <= 2 ? 2 : 1;
#endif
    int64_t column = 0;
    for (; column + C * LANES <= cache.head_dim; column += C * LANES) weigh<R, C>(i, end, first, column);
    for (; column < cache.head_dim; column += LANES) weigh<R, 1>(i, end, first, column);
  }

#if defined(SIMD_AVX512)
#define EVERY_SIZE(DO) DO(12) DO(9) DO(6) DO(4) DO(3) DO(2) DO(1)
#else
#define EVERY_SIZE(DO) DO(4) DO(3) DO(2) DO(1)
#endif
#define SCORE(R) if (last - first >= R) { score<R>(i, first, softcap_); first += R; continue; }
#define WEIGH(R) if (last - first >= R) { weigh_all<R>(i, end, first); first += R; continue; }

  void score_all(float softcap_) {
    for (int64_t i = 0; i < count; i++) {
      int first, last;
      seers(i, first, last);
      while (first < last) {
        EVERY_SIZE(SCORE)
      }
    }
  }

  /* Scores become weights, relative to each row's largest. Who sees nothing weighs nothing. */
  void soften() {
    Floats total[MOST_ROWS], from[MOST_ROWS];
    for (int r = 0; r < tile.rows; r++) {
      const float top = largest(most[r]);
      tile.partials[r][0] = top;
      from[r] = all(top == -INFINITY ? 0 : top), total[r] = all(0);
    }
    for (int64_t i = 0; i < count; i++) {
      int first, last;
      seers(i, first, last);
      for (int r = first; r < last; r++) {
        const Floats weight = exponential(load(row(i, r)) - from[r]);
        total[r] = total[r] + weight;
        Pairs<BFLOAT16>::store_ones(reinterpret_cast<One *>(row(i, r)), weight);
      }
    }
    for (int r = 0; r < tile.rows; r++) tile.partials[r][1] = sum(total[r]);
  }

  /* Pages that the same rows see are added up in one go. */
  void weigh_pages() {
    for (int64_t i = 0, end; i < count; i = end) {
      int first, last, next_first, next_last;
      seers(i, first, last);
      for (end = i + 1; end < count; end++) {
        seers(end, next_first, next_last);
        if (next_first != first || next_last != last) break;
      }
      while (first < last) {
        EVERY_SIZE(WEIGH)
      }
    }
    for (int r = 0; r < tile.rows; r++)
      for (int64_t d = 0; d < cache.head_dim; d += LANES)
        store(tile.partials[r] + 2 + d, load(sums + (d / LANES * MOST_ROWS + r) * LANES));
  }
};

void attend(int32_t type, const Cache &cache, const Tile &tile, const int32_t *pages, int64_t count, float softcap_,
            float *scratch) {
  auto run = [&](auto &&attention) {
    attention.score_all(softcap_);
    attention.soften();
    attention.weigh_pages();
  };
  if (type == PASTALM_F32)
    run(Attention<false>(cache, tile, pages, count, scratch));
  else
    run(Attention<true>(cache, tile, pages, count, scratch));
}

void merge(const float *partials, int64_t splits, int64_t apart, int64_t head_dim, float *out) {
  float top = -INFINITY, total = 0;
  for (int64_t i = 0; i < splits; i++) top = std::max(top, partials[i * apart]);
  for (int64_t d = 0; d < head_dim; d += LANES) store(out + d, all(0));
  if (top == -INFINITY) return;
  for (int64_t i = 0; i < splits; i++) {
    const float *own = partials + i * apart;
    if (own[0] == -INFINITY) continue; /* sees nothing of that share: its sums were not written */
    const float weight = std::exp(own[0] - top);
    total += weight * own[1];
    for (int64_t d = 0; d < head_dim; d += LANES) store(out + d, load(out + d) + load(own + 2 + d) * all(weight));
  }
  for (int64_t d = 0; d < head_dim; d += LANES) store(out + d, load(out + d) * all(1 / total));
}

}  // namespace

namespace pastalm {

#define JOINED(a, b) a##b
#define TABLE(isa) JOINED(isa, _kernels)
#define TEXT(x) #x
#define NAME(isa) TEXT(isa)

const Kernels *TABLE(PASTALM_ISA)() {
  static const Kernels table = {NAME(PASTALM_ISA), product, gated, norm,   bytes,  embed,
                                rotate,            softcap, rank,  write, attend, merge};
  return &table;
}

}  // namespace pastalm
