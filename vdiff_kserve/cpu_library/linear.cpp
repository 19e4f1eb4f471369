// Linear layers over any number of tokens.

#include "linear.h"

namespace {

constexpr i64 LEAST_SHARED = 1 << 20;  // products from which threads share the work

// run(first token, tokens, panel) for all of them, by as many threads as gain from it.
template <class Run>
void for_tiles(i64 tokens, const Linear& linear, int threads, Run run) {
  if (tokens * linear.inputs * linear.outputs < LEAST_SHARED) threads = 1;
  const i64 tiles = (tokens + TILE_TOKENS - 1) / TILE_TOKENS, panels = linear.panels();
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (i64 tile = 0; tile < tiles; tile++) {
    for (i64 panel = 0; panel < panels; panel++) {
      const i64 token = tile * TILE_TOKENS;
      run(token, std::min(TILE_TOKENS, tokens - token), panel);
    }
  }
}

}  // namespace

extern "C" {

// out[tokens][outputs] of x [tokens][inputs].
void linear(const bf16* x, const Linear* layer, bf16* out, i64 tokens, int threads) {
  for_tiles(tokens, *layer, threads, [&](i64 begin, i64 count, i64 panel) {
    alignas(64) float sums[TILE_TOKENS * PANEL];
    multiply(x + begin * layer->inputs, layer->inputs, count, *layer, panel, sums);
    for_outputs(sums, count, *layer, panel, [&](i64 token, i64 at, __mmask16 mask, __m512 value) {
      store(out + (begin + token) * layer->outputs + at, value, mask);
    });
  });
}

// out[tokens][outputs] = silu(gate(x)) * up(x).
void gated(const bf16* x, const Linear* gate, const Linear* up, bf16* out, i64 tokens,
           int threads) {
  for_tiles(tokens, *gate, threads, [&](i64 begin, i64 count, i64 panel) {
    multiply_gated(x + begin * gate->inputs, gate->inputs, count, *gate, *up, panel,
                   out + begin * gate->outputs, gate->outputs);
  });
}

}  // extern "C"
