// The likeliest token of every position.

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"

extern "C" {

// The first of the largest logits of every row, and its share of the row's softmax. Token `never`
// is not chosen; `left_out` is neither chosen nor counted in the rows that `leaves_out` tells.
// Either may be -1 for none. The logits [rows][size] are overwritten.
void likeliest(bf16* logits, i64 never, i64 left_out, const bool* leaves_out, i64* token,
               double* confidence, i64 rows, i64 size, int threads) {
  constexpr bf16 LEAST = 0xff80;  // -inf
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma omp parallel for num_threads(threads)
  for (i64 row = 0; row < rows; row++) {
    bf16* own = logits + row * size;
    const auto read = [&](i64 at) {
      const __mmask16 mask = first(size - at);
      return _mm512_mask_blend_ps(mask, least, load(own + at, mask));
    };
    if (left_out >= 0 && leaves_out[row]) own[left_out] = LEAST;
    const bf16 kept = never < 0 ? LEAST : own[never];
    if (never >= 0) own[never] = LEAST;
    __m512 best = least;
    __m512i place = lanes;
    for (i64 at = 0; at < size; at += LANES) {
      const __m512 value = read(at);
      const __mmask16 higher = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
      best = _mm512_mask_mov_ps(best, higher, value);
      const __m512i here = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(at)));
      place = _mm512_mask_mov_epi32(place, higher, here);
    }
    if (never >= 0) own[never] = kept;
    const float highest = _mm512_reduce_max_ps(best);
    const __mmask16 equal = _mm512_cmp_ps_mask(best, _mm512_set1_ps(highest), _CMP_EQ_OQ);
    token[row] = _mm512_mask_reduce_min_epi32(equal, place);
    const float top = std::max(highest, _mm512_cvtss_f32(load(&kept, 1)));
    __m512 sum = _mm512_setzero_ps();
    for (i64 at = 0; at < size; at += LANES) {
      const __m512 below = _mm512_sub_ps(read(at), _mm512_set1_ps(top));
      sum = _mm512_add_ps(sum, power_of_2(_mm512_mul_ps(below, _mm512_set1_ps(LOG2_E))));
    }
    confidence[row] = std::exp(static_cast<double>(highest) - top) / _mm512_reduce_add_ps(sum);
  }
}

}  // extern "C"
