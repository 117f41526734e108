/* Which id wins, exactly, without computing the noise of every id.
 *
 * Every id is hashed, since any hash may be a winner's. But the two logarithms of the noise are taken only where a
 * cheap bound says that the id can still win. With u the uniform number, -log(u) >= 1 - u, so
 *
 *   noise = -log(-log(u)) <= -log(1 - u),
 *
 * and the bits of a float, read as an integer, are a line through its logarithm that nowhere lies above it:
 * bits / 2^23 - 127 <= log2. So the bound costs a conversion, a product and a sum. It is close where it matters, at
 * large noise: few ids but the winner are computed in full. Blocks whose largest logit is too small for any noise
 * are not even hashed.
 */
#include "draw.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, FIRST_MIXER = 0xBF58476D1CE4E5B9, SECOND_MIXER = 0x94D049BB133111EB;
constexpr int BLOCK = 64;         /* ids that are bounded together */
constexpr double MOST = 36.737;   /* the largest noise is -log(-log(1 - 2^-53)) = 53 log(2) = 36.7368 */
constexpr float SLOPE = 8.26296e-8f; /* log(2) / 2^23 */
constexpr float OFFSET = 109.5173f;  /* log(2) * (127 + 31) = 109.51726, and what all roundings below can lose */

#define INLINE inline __attribute__((always_inline))

struct Steps { /* of the hash's state from the first id of a block to its others */
  uint64_t of[BLOCK];
  constexpr Steps() : of() {
    for (int i = 0; i < BLOCK; i++) of[i] = (uint64_t)i * GOLDEN;
  }
};
constexpr Steps steps;

/* splitmix64 but for its last step, which leaves the upper 31 bits as they are. */
INLINE uint64_t mixed(uint64_t state) {
  state = (state ^ state >> 30) * FIRST_MIXER;
  return (state ^ state >> 27) * SECOND_MIXER;
}

double noise(uint64_t state) {
  uint64_t x = mixed(state);
  x = (x ^ x >> 31) >> 12;
  return -std::log(-std::log(((double)x + 0.5) * 0x1p-52));
}

/* Loops below have a fixed length and no branch: the compiler makes vectors of them. */

template <typename Float>
INLINE bool any_reaches(const Float *values, Float reach) {
  int any = 0;
  for (int i = 0; i < BLOCK; i++) any |= values[i] >= reach;
  return any;
}

/* What the scores of BLOCK ids can be at most. state: of the first. */
template <typename Float>
INLINE void bound(const Float *logits, Float temperature, uint64_t state, Float *bounds) {
  float most[BLOCK];
  for (int i = 0; i < BLOCK; i++) {
    /* 1 - u is at least `rest` / 2^31; where that is 0, the bound is far above all noise */
    float rest = (float)(int32_t)(~mixed(state + steps.of[i]) >> 33);
    int32_t bits;
    std::memcpy(&bits, &rest, sizeof bits);
    most[i] = OFFSET - SLOPE * (float)bits;
  }
  for (int i = 0; i < BLOCK; i++) bounds[i] = logits[i] / temperature + (Float)most[i];
}

/* The logits of a row, BLOCK by BLOCK; the last block is filled up. */
template <typename Float>
struct Row {
  const Float *logits;
  int64_t size, blocks;
  Float last[BLOCK];

  INLINE Row(const Float *given, int64_t n) : logits(given), size(n), blocks((n + BLOCK - 1) / BLOCK) {
    for (int i = 0; i < BLOCK; i++) last[i] = -std::numeric_limits<Float>::infinity();
    std::memcpy(last, logits + (blocks - 1) * BLOCK, (size - (blocks - 1) * BLOCK) * sizeof(Float));
  }

  INLINE const Float *block(int64_t b) const { return b == blocks - 1 ? last : logits + b * BLOCK; }

  INLINE Float largest() const {
    Float lanes[BLOCK], found = last[0];
    std::memcpy(lanes, last, sizeof lanes);
    for (int64_t b = 0; b < blocks - 1; b++)
      for (int i = 0; i < BLOCK; i++) lanes[i] = logits[b * BLOCK + i] > lanes[i] ? logits[b * BLOCK + i] : lanes[i];
    for (int i = 0; i < BLOCK; i++) found = lanes[i] > found ? lanes[i] : found;
    return found;
  }

  /* The first id whose logit reaches `value`; 0 if none does. */
  INLINE int64_t first(Float value) const {
    for (int64_t b = 0; b < blocks; b++) {
      if (!any_reaches(block(b), value)) continue;
      for (int64_t i = b * BLOCK; i < size; i++)
        if (logits[i] >= value) return i;
    }
    return 0;
  }
};

/* The best id so far. reach: what a bound must reach for its id to be looked at; floor: what a logit must. */
template <typename Float>
struct Best {
  double temperature, score = -std::numeric_limits<double>::infinity();
  int64_t id = 0;
  Float reach = 0, floor = 0;

  void take(double other, int64_t other_id) {
    if (!(other > score || (other == score && other_id < id))) return;
    constexpr Float lowest = -std::numeric_limits<Float>::infinity();
    score = other;
    id = other_id;
    reach = std::nextafter((Float)score, lowest);
    floor = std::nextafter((Float)((score - MOST - 1e-6 * std::fabs(score)) * temperature), lowest);
  }
};

template <typename Float>
INLINE int64_t drawn(const Float *logits, int64_t size, double given_temperature, uint64_t key) {
  const Row<Float> row(logits, size);
  const Float temperature = (Float)std::fmin(given_temperature, std::numeric_limits<Float>::max());
  const Float largest = row.largest();
  const int64_t first = row.first(largest);
  if (!std::isfinite(largest / temperature)) return first;

  Best<Float> best{temperature};
  best.take((double)(largest / temperature) + noise(key + (uint64_t)(first + 1) * GOLDEN), first);
  for (int64_t b = 0; b < row.blocks; b++) {
    const Float *block = row.block(b);
    if (!any_reaches(block, best.floor)) continue;
    const uint64_t state = key + (uint64_t)(b * BLOCK + 1) * GOLDEN;
    Float bounds[BLOCK];
    bound(block, temperature, state, bounds);
    if (!any_reaches(bounds, best.reach)) continue;
    for (int i = 0; i < BLOCK; i++)
      if (bounds[i] >= best.reach)
        best.take((double)(block[i] / temperature) + noise(state + steps.of[i]), b * BLOCK + i);
  }
  return best.id;
}

/* The same code for each instruction set. */
struct Set {
  const char *name;
  bool here;
  int64_t (*floats)(const float *, int64_t, double, uint64_t);
  int64_t (*doubles)(const double *, int64_t, double, uint64_t);
};
#define SET(name, target) \
  target int64_t floats_##name(const float *l, int64_t n, double t, uint64_t k) { return drawn(l, n, t, k); } \
  target int64_t doubles_##name(const double *l, int64_t n, double t, uint64_t k) { return drawn(l, n, t, k); }
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS(what) (bool)__builtin_cpu_supports(what)
SET(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512"))))
SET(avx2, __attribute__((target("avx2,fma"))))
#endif
SET(plain, )

/* The best first. */
const std::vector<Set> &sets() {
  static const std::vector<Set> found = {
#if defined(__x86_64__) && defined(__GNUC__)
      {"avx512", HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq"), floats_avx512, doubles_avx512},
      {"avx2", HAS("avx2") && HAS("fma"), floats_avx2, doubles_avx2},
#endif
      {"plain", true, floats_plain, doubles_plain},
  };
  return found;
}

const Set *best_set() {
  for (const Set &set : sets())
    if (set.here) return &set;
  return nullptr;
}

std::atomic<const Set *> &current() {
  static std::atomic<const Set *> set{best_set()};
  return set;
}

} // namespace

int32_t pastalm_draw(int32_t rows, int32_t size, int32_t doubles, const void *const *logits,
                     const double *temperatures, const uint64_t *keys, int64_t *tokens) {
  if (rows < 0 || size < 1) return 1;
  for (int32_t r = 0; r < rows; r++)
    if (!logits[r] || !(temperatures[r] > 0)) return 1;
  const Set *set = current();
  for (int32_t r = 0; r < rows; r++)
    tokens[r] = doubles ? set->doubles((const double *)logits[r], size, temperatures[r], keys[r])
                        : set->floats((const float *)logits[r], size, temperatures[r], keys[r]);
  return 0;
}

int32_t pastalm_draw_with(const char *name) {
  for (const Set &set : sets())
    if (set.here && !std::strcmp(set.name, name)) {
      current() = &set;
      return 0;
    }
  return 1;
}
