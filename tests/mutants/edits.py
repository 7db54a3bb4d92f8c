# SPDX-License-Identifier: Apache-2.0
"""Edits that break the code, and the tests that are there to notice: ``tests/mutants/run`` tries each.

An edit replaces ``old``, which stands once in the file, by ``new``; every test named must fail then. A test is one of
pytest's (``FILE::NAME``) or of Catch2's (``BINARY: CASE``). Whoever mends a bug that no test had seen adds one here.
"""

from typing import NamedTuple

CPU_ROWS = "fsdc_kernel_tests: rows are copied whole and to their place"
CPU_SKIPPED = "fsdc_kernel_tests: the last entry is the sum of the skipped tokens"
GPU_ROWS = "fsdc_simt_plain: truncate: rows lie where the strides say"
GPU_ALIGNMENT = "fsdc_simt_address: truncate: strides and alignment"
GPU_SCORES = "fsdc_simt_plain: accumulate_scores: without query weights and carry, without queries, with other strides"
GPU_SIZES = "fsdc_simt_plain: accumulate_scores: sizes and types"
GPU_CHUNK = "fsdc_simt_plain: chunk_attention: options"
GPU_BLOCKS = "fsdc_simt_plain: chunk_attention: blocks of any size"
GPU_DECODE = "fsdc_simt_plain: decode_attention: every plan"
GPU_EVICTION = "fsdc_simt_plain: decode_attention: rules of eviction, as the CPU has them"
GPU_UNEQUAL = "fsdc_simt_plain: decode_attention: KV heads with slots of their own"
GPU_STRIDES = "fsdc_simt_plain: decode_attention: rows lie where the strides say"
EVICTION = "tests/python/test_eviction.py::"
STATE = "tests/python/test_layer_state.py::"
MODES = "tests/python/test_modes.py::"
USES = "tests/python/test_uses.py::"
PADDED = MODES + "test_a_padded_row_is_its_solo_run[plain-True-18]"


class Edit(NamedTuple):
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def binaries(self) -> set[str]:
        """Test programs to compile."""
        return {test.split(": ")[0] for test in self.tests if not test.startswith("tests/")}


EDITS = [
    # ---- CPU kernels -------------------------------------------------------------------------------------------------
    Edit(
        "the kept tokens are not passed over again for the next 256 columns of the skipped sum",
        "kernels/cpu/sum_skipped.inc",
        "begin += kSumColumns, kept = kept_indices",
        "begin += kSumColumns",
        (CPU_SKIPPED,),
    ),
    Edit(
        "the skipped sum takes the heads of a row for neighbours",
        "kernels/cpu/sum_skipped.inc",
        "h * rows.head_stride",
        "h * params.tokens * rows.token_stride",
        (CPU_SKIPPED,),
    ),
    Edit(
        "the gather takes the heads of a row for neighbours",
        "kernels/cpu/truncate.cpp",
        "row % params.heads * tokens.head_stride",
        "row % params.heads * params.tokens * tokens.token_stride",
        (CPU_ROWS,),
    ),
    Edit(
        "the gather takes batch rows for neighbours",
        "kernels/cpu/truncate.cpp",
        "row / params.heads * tokens.batch_stride",
        "row / params.heads * params.heads * tokens.head_stride",
        (CPU_ROWS,),
    ),
    Edit(
        "the selection takes the scores of batch rows for neighbours",
        "kernels/cpu/truncate.cpp",
        "row / params.heads * params.score_batch_stride",
        "row / params.heads * params.heads * params.score_head_stride",
        (CPU_ROWS,),
    ),
    Edit(
        "the selection takes the scores of heads for neighbours",
        "kernels/cpu/truncate.cpp",
        "row % params.heads * params.score_head_stride",
        "row % params.heads * params.tokens",
        (CPU_ROWS,),
    ),
    # ---- CUDA kernels, on the host -----------------------------------------------------------------------------------
    Edit(
        "the batch stride of keys and values is not used",
        "kernels/cuda/truncate/gather.cuh",
        "batch * rows.batch_stride + head * rows.head_stride",
        "row * rows.head_stride",
        (GPU_ROWS,),
    ),
    Edit(
        "the selection takes the scores of batch rows for neighbours",
        "kernels/cuda/truncate/truncate.cuh",
        "batch * params.score_batch_stride",
        "batch * params.heads * params.score_head_stride",
        (GPU_ROWS,),
    ),
    Edit(
        "the selection takes the scores of heads for neighbours",
        "kernels/cuda/truncate/truncate.cuh",
        "head * params.score_head_stride",
        "head * params.tokens",
        (GPU_ROWS,),
    ),
    Edit(
        "batch rows that are not aligned are read in wide accesses",
        "kernels/cuda/truncate/truncate.cuh",
        "rows.batch_stride | rows.head_stride",
        "rows.head_stride",
        (GPU_ALIGNMENT,),
    ),
    Edit(
        "heads that are not aligned are read in wide accesses",
        "kernels/cuda/truncate/truncate.cuh",
        "rows.head_stride | rows.token_stride",
        "rows.token_stride",
        (GPU_ALIGNMENT,),
    ),
    Edit(
        "an output that is not aligned is written in wide accesses",
        "kernels/cuda/truncate/truncate.cuh",
        "reinterpret_cast<uintptr_t>(rows.source) | reinterpret_cast<uintptr_t>(rows.out)",
        "reinterpret_cast<uintptr_t>(rows.source)",
        (GPU_ALIGNMENT,),
    ),
    Edit(
        "scores are taken for contiguous",
        "kernels/cuda/accumulate_scores.cuh",
        "token * params.score_token_stride",
        "token",
        (GPU_SCORES,),
    ),
    Edit(
        "the scores of batch rows are taken for neighbours",
        "kernels/cuda/accumulate_scores.cuh",
        "batch * params.score_batch_stride + head * params.score_head_stride",
        "row * params.score_head_stride",
        (GPU_SCORES,),
    ),
    Edit(
        "the scores of heads are taken for neighbours",
        "kernels/cuda/accumulate_scores.cuh",
        "head * params.score_head_stride",
        "head * params.tokens * params.score_token_stride",
        (GPU_SCORES,),
    ),
    Edit(
        "the carries of batch rows are taken for neighbours",
        "kernels/cuda/accumulate_scores.cuh",
        "batch * params.carry_stride",
        "batch",
        (GPU_SCORES,),
    ),
    Edit(
        "the query weights of batch rows are taken for neighbours",
        "kernels/cuda/weight_sums.cuh",
        "batch * params.query_weight_batch_stride",
        "batch * params.queries",
        (GPU_SCORES,),
    ),
    Edit(
        "the weights of queries are taken for neighbours",
        "kernels/cuda/weight_sums.cuh",
        "query_weight += params.query_weight_query_stride;",
        "++query_weight;",
        (GPU_SCORES,),
    ),
    Edit(
        "a query of weight zero is added, NaN and all",
        "kernels/cuda/weight_sums.cuh",
        "if (weight != 0) delta[i] = add(",
        "delta[i] = add(",
        (GPU_SIZES,),
    ),
    Edit(
        "clusters are planned that find no room on the device",
        "kernels/cuda/truncate/plan.h",
        "std::min(device.largest_cluster, kMostInCluster)",
        "kMostInCluster",
        ("fsdc_simt_plain: truncate: clusters no larger than fit on the device",),
    ),
    Edit(
        "elements are read from addresses between two of them",
        "kernels/cuda/truncate/truncate.cuh",
        "  if (!are_aligned(params, launched.access)) return cudaErrorMisalignedAddress;\n",
        "",
        ("fsdc_simt_plain: truncate: addresses that no element can have are refused",),
    ),
    Edit(
        "blocks of more than three warps are summed wrongly, as those of 512 threads that ship",
        "kernels/cuda/block.cuh",
        "lane_index() < warp_index() ? slot : 0",
        "lane_index() < min(warp_index(), 2) ? slot : 0",
        ("fsdc_simt_plain: truncate: every plan",),
    ),
    Edit(
        "a threshold below 0 is looked for among the numbers above it",
        "kernels/cuda/truncate/threshold.cuh",
        "if (sign != 0 && last.digit == 0) {",
        "if (false) {",
        ("fsdc_simt_plain: truncate: hostile scores",),
    ),
    Edit(
        "scores are read in wide accesses from wherever they begin",
        "kernels/cuda/truncate/codes.cuh",
        "(0 - reinterpret_cast<uintptr_t>(scores) / sizeof(float)) % kWide",
        "0",
        (GPU_ALIGNMENT,),
    ),
    Edit(
        "votes change scores that are not finite",
        "kernels/cuda/chunk_attention/votes.cuh",
        "if (is_finite(score)) score =",
        "score =",
        (GPU_CHUNK,),
    ),
    Edit(
        "scores are carried once for each block of queries",
        "kernels/cuda/chunk_attention/votes.cuh",
        "is_first && params.carry != nullptr",
        "params.carry != nullptr",
        (GPU_BLOCKS,),
    ),
    Edit(
        "a query of weight zero votes, NaN and all",
        "kernels/cuda/chunk_attention/votes.cuh",
        "if (of_lane.vote != 0) sums[token]",
        "sums[token]",
        (GPU_CHUNK,),
    ),
    Edit(
        "values of tokens that are not there are multiplied with zero",
        "kernels/cuda/chunk_attention/vectors.cuh",
        "is_there ? from[d] : nothing",
        "from[d]",
        (GPU_CHUNK,),
    ),
    Edit(
        "a query sees the new token after it",
        "kernels/cuda/chunk_attention/block.cuh",
        "token - held <= query;",
        "token - held <= query + 1;",
        (GPU_CHUNK,),
    ),
    Edit(
        "rows at uneven distances are multiplied as if they were even",
        "kernels/cuda/chunk_attention/plan.h",
        "params.head_layout != nullptr || uneven(params.keys) || uneven(params.values)",
        "params.head_layout != nullptr",
        (GPU_CHUNK,),
    ),
    Edit(
        "a sum of exponentials is of another maximum than what is added to it",
        "kernels/cuda/chunk_attention/softmax.cuh",
        "    sum *= exponential(largest - from(raised));\n",
        "",
        ("fsdc_simt_plain: chunk_attention: sizes and types",),
    ),
    Edit(
        "a key counts as newer than itself",
        "kernels/cuda/chunk_attention/redundancy.cuh",
        "first + token < newer",
        "first + token <= newer",
        (GPU_CHUNK,),
    ),
    Edit(
        "the new token is in no run where it would begin one",
        "kernels/cuda/decode_attention/row.cuh",
        "(min(p.length, slots) + plan.run_tokens) / plan.run_tokens",
        "(min(p.length, slots) + plan.run_tokens - 1) / plan.run_tokens",
        (GPU_DECODE,),
    ),
    Edit(
        "a plan leaves no room for the new token",
        "kernels/cuda/decode_attention/plan.h",
        "std::min(params.length, params.slots) + 1",
        "std::min(params.length, params.slots)",
        ("fsdc_simt_plain: decode_attention: by its own plan",),
    ),
    Edit(
        "scratch holds one cut run for each row of the batch, not for each head",
        "kernels/cuda/decode_attention/plan.h",
        "tokens_per_batch_row(params) / plan.run_tokens + params.heads",
        "tokens_per_batch_row(params) / plan.run_tokens + 1",
        (GPU_UNEQUAL,),
    ),
    Edit(
        "new tokens that are not aligned are read in wide accesses",
        "kernels/cuda/decode_attention/plan.h",
        "bits |= reinterpret_cast<uintptr_t>(token.data);",
        "",
        ("fsdc_simt_address: decode_attention: rows lie where the strides say",),
    ),
    Edit(
        "the sums of runs are added up without their scales",
        "kernels/cuda/decode_attention/finish.cuh",
        "sum += memory.sums[g] * scale;",
        "sum += memory.sums[g];",
        (GPU_DECODE,),
    ),
    Edit(
        "the largest logit of the first run passes for that of the row",
        "kernels/cuda/decode_attention/finish.cuh",
        "for (int run = 1; run < runs; ++run) maximum",
        "for (int run = 1; run < 1; ++run) maximum",
        ("fsdc_simt_plain: decode_attention: logits far apart",),
    ),
    Edit(
        "the last loads of a run add its last token again",
        "kernels/cuda/decode_attention/attend.cuh",
        "          if (!is_full && start + i * step >= run.held) values[i] = Word{};\n",
        "",
        (GPU_DECODE,),
    ),
    Edit(
        "values of empty slots are multiplied with zero",
        "kernels/cuda/decode_attention/attend.cuh",
        "if (has_holes && positions[token(i)] < 0)",
        "if (false && has_holes && positions[token(i)] < 0)",
        ("fsdc_simt_plain: decode_attention: whatever an empty slot holds does not count",),
    ),
    Edit(
        "the entry of the evicted counts as one token",
        "kernels/cuda/decode_attention/attend.cuh",
        "p.skipped_mean ? logarithm(static_cast<A>(count)) : A{0}",
        "A{0}",
        (GPU_DECODE,),
    ),
    Edit(
        "the entry's logit is not capped",
        "kernels/cuda/decode_attention/attend.cuh",
        "    if (softcap != 0) logit = softcap",
        "    if (false) logit = softcap",
        ("fsdc_simt_plain: decode_attention: logit rules",),
    ),
    Edit(
        "query heads take the sinks of another KV head",
        "kernels/cuda/decode_attention/finish.cuh",
        "row.h * group + g",
        "row.h + g",
        (GPU_DECODE,),
    ),
    Edit(
        "the lost attention is that of all query heads together",
        "kernels/cuda/decode_attention/finish.cuh",
        "lost / static_cast<A>(group)",
        "lost",
        (GPU_EVICTION,),
    ),
    Edit(
        "scores do not decay",
        "kernels/cuda/decode_attention/finish.cuh",
        "add(multiply(p.decay, score), received)",
        "add(score, received)",
        (GPU_DECODE,),
    ),
    Edit(
        "redundancy forgets a cosine that is no number",
        "kernels/cuda/decode_attention/finish.cuh",
        "cosine > redundancy || cosine != cosine",
        "cosine > redundancy",
        (GPU_EVICTION,),
    ),
    Edit(
        "a hole that is filled counts as an evicted token",
        "kernels/cuda/decode_attention/finish.cuh",
        "p.skipped_count != nullptr && is_token",
        "p.skipped_count != nullptr && (is_token || true)",
        (GPU_DECODE,),
    ),
    Edit(
        "the new token is rated without the norm of its value",
        "kernels/cuda/decode_attention/finish.cuh",
        "rule.candidate(score, token.weight,",
        "rule.candidate(score, 1.0f,",
        (GPU_EVICTION,),
    ),
    Edit(
        "who goes is sought among the slots of a cluster's first block",
        "kernels/cuda/decode_attention/finish.cuh",
        "block < blocks; ++block) goes",
        "block < blocks && block < 1; ++block) goes",
        (GPU_DECODE,),
    ),
    Edit(
        "the position of the new token says how many heads have read it",
        "kernels/cuda/decode_attention/finish.cuh",
        "found & ((1u << plan.seen_shift) - 1)",
        "found",
        (GPU_DECODE,),
    ),
    Edit(
        "of equal scores the first slot goes, not the oldest token",
        "kernels/cuda/decode_attention/evict.cuh",
        "b.code < a.code || (b.code == a.code && b.slot < a.slot)",
        "b.code >> 32 < a.code >> 32 || (b.code >> 32 == a.code >> 32 && b.slot < a.slot)",
        (GPU_EVICTION,),
    ),
    Edit(
        "who goes is not sought by a block's last warp",
        "kernels/cuda/decode_attention/evict.cuh",
        "warp < kWarps; ++warp) candidate",
        "warp < kWarps - 1; ++warp) candidate",
        (GPU_DECODE,),
    ),
    Edit(
        "heads with slots of their own protect as many recent tokens as all",
        "kernels/cuda/decode_attention/row.cuh",
        "layout == nullptr ? p.recent_tokens : layout[3]",
        "p.recent_tokens",
        (GPU_UNEQUAL,),
    ),
    Edit(
        "facts of batch rows are taken for neighbours",
        "kernels/cuda/decode_attention/row.cuh",
        "first(p.fact_batch_stride, p.fact_head_stride, 1)",
        "first(p.heads * p.fact_head_stride, p.fact_head_stride, 1)",
        (GPU_STRIDES,),
    ),
    Edit(
        "whether a row is padding is asked of its neighbour",
        "kernels/cuda/decode_attention/row.cuh",
        "p.valid[batch * p.valid_stride]",
        "p.valid[batch]",
        (GPU_STRIDES,),
    ),
    # ---- argument rules ----------------------------------------------------------------------------------------------
    Edit(
        "of tensors that overlap themselves only a stride of 0 is seen",
        "csrc/overlap.h",
        "overlaps |= strides[dim] <= reach;",
        "overlaps |= strides[dim] == 0;",
        ("fsdc_op_tests: what is written shares memory with nobody, itself included",),
    ),
    Edit(
        "an argument that begins within what is written is not seen",
        "csrc/overlap.h",
        "ranges[i].end <= ranges[j].begin || ranges[j].end <= ranges[i].begin",
        "ranges[i].begin != ranges[j].begin",
        ("fsdc_op_tests: what is written shares memory with nobody, itself included",),
    ),
    Edit(
        "fake tensors: of those that overlap themselves only a stride of 0 is seen",
        "python/fixed_size_kv_cache/operators/checks.py",
        "apart &= stride > reach",
        "apart &= stride != 0",
        ("tests/python/test_unusual_tensors.py::test_scores_do_not_overlap_themselves",),
    ),
    # ---- scores and eviction -----------------------------------------------------------------------------------------
    Edit(
        "old scores decay once in every block of queries of a chunk",
        "python/fixed_size_kv_cache/layer/chunk.py",
        "carry if start == 0 else None",
        "carry",
        (EVICTION + "test_a_chunk_of_several_blocks_decays_old_scores_once[plain]",),
    ),
    Edit(
        "NaN goes after the protected tokens",
        "python/fixed_size_kv_cache/layer/score_rule.py",
        "nan=1e300",
        'nan=float("inf")',
        (EVICTION + "test_the_victim_is_the_least_by_the_order_of_the_operators",),
    ),
    Edit(
        "NaN goes first",
        "python/fixed_size_kv_cache/layer/score_rule.py",
        "nan=1e300",
        'nan=-float("inf")',
        (EVICTION + "test_the_victim_is_the_least_by_the_order_of_the_operators",),
    ),
    Edit(
        "-0 goes before +0",
        "python/fixed_size_kv_cache/layer/score_rule.py",
        "others = order != order.amin(-1, keepdim=True)",
        "order = torch.where(order.signbit() & (order == 0), -1e-300, order)\n"
        "    others = order != order.amin(-1, keepdim=True)",
        (EVICTION + "test_the_victim_is_the_least_by_the_order_of_the_operators",),
    ),
    Edit(
        "of equal scores the newer goes",
        "python/fixed_size_kv_cache/layer/score_rule.py",
        "positions.masked_fill(others, torch.iinfo(torch.int32).max).argmin(-1, keepdim=True)",
        "positions.masked_fill(others, -2).argmax(-1, keepdim=True)",
        (EVICTION + "test_the_victim_is_the_least_by_the_order_of_the_operators",),
    ),
    Edit(
        "a token that takes an empty slot adds it to the skipped entry",
        "python/fixed_size_kv_cache/layer/decode.py",
        "evicted.positions >= 0",
        "evicted.positions >= -1",
        (PADDED,),
    ),
    Edit(
        "empty slots that a chunk drops are added to the skipped entry",
        "python/fixed_size_kv_cache/layer/chunk.py",
        "(every.positions >= 0).scatter",
        "(every.positions >= -1).scatter",
        (PADDED,),
    ),
    # ---- tokens taken back, assistants -------------------------------------------------------------------------------
    Edit(
        "recorded tokens stay where their rows were",
        "python/fixed_size_kv_cache/layer/state.py",
        "self.recorded = self.recorded.select_rows(rows)",
        "pass",
        (STATE + "test_what_was_recorded_moves_with_its_row",),
    ),
    Edit(
        "the end of recording evicts nothing",
        "python/fixed_size_kv_cache/layer/layer.py",
        "        self.record_past = False\n        if self.staged is None:\n            self.crop(0)\n",
        "        self.record_past = False\n",
        (STATE + "test_the_end_of_recording_evicts_at_once",),
    ),
    Edit(
        "prompts come in chunks beside an assistant",
        "python/fixed_size_kv_cache/huggingface/generate_hook.py",
        "        or assisted\n",
        "",
        (MODES + "test_while_an_assistant_is_active_prompts_are_read_in_one_piece",),
    ),
    # ---- attention ---------------------------------------------------------------------------------------------------
    Edit(
        "a second attention to the keys of an update passes for one without a cache",
        "python/fixed_size_kv_cache/layer/handoff.py",
        "if self.taken is not None and self.taken() is keys",
        "if False",
        ("tests/python/test_enable.py::test_a_second_attention_to_the_same_keys_is_refused",),
    ),
    Edit(
        "what a mask says of older tokens hides new ones",
        "python/fixed_size_kv_cache/layer/new_tokens.py",
        "new = mask[..., first : first + Q]",
        "new = mask[..., first : first + Q] * mask[..., :1]",
        ("tests/python/test_masks.py::test_two_dimensions",),
    ),
    Edit(
        "a new token that sees older ones counts as real",
        "python/fixed_size_kv_cache/layer/new_tokens.py",
        "sees = new[:, 0, -Q:].expand(B, Q, Q)",
        "sees = mask[:, 0, -Q:, -Q:].expand(B, Q, Q)",
        ("tests/python/test_masks.py::test_full_width_and_one_column_too_many",),
    ),
    Edit(
        "all but float64 takes its softmax in bfloat16",
        "python/fixed_size_kv_cache/layer/attention.py",
        "wide = torch.float64 if query.dtype == torch.float64 else torch.float32",
        "wide = torch.float64 if query.dtype == torch.float64 else torch.bfloat16",
        (MODES + "test_in_narrower_types_it_errs_no_more_than_stock_attention",),
    ),
    # ---- generate() --------------------------------------------------------------------------------------------------
    Edit(
        "continuous batching goes on without us",
        "python/fixed_size_kv_cache/huggingface/generate_hook.py",
        "    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:\n        if _is_capped(self):",
        "    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:\n        if False:",
        (USES + "test_continuous_batching_is_refused",),
    ),
    Edit(
        "an offloaded cache is made before it is refused",
        "python/fixed_size_kv_cache/huggingface/generate_hook.py",
        'if asked_for is not None and ("offloaded" in asked_for or "quantized" in asked_for):',
        "if False:",
        (USES + "test_caches_of_other_kinds_are_refused_before_they_are_made[offloaded]",),
    ),
    Edit(
        "evaluation behind virtual tokens is taken for a foreign cache",
        "python/fixed_size_kv_cache/huggingface/attention_interface.py",
        'return is_trained or key.shape[2] - Q in prefix_lengths(getattr(module, "config", None))',
        "return is_trained",
        ("tests/python/test_causes.py::test_prefix_tuning_of_peft_trains_and_is_evaluated",),
    ),
    Edit(
        "the cache that comes in the place of a dropped one records nothing",
        "python/fixed_size_kv_cache/huggingface/own_cache.py",
        "if cache.record_past:",
        "if False:",
        ("tests/python/test_causes.py::test_phi3_drops_its_cache_while_tokens_may_be_taken_back[12]",),
    ),
    Edit(
        "that cache goes on recording after assisted decoding",
        "python/fixed_size_kv_cache/huggingface/assisted.py",
        "for cache in (given.cache, RUNNING.cache):",
        "for cache in (given.cache,):",
        ("tests/python/test_causes.py::test_phi3_drops_its_cache_while_tokens_may_be_taken_back[12]",),
    ),
    Edit(
        "the command cuts a prompt whose rotation depends on its length",
        "python/fixed_size_kv_cache/cli/generate.py",
        "if reads_in_one_piece(model.config):",
        "if False:",
        ("tests/python/test_rope.py::test_the_command_reads_a_prompt_in_one_piece_too[None]",),
    ),
    Edit(
        "a handle that has ended begins a block that caps nothing",
        "python/fixed_size_kv_cache/huggingface/enabling.py",
        "if model is None or not marks.holds(model, self._cap):",
        "if False:",
        ("tests/python/test_blocks.py::test_a_handle_that_has_ended_begins_no_block",),
    ),
    Edit(
        "filler takes the room of the only question",
        "python/fixed_size_kv_cache/recall/language.py",
        "return bool(self.answers) or len(self) + FILLER + QUESTION <= length",
        "return True",
        ("tests/python/test_recall.py::test_the_shortest_texts_ask_something_too[zipf-122]",),
    ),
]
