# SPDX-License-Identifier: Apache-2.0
"""The real model stories260K (llama2.c's format) as a LlamaForCausalLM, and its tokenizer."""

import struct
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parents[3] / "shared/models/stories260K"
BOS = 1

needs_stories = pytest.mark.skipif(not FOLDER.exists(), reason=f"the model stories260K is not at {FOLDER}")


def load_model() -> LlamaForCausalLM:
    data = (FOLDER / "stories260K.bin").read_bytes()
    hidden, feed_forward, layers, heads, kv_heads, vocabulary, positions = struct.unpack("7i", data[:28])
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    head_dim = hidden // heads

    def take(*sizes: int) -> torch.Tensor:
        nonlocal numbers
        count = torch.Size(sizes).numel()
        taken, numbers = numbers[:count].view(sizes), numbers[count:]
        return taken

    def half_rotated(weight: torch.Tensor) -> torch.Tensor:
        """llama2.c rotates neighbouring pairs, transformers the two halves of a head."""
        return weight.view(layers, -1, head_dim // 2, 2, hidden).transpose(2, 3).reshape(weight.shape)

    embedding = take(vocabulary, hidden)
    attention_norm = take(layers, hidden)
    q = half_rotated(take(layers, hidden, hidden))
    k = half_rotated(take(layers, kv_heads * head_dim, hidden))
    v = take(layers, kv_heads * head_dim, hidden)
    o = take(layers, hidden, hidden)
    mlp_norm = take(layers, hidden)
    gate, down, up = (
        take(layers, feed_forward, hidden),
        take(layers, hidden, feed_forward),
        take(layers, feed_forward, hidden),
    )
    final_norm = take(hidden)

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=0,
    )
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": final_norm, "lm_head.weight": embedding}
    for i in range(layers):
        state |= {
            f"model.layers.{i}.{name}.weight": weight[i]
            for name, weight in {
                "input_layernorm": attention_norm,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": o,
                "post_attention_layernorm": mlp_norm,
                "mlp.gate_proj": gate,
                "mlp.down_proj": down,
                "mlp.up_proj": up,
            }.items()
        }
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def load_pieces() -> list[bytes]:
    """The text of each token."""
    data = (FOLDER / "tok512.bin").read_bytes()
    pieces, at = [], 4
    while at < len(data):
        (length,) = struct.unpack_from("i", data, at + 4)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


def decode(ids: list[int]) -> str:
    pieces = load_pieces()
    return b"".join(pieces[i] for i in ids if i != BOS).decode(errors="replace")
