// Attention of many rows, in tasks that threads take in any order.

#pragma once

#include <memory>
#include <vector>

#include "lanes.h"

// Queries that follow each other in the pass and see the same keys.
struct Part {
  i64 query, queries;  // the first, and how many
  i64 is_cached;       // whether the keys lie in the cache, or among those of the pass
  i64 key, keys;       // the first, and how many
};

struct Heads {
  i64 count, kv_heads, size;
  i64 group() const { return count / kv_heads; }
};

struct AttentionTensors {
  const bf16 *query, *key, *value;          // [tokens][heads][size], of the pass
  const bf16 *cached_key, *cached_value;    // [places][kv heads][size], of its layer
  bf16* out;                                // [tokens][heads * size]
};

// What one thread works in. Lanes are queries; two bfloat16 numbers that are multiplied and added
// in one go, of neighbouring dimensions or keys, lie side by side in 32 bits.
struct AttentionScratch {
  std::unique_ptr<uint32_t[]> queries;  // [size / 2][BLOCK]
  std::unique_ptr<uint32_t[]> values;   // [TILE / 2][size]
  std::unique_ptr<uint32_t[]> weights;  // [TILE / 2][BLOCK]
  std::unique_ptr<float[]> scores;      // [TILE][BLOCK]
  std::unique_ptr<float[]> sums;        // [size][BLOCK]
  explicit AttentionScratch(i64 size);
};

class AttentionTasks {
 public:
  // The parts stay where they are.
  AttentionTasks(const Part* parts, i64 count, const Heads& heads);
  i64 count() const { return first_.back(); }
  bool are_many() const;  // enough for more than one thread
  void run(i64 task, const AttentionTensors& tensors, AttentionScratch& scratch) const;

 private:
  const Part* parts_;
  Heads heads_;
  std::vector<i64> first_;  // task of each part, and one past the last
};
