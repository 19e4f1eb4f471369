// What stands between a layer's matrix products, for many tokens.

#include "pointwise.h"

extern "C" {

// total = x + other, unless `other` is null, and out = norm(total) * weight; [rows][size] each.
void rms_norm(const bf16* x, const bf16* other, const bf16* weight, bf16* total, bf16* out,
              i64 rows, i64 size, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
  for (i64 row = 0; row < rows; row++) {
    const bf16* own = x + row * size;
    if (other) {
      for (i64 at = 0; at < size; at += LANES) {
        const __mmask16 mask = first(size - at);
        const __m512 sum = _mm512_add_ps(load(own + at, mask), load(other + row * size + at, mask));
        store(total + row * size + at, sum, mask);
      }
      own = total + row * size;
    }
    norm_token(own, weight, out + row * size, size, eps);
  }
}

// Rotary positions of [tokens][heads][size]; cos and sin are float32 [tokens][turned].
void rotate(const bf16* x, const float* cos, const float* sin, bf16* out, i64 tokens, i64 heads,
            i64 size, i64 turned, int threads) {
#pragma omp parallel for num_threads(threads)
  for (i64 token = 0; token < tokens; token++) {
    for (i64 head = token * heads; head < (token + 1) * heads; head++) {
      rotate_head(x + head * size, cos + token * turned, sin + token * turned, out + head * size,
                  size, turned);
    }
  }
}

// stored[places[i]] = fresh[tokens[i]], or fresh[i] where `tokens` is null; rows of `size` numbers.
void keep(const bf16* fresh, const i64* tokens, const i64* places, bf16* stored, i64 count,
          i64 size, int threads) {
#pragma omp parallel for num_threads(threads)
  for (i64 i = 0; i < count; i++) {
    const i64 token = tokens ? tokens[i] : i;
    std::memcpy(stored + places[i] * size, fresh + token * size, size * sizeof(bf16));
  }
}

}  // extern "C"
