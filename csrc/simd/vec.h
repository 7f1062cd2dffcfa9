// Sixteen floats at a time: loads, stores, exp2, log2, reductions. Written with the vector extensions of GCC and clang, so
// one source serves every instruction set that the compiler may use; with AVX-512 a Vec is one register.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
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
#if defined(__AVX512F__)
  const UintVec bits = (UintVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  const UintVec bits = __builtin_convertvector(half, UintVec);
#endif
  return (Vec)(bits << 16);
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Rounds to nearest, ties to even.
inline void store(BFloat16* to, Vec x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
  const UintVec bits = (UintVec)x;
  const HalfVec half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, HalfVec);
#endif
  std::memcpy(to, &half, sizeof half);
}

// Loads the first `count` lanes from memory; the others are `fill`, by default -inf, which has no part in any softmax.
template <class Element>
inline Vec load(const Element* from, int64_t count, float fill = -kInfinity) {
  if (count >= kLanes) return load(from);
  Element lanes[kLanes];
  store(lanes, broadcast(fill));
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
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

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

// 2^x with a relative error below 2e-7: exactly 1 at 0, exactly 0 for -inf, NaN for NaN; 0 or tiny from -126 down.
// The fraction in [0, 1] goes through the polynomial of degree 5 with the least relative error among those that are 1 at
// 0.
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // 0 for -inf
#else
  // Adding a number so large that fractions are rounded off leaves the integer part, biased by 127, in the low bits.
  constexpr float kRounder = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the bias
  x = min(broadcast(128.5f), max(broadcast(-126.5f), x));
  const Vec shifted = (x - 0.49999997f) + kRounder;  // a little less than a half, so that 0 goes to itself
  const Vec fraction = x - (shifted - kRounder);
#endif
  Vec poly = fraction * 1.8671316863e-03f + 9.0170269014e-03f;
  poly = poly * fraction + 5.5799915547e-02f;
  poly = poly * fraction + 2.4016444949e-01f;
  poly = poly * fraction + 6.9315131186e-01f;
  poly = poly * fraction + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)poly, (__m512)x);
#else
  return poly * (Vec)((UintVec)shifted << 23);
#endif
}

// log2 x for x >= 0 with a relative error below 3e-7, near 1 too: -inf for 0, NaN for NaN and for infinity; for x below
// 2^-126 some number from -127 down. x = 2^n (1 + f) with f in [-1/4, 1/2), and log2(1 + f) / f is a polynomial.
inline Vec log2(Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec exponent = (bits - 0x3f400000) >> 23;
  const Vec f = (Vec)(bits - (exponent << 23)) - 1.0f;
  Vec poly = f * 7.8066758811e-02f - 1.7423029244e-01f;
  poly = poly * f + 2.1632491052e-01f;
  poly = poly * f - 2.4272352457e-01f;
  poly = poly * f + 2.8819149733e-01f;
  poly = poly * f - 3.6057591438e-01f;
  poly = poly * f + 4.8090207577e-01f;
  poly = poly * f - 7.2134846449e-01f;
  poly = poly * f + 1.4426950216e+00f;
  const Vec result = __builtin_convertvector(exponent, Vec) + f * poly + (x - x);
  return x == 0.0f ? broadcast(-kInfinity) : result;
}

}  // namespace megakd
