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

// Numbers of `even` and `odd` in turn, in bfloat16: lane i has even[i] in its low half.
inline __m512i side_by_side(__m512 even, __m512 odd) {
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(LANES)), 16);
  return _mm512_permutexvar_epi16(_mm512_or_si512(low, high),
                                  (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// 2^x for x <= 0, wrong by 0.01% at most; 2^-125 for what is below it. A polynomial on [-1/2, 1/2] gives
// the mantissa. The whole part is added to the exponent: it stands in the lowest bits of x plus
// 1.5 * 2^23, which rounds to whole numbers.
inline __m512 power_of_2(__m512 x) {
  const __m512 shift = _mm512_set1_ps(12582912.f);
  x = _mm512_max_ps(_mm512_set1_ps(-125.f), x);  // of these two, a NaN gives the second
  const __m512 shifted = _mm512_add_ps(x, shift);
  const __m512 part = _mm512_sub_ps(x, _mm512_sub_ps(shifted, shift));
  __m512 y = _mm512_set1_ps(5.500878e-2f);
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4221083e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9328293e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), exponent));
}

// Rows become columns, of 16 times 16 numbers of 32 bits.
inline void transpose(__m512i (&rows)[LANES]) {
  __m512i half[LANES];
  for (int i = 0; i < LANES; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Afterwards, row 4 i + j has columns j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3.
  for (int i = 0; i < LANES; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
