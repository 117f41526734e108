/* The C interface: checks, and one forward pass as phases that a team of threads goes through together. */
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

using namespace pastalm;

namespace {

/* ------------------------------------------------------------------------------ errors */

thread_local char message[256];

bool fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return false;
}

/* ------------------------------------------------------------------------------ which kernels */

/* Those that this processor has, best first. */
std::vector<const Kernels *> possible() {
  std::vector<const Kernels *> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(avx512bf16_kernels());
  if (avx512) found.push_back(avx512_kernels());
  if (avx2) found.push_back(avx2_kernels()); /* every processor with AVX2 has F16C */
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & (1 << 20)) found.push_back(neon_kernels()); /* HWCAP_ASIMDDP */
#elif defined(__aarch64__)
  found.push_back(neon_kernels()); /* every processor of Apple's has the products */
#endif
  found.push_back(plain_kernels());
  return found;
}

const Kernels *&chosen() {
  static const Kernels *kernels = possible().front();
  return kernels;
}

/* ------------------------------------------------------------------------------ memory */

template <typename T>
struct Buffer { /* aligned, grows, keeps nothing when it does */
  T *data = nullptr;
  size_t size = 0;
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  ~Buffer() { ::operator delete[](data, std::align_val_t(64)); }
  T *of(size_t count) {
    if (count > size) {
      ::operator delete[](data, std::align_val_t(64));
      data = nullptr, size = 0;
      data = static_cast<T *>(::operator new[](count * sizeof(T), std::align_val_t(64)));
      size = count;
    }
    return data;
  }
};

struct RowsBuffer {
  Buffer<float> x, scale;
  Buffer<int8_t> q;
  Buffer<int32_t> offset;
  Rows of(size_t rows, int32_t width) {
    const size_t whole = (rows + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS;
    return {width, x.of(whole * width), q.of(whole * width), scale.of(whole * width / GROUP),
            offset.of(whole * width / GROUP)};
  }
};

}  // namespace

struct pastalm_model {
  pastalm_config config;
  std::vector<pastalm_layer> layers;
  std::vector<pastalm_rope> ropes;
  Team team;

  RowsBuffer hidden, attended, mlp, kept;
  Buffer<float> stream, delta, qkv, partials;
  std::vector<Buffer<float>> cosines, scratch; /* of each rope; of each thread */

  pastalm_model(const pastalm_config &c, const pastalm_layer *l, const pastalm_rope *r)
      : config(c), layers(l, l + c.layers), ropes(r, r + c.ropes), team(c.threads), cosines(c.ropes), scratch(c.threads) {
  }
};

namespace {

/* ------------------------------------------------------------------------------ one step */

constexpr int64_t ROWS_AT_ONCE = 64;   /* rows of gate and up between product and activation */
constexpr int64_t BLOCKS_AT_ONCE = 64; /* of the head between product and what is made of its logits */

/* The order in which attention sums over the pages of a request: share by share, then over the shares. It depends on
 * nothing but the caller's: so a row is the same, to the last bit, whatever other rows a pass has. */
struct Order {
  std::vector<int32_t> pages, share;

  explicit Order(const pastalm_group &g) : pages(g.pages), share(g.pages) {
    for (int32_t i = 0; i < g.pages; i++) {
      pages[i] = g.order ? g.order[i] : i;
      share[i] = g.order ? g.share[i] : i / 16;
    }
  }
};

/* What attention computes as one task: query rows (token, head of its group) first .. last - 1 of one request. */
struct Part {
  int32_t group, first, last;
  std::vector<int32_t> pages, share; /* that any of them sees, in order; for layers without a window, and with each */
};

struct Sight { /* what tokens see in layers of one window */
  int32_t window;
  std::vector<const uint16_t *> visible; /* of each token: [pages of its group] */
  std::vector<uint16_t> words;           /* of windows; without one the caller's */
  std::vector<Part> parts;
};

constexpr size_t PHASES = 9; /* of a layer */

struct Step final : Job {
  pastalm_model &model;
  pastalm_pool &pool;
  const Kernels &kernels;
  int32_t tokens;
  const int32_t *ids, *positions, *slots;
  int32_t groups;
  const pastalm_group *group;
  int32_t kept;
  const int32_t *keep;
  float *logits;
  int32_t *likeliest;

  Step(pastalm_model &model, pastalm_pool &pool, const Kernels &kernels, int32_t tokens, const int32_t *ids,
       const int32_t *positions, const int32_t *slots, int32_t groups, const pastalm_group *group, int32_t kept,
       const int32_t *keep, float *logits, int32_t *likeliest)
      : model(model), pool(pool), kernels(kernels), tokens(tokens), ids(ids), positions(positions), slots(slots),
        groups(groups), group(group), kept(kept), keep(keep), logits(logits), likeliest(likeliest) {}

  const pastalm_config &config = model.config;
  const int32_t heads_each = config.heads / config.kv_heads; /* query heads of one key head */
  const int32_t head_dim = config.head_dim, queries = config.heads * head_dim;
  const int32_t qkv_width = queries + 2 * config.kv_heads * head_dim;
  Rows hidden{}, attended{}, mlp{}, last{};
  float *x = nullptr, *delta = nullptr, *qkv = nullptr, *partials = nullptr;
  std::vector<Sight> sights;
  std::vector<int32_t> sight_of; /* of each layer */
  std::vector<Phase> phases = std::vector<Phase>(PHASES * ((size_t)config.layers + 1));
  std::vector<Order> orders;       /* of each group */
  std::vector<Likeliest> ranked;   /* [threads of the team][kept]: what each thread has seen */
  int32_t splits = 1;              /* shares of the request that has most */

  /* ---------------------------------------------------------- what is seen */

  Sight &seen_within(int32_t window) {
    for (Sight &sight : sights)
      if (sight.window == window) return sight;
    sights.emplace_back();
    Sight &sight = sights.back();
    sight.window = window;
    sight.visible.resize(tokens);
    size_t words = 0;
    for (int32_t g = 0; g < groups; g++) words += (size_t)group[g].count * group[g].pages;
    if (window) sight.words.resize(words);
    uint16_t *next = sight.words.data();
    for (int32_t g = 0; g < groups; g++)
      for (int32_t t = 0; t < group[g].count; t++) {
        const uint16_t *own = group[g].visible + (size_t)t * group[g].pages;
        if (window) {
          narrowed(group[g], group[g].first + t, own, window, next);
          own = next;
          next += group[g].pages;
        }
        sight.visible[group[g].first + t] = own;
      }
    for (int32_t g = 0; g < groups; g++) divide(sight, g);
    return sight;
  }

  /* Only slots whose positions lie less than a window before the token's. Positions of this step's own slots are known
   * to the pool already. */
  void narrowed(const pastalm_group &g, int32_t token, const uint16_t *own, int32_t window, uint16_t *into) {
    for (int32_t p = 0; p < g.pages; p++) {
      uint16_t word = 0;
      for (int32_t s = 0; own[p] >> s; s++)
        if (own[p] >> s & 1 && (int64_t)positions[token] - pool.positions[g.base + p * PAGE + s] < window) word |= 1 << s;
      into[p] = word;
    }
  }

  /* Query rows of a request in tiles, with the pages that each tile reads. */
  void divide(Sight &sight, int32_t g) {
    const int32_t rows = group[g].count * heads_each;
    for (int32_t first = 0; first < rows; first += MOST_ROWS) {
      Part part{g, first, std::min(first + MOST_ROWS, rows), {}, {}};
      const int32_t from = group[g].first + first / heads_each, to = group[g].first + (part.last - 1) / heads_each;
      for (int32_t i = 0; i < group[g].pages; i++) {
        const int32_t page = orders[g].pages[i];
        uint16_t any = 0;
        for (int32_t t = from; t <= to; t++) any |= sight.visible[t][page];
        if (any) part.pages.push_back(page), part.share.push_back(orders[g].share[i]);
      }
      sight.parts.push_back(std::move(part));
    }
  }

  /* ---------------------------------------------------------- tasks */

  template <typename F>
  void each(size_t phase, int64_t count, F &&task) {
    phases[phase].each((int32_t)count, model.team.size(), task);
  }

  template <typename F>
  void each_one(size_t phase, int64_t count, F &&task) {
    each(phase, count, [&](int64_t first, int64_t last_) {
      for (int64_t i = first; i < last_; i++) task(i);
    });
  }

  /* A matrix by some rows, in runs of blocks. */
  void multiply(size_t phase, const pastalm_matrix &m, const Rows &rows, int64_t count, float *out, int64_t stride,
                bool add, const pastalm_vector *bias) {
    const float *b = bias && bias->count ? bias->data : nullptr;
    each(phase, blocks(m), [&](int64_t first, int64_t last_) {
      kernels.product(m, rows, 0, count, first, last_, out + first * BLOCK, stride, add, b);
    });
  }

  /* ---------------------------------------------------------- phases */

  /* Adds what the layer before left (where it has a norm of its own), and makes the norm of a token for a product. */
  void advance(int64_t token, const pastalm_vector *post, const pastalm_vector &norm, const Rows &into, int64_t row,
               int32_t type) {
    float *own = x + token * config.hidden, *normed = into.x + row * config.hidden;
    if (post && post->count) {
      kernels.norm(delta + token * config.hidden, post->data, config.hidden, config.epsilon, normed);
      for (int32_t i = 0; i < config.hidden; i++) own[i] += normed[i];
    }
    kernels.norm(own, norm.data, config.hidden, config.epsilon, normed);
    if (in_bytes(type)) kernels.bytes(into, row, 0, config.hidden);
  }

  /* Rotates the queries and the key of one key head of one token, and writes key and value into the pool. */
  void place(int32_t layer_index, int64_t token, int32_t head) {
    const pastalm_layer &layer = model.layers[layer_index];
    float *row = qkv + token * qkv_width, *key = row + queries + head * head_dim;
    float *value = key + config.kv_heads * head_dim;
    for (int32_t i = 0; i <= heads_each; i++) {
      float *own = i < heads_each ? row + (head * heads_each + i) * head_dim : key;
      const pastalm_vector &norm = i < heads_each ? layer.q_norm : layer.k_norm;
      if (norm.count) kernels.norm(own, norm.data, head_dim, config.epsilon, own);
      if (layer.rope >= 0) {
        const int64_t half = model.ropes[layer.rope].inverse_frequencies.count;
        const float *cosine = model.cosines[layer.rope].data + token * 2 * half;
        kernels.rotate(own, cosine, cosine + half, half);
      }
      if (i < heads_each)
        for (int32_t d = 0; d < head_dim; d++) own[d] *= config.attention_scale;
    }
    kernels.write(pool, slots[token], layer_index, head, key, value);
  }

  float *partial(int64_t token, int64_t head, int64_t split) const {
    return partials + ((token * config.heads + head) * splits + split) * (2 + head_dim);
  }

  /* One tile, one key head, one share of the pages. */
  void attend(int32_t layer, const Sight &sight, const Part &part, int32_t head, int64_t split, float *scratch) {
    const pastalm_group &g = group[part.group];
    const auto [from, to] = std::equal_range(part.share.begin(), part.share.end(), (int32_t)split);
    const int64_t count = to - from;
    Tile tile;
    tile.rows = part.last - part.first;
    for (int32_t r = 0; r < tile.rows; r++) {
      const int32_t token = g.first + (part.first + r) / heads_each;
      const int32_t query_head = head * heads_each + (part.first + r) % heads_each;
      tile.queries[r] = qkv + (int64_t)token * qkv_width + query_head * head_dim;
      tile.visible[r] = sight.visible[token];
      tile.partials[r] = partial(token, query_head, split);
    }
    if (!count) {
      for (int32_t r = 0; r < tile.rows; r++) tile.partials[r][0] = -INFINITY;
      return;
    }
    const Cache cache{pool.at(layer, 0, head, g.base / PAGE), pool.at(layer, 1, head, g.base / PAGE), head_dim};
    kernels.attend(pool.type, cache, tile, part.pages.data() + (from - part.share.begin()), count, config.attention_softcap, scratch);
  }

  void run(int thread) override {
    const int64_t n = tokens;
    size_t phase = 0;
    each_one(phase++, n, [&](int64_t t) {
      kernels.embed(config.embedding, ids[t], config.embedding_scale, x + t * config.hidden);
      turn(t);
      advance(t, nullptr, model.layers[0].input_norm, hidden, t, model.layers[0].qkv.type);
    });
    for (int32_t l = 0; l < config.layers; l++) {
      const pastalm_layer &layer = model.layers[l];
      const Sight &sight = sights[sight_of[l]];
      multiply(phase++, layer.qkv, hidden, n, qkv, qkv_width, false, &layer.qkv_bias);
      /* Tokens of one thread lie side by side in a page: one worker writes them, so that no cache line goes to and fro. */
      const int64_t parts = (n + PAGE - 1) / PAGE;
      each_one(phase++, config.kv_heads * parts, [&](int64_t i) {
        const int64_t first = i % parts * PAGE, end = std::min<int64_t>(first + PAGE, n);
        for (int64_t t = first; t < end; t++) place(l, t, (int32_t)(i / parts));
      });
      each_one(phase++, (int64_t)sight.parts.size() * config.kv_heads * splits, [&](int64_t i) {
        const int64_t part = i / (config.kv_heads * splits), rest = i % (config.kv_heads * splits);
        attend(l, sight, sight.parts[part], (int32_t)(rest / splits), rest % splits, model.scratch[thread].data);
      });
      each_one(phase++, n, [&](int64_t t) {
        for (int32_t h = 0; h < config.heads; h++)
          kernels.merge(partial(t, h, 0), splits, 2 + head_dim, head_dim, attended.x + t * queries + h * head_dim);
        if (in_bytes(layer.attention_out.type)) kernels.bytes(attended, t, 0, queries);
      });
      const bool after = layer.attention_post_norm.count > 0;
      multiply(phase++, layer.attention_out, attended, n, after ? delta : x, config.hidden, !after,
               &layer.attention_out_bias);
      each_one(phase++, n, [&](int64_t t) {
        advance(t, &layer.attention_post_norm, layer.mlp_norm, hidden, t, layer.gate_up.type);
      });
      feed_forward(phase++, layer, thread);
      const bool after_mlp = layer.mlp_post_norm.count > 0;
      multiply(phase++, layer.down, mlp, n, after_mlp ? delta : x, config.hidden, !after_mlp, nullptr);
      if (l + 1 < config.layers) {
        const pastalm_layer &next = model.layers[l + 1];
        each_one(phase++, n, [&](int64_t t) {
          advance(t, &layer.mlp_post_norm, next.input_norm, hidden, t, next.qkv.type);
        });
      }
    }
    finish(phase, thread);
  }

  /* Gate and up by 32 outputs each, and at once what becomes of them. */
  void feed_forward(size_t phase, const pastalm_layer &layer, int thread) {
    constexpr int64_t unit = 2 * GROUP / BLOCK;
    const int64_t count = config.intermediate / GROUP;
    each_one(phase, count, [&](int64_t i) {
      float *scratch = model.scratch[thread].data;
      for (int64_t from = 0; from < tokens; from += ROWS_AT_ONCE) {
        const int64_t to = std::min<int64_t>(from + ROWS_AT_ONCE, tokens);
        kernels.product(layer.gate_up, hidden, from, to, i * unit, (i + 1) * unit, scratch, 2 * GROUP, false, nullptr);
        for (int64_t t = from; t < to; t++) {
          const float *gate = scratch + (t - from) * 2 * GROUP;
          kernels.gated(gate, gate + GROUP, config.activation, t, i * GROUP, in_bytes(layer.down.type), mlp);
        }
      }
    });
  }

  /* The cosines and sines of a token's position. */
  void turn(int64_t t) {
    for (size_t r = 0; r < model.ropes.size(); r++) {
      const pastalm_rope &rope = model.ropes[r];
      const int64_t half = rope.inverse_frequencies.count;
      float *cosine = model.cosines[r].data + t * 2 * half;
      for (int64_t i = 0; i < half; i++) {
        const float angle = (float)positions[t] * rope.inverse_frequencies.data[i];
        cosine[i] = std::cos(angle) * rope.factor;
        cosine[half + i] = std::sin(angle) * rope.factor;
      }
    }
  }

  /* The logits of the tokens that are kept. */
  void finish(size_t phase, int thread) {
    if (!kept) return;
    each_one(phase++, kept, [&](int64_t i) {
      advance(keep[i], &model.layers.back().mlp_post_norm, config.norm, last, i, config.head.type);
    });
    each(phase, blocks(config.head), [&](int64_t first, int64_t last_) {
      for (int64_t from = first; from < last_; from += BLOCKS_AT_ONCE)
        give_logits(from, std::min(from + BLOCKS_AT_ONCE, last_), thread);
    });
  }

  void give_logits(int64_t first, int64_t last_, int thread) {
    float *out = logits + first * BLOCK;
    kernels.product(config.head, last, 0, kept, first, last_, out, config.vocabulary, false, nullptr);
    const int64_t width = std::min<int64_t>(last_ * BLOCK, config.vocabulary) - first * BLOCK;
    for (int64_t i = 0; i < kept; i++) {
      float *own = out + i * config.vocabulary;
      if (config.logit_softcap > 0) kernels.softcap(own, width, config.logit_softcap);
      if (likeliest) kernels.rank(own, width, first * BLOCK, ranked[(size_t)thread * kept + i]);
    }
  }

  /* After the phases. */
  void give_likeliest() {
    for (int32_t i = 0; likeliest && i < kept; i++) {
      Likeliest best;
      for (size_t own = i; own < ranked.size(); own += kept) {
        const Likeliest &other = ranked[own];
        best.finite = best.finite && other.finite;
        if (other.id < 0) continue;
        if (best.id < 0 || other.logit > best.logit || (other.logit == best.logit && other.id < best.id))
          best.logit = other.logit, best.id = other.id;
      }
      likeliest[i] = best.finite ? best.id : -1;
    }
  }

  /* ---------------------------------------------------------- before the phases */

  void prepare() {
    const size_t n = tokens;
    for (int32_t t = 0; t < tokens; t++) pool.positions[slots[t]] = positions[t];
    for (int32_t g = 0; g < groups; g++) orders.emplace_back(group[g]);
    sights.reserve(model.layers.size());
    for (const pastalm_layer &layer : model.layers) sight_of.push_back((int32_t)(&seen_within(layer.window) - &sights[0]));
    int64_t most_pages = 1; /* of a share */
    for (const Order &order : orders) {
      splits = std::max(splits, order.share.back() + 1);
      for (auto from = order.share.begin(), to = from; from != order.share.end(); from = to) {
        to = std::upper_bound(from, order.share.end(), *from);
        most_pages = std::max<int64_t>(most_pages, to - from);
      }
    }
    hidden = model.hidden.of(n, config.hidden);
    attended = model.attended.of(n, queries);
    mlp = model.mlp.of(n, config.intermediate);
    last = model.kept.of(kept, config.hidden);
    if (likeliest) ranked.resize((size_t)model.team.size() * kept);
    x = model.stream.of(n * config.hidden);
    delta = model.delta.of(n * config.hidden);
    qkv = model.qkv.of(n * qkv_width);
    partials = model.partials.of(n * config.heads * splits * (2 + head_dim));
    for (size_t r = 0; r < model.ropes.size(); r++)
      model.cosines[r].of(n * 2 * model.ropes[r].inverse_frequencies.count);
    for (Buffer<float> &own : model.scratch)
      own.of(std::max<size_t>(ROWS_AT_ONCE * 2 * GROUP, scratch_of(most_pages, head_dim)));
  }
};

/* ------------------------------------------------------------------------------ checks */

bool check_matrix(const char *name, const pastalm_matrix &m, int64_t outputs, int64_t inputs) {
  if (m.outputs != outputs || m.inputs != inputs)
    return fail("%s is [%d, %d], not [%lld, %lld]", name, m.outputs, m.inputs, (long long)outputs, (long long)inputs);
  const int64_t size = block_bytes(m.type, m.inputs);
  if (!size) return fail("%s: type %d cannot hold %d inputs", name, m.type, m.inputs);
  if (m.bytes != size * blocks(m))
    return fail("%s has %lld bytes, not %lld", name, (long long)m.bytes, (long long)(size * blocks(m)));
  if (!m.data || reinterpret_cast<uintptr_t>(m.data) % 64) return fail("%s is not aligned to 64 bytes", name);
  return true;
}

bool check_vector(const char *name, const pastalm_vector &v, int64_t count, bool needed) {
  if (v.count == 0 && !needed) return true;
  if (v.count != count) return fail("%s has %lld numbers, not %lld", name, (long long)v.count, (long long)count);
  return v.data || fail("%s has no data", name);
}

bool check_layer(const pastalm_config &c, const pastalm_layer &l) {
  const int64_t queries = (int64_t)c.heads * c.head_dim, keys = (int64_t)c.kv_heads * c.head_dim;
  return check_matrix("qkv", l.qkv, queries + 2 * keys, c.hidden) &&
         check_matrix("attention_out", l.attention_out, c.hidden, queries) &&
         check_matrix("gate_up", l.gate_up, 2 * (int64_t)c.intermediate, c.hidden) &&
         check_matrix("down", l.down, c.hidden, c.intermediate) &&
         check_vector("input_norm", l.input_norm, c.hidden, true) &&
         check_vector("mlp_norm", l.mlp_norm, c.hidden, true) &&
         check_vector("qkv_bias", l.qkv_bias, queries + 2 * keys, false) &&
         check_vector("attention_out_bias", l.attention_out_bias, c.hidden, false) &&
         check_vector("q_norm", l.q_norm, c.head_dim, false) && check_vector("k_norm", l.k_norm, c.head_dim, false) &&
         check_vector("attention_post_norm", l.attention_post_norm, c.hidden, false) &&
         check_vector("mlp_post_norm", l.mlp_post_norm, c.hidden, false) &&
         ((l.rope >= -1 && l.rope < c.ropes) || fail("there is no rope %d", l.rope)) &&
         (l.window >= 0 || fail("a window of %d", l.window));
}

bool check_config(const pastalm_config &c) {
  const int32_t sizes[] = {c.layers, c.hidden, c.intermediate, c.heads, c.kv_heads, c.head_dim, c.vocabulary};
  for (int32_t size : sizes)
    if (size < 1 || size > 1 << 24) return fail("a size of %d", size);
  if (c.head_dim % 16 || c.head_dim > 1024) return fail("head_dim is %d: a multiple of 16 is needed", c.head_dim);
  if (c.heads % c.kv_heads) return fail("%d heads cannot share %d key heads", c.heads, c.kv_heads);
  if (c.intermediate % GROUP) return fail("intermediate is %d: a multiple of 32 is needed", c.intermediate);
  if ((int64_t)c.heads * c.head_dim > 1 << 20) return fail("%d heads of %d", c.heads, c.head_dim);
  if (c.threads < 1 || c.threads > 256) return fail("%d threads: 1 to 256", c.threads);
  if (c.ropes < 0 || c.ropes > 16) return fail("%d ropes: 0 to 16", c.ropes);
  if (c.activation != PASTALM_SILU && c.activation != PASTALM_GELU_TANH) return fail("no activation %d", c.activation);
  return check_matrix("embedding", c.embedding, c.vocabulary, c.hidden) &&
         check_matrix("head", c.head, c.vocabulary, c.hidden) && check_vector("norm", c.norm, c.hidden, true);
}

bool check_order(const pastalm_group &g) {
  if (!g.order) return true;
  if (!g.share) return false;
  std::vector<bool> listed(g.pages);
  for (int32_t i = 0; i < g.pages; i++) {
    if (g.order[i] < 0 || g.order[i] >= g.pages || listed[g.order[i]]) return false;
    listed[g.order[i]] = true;
    if (g.share[i] < (i ? g.share[i - 1] : 0) || g.share[i] > i) return false;
  }
  return true;
}

bool check_step(const pastalm_model *model, const pastalm_pool *pool, const Step &s) {
  const pastalm_config &c = model->config;
  if (pool->layers != c.layers || pool->kv_heads != c.kv_heads || pool->head_dim != c.head_dim)
    return fail("the pool was made for another model");
  if (s.tokens < 1 || s.tokens > 1 << 16) return fail("%d tokens in a step: 1 to 65536", s.tokens);
  if (!s.ids || !s.positions || !s.slots || !s.group) return fail("ids, positions, slots and groups are needed");
  for (int32_t t = 0; t < s.tokens; t++) {
    if (s.ids[t] < 0 || s.ids[t] >= c.vocabulary) return fail("token id %d is not below %d", s.ids[t], c.vocabulary);
    if (s.positions[t] < 0) return fail("position %d", s.positions[t]);
    if (s.slots[t] < 0 || s.slots[t] >= pool->slots) return fail("slot %d is not in the pool", s.slots[t]);
  }
  std::vector<int32_t> sorted(s.slots, s.slots + s.tokens);
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return fail("a slot is written twice");
  int32_t next = 0;
  for (int32_t g = 0; g < s.groups; g++) {
    const pastalm_group &own = s.group[g];
    if (own.first != next || own.count < 1 || own.count > s.tokens - next)
      return fail("group %d has %d tokens from %d on", g, own.count, own.first);
    if (own.base < 0 || own.base % PAGE || own.pages < 1 || own.pages > (pool->slots - own.base) / PAGE)
      return fail("group %d reads %d pages from slot %d", g, own.pages, own.base);
    if (!own.visible) return fail("group %d sees nothing", g);
    if (!check_order(own)) return fail("group %d: order is each page once, and shares ascend from 0", g);
    next += own.count;
  }
  if (next != s.tokens) return fail("the groups have %d of %d tokens", next, s.tokens);
  if (s.kept < 0 || s.kept > s.tokens || (s.kept && (!s.keep || !s.logits))) return fail("%d tokens to keep", s.kept);
  for (int32_t i = 0; i < s.kept; i++)
    if (s.keep[i] < 0 || s.keep[i] >= s.tokens || (i && s.keep[i] <= s.keep[i - 1]))
      return fail("keep must ascend below %d", s.tokens);
  return true;
}

bool check_slots(const pastalm_pool *pool, int64_t first, int64_t count) {
  if (!pool) return fail("no pool");
  return (first >= 0 && count >= 0 && count <= pool->slots && first <= pool->slots - count) ||
         fail("%lld slots from %lld on are not in the pool", (long long)count, (long long)first);
}

/* Keys (which 0) or values of one slot of a page, also in a slot of another page. */
void copy_slot(const pastalm_pool &pool, char *from_page, char *to_page, int which, int64_t from, int64_t to) {
  const int64_t d = pool.head_dim, size = pool.element();
  for (int64_t i = 0; i < d; i++) {
    const bool wide = pool.type == PASTALM_F32;
    auto at = [&](int64_t s) {
      if (which == 0) return wide ? i * PAGE + s : i / 2 * 2 * PAGE + s * 2 + i % 2;
      return wide ? s * d + i : (s / 2 * d + i) * 2 + s % 2;
    };
    memcpy(to_page + at(to) * size, from_page + at(from) * size, size);
  }
}

template <typename F>
int32_t guarded(F &&work) {
  try {
    return work() ? 0 : 1;
  } catch (const std::bad_alloc &) {
    fail("out of memory");
  } catch (const std::exception &error) {
    fail("%s", error.what());
  }
  return 1;
}

}  // namespace

/* ------------------------------------------------------------------------------ the interface */

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t pastalm_abi(void) { return PASTALM_ABI; }
EXPORT const char *pastalm_error(void) { return message; }
EXPORT const char *pastalm_kernels(void) { return chosen()->name; }

EXPORT int32_t pastalm_use_kernels(const char *name) {
  for (const Kernels *kernels : possible())
    if (name && !strcmp(kernels->name, name)) {
      chosen() = kernels;
      return 0;
    }
  fail("this processor has no kernels %s", name ? name : "without a name");
  return 1;
}

EXPORT pastalm_model *pastalm_model_new(const pastalm_config *config, const pastalm_layer *layers,
                                        const pastalm_rope *ropes) {
  pastalm_model *model = nullptr;
  guarded([&] {
    if (!config || !layers) return fail("config and layers are needed");
    if (!check_config(*config)) return false;
    if (config->ropes && !ropes) return fail("ropes are needed");
    for (int32_t r = 0; r < config->ropes; r++) {
      const int64_t count = ropes[r].inverse_frequencies.count;
      if (count < 1 || count > config->head_dim / 2 || !ropes[r].inverse_frequencies.data)
        return fail("rope %d has %lld frequencies", r, (long long)count);
    }
    for (int32_t l = 0; l < config->layers; l++)
      if (!check_layer(*config, layers[l])) return false;
    model = new pastalm_model(*config, layers, ropes);
    return true;
  });
  return model;
}

EXPORT void pastalm_model_free(pastalm_model *model) { delete model; }

EXPORT pastalm_pool *pastalm_pool_new(const pastalm_model *model, int64_t slots, int32_t type) {
  pastalm_pool *pool = nullptr;
  guarded([&] {
    if (!model) return fail("no model");
    if (type != PASTALM_BF16 && type != PASTALM_F32) return fail("keys and values are bfloat16 or float32");
    if (slots < PAGE || slots % PAGE || slots > INT32_MAX) return fail("%lld slots: a multiple of 16", (long long)slots);
    const pastalm_config &c = model->config;
    std::unique_ptr<pastalm_pool> made(new pastalm_pool{slots, 0, type, c.layers, c.kv_heads, c.head_dim, nullptr, nullptr});
    const double total = 2.0 * c.layers * c.kv_heads * (double)made->head_bytes();
    if (total > 1e14) return fail("a pool of %.0f GB", total / 1e9);
    made->bytes = 2 * (int64_t)c.layers * c.kv_heads * made->head_bytes() + slots * (int64_t)sizeof(int32_t);
    void *data = mmap(nullptr, made->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) return fail("no memory for a pool of %.1f GB", total / 1e9);
    made->data = static_cast<char *>(data);
    made->positions = reinterpret_cast<int32_t *>(made->data + made->bytes) - slots;
    pool = made.release();
    return true;
  });
  return pool;
}

EXPORT void pastalm_pool_free(pastalm_pool *pool) {
  if (!pool) return;
  munmap(pool->data, pool->bytes);
  delete pool;
}

EXPORT int64_t pastalm_pool_bytes(const pastalm_pool *pool) {
  return pool ? 2 * (int64_t)pool->layers * pool->kv_heads * pool->head_dim * pool->element() : 0;
}

EXPORT int32_t pastalm_pool_copy(pastalm_pool *pool, int64_t from, int64_t to, int64_t count) {
  return guarded([&] {
    if (!check_slots(pool, from, count) || !check_slots(pool, to, count)) return false;
    if (from < to + count && to < from + count && count) return fail("slots cannot be copied onto themselves");
    const bool aligned = from % PAGE == 0 && to % PAGE == 0;
    const int64_t whole = aligned ? count / PAGE : 0;
    for (int64_t l = 0; l < pool->layers; l++)
      for (int which = 0; which < 2; which++)
        for (int64_t h = 0; h < pool->kv_heads; h++) {
          if (whole)
            memcpy(pool->at(l, which, h, to / PAGE), pool->at(l, which, h, from / PAGE), whole * pool->page_bytes());
          for (int64_t i = whole * PAGE; i < count; i++)
            copy_slot(*pool, pool->at(l, which, h, (from + i) / PAGE), pool->at(l, which, h, (to + i) / PAGE), which,
                      (from + i) % PAGE, (to + i) % PAGE);
        }
    memcpy(pool->positions + to, pool->positions + from, count * sizeof(int32_t));
    return true;
  });
}

EXPORT int32_t pastalm_pool_clear(pastalm_pool *pool, int64_t first, int64_t count) {
  return guarded([&] {
    if (!check_slots(pool, first, count)) return false;
    if (first % PAGE || count % PAGE) return fail("slots are given back by pages of 16");
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (int64_t l = 0; l < pool->layers; l++)
      for (int which = 0; which < 2; which++)
        for (int64_t h = 0; h < pool->kv_heads; h++) {
          char *begin = pool->at(l, which, h, first / PAGE), *end = begin + count / PAGE * pool->page_bytes();
          char *inner = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page);
          char *outer = reinterpret_cast<char *>(reinterpret_cast<uintptr_t>(end) / page * page);
#if defined(__linux__) /* elsewhere what is given back need not read as zeros */
          if (inner >= outer || madvise(inner, outer - inner, MADV_DONTNEED)) inner = outer = end;
#else
          inner = outer = end;
#endif
          memset(begin, 0, inner - begin);
          memset(outer, 0, end - outer);
        }
    return true;
  });
}

EXPORT int32_t pastalm_step(pastalm_model *model, pastalm_pool *pool, int32_t tokens, const int32_t *ids,
                            const int32_t *positions, const int32_t *slots, int32_t groups, const pastalm_group *group,
                            int32_t kept, const int32_t *keep, float *logits, int32_t *likeliest) {
  return guarded([&] {
    if (!model || !pool) return fail("no model or no pool");
    auto step = std::make_shared<Step>(*model, *pool, *chosen(), tokens, ids, positions, slots, groups, group, kept, keep,
                                       logits, likeliest);
    if (!check_step(model, pool, *step)) return false;
    step->prepare();
    model->team.run(step);
    step->give_likeliest();
    return true;
  });
}
