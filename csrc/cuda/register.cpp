// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "csrc/accumulate_scores.h"
#include "csrc/chunk_attention.h"
#include "csrc/cuda/backend.h"
#include "csrc/decode_attention.h"
#include "csrc/truncate.h"

STABLE_TORCH_LIBRARY_IMPL(fsdc, CUDA, m) {
  m.impl("truncate", TORCH_BOX(&fsdc::truncate<fsdc::CudaBackend>));
  m.impl("accumulate_scores_", TORCH_BOX(&fsdc::accumulate_scores<fsdc::CudaBackend>));
  m.impl("decode_attention_", TORCH_BOX(&fsdc::decode_attention<fsdc::CudaBackend>));
  m.impl("chunk_attention_", TORCH_BOX(&fsdc::chunk_attention<fsdc::CudaBackend>));
}
