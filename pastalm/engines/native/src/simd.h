/* Sixteen floats or integers as one value, whatever the processor's registers hold.
 *
 * Included by kernels.cpp only, which is compiled once for each instruction set (PASTALM_ISA). GCC's and Clang's
 * vector types do nearly everything; what they cannot say (products of bytes, half precision) has a line of
 * intrinsics for each set. A value is an array of the widest registers there are: 1, 2 or 4 of them.
 */
#ifndef PASTALM_SIMD_H
#define PASTALM_SIMD_H
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SIMD_AVX512 1
#elif defined(__AVX2__) && defined(__F16C__)
#define SIMD_AVX2 1
#elif defined(__ARM_FEATURE_DOTPROD)
#define SIMD_NEON 1
#endif
#if defined(SIMD_AVX512) || defined(SIMD_AVX2)
#include <immintrin.h>
#elif defined(SIMD_NEON)
#include <arm_neon.h>
#endif

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
#if defined(SIMD_AVX512)
constexpr int BYTES = 64;
#elif defined(SIMD_AVX2)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int PARTS = 64 / BYTES;
constexpr int PER = LANES / PARTS; /* lanes of one register */

typedef float FloatRegister __attribute__((vector_size(BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(BYTES)));
typedef float FloatsInMemory __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t IntsInMemory __attribute__((vector_size(BYTES), aligned(4), may_alias));

struct Ints {
  IntRegister part[PARTS];
};
struct Floats {
  FloatRegister part[PARTS];
};

#define EACH UNROLL for (int i = 0; i < PARTS; i++)

INLINE Floats load(const float *from) {
  Floats x;
  EACH x.part[i] = *reinterpret_cast<const FloatsInMemory *>(from + i * PER);
  return x;
}
INLINE void store(float *to, const Floats &x) {
  EACH *reinterpret_cast<FloatsInMemory *>(to + i * PER) = x.part[i];
}
INLINE Ints load_ints(const void *from) {
  Ints x;
  EACH x.part[i] = *reinterpret_cast<const IntsInMemory *>(static_cast<const char *>(from) + i * BYTES);
  return x;
}
INLINE Floats all(float value) {
  Floats x;
  EACH x.part[i] = value - FloatRegister{}; /* x - 0 is x, and the compiler knows it; 0 + x is not */
  return x;
}
INLINE Ints all_ints(int32_t value) {
  Ints x;
  EACH x.part[i] = IntRegister{} + value;
  return x;
}

INLINE Floats operator+(const Floats &a, const Floats &b) {
  Floats x;
  EACH x.part[i] = a.part[i] + b.part[i];
  return x;
}
INLINE Floats operator-(const Floats &a, const Floats &b) {
  Floats x;
  EACH x.part[i] = a.part[i] - b.part[i];
  return x;
}
INLINE Floats operator*(const Floats &a, const Floats &b) {
  Floats x;
  EACH x.part[i] = a.part[i] * b.part[i];
  return x;
}
INLINE Floats operator/(const Floats &a, const Floats &b) {
  Floats x;
  EACH x.part[i] = a.part[i] / b.part[i];
  return x;
}
INLINE void add_product(Floats &sum, const Floats &a, const Floats &b) {
  EACH sum.part[i] += a.part[i] * b.part[i];
}
INLINE Floats larger(const Floats &a, const Floats &b) {
  Floats x;
  EACH x.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return x;
}
INLINE Floats smaller(const Floats &a, const Floats &b) {
  Floats x;
  EACH x.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return x;
}
INLINE Floats absolute(const Floats &a) {
  Floats x;
  EACH x.part[i] = (FloatRegister)((IntRegister)a.part[i] & 0x7fffffff);
  return x;
}
INLINE Floats as_floats(const Ints &a) {
  Floats x;
  EACH x.part[i] = __builtin_convertvector(a.part[i], FloatRegister);
  return x;
}
INLINE float sum(const Floats &a) {
  float lanes[LANES], total = 0;
  store(lanes, a);
  for (float lane : lanes) total += lane;
  return total;
}
INLINE float largest(const Floats &a) {
  float lanes[LANES];
  store(lanes, a);
  float best = lanes[0];
  for (float lane : lanes) best = lane > best ? lane : best;
  return best;
}

INLINE int32_t sum(const Ints &a) {
  IntRegister all_parts = a.part[0];
  UNROLL for (int i = 1; i < PARTS; i++) all_parts += a.part[i];
  int32_t total = 0;
  UNROLL for (int i = 0; i < PER; i++) total += all_parts[i];
  return total;
}
constexpr float ROUNDING = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, which the lowest bits hold */
INLINE Ints nearest(const Floats &a) {
  Ints x;
  EACH x.part[i] = (IntRegister)(a.part[i] + ROUNDING) - 0x4b400000;
  return x;
}
INLINE void store_bytes(int8_t *to, const Ints &a) {
  typedef int8_t Narrow __attribute__((vector_size(PER)));
  EACH {
    const Narrow bytes = __builtin_convertvector(a.part[i], Narrow);
    memcpy(to + i * PER, &bytes, PER);
  }
}

/* e to the x within 2 units in the last place; 0 from -87.3 down, so that what is hidden (-inf) weighs nothing. */
INLINE Floats exponential(const Floats &x) {
  Floats y;
  EACH {
    FloatRegister v = x.part[i];
    const FloatRegister low = FloatRegister{} - 87.3f, high = FloatRegister{} + 88.7f;
    IntRegister gone = v <= low;
    v = v < low ? low : v;
    v = v > high ? high : v;
    FloatRegister n = (v * 1.44269504f + ROUNDING) - ROUNDING;
    FloatRegister r = v - n * 0.693359375f + n * 2.12194440e-4f;
    FloatRegister p = FloatRegister{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* 2^n in two factors: 2^128 by itself is no float */
    IntRegister whole = __builtin_convertvector(n, IntRegister), half = whole >> 1;
    p *= (FloatRegister)((half + 127) << 23);
    p *= (FloatRegister)((whole - half + 127) << 23);
    y.part[i] = (FloatRegister)((IntRegister)p & ~gone);
  }
  return y;
}

/* Of 16 32-bit words, each two bfloat16: the lower ones and the higher ones as floats. */
INLINE Floats lower_halves(const Ints &a) {
  Floats x;
  EACH x.part[i] = (FloatRegister)(a.part[i] << 16);
  return x;
}
INLINE Floats higher_halves(const Ints &a) {
  Floats x;
  EACH x.part[i] = (FloatRegister)(a.part[i] & (int32_t)0xffff0000);
  return x;
}

/* 0 or -infinity by the bits of a mask, lane 0 the lowest. */
INLINE Floats hide(const Floats &a, uint16_t seen) {
  Floats x;
#if defined(SIMD_AVX512)
  x.part[0] = (FloatRegister)_mm512_mask_blend_ps(seen, _mm512_set1_ps(-__builtin_inff()), (__m512)a.part[0]);
#else
  UNROLL for (int i = 0; i < PARTS; i++) {
    IntRegister bit;
    UNROLL for (int j = 0; j < PER; j++) bit[j] = 1 << (i * PER + j);
    IntRegister kept = ((IntRegister{} + (int32_t)seen) & bit) != 0;
    x.part[i] = kept ? a.part[i] : FloatRegister{} - __builtin_inff();
  }
#endif
  return x;
}

/* What attention multiplies: 16 pairs of keys or values by one pair, the same for all. `Pairs::One` is such a pair as it
 * is kept: two floats, or, where the processor multiplies bfloat16, two of those in one word. */
template <bool BFLOAT16>
struct Pairs {
  struct One {
    float first, second;
  };
  Floats even, odd;

  /* bfloat16 lie in pairs; float32 in two runs of 16, `apart` from each other. */
  static INLINE Pairs at(const void *from, int64_t apart) {
    if (BFLOAT16) {
      const Ints words = load_ints(from);
      return {lower_halves(words), higher_halves(words)};
    }
    const float *floats = static_cast<const float *>(from);
    return {load(floats), load(floats + apart)};
  }
  static INLINE One one(float first, float second) { return {first, second}; }
  static INLINE void store_ones(One *to, const Floats &from) { store(&to->first, from); } /* 8 of 16 floats */
  INLINE void add_to(Floats &sum, const One &by) const {
    add_product(sum, even, all(by.first));
    add_product(sum, odd, all(by.second));
  }
};
#if defined(SIMD_AVX512) && defined(__AVX512BF16__)
template <>
struct Pairs<true> {
  typedef int32_t One;
  Ints words;

  static INLINE Pairs at(const void *from, int64_t) { return {load_ints(from)}; }
  static INLINE One one(float first, float second) {
    const __m128bh both = _mm_cvtneps_pbh(_mm_set_ps(0, 0, second, first));
    return _mm_cvtsi128_si32((__m128i)both);
  }
  static INLINE void store_ones(One *to, const Floats &from) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh((__m512)from.part[0]));
  }
  INLINE void add_to(Floats &sum, One by) const {
    sum.part[0] = (FloatRegister)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)words.part[0],
                                                  (__m512bh)_mm512_set1_epi32(by));
  }
};
#endif

INLINE float half_to_float(uint16_t half) { /* any float16 but infinities and NaN, which weights do not hold */
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = (uint32_t)(half & 0x7fff) << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f; /* 2^112: the exponents' different zero, subnormals too */
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE Floats load_halves(const void *from) {
  Floats x;
#if defined(SIMD_AVX512)
  x.part[0] = (FloatRegister)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(from)));
#elif defined(SIMD_AVX2)
  EACH x.part[i] = (FloatRegister)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(from) + i));
#elif defined(SIMD_NEON)
  EACH x.part[i] =
      (FloatRegister)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t *>(from) + 4 * i)));
#else
  uint16_t halves[LANES];
  float lanes[LANES];
  memcpy(halves, from, sizeof halves);
  for (int i = 0; i < LANES; i++) lanes[i] = half_to_float(halves[i]);
  x = load(lanes);
#endif
  return x;
}

/* Products of bytes. Weights: 16 outputs x 4 inputs, a byte each; activations: the 4 inputs, the same for all outputs. */
INLINE int32_t four(const int8_t *activations) {
  int32_t word;
  memcpy(&word, activations, 4);
  return word;
}
INLINE Ints low_nibbles(const Ints &a) {
  Ints x;
  EACH x.part[i] = a.part[i] & 0x0f0f0f0f;
  return x;
}
INLINE Ints high_nibbles(const Ints &a) {
  Ints x;
  EACH x.part[i] = (a.part[i] >> 4) & 0x0f0f0f0f;
  return x;
}

/* Sums over a group of 32 inputs: `begin` with -8 times the sum of the activations, some `add_bytes`, `end`. Weights are
 * 0 .. 255, counted from 128, or (NARROW) 0 .. 15, counted from 8. */
template <bool NARROW>
struct ByteSum {
#if defined(SIMD_AVX2)
  /* sums of pairs fit 16 bits while weights are narrow: 8 times 2 * 15 * 127 */
  Ints pairs, total;
  INLINE void begin(int32_t offset) { pairs = all_ints(0), total = all_ints(NARROW ? offset : 0); }
  INLINE void add_bytes(const Ints &weights, int32_t activations) {
    const __m256i a = _mm256_set1_epi32(activations);
    EACH {
      __m256i w = (__m256i)weights.part[i];
      if (NARROW) {
        pairs.part[i] = (IntRegister)_mm256_add_epi16((__m256i)pairs.part[i], _mm256_maddubs_epi16(w, a));
      } else { /* 255 * 127 * 2 does not fit: 128 and what is missing to it, by its size and the other's sign */
        __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
        __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(a, s));
        total.part[i] = (IntRegister)_mm256_add_epi32((__m256i)total.part[i],
                                                      _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
      }
    }
  }
  INLINE Ints end() const {
    Ints x = total;
    if (NARROW)
      EACH x.part[i] = (IntRegister)_mm256_add_epi32(
          (__m256i)x.part[i], _mm256_madd_epi16((__m256i)pairs.part[i], _mm256_set1_epi16(1)));
    return x;
  }
#else
  Ints total;
  INLINE void begin(int32_t offset) {
#if defined(SIMD_NEON)
    total = all_ints(NARROW ? offset : 0); /* wide weights get their sign back */
#else
    total = all_ints(NARROW ? offset : offset * 16);
#endif
  }
  INLINE void add_bytes(const Ints &weights, int32_t activations) {
#if defined(SIMD_AVX512)
    total.part[0] = (IntRegister)_mm512_dpbusd_epi32((__m512i)total.part[0], (__m512i)weights.part[0],
                                                     _mm512_set1_epi32(activations));
#elif defined(SIMD_NEON)
    int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
    EACH {
      int8x16_t w = vreinterpretq_s8_s32((int32x4_t)weights.part[i]);
      if (!NARROW) w = veorq_s8(w, vdupq_n_s8((int8_t)0x80));
      total.part[i] = (IntRegister)vdotq_s32((int32x4_t)total.part[i], w, a);
    }
#else
    int8_t a[4];
    memcpy(a, &activations, 4);
    EACH {
      const IntRegister w = weights.part[i];
      total.part[i] += (w & 255) * (int32_t)a[0] + ((w >> 8) & 255) * (int32_t)a[1] +
                       ((w >> 16) & 255) * (int32_t)a[2] + ((w >> 24) & 255) * (int32_t)a[3];
    }
#endif
  }
  INLINE Ints end() const { return total; }
#endif
};

}  // namespace
#endif
