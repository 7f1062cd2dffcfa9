// Sixteen floats at a time: loads, stores, exp2, reductions. GCC and clang vector extensions, so one source serves every
// instruction set that the compiler is told to use; with AVX-512 a Vec is one register.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace megakd {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const BFloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  const UintVec bits = __builtin_convertvector(half, UintVec) << 16;
  return (Vec)bits;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Rounds to nearest, ties to even.
inline void store(BFloat16* to, Vec x) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
  const UintVec bits = (UintVec)x;
  const HalfVec half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, HalfVec);
#endif
  std::memcpy(to, &half, sizeof half);
}

// The first `count` lanes from memory, the others -inf: an entry that has no part in any softmax.
template <class Element>
inline Vec load(const Element* from, int64_t count) {
  if (count >= kLanes) return load(from);
  Element lanes[kLanes];
  store(lanes, broadcast(-kInfinity));
  std::memcpy(lanes, from, count * sizeof(Element));
  return load(lanes);
}

template <class Element>
inline void store(Element* to, Vec x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  Element lanes[kLanes];
  store(lanes, x);
  std::memcpy(to, lanes, count * sizeof(Element));
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

inline float reduce_max(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; i++) best = x[i] > best ? x[i] : best;
  return best;
}

inline float reduce_add(Vec x) {
  float sums[kLanes];
  store(sums, x);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  }
  return sums[0];
}

// 2^x for x <= 0 with a relative error of about 2e-7, exactly 0 below 2^-127, NaN for NaN. The integer part comes from
// adding a number so large that the fraction is rounded away, which leaves it, biased by 127, in the low bits of the sum;
// the fraction in [-0.5, 0.5] goes through Taylor's polynomial of degree 6 (coefficients ln2^k / k!).
inline Vec exp2(Vec x) {
  constexpr float kRounder = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the bias
  x = x < -127.0f ? broadcast(-127.0f) : x;
  const Vec shifted = x + kRounder;
  const Vec fraction = x - (shifted - kRounder);
  Vec poly = fraction * 1.5403530e-4f + 1.3333558e-3f;
  poly = poly * fraction + 9.6181291e-3f;
  poly = poly * fraction + 5.5504109e-2f;
  poly = poly * fraction + 2.4022651e-1f;
  poly = poly * fraction + 6.9314718e-1f;
  poly = poly * fraction + 1.0f;
  const Vec power = (Vec)((UintVec)shifted << 23);
  return poly * power;
}

}  // namespace megakd
