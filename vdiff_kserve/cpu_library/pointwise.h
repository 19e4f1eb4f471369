// What stands between a layer's matrix products, for one token.

#pragma once

#include <cmath>
#include <cstring>

#include "lanes.h"

// out = norm(x) * weight, of `size` numbers.
inline void norm_token(const bf16* x, const bf16* weight, bf16* out, i64 size, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (i64 at = 0; at < size; at += LANES) {
    const __m512 value = load(x + at, first(size - at));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(size);
  const __m512 factor = _mm512_set1_ps(1.f / std::sqrt(mean + eps));
  for (i64 at = 0; at < size; at += LANES) {
    const __mmask16 mask = first(size - at);
    const __m512 normed = rounded(_mm512_mul_ps(load(x + at, mask), factor));
    store(out + at, _mm512_mul_ps(normed, load(weight + at, mask)), mask);
  }
}

// Rotary position of one head of `size` dimensions, in the "half" layout. cos and sin are float32
// [turned], the first half of the sine negated; dimensions from `turned` on stay.
inline void rotate_head(const bf16* x, const float* cos, const float* sin, bf16* out, i64 size,
                        i64 turned) {
  const i64 half = turned / 2;
  for (i64 at = 0; at < half; at += LANES) {
    const __mmask16 mask = first(half - at);
    const __m512 low = load(x + at, mask), high = load(x + half + at, mask);
    const auto turn = [&](__m512 own, __m512 other, i64 place) {
      const __m512 part = _mm512_mul_ps(own, _mm512_maskz_loadu_ps(mask, cos + place));
      return _mm512_fmadd_ps(other, _mm512_maskz_loadu_ps(mask, sin + place), part);
    };
    store(out + at, turn(low, high, at), mask);
    store(out + half + at, turn(high, low, half + at), mask);
  }
  if (turned < size) std::memcpy(out + turned, x + turned, (size - turned) * sizeof(bf16));
}
