// SPDX-License-Identifier: Apache-2.0
// How chunk_attention is cut into work, and what each instruction set does of it. See chunk_attention.inc.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/chunk_attention.h"
#include "kernels/cpu/isa.h"

namespace fsdc::cpu {

// Lanes are the query heads of a KV head's group, query after query: lane m is query m / G, query head m % G. They are
// taken 64 at a time, a block; some blocks make a unit of work. Depends on shapes only, never on threads.
struct ChunkPlan {
  static constexpr int64_t kLanesPerBlock = 64;
  static constexpr int64_t kTokensPerBlock = 64;  // keys and values are taken so many at a time

  explicit ChunkPlan(const ChunkAttentionParams& params, bool has_tiles = false) {
    constexpr int64_t kMostBlocks = 8, kUnits = 16;
    const int64_t rows = params.batch * params.heads;
    tokens = params.held + params.queries;
    blocks = divided(params.group * params.queries, kLanesPerBlock);
    blocks_per_unit = std::clamp<int64_t>(rows * blocks / kUnits, 1, kMostBlocks);
    units = divided(blocks, blocks_per_unit);
    const int64_t dim = std::max(params.keys.dim, params.values.dim);
    staged_at = kLanesPerBlock * params.keys.dim;
    outputs_at = staged_at + kTokensPerBlock * whole(dim);
    lanes_at = outputs_at + kLanesPerBlock * whole(params.values.dim);
    logits_at = lanes_at + kLaneFacts * kLanesPerBlock;
    numbers = logits_at + divided(tokens, kTokensPerBlock) * kTokensPerBlock * kLanesPerBlock;
    if (params.redundancy) {  // a block of products, and a vector for each token
      numbers = std::max(numbers, logits_at + kTokensPerBlock * kLanesPerBlock + 16 * kTokensPerComparison);
    }
    tiles = has_tiles && params.dtype == DType::kBFloat16 && params.keys.dim > 0 && params.keys.dim % 32 == 0 &&
            params.values.dim > 0 && params.values.dim % 16 == 0;
    pairs_at = turned_values_at = numbers;
    if (tiles) {
      const int64_t whole_tokens = divided(tokens, kTokensPerBlock) * kTokensPerBlock;
      turned_values_at = pairs_at + whole_tokens / 2 * kLanesPerBlock;
      numbers = turned_values_at + whole_tokens * params.values.dim / 2;
    }
    compared_units = params.redundancy ? divided(tokens, kTokensPerComparison) : 0;
  }

  int64_t tokens;           // T + Q of the largest head
  int64_t blocks;           // per row
  int64_t blocks_per_unit;  // of each unit but the last
  int64_t units;            // per row
  int64_t compared_units;   // per row, for the redundancy
  int64_t staged_at;        // where parts of a thread's memory begin: queries, then staged keys or values
  int64_t outputs_at;
  int64_t lanes_at;
  int64_t logits_at;
  bool tiles;  // products are those of tiles of bfloat16, see chunk_tiles.inc
  int64_t pairs_at;
  int64_t turned_values_at;
  int64_t numbers;  // floats (doubles for fp64) of memory that a thread needs

  static constexpr int64_t kLaneFacts = 8;
  static constexpr int64_t kTokensPerComparison = 512;
  static constexpr int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }
  static constexpr int64_t whole(int64_t n) { return divided(n, 16) * 16; }
};

// What one unit found, to be added up in order.
struct ChunkUnit {
  float* votes;  // [T + Q]; null: nobody votes
  double lost = 0;
  int64_t voters = 0;  // lanes that vote
};

struct ChunkAttentionLoops {
  // Output and votes of one unit of a row.
  void (*attend)(const ChunkAttentionParams& params, const ChunkPlan& plan, int64_t row, int64_t unit, void* memory,
                 ChunkUnit& found);

  // The votes of all units into the scores of one row, and the lost share.
  void (*add_votes)(const ChunkAttentionParams& params, const ChunkPlan& plan, int64_t row, const ChunkUnit* units);

  // The redundancy of one run of tokens of a row.
  void (*compare)(const ChunkAttentionParams& params, const ChunkPlan& plan, int64_t row, int64_t unit, void* memory);
};

const ChunkAttentionLoops& chunk_attention_loops(Isa isa);

}  // namespace fsdc::cpu
