// The AVX-512 instructions that csrc/ names itself, written out, so that the kernels built on them run anywhere.
// Included before everything else when CMake is given -DNEGOTIATOR_EMULATE_AVX512=ON.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define __AVX512F__ 1
#define __AVX512BF16__ 1

namespace emulated {

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));

// Sums two products a lane: of the low and of the high bf16 halves.
inline Floats dpbf16(Floats sum, Words a, Words b) {
  constexpr uint32_t kHigh = 0xffff0000;
  return sum + (Floats)(a << 16) * (Floats)(b << 16) + (Floats)(a & kHigh) * (Floats)(b & kHigh);
}

inline Words set1(int x) { return Words{} + static_cast<uint32_t>(x); }

template <typename Vector>
inline Words widen(const Vector& x) {
  Shorts shorts;
  memcpy(&shorts, &x, sizeof shorts);
  return __builtin_convertvector(shorts, Words);
}

}  // namespace emulated

#define _mm512_dpbf16_ps(sum, a, b) \
  emulated::dpbf16((emulated::Floats)(sum), (emulated::Words)(a), (emulated::Words)(b))
#define _mm512_set1_epi32(x) emulated::set1(x)
#define _mm512_cvtepu16_epi32(x) emulated::widen(x)
