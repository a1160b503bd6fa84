// Vectors of the widest kind this translation unit is compiled for. Included by the per-instruction-set sources only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Float = float __attribute__((vector_size(kLanes * 4)));
using Int = int32_t __attribute__((vector_size(kLanes * 4)));
using Uint = uint32_t __attribute__((vector_size(kLanes * 4)));
using Short = uint16_t __attribute__((vector_size(kLanes * 2)));
using HalfFloat = float __attribute__((vector_size(kLanes * 2)));  // as many lanes as Double
using Double = double __attribute__((vector_size(kLanes * 4)));
using Long = int64_t __attribute__((vector_size(kLanes * 4)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <typename Vector>
inline void store(void* to, Vector x) {
  memcpy(to, &x, sizeof x);
}

// kLanes 16-bit integers, zero-extended. The compiler's own conversion goes through half-width vectors.
inline Uint widen_integers(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Uint)_mm512_cvtepu16_epi32(load<__m256i>(from));
#elif defined(__AVX2__)
  return (Uint)_mm256_cvtepu16_epi32(load<__m128i>(from));
#else
  return __builtin_convertvector(load<Short>(from), Uint);
#endif
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
inline Float widen_vector(const float* x) { return load<Float>(x); }
inline Float widen_vector(const uint16_t* x) { return (Float)(widen_integers(x) << 16); }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *to = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // to nearest, ties to even
}

inline Float splat(float x) { return x - Float{}; }
inline Float max(Float a, Float b) { return a > b ? a : b; }

// 2^x for x <= 0, relative error below 2e-7; exactly 0 below -126. NaN stays NaN.
inline Float exp2(Float x) {
  const Float magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Float shifted = max(x, splat(-126.0f)) + magic;
  const Float f = max(x, splat(-126.0f)) - (shifted - magic);
  Float p = splat(1.5252734e-5f);  // ln(2)^k / k!, k = 7 .. 0
  p = p * f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Int exponent = ((Int)shifted - (Int)magic) << 23;
  const Float power = (Float)((Int)p + exponent);
  return x < -126.0f ? Float{} : (x == x ? power : x);
}

// e^x, relative error below 2e-7; exactly 0 below -87, infinity above 88.7. NaN stays NaN.
inline Float exp(Float x) {
  const Float magic = splat(12582912.0f), least = splat(-87.0f), most = splat(88.7f);
  const Float below = x < most ? x : most;
  const Float clamped = max(below, least);
  const Float shifted = clamped * 1.44269504f + magic;
  const Float n = shifted - magic;
  // ln(2) in two parts: the first has so few bits that its product with n is exact.
  const Float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  Float p = splat(1.9841270e-4f);  // 1 / k!, k = 7 .. 0
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Int exponent = ((Int)shifted - (Int)magic) << 23;
  const Float power = (Float)((Int)p + exponent);
  const Float finite = x < least ? Float{} : power;
  return x > most ? splat(__builtin_inff()) : (x == x ? finite : x);
}

// e^x for x <= 0, within an ulp or two; exactly 0 below -708. NaN stays NaN.
inline Double exp(Double x) {
  const Double magic = 6755399441055744.0 - Double{};  // 1.5 * 2^52
  const Double least = -708.0 - Double{};
  const Double clamped = x > least ? x : least;
  const Double shifted = clamped * 1.4426950408889634 + magic;
  const Double n = shifted - magic;
  // ln(2) in two parts: the first has so few bits that its product with n is exact.
  const Double r = (clamped - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b39p-40;
  Double p = 1.6059043836821613e-10 - Double{};  // 1 / k!, k = 13 .. 0
  p = p * r + 2.0876756987868099e-9;
  p = p * r + 2.5052108385441719e-8;
  p = p * r + 2.7557319223985891e-7;
  p = p * r + 2.7557319223985891e-6;
  p = p * r + 2.4801587301587302e-5;
  p = p * r + 1.9841269841269841e-4;
  p = p * r + 1.3888888888888889e-3;
  p = p * r + 8.3333333333333333e-3;
  p = p * r + 4.1666666666666667e-2;
  p = p * r + 1.6666666666666667e-1;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const Long exponent = ((Long)shifted - (Long)magic) << 52;
  const Double power = (Double)((Long)p + exponent);
  return x < least ? Double{} : (x == x ? power : x);
}

}  // namespace
