// SPDX-License-Identifier: Apache-2.0
// How decode_attention is cut into work, and what each instruction set does of it. See decode_attention.inc.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/isa.h"
#include "kernels/decode_attention.h"

namespace fsdc::cpu {

// A row's tokens, the T in use and then the new one, are cut into runs. Depends on shapes only, never on threads.
struct DecodePlan {
  explicit DecodePlan(const DecodeAttentionParams& params) {
    constexpr int64_t kFewRows = 16;       // so few rows cannot keep many threads busy
    constexpr int64_t kUnits = 32;         // then rows are cut into so many units in all
    constexpr int64_t kLeastTokens = 256;  // that a unit is worth
    const int64_t tokens = std::min(params.length, params.slots) + 1;
    const int64_t rows = params.batch * params.heads;
    if (rows > 0 && rows < kFewRows) runs = std::clamp<int64_t>(tokens / kLeastTokens, 1, (kUnits + rows - 1) / rows);
    run_tokens = whole((tokens + runs - 1) / runs);
    row_stride = whole(params.keys.dim);
    value_stride = whole(params.values.dim);
    logit_stride = run_tokens + kWhole;  // products write up to 3 numbers past the last
    logits_at = (params.group + 1) * row_stride;
    outputs_at = logits_at + (params.group + 1) * logit_stride;
    facts_at = outputs_at + params.group * value_stride;
    numbers = facts_at + whole(4 * params.group + 2);
  }

  int64_t runs = 1;      // per row
  int64_t run_tokens;    // of each but the last
  int64_t row_stride;    // of query rows
  int64_t value_stride;  // of outputs
  int64_t logit_stride;
  int64_t logits_at;  // where parts of a run's memory begin
  int64_t outputs_at;
  int64_t facts_at;
  int64_t numbers;  // floats (doubles for fp64) of memory that one run needs

  // Sizes are rounded up to whole vectors of every instruction set.
  static constexpr int64_t kWhole = 16;
  static constexpr int64_t whole(int64_t n) { return (n + kWhole - 1) / kWhole * kWhole; }
};

struct DecodeAttentionLoops {
  // Logits, exponentials and weighted values of one run. `memory` is that of the run.
  void (*attend_run)(const DecodeAttentionParams& params, const DecodePlan& plan, int64_t row, int64_t run,
                     void* memory);

  // Once all runs of the row have attended: scores and redundancy of one run, and which of its tokens would go; of run
  // 0 also the output. `memory` is that of the row, run after run.
  void (*finish_run)(const DecodeAttentionParams& params, const DecodePlan& plan, int64_t row, int64_t run,
                     void* memory);

  // Once all runs have finished: puts the new token into its slot.
  void (*finish_row)(const DecodeAttentionParams& params, const DecodePlan& plan, int64_t row, void* memory);
};

const DecodeAttentionLoops& decode_attention_loops(Isa isa);

}  // namespace fsdc::cpu
