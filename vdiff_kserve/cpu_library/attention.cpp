// Attention of many rows, each row's queries over its own keys.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

// Of loops whose numbers all stay in registers, unless they are compiled as part of others.
#define KERNEL __attribute__((noinline))

namespace {

constexpr int BLOCK = 2 * LANES;  // queries that are computed together
constexpr int TILE = 128;         // keys whose scores are held at a time
constexpr int STEP = 8;           // keys, or head dimensions, in registers at a time
constexpr int LINE = 32;          // numbers in a cache line
constexpr int AHEAD = 4 * STEP;   // keys
constexpr int SHARE = 4 * BLOCK;  // queries of a task
constexpr i64 LEAST_SHARED = 1 << 19;  // products from which threads share the work

// values[pair][dimension]: two keys' values side by side; what is past the last key is zero.
KERNEL void pair_values(const bf16* value, i64 stride, i64 keys, i64 size, uint32_t* to) {
  // Places among `even` (0 to 31) and `odd` (from 32 on): 0, 32, 1, 33 and so on.
  const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_add_epi32(_mm512_mullo_epi32(each, _mm512_set1_epi32(0x10001)),
                                       _mm512_set1_epi32(LINE << 16));
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(LANES * 0x10001));
  for (i64 key = 0; key < keys; key += 2, to += size) {
    const bf16* row = value + key * stride;
    const __mmask32 has_odd = key + 1 < keys ? 0xffffffff : 0;
    for (i64 at = 0; at < size; at += LINE) {
      const __mmask32 mask = size - at < LINE ? 0xffff : 0xffffffff;
      const __m512i even = _mm512_maskz_loadu_epi16(mask, row + at);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask & has_odd, row + stride + at);
      _mm512_storeu_si512(to + at, _mm512_permutex2var_epi16(even, low, odd));
      if (mask >> LANES) {
        _mm512_storeu_si512(to + at + LANES, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
}

// scores[key][query] of a tile of keys, and the largest of every query. A head's keys lie far
// apart in memory, so those to come are asked for early, and so are the values.
template <int G>
KERNEL void score(const uint32_t* queries, const bf16* key, const bf16* value, i64 stride, i64 keys,
           i64 size, float* scores, __m512* largest) {
  __m512 most[G];  // in registers
  std::copy(largest, largest + G, most);
  for (i64 begin = 0; begin < keys; begin += STEP) {
    const uint32_t* row[STEP];
    for (int k = 0; k < STEP; k++) {
      row[k] = (const uint32_t*)(key + std::min(begin + k, keys - 1) * stride);
      for (i64 at = 0; at < size; at += LINE) {
        _mm_prefetch(key + (begin + k + AHEAD) * stride + at, _MM_HINT_T0);
        _mm_prefetch(value + (begin + k) * stride + at, _MM_HINT_T1);
      }
    }
    __m512 sum[STEP][G];
    for (auto& each : sum) std::fill(each, each + G, _mm512_setzero_ps());
    for (i64 pair = 0; pair < size / 2; pair++) {
      __m512i query[G];
      for (int g = 0; g < G; g++) {
        query[g] = _mm512_loadu_si512(queries + pair * BLOCK + g * LANES);
      }
#pragma GCC unroll 8
      for (int k = 0; k < STEP; k++) {
        const __m512i both = _mm512_set1_epi32(row[k][pair]);
        for (int g = 0; g < G; g++) sum[k][g] = dot(sum[k][g], query[g], both);
      }
    }
    // Past the last key stand copies of it, which change no maximum and are not read again.
#pragma GCC unroll 8
    for (int k = 0; k < STEP; k++) {
      for (int g = 0; g < G; g++) {
        most[g] = _mm512_max_ps(most[g], sum[k][g]);
        _mm512_storeu_ps(scores + (begin + k) * BLOCK + g * LANES, sum[k][g]);
      }
    }
  }
  std::copy(most, most + G, largest);
}

// weights[pair][query] = 2^(scale * (score - largest)), and their sum added to `total`.
template <int G>
KERNEL void weigh(const float* scores, i64 keys, float scale, const __m512* largest, uint32_t* weights,
           __m512* total) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int g = 0; g < G; g++) {
    const __m512 shift = _mm512_mul_ps(largest[g], factor);
    __m512 sum = total[g];
    for (i64 key = 0; key < keys; key += 2) {
      const float* at = scores + key * BLOCK + g * LANES;
      const __m512 even = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(at), factor, shift));
      __m512 odd = _mm512_setzero_ps();
      if (key + 1 < keys) {
        odd = power_of_2(_mm512_fmsub_ps(_mm512_loadu_ps(at + BLOCK), factor, shift));
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
      _mm512_storeu_si512(weights + key / 2 * BLOCK + g * LANES, side_by_side(even, odd));
    }
    total[g] = sum;
  }
}

// sums[dimension][query] = kept * sums + weights x values.
template <int G>
KERNEL void mix(const uint32_t* weights, const uint32_t* values, i64 pairs, i64 size, const __m512* kept,
         float* sums) {
  for (i64 begin = 0; begin < size; begin += STEP) {
    __m512 sum[STEP][G];
#pragma GCC unroll 8
    for (int d = 0; d < STEP; d++) {
      for (int g = 0; g < G; g++) {
        sum[d][g] = _mm512_mul_ps(kept[g], _mm512_loadu_ps(sums + (begin + d) * BLOCK + g * LANES));
      }
    }
    for (i64 pair = 0; pair < pairs; pair++) {
      __m512i weight[G];
      for (int g = 0; g < G; g++) {
        weight[g] = _mm512_loadu_si512(weights + pair * BLOCK + g * LANES);
      }
#pragma GCC unroll 8
      for (int d = 0; d < STEP; d++) {
        const __m512i value = _mm512_set1_epi32(values[pair * size + begin + d]);
        for (int g = 0; g < G; g++) sum[d][g] = dot(sum[d][g], weight[g], value);
      }
    }
#pragma GCC unroll 8
    for (int d = 0; d < STEP; d++) {
      for (int g = 0; g < G; g++) {
        _mm512_storeu_ps(sums + (begin + d) * BLOCK + g * LANES, sum[d][g]);
      }
    }
  }
}

// queries[pair][lane] of the queries at the lanes' places.
template <int G>
void gather(const bf16* query, const i64* place, i64 size, uint32_t* queries) {
  for (int g = 0; g < G; g++) {
    for (i64 at = 0; at < size; at += LINE) {
      const i64 pairs = std::min<i64>(LANES, (size - at) / 2);
      __m512i rows[LANES];
      for (int lane = 0; lane < LANES; lane++) {
        rows[lane] = _mm512_maskz_loadu_epi32(first(pairs), query + place[g * LANES + lane] + at);
      }
      transpose(rows);
      for (i64 pair = 0; pair < pairs; pair++) {
        _mm512_storeu_si512(queries + (at / 2 + pair) * BLOCK + g * LANES, rows[pair]);
      }
    }
  }
}

// sums[dimension][lane] / total, to the lanes' places.
template <int G>
void scatter(const float* sums, const __m512* total, const i64* place, i64 lanes, i64 size,
             bf16* out) {
  for (int g = 0; g < G; g++) {
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.f), total[g]);
    for (i64 at = 0; at < size; at += LINE) {
      const i64 pairs = std::min<i64>(LANES, (size - at) / 2);
      __m512i rows[LANES] = {};
      for (i64 pair = 0; pair < pairs; pair++) {
        const float* sum = sums + (at + 2 * pair) * BLOCK + g * LANES;
        rows[pair] = side_by_side(_mm512_mul_ps(_mm512_loadu_ps(sum), share),
                                  _mm512_mul_ps(_mm512_loadu_ps(sum + BLOCK), share));
      }
      transpose(rows);
      for (i64 lane = g * LANES; lane < std::min<i64>(lanes, (g + 1) * LANES); lane++) {
        _mm512_mask_storeu_epi32(out + place[lane] + at, first(pairs), rows[lane - g * LANES]);
      }
    }
  }
}

// Up to 32 queries of the heads that share keys. A lane is one query of one head: number `lane` of
// the part counts the heads of a query first.
template <int G>
void attend_block(const AttentionTensors& tensors, const Part& part, const Heads& heads,
                  i64 kv_head, i64 begin, i64 lanes, AttentionScratch& scratch) {
  const i64 size = heads.size, group = heads.group(), stride = heads.kv_heads * size;
  const bf16* keys = part.is_cached ? tensors.cached_key : tensors.key;
  const bf16* values = part.is_cached ? tensors.cached_value : tensors.value;
  i64 place[G * LANES];
  i64 token = part.query + begin / group, head = begin % group;
  for (i64 lane = 0; lane < G * LANES; lane++) {
    place[lane] = (token * heads.count + kv_head * group + head) * size;
    if (lane < lanes - 1 && ++head == group) head = 0, token++;
  }
  gather<G>(tensors.query, place, size, scratch.queries.get());
  const float scale = LOG2_E / std::sqrt(static_cast<float>(size));
  __m512 largest[G], total[G], kept[G];
  for (int g = 0; g < G; g++) {
    largest[g] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    total[g] = kept[g] = _mm512_setzero_ps();
  }
  std::fill_n(scratch.sums.get(), size * BLOCK, 0.f);
  for (i64 tile = 0; tile < part.keys; tile += TILE) {
    const i64 count = std::min<i64>(TILE, part.keys - tile);
    const i64 from = (part.key + tile) * stride + kv_head * size;
    __m512 before[G];
    std::copy(largest, largest + G, before);
    score<G>(scratch.queries.get(), keys + from, values + from, stride, count, size,
             scratch.scores.get(), largest);
    for (int g = 0; g < G; g++) {
      const __m512 change = _mm512_sub_ps(before[g], largest[g]);
      kept[g] = power_of_2(_mm512_mul_ps(change, _mm512_set1_ps(scale)));
      total[g] = _mm512_mul_ps(total[g], kept[g]);
    }
    weigh<G>(scratch.scores.get(), count, scale, largest, scratch.weights.get(), total);
    pair_values(values + from, stride, count, size, scratch.values.get());
    mix<G>(scratch.weights.get(), scratch.values.get(), (count + 1) / 2, size, kept,
           scratch.sums.get());
  }
  scatter<G>(scratch.sums.get(), total, place, lanes, size, tensors.out);
}

}  // namespace

AttentionScratch::AttentionScratch(i64 size)
    : queries(new uint32_t[size / 2 * BLOCK]), values(new uint32_t[TILE / 2 * size]),
      weights(new uint32_t[TILE / 2 * BLOCK]),
      scores(new float[TILE * BLOCK]), sums(new float[size * BLOCK]) {}

AttentionTasks::AttentionTasks(const Part* parts, i64 count, const Heads& heads)
    : parts_(parts), heads_(heads), first_(count + 1, 0) {
  for (i64 i = 0; i < count; i++) {
    const i64 shares = (parts_[i].queries * heads.group() + SHARE - 1) / SHARE;
    first_[i + 1] = first_[i] + shares * heads.kv_heads;
  }
}

bool AttentionTasks::are_many() const {
  i64 pairs = 0;
  for (size_t i = 0; i + 1 < first_.size(); i++) pairs += parts_[i].queries * parts_[i].keys;
  return pairs * heads_.count * heads_.size >= LEAST_SHARED;
}

void AttentionTasks::run(i64 task, const AttentionTensors& tensors,
                         AttentionScratch& scratch) const {
  const i64 i = std::upper_bound(first_.begin(), first_.end(), task) - first_.begin() - 1;
  const i64 own = task - first_[i], lanes = parts_[i].queries * heads_.group();
  const i64 kv_head = own % heads_.kv_heads, from = own / heads_.kv_heads * SHARE;
  for (i64 begin = from; begin < std::min(from + SHARE, lanes); begin += BLOCK) {
    const i64 count = std::min<i64>(BLOCK, lanes - begin);
    const auto attend = count > LANES ? attend_block<2> : attend_block<1>;
    attend(tensors, parts_[i], heads_, kv_head, begin, count, scratch);
  }
}

extern "C" {

// out[tokens][heads * size] of queries [tokens][heads][size], each over the keys of its part:
// [tokens or places][kv heads][size], as the values.
void attend(const bf16* query, const bf16* key, const bf16* value, const bf16* cached_key,
            const bf16* cached_value, const Part* parts, i64 count, i64 heads, i64 kv_heads,
            i64 size, bf16* out, int threads) {
  const AttentionTensors tensors{query, key, value, cached_key, cached_value, out};
  const AttentionTasks tasks(parts, count, {heads, kv_heads, size});
  if (!tasks.are_many()) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    AttentionScratch scratch(size);
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < tasks.count(); task++) tasks.run(task, tensors, scratch);
  }
}

}  // extern "C"
