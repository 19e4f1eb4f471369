// Products of a few tokens with a linear layer's weight.

#pragma once

#include <algorithm>

#include "lanes.h"

constexpr int VECTORS = 4;
constexpr int PANEL = VECTORS * LANES;  // outputs that are computed together
constexpr int GROUP = 6;                // tokens in registers at a time
constexpr i64 TILE_TOKENS = 16 * GROUP;  // tokens that go through a panel before the next
constexpr i64 CHUNK = 1024;  // pairs of inputs, so many that their part of a panel stays close

// The weight lies as it is read, [panels][inputs / 2][PANEL] of two inputs' side by side; past the
// last output it is zero. There may be no bias.
struct Linear {
  const uint32_t* weight;
  const bf16* bias;
  i64 inputs, outputs;
  i64 panels() const { return (outputs + PANEL - 1) / PANEL; }
};

// sums[token][output] += products of T tokens with a part of a panel; from zero where it is the
// first part.
template <int T>
void add_products(const bf16* x, i64 stride, const uint32_t* weight, i64 pairs, bool is_first,
                  float* sums) {
  const __mmask16 kept = is_first ? 0 : 0xffff;
  __m512 sum[T][VECTORS];
#pragma GCC unroll 6
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      sum[t][v] = _mm512_maskz_load_ps(kept, sums + t * PANEL + v * LANES);
    }
  }
  for (i64 pair = 0; pair < pairs; pair++, weight += PANEL) {
    __m512i column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) column[v] = _mm512_loadu_si512(weight + v * LANES);
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
      const __m512i both = _mm512_set1_epi32(((const int32_t*)(x + t * stride))[pair]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[t][v] = dot(sum[t][v], column[v], both);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) _mm512_store_ps(sums + t * PANEL + v * LANES, sum[t][v]);
  }
}

// sums[token][output] of up to TILE_TOKENS tokens with one panel, in float32. The order in which
// products are added up is the same for any number of tokens.
inline void multiply(const bf16* x, i64 stride, i64 tokens, const Linear& linear, i64 panel,
                     float* sums) {
  constexpr decltype(&add_products<1>) RUN[] = {
      nullptr,         add_products<1>, add_products<2>, add_products<3>,
      add_products<4>, add_products<5>, add_products<GROUP>};
  const i64 pairs = linear.inputs / 2;
  const uint32_t* weight = linear.weight + panel * pairs * PANEL;
  for (i64 from = 0; from < pairs; from += CHUNK) {
    for (i64 token = 0; token < tokens; token += GROUP) {
      RUN[std::min<i64>(GROUP, tokens - token)](x + token * stride + 2 * from, stride,
                                                weight + from * PANEL,
                                                std::min(CHUNK, pairs - from), from == 0,
                                                sums + token * PANEL);
    }
  }
}

// take(token, output, mask, value) for every 16 outputs of a panel, with the bias.
template <class Take>
void for_outputs(const float* sums, i64 tokens, const Linear& linear, i64 panel, Take take) {
  const i64 begin = panel * PANEL, end = std::min(begin + PANEL, linear.outputs);
  for (i64 token = 0; token < tokens; token++) {
    for (i64 output = begin; output < end; output += LANES) {
      const __mmask16 mask = first(linear.outputs - output);
      __m512 value = _mm512_load_ps(sums + token * PANEL + output - begin);
      if (linear.bias) value = _mm512_add_ps(value, load(linear.bias + output, mask));
      take(token, output, mask, value);
    }
  }
}

// silu(gate) * up, both float32.
inline __m512 gated_value(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.f);
  // The power is taken of what is not above zero, and the other half of the sigmoid follows.
  const __m512 below = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate));
  const __mmask16 counts = _mm512_cmp_ps_mask(below, _mm512_set1_ps(-80.f), _CMP_NLT_UQ);
  const __m512 power = _mm512_maskz_mov_ps(
      counts, power_of_2(_mm512_mul_ps(below, _mm512_set1_ps(LOG2_E))));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(gate));
  const __m512 share = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, power),
                                     _mm512_add_ps(one, power));
  return _mm512_mul_ps(_mm512_mul_ps(gate, share), up);
}

// out[token][output] = silu(gate) * up for one panel of two layers of one input.
inline void multiply_gated(const bf16* x, i64 stride, i64 tokens, const Linear& gate,
                           const Linear& up, i64 panel, bf16* out, i64 out_stride) {
  alignas(64) float gates[TILE_TOKENS * PANEL], ups[TILE_TOKENS * PANEL];
  multiply(x, stride, tokens, gate, panel, gates);
  multiply(x, stride, tokens, up, panel, ups);
  for_outputs(gates, tokens, gate, panel, [&](i64 token, i64 output, __mmask16, __m512 value) {
    _mm512_store_ps(gates + token * PANEL + output % PANEL, value);
  });
  for_outputs(ups, tokens, up, panel, [&](i64 token, i64 output, __mmask16 mask, __m512 value) {
    const __m512 own = _mm512_load_ps(gates + token * PANEL + output % PANEL);
    store(out + token * out_stride + output, gated_value(own, value), mask);
  });
}
