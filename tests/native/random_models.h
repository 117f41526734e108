/* Small random models for programs that test the C interface: what the header allows, drawn from a seed that gives
 * the same on every machine. Every array has just the size that the header names, so that a reader who goes past
 * it is seen by a sanitizer. */
#ifndef RANDOM_MODELS_H
#define RANDOM_MODELS_H
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "pastalm.h"

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t bits() {
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  int below(int n) { return int(bits() % uint64_t(n)); }
  int between(int least, int most) { return least + below(most - least + 1); }
  bool once_in(int n) { return below(n) == 0; }
  int of(std::initializer_list<int> values) { return values.begin()[below(int(values.size()))]; }
  float real(float least, float most) { return least + (most - least) * float(bits() >> 40) / float(1 << 24); }
};

constexpr bool grouped(int type) { return type == PASTALM_Q4 || type == PASTALM_Q8; }
constexpr int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Freed {
  void operator()(void *p) const { free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Freed>;

/* Bits of a 16-bit float of five (float16) or eight (bfloat16) bits of exponent, of magnitude 2^-7 to 2^-2. */
inline uint16_t small_float(Random &random, bool bfloat16, bool positive = false) {
  const int mantissa = bfloat16 ? 7 : 10, bias = bfloat16 ? 127 : 15;
  const uint16_t exponent = uint16_t(bias - random.between(3, 7)), sign = !positive && random.once_in(2) ? 0x8000 : 0;
  return uint16_t(sign | exponent << mantissa | (random.bits() & ((1u << mantissa) - 1)));
}

/* A model's weights, which must outlive it. */
struct Weights {
  pastalm_config config{};
  std::vector<pastalm_layer> layers;
  std::vector<pastalm_rope> ropes;

  /* types: which weight types there may be. */
  Weights(Random &random, const std::vector<int> &types) {
    const bool mixed = random.once_in(3);
    const int one = types[size_t(random.below(int(types.size())))];
    auto type = [&] { return mixed ? types[size_t(random.below(int(types.size())))] : one; };
    const int unit = mixed || grouped(one) ? 32 : 2;
    config.layers = random.once_in(4) ? 3 : random.between(1, 2);
    config.hidden = unit == 32 ? random.of({32, 64, 96}) : random.of({8, 32, 34, 40, 64, 100});
    config.intermediate = random.of({32, 64, 96});
    config.kv_heads = random.between(1, 3);
    config.heads = config.kv_heads * random.between(1, 4);
    config.head_dim = unit == 32 ? 32 : 16;
    config.head_dim *= random.once_in(5) ? random.between(1, unit == 32 ? 4 : 8) : random.between(1, 2);
    config.vocabulary = random.between(1, 90);
    config.ropes = random.between(0, 2);
    config.activation = random.of({PASTALM_SILU, PASTALM_GELU_TANH});
    config.threads = random.once_in(5) ? random.between(2, 4) : 1;
    config.epsilon = 1e-5f;
    config.embedding_scale = random.once_in(3) ? random.real(1, 8) : 1;
    config.attention_scale = random.real(.5f, 1.5f) / std::sqrt(float(config.head_dim));
    config.attention_softcap = random.once_in(4) ? 20.f : 0.f;
    config.logit_softcap = random.once_in(4) ? 30.f : 0.f;
    config.embedding = matrix(random, type(), config.vocabulary, config.hidden);
    config.head = random.once_in(2) ? config.embedding : matrix(random, type(), config.vocabulary, config.hidden);
    config.norm = vector(random, config.hidden, .5f, 1.5f);
    for (int i = 0; i < config.ropes; i++)
      ropes.push_back({vector(random, random.between(1, config.head_dim / 2), 1e-3f, 1), random.real(.8f, 1.2f)});
    for (int i = 0; i < config.layers; i++) layers.push_back(layer(random, type));
  }

 private:
  std::vector<Buffer> buffers;
  std::vector<std::unique_ptr<float[]>> floats;

  template <class Type>
  pastalm_layer layer(Random &random, Type type) {
    const int hidden = config.hidden, attended = config.heads * config.head_dim;
    const int qkv = attended + 2 * config.kv_heads * config.head_dim;
    auto maybe = [&](int count, float least, float most) {
      return random.once_in(3) ? vector(random, count, least, most) : pastalm_vector{nullptr, 0};
    };
    pastalm_layer made{};
    made.qkv = matrix(random, type(), qkv, hidden);
    made.attention_out = matrix(random, type(), hidden, attended);
    made.gate_up = matrix(random, type(), 2 * config.intermediate, hidden);
    made.down = matrix(random, type(), hidden, config.intermediate);
    made.input_norm = vector(random, hidden, .5f, 1.5f);
    made.mlp_norm = vector(random, hidden, .5f, 1.5f);
    made.qkv_bias = maybe(qkv, -.1f, .1f);
    made.attention_out_bias = maybe(hidden, -.1f, .1f);
    made.q_norm = maybe(config.head_dim, .5f, 1.5f);
    made.k_norm = maybe(config.head_dim, .5f, 1.5f);
    made.attention_post_norm = maybe(hidden, .5f, 1.5f);
    made.mlp_post_norm = maybe(hidden, .5f, 1.5f);
    made.rope = random.between(-1, config.ropes - 1);
    made.window = random.once_in(3) ? random.between(1, 40) : 0;
    return made;
  }

  pastalm_vector vector(Random &random, int count, float least, float most) {
    floats.emplace_back(new float[size_t(count)]);
    for (int i = 0; i < count; i++) floats.back()[size_t(i)] = random.real(least, most);
    return {floats.back().get(), count};
  }

  pastalm_matrix matrix(Random &random, int type, int outputs, int inputs) {
    const int64_t groups = inputs / 32, scales = up_to(groups * 32, 64);
    const int64_t element = type == PASTALM_F32 ? 4 : 2, vectors = type == PASTALM_Q4 ? 4 : 8;
    const int64_t block = grouped(type) ? groups * vectors * 64 + scales : inputs * 16 * element;
    const int64_t bytes = up_to(outputs, 16) / 16 * block;
    buffers.emplace_back(static_cast<uint8_t *>(aligned_alloc(64, size_t(up_to(bytes, 64)))));
    uint8_t *data = buffers.back().get();
    memset(data, 0, size_t(bytes));
    for (int64_t output = 0; output < outputs; output++) {
      uint8_t *at = data + output / 16 * block;
      const int64_t column = output % 16;
      if (grouped(type)) {
        for (int64_t g = 0; g < groups; g++) {
          uint8_t *pair = at + g / 2 * (1 + 2 * vectors) * 64, *own = pair + 64 + g % 2 * vectors * 64;
          for (int64_t v = 0; v < vectors; v++)
            for (int64_t i = 0; i < 4; i++) own[64 * v + 4 * column + i] = uint8_t(random.bits());
          uint16_t scale = small_float(random, false, true);
          scale = uint16_t(scale - ((type == PASTALM_Q4 ? 2 : 6) << 10)); /* weights of one size, whatever q's range */
          memcpy(pair + g % 2 * 32 + 2 * column, &scale, 2);
        }
        continue;
      }
      for (int64_t input = 0; input < inputs; input++) {
        if (type == PASTALM_F32) {
          const float w = random.real(-.2f, .2f);
          memcpy(at + 4 * (16 * input + column), &w, 4);
        } else {
          const bool bfloat16 = type == PASTALM_BF16;
          const int64_t place = bfloat16 ? (input / 2 * 16 + column) * 2 + input % 2 : 16 * input + column;
          const uint16_t w = small_float(random, bfloat16);
          memcpy(at + 2 * place, &w, 2);
        }
      }
    }
    return {data, bytes, type, outputs, inputs};
  }
};

/* The arguments of one step that the header allows. */
struct Plan {
  std::vector<int32_t> ids, positions, slots, keep;
  std::vector<std::vector<uint16_t>> visible;
  std::vector<std::vector<int32_t>> order, share; /* of each group; empty: as the pages lie */
  std::vector<pastalm_group> groups;
  size_t vocabulary;

  Plan(Random &random, const pastalm_config &config, int slots_of_pool, int most)
      : vocabulary(size_t(config.vocabulary)) {
    const int pages_of_pool = slots_of_pool / PASTALM_PAGE, requests = random.between(1, 3);
    std::vector<bool> taken(size_t(slots_of_pool), false);
    for (int r = 0; r < requests; r++) {
      const int base = random.below(pages_of_pool), pages = random.between(1, pages_of_pool - base);
      const int wanted = random.once_in(4) ? random.between(1, most) : random.between(1, 8);
      const int first = int(ids.size());
      for (int i = 0; i < wanted; i++) {
        const int slot = PASTALM_PAGE * base + random.below(PASTALM_PAGE * pages);
        if (taken[size_t(slot)]) continue;
        taken[size_t(slot)] = true;
        ids.push_back(random.below(config.vocabulary));
        positions.push_back(random.once_in(20) ? random.below(1 << 20) : random.below(200));
        slots.push_back(slot);
      }
      const int count = int(ids.size()) - first;
      if (!count) continue;
      visible.push_back(rows(random, count, base, pages, first));
      groups.push_back({first, count, base * PASTALM_PAGE, pages, nullptr, nullptr, nullptr});
      order.emplace_back(), share.emplace_back();
      if (random.once_in(3)) continue;
      for (int p = 0; p < pages; p++) {
        order.back().push_back(p), share.back().push_back(p ? share.back()[size_t(p) - 1] + random.once_in(3) : 0);
        std::swap(order.back().back(), order.back()[size_t(random.below(p + 1))]);
      }
    }
    if (groups.empty()) *this = Plan(random, config, slots_of_pool, most);
    const bool all = random.once_in(3);
    for (int i = 0; i < int(ids.size()); i++)
      if (all || random.once_in(3)) keep.push_back(i);
    point();
  }
  Plan(const Plan &other) { *this = other; }
  Plan &operator=(const Plan &other) {
    ids = other.ids, positions = other.positions, slots = other.slots, keep = other.keep;
    vocabulary = other.vocabulary;
    visible = other.visible, groups = other.groups, order = other.order, share = other.share;
    point();
    return *this;
  }

  /* Aborts if what is said to be likeliest is not. */
  int32_t run(pastalm_model *model, pastalm_pool *pool, float *logits) const {
    std::vector<int32_t> likeliest(keep.size(), -2);
    const int32_t failed = pastalm_step(model, pool, int32_t(ids.size()), ids.data(), positions.data(), slots.data(),
                                        int32_t(groups.size()), groups.data(), int32_t(keep.size()), keep.data(), logits,
                                        likeliest.data());
    for (size_t i = 0; !failed && i < keep.size(); i++) {
      const float *row = logits + i * vocabulary;
      const int32_t first = int32_t(std::max_element(row, row + vocabulary) - row);
      const bool finite = std::all_of(row, row + vocabulary, [](float x) { return std::isfinite(x); });
      if (likeliest[i] != (finite ? first : -1)) fprintf(stderr, "row %zu: %d is likeliest\n", i, likeliest[i]), abort();
    }
    return failed;
  }

 private:
  void point() {
    for (size_t g = 0; g < groups.size(); g++) {
      groups[g].visible = visible[g].data();
      groups[g].order = order[g].empty() ? nullptr : order[g].data();
      groups[g].share = share[g].empty() ? nullptr : share[g].data();
    }
  }

  /* Rows that share most of what they see; each sees its own slot. */
  std::vector<uint16_t> rows(Random &random, int count, int base, int pages, int first) {
    std::vector<uint16_t> bits(size_t(count) * size_t(pages));
    for (int p = 0; p < pages; p++) {
      const uint16_t shared = random.once_in(3) ? 0xFFFF : random.once_in(3) ? 0 : uint16_t(random.bits());
      for (int i = 0; i < count; i++)
        bits[size_t(i * pages + p)] = random.once_in(8) ? uint16_t(random.bits()) : shared;
    }
    for (int i = 0; i < count; i++) {
      const int slot = slots[size_t(first + i)] - base * PASTALM_PAGE;
      bits[size_t(i * pages + slot / PASTALM_PAGE)] |= uint16_t(1u << slot % PASTALM_PAGE);
    }
    return bits;
  }
};
#endif
