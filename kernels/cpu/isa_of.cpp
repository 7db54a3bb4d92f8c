// SPDX-License-Identifier: Apache-2.0
#include <map>

#include "kernels/cpu/accumulate_scores.h"
#include "kernels/cpu/chunk_attention.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/decode_attention.h"
#include "kernels/cpu/truncate.h"

namespace fsdc::cpu {

// A set that an operator lacks has the table of the next lower one, so the lowest of the same table is meant.
Isa isa_of(const std::string& operation, Isa isa) {
  static const std::map<std::string, const void* (*)(Isa)> tables = {
      {"truncate", [](Isa x) -> const void* { return &truncate_loops(x); }},
      {"accumulate_scores_", [](Isa x) -> const void* { return &accumulate_scores_loops(x); }},
      {"decode_attention_", [](Isa x) -> const void* { return &decode_attention_loops(x); }},
      {"chunk_attention_", [](Isa x) -> const void* { return &chunk_attention_loops(x); }},
  };
  const auto table = tables.at(operation);
  Isa lowest = isa;
  for (const Isa other : available_isas()) {  // best first
    if (other <= isa && table(other) == table(isa)) lowest = other;
  }
  return lowest;
}

}  // namespace fsdc::cpu
