// A decoder's layers over the tokens of a pass. Between one attention and the next nothing looks at
// other tokens, so a thread takes some tokens through all of it while they are in its cache.

#include <algorithm>
#include <memory>

#include "attention.h"
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

// Tokens of one row that follow each other.
struct Run {
  i64 position, tokens;  // of the first, and how many
  i64 place;             // in the cache, of the first one's key and value; below 0 for nowhere
};

template <class T>
struct Many {
  const T* first;
  i64 count;
};

struct Pass {
  i64 tokens, hidden_size, turned;
  Heads heads;
  float eps;
  Many<Run> runs;                       // of all tokens
  Many<Part> parts;                     // what the tokens' queries see
  Many<i64> wanted;                     // tokens that the last layer computes, unless it is all
  Many<Part> wanted_parts;              // what their queries see
  const float *cos, *sin;               // [positions][turned]
  const bf16* last_norm;
  bf16* hidden;                         // [tokens][hidden_size]: the residual stream; in the end,
                                        // the last norm's of the wanted tokens
  bf16 *query, *key, *value;            // [tokens][heads][head_size]
  bf16* attended;                       // [tokens][heads * head_size]
  bf16 *stored_keys, *stored_values;    // [layers][places][heads][head_size]; or null
  i64 layer_size;                       // numbers that a layer stores of either
};

// The part of the cache that one layer has.
struct Stored {
  bf16 *keys, *values;
  Stored(const Pass& pass, i64 layer)
      : keys(pass.stored_keys ? pass.stored_keys + layer * pass.layer_size : nullptr),
        values(pass.stored_values ? pass.stored_values + layer * pass.layer_size : nullptr) {}
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

// Where each token stands: its position, and its place in the cache.
struct Places {
  std::vector<i64> position, stored;
  explicit Places(const Pass& pass) {
    for (const Run* run = pass.runs.first; run < pass.runs.first + pass.runs.count; run++) {
      for (i64 i = 0; i < run->tokens; i++) {
        position.push_back(run->position + i);
        stored.push_back(run->place < 0 ? -1 : run->place + i);
      }
    }
  }
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
void place_heads(bf16* heads, const bf16* norm, const Pass& pass, i64 position, i64 count,
                 bf16* to) {
  const float *cos = pass.cos + position * pass.turned, *sin = pass.sin + position * pass.turned;
  const i64 size = pass.heads.size;
  for (i64 at = 0; at < count; at += size) {
    if (norm) norm_token(heads + at, norm, heads + at, size, pass.eps);
    rotate_head(heads + at, cos, sin, to + at, size, pass.turned);
  }
}

// From the residual stream to queries, keys and values.
void begin_layer(const Layer& layer, const Pass& pass, const Places& places, const Stored& stored,
                 i64 begin, i64 tokens, Scratch& scratch) {
  Buffer &normed = scratch.normed, &heads = scratch.heads;
  for (i64 token = 0; token < tokens; token++) {
    norm_token(pass.hidden + (begin + token) * pass.hidden_size, layer.norm, normed[token],
               pass.hidden_size, pass.eps);
  }
  multiply_all(normed[0], normed.stride, tokens, layer.query, heads);
  for (i64 token = 0; token < tokens; token++) {
    const i64 size = layer.query.outputs, own = begin + token;
    place_heads(heads[token], layer.query_norm, pass, places.position[own], size,
                pass.query + own * size);
  }
  const i64 size = layer.key.outputs;
  const auto home = [&](i64 token, bf16* fresh, bf16* kept) {
    const i64 place = places.stored[token];
    return place < 0 ? fresh + token * size : kept + place * size;
  };
  multiply_all(normed[0], normed.stride, tokens, layer.key, heads);
  for (i64 token = 0; token < tokens; token++) {
    const i64 own = begin + token;
    place_heads(heads[token], layer.key_norm, pass, places.position[own], size,
                home(own, pass.key, stored.keys));
  }
  multiply_all(normed[0], normed.stride, tokens, layer.value, heads);
  for (i64 token = 0; token < tokens; token++) {
    std::memcpy(home(begin + token, pass.value, stored.values), heads[token],
                size * sizeof(bf16));
  }
}

// The wanted tokens' hidden states and queries come first; they are in ascending order.
void move_wanted(const Pass& pass) {
  const i64 size = pass.heads.count * pass.heads.size;
  for (i64 i = 0; i < pass.wanted.count; i++) {
    const i64 from = pass.wanted.first[i];
    std::memmove(pass.hidden + i * pass.hidden_size, pass.hidden + from * pass.hidden_size,
                 pass.hidden_size * sizeof(bf16));
    std::memmove(pass.query + i * size, pass.query + from * size, size * sizeof(bf16));
  }
}

// Tokens in tiles of nearly the same size, as many as give each thread the same number of them.
class Tiles {
 public:
  Tiles(i64 tokens, int threads)
      : count(threads * ((tokens + threads * TILE_TOKENS - 1) / (threads * TILE_TOKENS))),
        tokens_(tokens) {}
  i64 begin(i64 tile) const {
    const i64 groups = (tokens_ + GROUP - 1) / GROUP;
    return std::min(tokens_, groups * tile / count * GROUP);
  }
  const i64 count;

 private:
  i64 tokens_;
};

}  // namespace

extern "C" {

// Layers `begin` to `end` (not included) of all `count`, each from its queries, keys and values to
// those of the next one, or to the last norm. The first layer's are computed before.
void run_layers(const Layer* layers, i64 count, i64 begin, i64 end, const Pass* of, int threads) {
  const Pass& pass = *of;
  const Places places(pass);
  const AttentionTasks all(pass.parts.first, pass.parts.count, pass.heads);
  const AttentionTasks wanted(pass.wanted_parts.first, pass.wanted_parts.count, pass.heads);
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch{{TILE_TOKENS, pass.hidden_size},
                    {TILE_TOKENS, layers->query.outputs},
                    {TILE_TOKENS, layers->gate.outputs}};
    AttentionScratch attention(pass.heads.size);
    const auto step = [&](i64 ended, i64 tokens) {
      const Tiles tiles(tokens, threads);
#pragma omp for schedule(dynamic)
      for (i64 tile = 0; tile < tiles.count; tile++) {
        const i64 first = tiles.begin(tile), own = tiles.begin(tile + 1) - first;
        if (own == 0) continue;
        if (ended >= 0) end_layer(layers[ended], pass, first, own, scratch);
        if (ended + 1 < count) {
          begin_layer(layers[ended + 1], pass, places, {pass, ended + 1}, first, own, scratch);
        }
        for (i64 token = first; ended + 1 == count && token < first + own; token++) {
          bf16* hidden = pass.hidden + token * pass.hidden_size;
          norm_token(hidden, pass.last_norm, hidden, pass.hidden_size, pass.eps);
        }
      }
    };
    if (begin == 0) step(-1, pass.tokens);
    for (i64 layer = begin; layer < end; layer++) {
      const bool some = layer + 1 == count && pass.wanted.count < pass.tokens;
      if (some) {
#pragma omp single
        move_wanted(pass);
      }
      const AttentionTasks& tasks = some ? wanted : all;
      const Stored stored(pass, layer);
      const AttentionTensors tensors{pass.query,  pass.key,      pass.value,
                                     stored.keys, stored.values, pass.attended};
#pragma omp for schedule(dynamic)
      for (i64 task = 0; task < tasks.count(); task++) tasks.run(task, tensors, attention);
      step(layer, some ? pass.wanted.count : pass.tokens);
    }
  }
}

}  // extern "C"
