// What all kernels are made of: 16 numbers at a time, for processors that multiply bfloat16 with
// AVX-512. Numbers are bfloat16 unless they are said to be float32.

#pragma once

#include <immintrin.h>

#include <cstdint>

using bf16 = uint16_t;
using i64 = int64_t;

constexpr int LANES = 16;
constexpr float LOG2_E = 1.44269504f;

inline __mmask16 first(i64 count) {
  return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 load(const bf16* from, __mmask16 mask = 0xffff) {
  return widen(_mm256_maskz_loadu_epi16(mask, from));
}

inline void store(bf16* to, __m512 x, __mmask16 mask = 0xffff) {
  _mm256_mask_storeu_epi16(to, mask, narrow(x));
}

// Whatever would become of it in memory: float32 rounded to bfloat16 and back.
inline __m512 rounded(__m512 x) { return widen(narrow(x)); }

// sum + a * b of the two numbers in each 32 bits.
inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// 2^x for x <= 0, to four digits: a polynomial on [-1/2, 1/2], then the exponent.
inline __m512 power_of_2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // of these two, a NaN gives the second
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(9.6181291e-3f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, whole);
}
