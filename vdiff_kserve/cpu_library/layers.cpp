// What a decoder's layers compute between one attention and the next. Nothing of it looks at other
// tokens, so a thread takes some tokens through all of it while they are in its cache.

#include <algorithm>
#include <memory>

#include "linear.h"
#include "pointwise.h"

namespace {

constexpr i64 PAD = 32;  // numbers between two tokens, so that they do not compete for cache lines

struct Layer {
  const bf16* norm;
  Linear query, key, value;
  const bf16 *query_norm, *key_norm;  // of a head; or null
  Linear output;
  const bf16* mlp_norm;
  Linear gate, up, down;
};

struct Pass {
  i64 tokens, hidden_size, head_size, turned;
  float eps;
  bf16* hidden;                         // [tokens][hidden_size], the residual stream
  const bf16* attended;                 // [tokens][heads * head_size]
  const float *cos, *sin;               // [tokens][turned]
  bf16 *query, *key, *value;            // [tokens][heads][head_size]
  bf16 *stored_keys, *stored_values;    // [places][heads][head_size], of the layer that is begun
  const i64* places;                    // [tokens], where keys and values go in them if not below 0
  const bf16* last_norm;                // null unless there is no layer to begin
  bf16* out;                            // [tokens][hidden_size], the last norm's
};

// What one thread works in: tokens of `size` numbers each.
class Buffer {
 public:
  Buffer(i64 tokens, i64 size) : stride(size + PAD), numbers_(new bf16[tokens * stride]) {}
  bf16* operator[](i64 token) { return numbers_.get() + token * stride; }
  const i64 stride;

 private:
  std::unique_ptr<bf16[]> numbers_;
};

struct Scratch {
  Buffer normed, heads, product;
};

// to[token] += linear(x[token]); the sum is rounded as one of two tensors would be.
void add_linear(const bf16* x, i64 stride, i64 tokens, const Linear& linear, bf16* to) {
  alignas(64) float sums[TILE_TOKENS * PANEL];
  for (i64 panel = 0; panel < linear.panels(); panel++) {
    multiply(x, stride, tokens, linear, panel, sums);
    for_outputs(sums, tokens, linear, panel, [&](i64 token, i64 at, __mmask16 mask, __m512 value) {
      bf16* own = to + token * linear.outputs + at;
      store(own, _mm512_add_ps(load(own, mask), rounded(value)), mask);
    });
  }
}

void multiply_all(const bf16* x, i64 stride, i64 tokens, const Linear& linear, Buffer& to) {
  alignas(64) float sums[TILE_TOKENS * PANEL];
  for (i64 panel = 0; panel < linear.panels(); panel++) {
    multiply(x, stride, tokens, linear, panel, sums);
    for_outputs(sums, tokens, linear, panel, [&](i64 token, i64 at, __mmask16 mask, __m512 value) {
      store(to[token] + at, value, mask);
    });
  }
}

// From what attention gave to the end of the layer.
void end_layer(const Layer& layer, const Pass& pass, i64 begin, i64 tokens, Scratch& scratch) {
  const i64 size = layer.output.inputs;
  bf16* hidden = pass.hidden + begin * pass.hidden_size;
  add_linear(pass.attended + begin * size, size, tokens, layer.output, hidden);
  Buffer &normed = scratch.normed, &product = scratch.product;
  for (i64 token = 0; token < tokens; token++) {
    norm_token(hidden + token * pass.hidden_size, layer.mlp_norm, normed[token], pass.hidden_size,
               pass.eps);
  }
  for (i64 panel = 0; panel < layer.gate.panels(); panel++) {
    multiply_gated(normed[0], normed.stride, tokens, layer.gate, layer.up, panel, product[0],
                   product.stride);
  }
  add_linear(product[0], product.stride, tokens, layer.down, hidden);
}

// Heads of one token, with their norm and position if they have any.
void place_heads(bf16* heads, const bf16* norm, const Pass& pass, i64 token, i64 count, bf16* to) {
  const float *cos = pass.cos + token * pass.turned, *sin = pass.sin + token * pass.turned;
  for (i64 at = 0; at < count; at += pass.head_size) {
    if (norm) norm_token(heads + at, norm, heads + at, pass.head_size, pass.eps);
    rotate_head(heads + at, cos, sin, to + at, pass.head_size, pass.turned);
  }
}

// From the residual stream to queries, keys and values.
void begin_layer(const Layer& layer, const Pass& pass, i64 begin, i64 tokens, Scratch& scratch) {
  Buffer &normed = scratch.normed, &heads = scratch.heads;
  for (i64 token = 0; token < tokens; token++) {
    norm_token(pass.hidden + (begin + token) * pass.hidden_size, layer.norm, normed[token],
               pass.hidden_size, pass.eps);
  }
  multiply_all(normed[0], normed.stride, tokens, layer.query, heads);
  for (i64 token = 0; token < tokens; token++) {
    const i64 size = layer.query.outputs, own = begin + token;
    place_heads(heads[token], layer.query_norm, pass, own, size, pass.query + own * size);
  }
  const i64 size = layer.key.outputs;
  const auto home = [&](i64 token, bf16* fresh, bf16* stored) {
    const i64 place = pass.places ? pass.places[token] : -1;
    return place < 0 ? fresh + token * size : stored + place * size;
  };
  multiply_all(normed[0], normed.stride, tokens, layer.key, heads);
  for (i64 token = 0; token < tokens; token++) {
    const i64 own = begin + token;
    bf16* to = home(own, pass.key, pass.stored_keys);
    place_heads(heads[token], layer.key_norm, pass, own, size, to);
  }
  multiply_all(normed[0], normed.stride, tokens, layer.value, heads);
  for (i64 token = 0; token < tokens; token++) {
    bf16* to = home(begin + token, pass.value, pass.stored_values);
    std::memcpy(to, heads[token], size * sizeof(bf16));
  }
}

}  // namespace

extern "C" {

// Ends one layer and begins another, either of which may be null: nothing is ended before the first
// layer, and after the last there is but the last norm.
void between_attentions(const Layer* ended, const Layer* begun, const Pass* pass, int threads) {
  if (pass->tokens == 0) return;  // none is wanted of the last layer
  const i64 rounds = (pass->tokens + threads * TILE_TOKENS - 1) / (threads * TILE_TOKENS);
  const i64 tiles = threads * rounds, even = (pass->tokens + tiles - 1) / tiles;
  const i64 tile = (even + GROUP - 1) / GROUP * GROUP;
  i64 heads = 0, product = 0;
  if (begun) heads = std::max(begun->query.outputs, begun->key.outputs);
  if (ended) product = ended->gate.outputs;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch{{tile, pass->hidden_size}, {tile, heads}, {tile, product}};
#pragma omp for schedule(dynamic)
    for (i64 begin = 0; begin < pass->tokens; begin += tile) {
      const i64 tokens = std::min(tile, pass->tokens - begin);
      if (ended) end_layer(*ended, *pass, begin, tokens, scratch);
      if (begun) begin_layer(*begun, *pass, begin, tokens, scratch);
      for (i64 token = begin; token < begin + tokens && pass->last_norm; token++) {
        const i64 at = token * pass->hidden_size;
        norm_token(pass->hidden + at, pass->last_norm, pass->out + at, pass->hidden_size,
                   pass->eps);
      }
    }
  }
}

}  // extern "C"
