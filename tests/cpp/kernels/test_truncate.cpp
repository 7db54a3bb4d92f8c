// SPDX-License-Identifier: Apache-2.0
// truncate on every instruction set of this machine: selection, ties, gather, the entry of the skipped tokens.
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/element.h"
#include "kernels/cpu/truncate.h"
#include "reference.h"
#include "threads.h"

namespace {

using namespace fsdc;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> random_scores(int64_t tokens, const std::vector<float>& from, uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<float> scores(tokens);
  for (float& score : scores) score = from[generator() % from.size()];
  return scores;
}

std::vector<int64_t> select(cpu::Isa isa, const std::vector<float>& scores, int64_t kept) {
  std::vector<int64_t> indices(kept + 1, -7);  // one more: it must not be touched
  cpu::truncate_loops(isa).select_row(scores.data(), int64_t(scores.size()), kept, indices.data());
  CHECK(indices.back() == -7);
  indices.pop_back();
  return indices;
}

// Rows of one layer: keys count up, values down, so every element tells where it came from.
struct Layer {
  int64_t batch, heads, tokens, head_dim, value_dim;
  bool tokens_before_heads = false;  // [B, S, H, D], seen as [B, H, S, D]
  int64_t score_head_stride = tokens + 2, score_batch_stride = heads * score_head_stride + 5;
  std::vector<float> keys, values, scores;

  Layer(int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, int64_t value_dim)
      : batch(batch), heads(heads), tokens(tokens), head_dim(head_dim), value_dim(value_dim) {
    keys.resize(batch * heads * tokens * head_dim);
    values.resize(batch * heads * tokens * value_dim);
    scores.resize(batch * score_batch_stride);
    for (size_t i = 0; i < keys.size(); ++i) keys[i] = float(i);
    for (size_t i = 0; i < values.size(); ++i) values[i] = -float(i);
    std::mt19937 generator(7);
    for (float& score : scores) score = std::generate_canonical<float, 24>(generator);
  }

  // How many tokens lie before this one.
  int64_t place(int64_t row, int64_t token) const {
    return tokens_before_heads ? (row / heads * tokens + token) * heads + row % heads : row * tokens + token;
  }

  TokenRows token_rows(const std::vector<float>& from, int64_t dim, std::vector<float>& to) const {
    return {from.data(), heads * tokens * dim, place(1, 0) * dim, place(0, 1) * dim, dim, to.data()};
  }

  std::vector<float> scores_of(int64_t row) const {
    const auto begin = scores.begin() + row / heads * score_batch_stride + row % heads * score_head_stride;
    return {begin, begin + tokens};
  }
};

struct Result {
  std::vector<float> keys, values;
  std::vector<int64_t> indices;
  bool operator==(const Result&) const = default;
};

Result truncate(const Layer& layer, int64_t kept, bool has_skipped, const cpu::Parallel& parallel, cpu::Isa isa) {
  const int64_t rows = layer.batch * layer.heads, entries = kept + has_skipped;
  Result out{std::vector<float>(rows * entries * layer.head_dim, kNaN),
             std::vector<float>(rows * entries * layer.value_dim, kNaN), std::vector<int64_t>(rows * entries, -7)};
  cpu::truncate({.batch = layer.batch,
                 .heads = layer.heads,
                 .tokens = layer.tokens,
                 .kept = kept,
                 .has_skipped = has_skipped,
                 .dtype = DType::kFloat32,
                 .scores = layer.scores.data(),
                 .score_batch_stride = layer.score_batch_stride,
                 .score_head_stride = layer.score_head_stride,
                 .keys = layer.token_rows(layer.keys, layer.head_dim, out.keys),
                 .values = layer.token_rows(layer.values, layer.value_dim, out.values),
                 .indices = out.indices.data()},
                parallel, isa);
  return out;
}

}  // namespace

TEST_CASE("selection keeps the best, of equal ones the newer, in ascending order") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  const std::vector<std::vector<float>> alphabets = {
      {0.0f},
      {0.0f, -0.0f},
      {1.0f, 2.0f},
      {kNaN, -kNaN, kInf, -kInf, 0.0f, -0.0f, 1.0f, -1.0f, 1e-45f, -1e-45f, std::numeric_limits<float>::max()},
      {kInf, kInf, kInf, 1.0f},
      {-kInf},
      {kNaN},
      {1.0f, std::nextafter(1.0f, 2.0f), std::nextafter(1.0f, 0.0f), 1.0f + 0x1p-13f, 1.125f}};
  for (const std::vector<float>& alphabet : alphabets) {
    for (int64_t tokens : {1, 2, 63, 64, 65, 128, 1000, 9000}) {
      const std::vector<float> scores = random_scores(tokens, alphabet, uint32_t(tokens));
      for (int64_t kept : {int64_t{0}, int64_t{1}, tokens / 3, tokens / 2, tokens - 1, tokens}) {
        CAPTURE(cpu::name_of(isa), tokens, kept, alphabet);
        CHECK(select(isa, scores, kept) == test::select(scores, kept));
      }
    }
  }
}

TEST_CASE("selection is right for long rows of any distribution") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  std::mt19937 generator(3);
  std::lognormal_distribution<float> heavy_tailed(0, 3);
  for (int64_t tokens : {511, 512, 513, 700, 4097, 40'000}) {
    std::vector<float> drawn(tokens), narrow(tokens), rising(tokens), mostly_zero(tokens), above(tokens);
    for (int64_t i = 0; i < tokens; ++i) {
      drawn[i] = heavy_tailed(generator);
      narrow[i] = 1.0f + 0.01f * std::generate_canonical<float, 24>(generator);
      rising[i] = float(i) - 100.0f;
      mostly_zero[i] = generator() % 20 == 0 ? drawn[i] : generator() % 2 == 0 ? 0.0f : -0.0f;
      above[i] = generator() % 3 == 0 ? kInf : generator() % 2 == 0 ? kNaN : drawn[i];
    }
    for (const std::vector<float>& scores : {drawn, narrow, rising, mostly_zero, above}) {
      for (int64_t kept : {int64_t{1}, tokens / 100, tokens / 8, tokens / 2, tokens * 9 / 10, tokens - 1}) {
        CAPTURE(cpu::name_of(isa), tokens, kept, scores[0], scores[1]);
        CHECK(select(isa, scores, kept) == test::select(scores, kept));
      }
    }
  }
}

TEST_CASE("selection is right where its sample of the scores misleads") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  constexpr int64_t kTokens = 16384, kKept = 2048;
  std::vector<float> scores(kTokens);
  std::mt19937 generator(1);
  for (float& score : scores) score = std::generate_canonical<float, 24>(generator);
  const cpu::CodeRange right = cpu::truncate_loops(isa).guess_range(scores.data(), kTokens, kKept);
  const std::vector<int64_t> expected = test::select(scores, kKept);
  std::vector<uint32_t> inside(cpu::kSelectRoom);
  // Ranges above the last score to stay, below it, of one code, and of all of them.
  for (const cpu::CodeRange& range : {cpu::CodeRange{right.high, cpu::kTopCode},
                                      {right.high, right.high + 1},
                                      {0, right.low},
                                      {0, 1},
                                      {right.low, right.low + 1},
                                      {0, cpu::kTopCode}}) {
    CAPTURE(cpu::name_of(isa), range.low, range.high);
    cpu::RowPart row{.begin = 0, .end = kTokens, .inside = inside.data()};
    cpu::truncate_loops(isa).split_part(scores.data(), range, row);
    const uint32_t code = cpu::truncate_loops(isa).find_threshold(scores.data(), kKept, range, &row, 1);
    std::vector<int64_t> indices(kKept);
    cpu::truncate_loops(isa).write_part(scores.data(), code, row, indices.data());
    CHECK(indices == expected);
  }
}

TEST_CASE("a long row is shared among threads") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  constexpr int64_t kTokens = 50'001;  // three parts
  const std::vector<std::vector<float>> alphabets = {
      {0.0f, -0.0f, 1.0f}, {1.0f}, {kInf, kNaN, -kNaN, -kInf, 2.0f}, {kNaN}, {}};
  for (const std::vector<float>& alphabet : alphabets) {
    Layer layer{1, 2, kTokens, 1, 1};
    for (size_t i = 0; i < layer.scores.size() && !alphabet.empty(); ++i) {
      layer.scores[i] = alphabet[i * 7919 % alphabet.size()];
    }
    for (int64_t kept : {int64_t{0}, int64_t{1}, int64_t{1000}, kTokens / 3, kTokens - 1, kTokens}) {
      const Result out = truncate(layer, kept, false, test::Threads(3), isa);
      for (int64_t row = 0; row < 2; ++row) {
        const auto indices = out.indices.begin() + row * kept;
        CAPTURE(cpu::name_of(isa), alphabet, kept, row);
        CHECK(std::vector(indices, indices + kept) == test::select(layer.scores_of(row), kept));
      }
    }
  }
}

TEST_CASE("rows are copied whole and to their place") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  Layer layer(2, 3, 70, 5, 9);
  layer.tokens_before_heads = GENERATE(false, true);
  const int64_t kept = GENERATE(1, 20, 69, 70);
  const Result out = truncate(layer, kept, false, cpu::Sequential(), isa);
  for (int64_t row = 0; row < layer.batch * layer.heads; ++row) {
    const std::vector<int64_t> expected = test::select(layer.scores_of(row), kept);
    for (int64_t i = 0; i < kept; ++i) {
      CAPTURE(cpu::name_of(isa), layer.tokens_before_heads, row, i);
      REQUIRE(out.indices[row * kept + i] == expected[i]);
      const int64_t token = layer.place(row, expected[i]);
      for (int64_t d = 0; d < layer.head_dim; ++d) {
        REQUIRE(out.keys[(row * kept + i) * layer.head_dim + d] == layer.keys[token * layer.head_dim + d]);
      }
      for (int64_t d = 0; d < layer.value_dim; ++d) {
        REQUIRE(out.values[(row * kept + i) * layer.value_dim + d] == layer.values[token * layer.value_dim + d]);
      }
    }
  }
}

TEST_CASE("what is written past the caches is the same") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  constexpr int64_t kTokens = 40;
  const std::vector<int64_t> indices = {0, 3, 4, 17, 39};
  for (int64_t row_bytes : {4, 64, 192, 200}) {  // whole lines and others
    for (int64_t offset : {0, 8}) {              // on a line's border and not
      std::vector<char> source(kTokens * row_bytes), room(indices.size() * row_bytes + 128, 7);
      for (size_t i = 0; i < source.size(); ++i) source[i] = char(i * 31 % 127);
      char* out = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) + offset;
      cpu::truncate_loops(isa).copy_rows(source.data(), row_bytes, row_bytes, indices.data(), 1, 5, true, out);
      CAPTURE(cpu::name_of(isa), row_bytes, offset);
      for (int64_t i = 0; i < 5; ++i) {
        for (int64_t byte = 0; byte < row_bytes; ++byte) {
          REQUIRE(out[i * row_bytes + byte] == (i == 0 ? 7 : source[indices[i] * row_bytes + byte]));
        }
      }
      CHECK(out[5 * row_bytes] == 7);
    }
  }
}

TEST_CASE("the last entry is the sum of the skipped tokens") {
  const cpu::Isa isa = GENERATE(from_range(cpu::available_isas()));
  Layer layer(2, 3, 70, 5, GENERATE(9, 300));  // columns are summed 256 at a time
  layer.tokens_before_heads = GENERATE(false, true);
  const int64_t kept = GENERATE(1, 20, 69);
  const Result out = truncate(layer, kept, true, cpu::Sequential(), isa);
  for (int64_t row = 0; row < layer.batch * layer.heads; ++row) {
    const int64_t* indices = out.indices.data() + row * (kept + 1);
    CHECK(indices[kept] == -1);
    for (int64_t d = 0; d < layer.value_dim; ++d) {
      double sum = 0;  // exact: these are whole numbers below 2^24
      for (int64_t token = 0; token < layer.tokens; ++token) {
        if (!std::binary_search(indices, indices + kept, token)) {
          sum += layer.values[layer.place(row, token) * layer.value_dim + d];
        }
      }
      CAPTURE(cpu::name_of(isa), row, d);
      CHECK(out.values[(row * (kept + 1) + kept) * layer.value_dim + d] == float(sum));
    }
  }
}

TEST_CASE("threads change nothing") {
  const Layer layer{2, 3, 70, 5, 9};
  const cpu::Isa isa = cpu::active_isa();
  for (bool has_skipped : {false, true}) {
    const Result expected = truncate(layer, 20, has_skipped, cpu::Sequential(), isa);
    for (int threads : {2, 3, 7}) CHECK(truncate(layer, 20, has_skipped, test::Threads(threads), isa) == expected);
  }
}
