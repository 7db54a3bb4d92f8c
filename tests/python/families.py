# SPDX-License-Identifier: Apache-2.0
"""Every text decoder of the installed transformers, with a tiny random config: does enable() cap it, or refuse it?

python tests/python/families.py             # writes the table in docs/huggingface.md
python tests/python/families.py --print     # shows it
python tests/python/families.py llama       # one family
"""

import re
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fixed_size_kv_cache import FixedSizeLayer, enable

PAGE = Path(__file__).resolve().parents[2] / "docs/huggingface.md"
BLOCK = re.compile(r"(<!-- families: .*? -->\n)(.*?)(<!-- end of families -->)", re.DOTALL)
LARGE, CAPPED, PADS, CHUNK, NEW, LIMIT = 64, 8, 3, 5, 8, 3_000_000
WORKS, NOTHING = "works", "nothing to cap"

HEADS = dict(num_attention_heads=4, n_head=4, n_heads=4, decoder_attention_heads=4, num_key_value_heads=2, head_dim=8)
LAYERS = dict(num_hidden_layers=4, n_layer=4, n_layers=4, num_layers=4, decoder_layers=4)
WIDTHS = dict(hidden_size=32, n_embd=32, d_model=32, word_embed_proj_dim=32, intermediate_size=48, ffn_dim=48)
TEXT = dict(vocab_size=96, max_position_embeddings=512, n_positions=512, sliding_window=8)
EXPERTS = dict(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    mamba_d_state=8,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_expand=2,
    state_size=8,
    conv_dim=32,
)
TINY = {**HEADS, **LAYERS, **WIDTHS, **TEXT, **EXPERTS, **LATENT, **LINEAR, "rotary_dim": 8, "decoder_ffn_dim": 48}
OWN = {  # what a family needs beside or instead
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(layer_types=["sliding_attention", "full_attention"] * 2),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
    ),
    "gemma4_text": dict(
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=0,
        head_dim=8,
        global_head_dim=8,
        num_global_key_value_heads=2,
        num_kv_shared_layers=0,
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "hunyuan_v1_dense": dict(rope_theta=10000.0, head_dim=8),
    "hunyuan_v1_moe": dict(rope_theta=10000.0, head_dim=8, moe_topk=2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "dbrx": dict(
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "kimi_linear": dict(linear_head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1),
    "ministral": dict(head_dim=8, rope_theta=10000.0),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "phi4_multimodal": {},
    "roc_bert": dict(pronunciation_vocab_size=9, shape_vocab_size=9, pronunciation_embed_dim=8, shape_embed_dim=8),
    "zaya": dict(num_experts_per_tok=1),
    "zamba2": dict(layer_types=["mamba", "hybrid"] * 2, num_mem_blocks=1),
    "zamba": dict(layers_block_type=["mamba", "hybrid"] * 2),
}


def discover() -> list[str]:
    """Model types with a causal language model; of models for text and images the text decoder's."""
    found = []
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        made = CONFIG_MAPPING[name]
        try:
            text = made().get_text_config(decoder=True)
        except Exception:  # a config without defaults: it counts for itself
            text = None
        if text is None or type(text) is made or text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            found.append(name)
    return found


def tiny_model(name: str) -> torch.nn.Module:
    """A random model of the family, in float32. Raises what the family raises where our config does not fit it."""
    made = CONFIG_MAPPING[name]
    default = made()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[made]
    text = default.get_text_config(decoder=True)
    made = type(text)

    def has(field: str) -> bool:
        try:
            return getattr(text, field, None) is not None
        except Exception:  # a field of single layers
            return False

    chosen = {field: value for field, value in TINY.items() if has(field)}
    if "kv_lora_rank" in chosen:
        chosen.pop("head_dim", None)  # it follows from the others
        chosen["num_key_value_heads"] = HEADS["num_attention_heads"]
    if vars(text).get("layer_types"):
        kinds = list(dict.fromkeys(text.layer_types))
        chosen["layer_types"] = (kinds * 4)[:4]
    config = made(**{**chosen, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **OWN.get(name, {})})
    config.is_decoder = True  # of models that may be encoders too
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class(config).parameters())
    if size > LIMIT:
        raise ValueError(f"the config stays large: {size} parameters")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # attention must have preferences
            if weight.dim() > 1 and weight.is_floating_point():
                weight.mul_(3)
    return model


def run(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor):
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, dim=1), out.past_key_values if "past_key_values" in out else None


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 2e-3 * other.abs().max())


def verdict(name: str) -> str:
    """``works``, ``nothing to cap``, the text of a refusal, ``fails: ...``, or ``not tried: ...`` without a model."""
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    try:
        model = tiny_model(name)
        expected, _ = run(model, ids, mask)
        again, _ = run(model, ids[:1, PADS:], mask[:1, PADS:])
    except Exception as error:
        return f"not tried: {type(error).__name__}"
    pads_matter = not close(expected[:1], again)  # already in the stock model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            handle = enable(model, cache_size=LARGE)
        except NotImplementedError as error:
            return str(error).split("; use it without")[0]
        with handle:
            try:
                run(model, ids[:1, PADS:], mask[:1, PADS:])
                exact, cache = run(model, ids, mask)
            except (NotImplementedError, ValueError) as error:
                return str(error).split("; call disable")[0]
            except Exception as error:
                return f"fails: {error}"
        if not close(exact, expected):
            return f"fails: other logits than stock, by {(exact - expected).abs().max():.1e}"
        own = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, FixedSizeLayer)]
        if not own:
            return NOTHING
        with enable(model, cache_size=LARGE, prefill_chunk_size=CHUNK):
            in_chunks, _ = run(model, ids, mask)
        if not close(in_chunks, expected):
            return f"fails: other logits in chunks, by {(in_chunks - expected).abs().max():.1e}"
        with enable(model, cache_size=CAPPED):
            both, cache = run(model, ids, mask)
            solo, _ = run(model, ids[:1, PADS:], mask[:1, PADS:])
        own = [layer for layer in cache.layers if isinstance(layer, FixedSizeLayer) and layer.is_initialized]
        held = max((int((layer.slots.tokens.positions >= 0).sum(-1).max()) for layer in own), default=0)
        if held != CAPPED:
            return f"fails: {held} tokens held of {CAPPED}"
        if not pads_matter and not close(both[:1], solo):
            return f"fails: a padded row is not its solo run, by {(both[:1] - solo).abs().max():.1e}"
    return WORKS


def table(verdicts: dict[str, str]) -> str:
    """Works and refusals, families of one verdict in one line."""
    by_text: dict[str, list[str]] = {}
    for name, text in verdicts.items():
        key = re.sub(r"^\w+: |generate: ", "", text) if text.startswith(("generate", "Diff", "Jet")) else text
        key = re.sub(r"\b(got|for) \w+,", r"\1 it,", key.replace(f" of {name}", ""))
        by_text.setdefault(key, []).append(name)
    order = sorted(by_text, key=lambda text: (text != WORKS, text != NOTHING, text.startswith("not tried"), text))
    lines = [f"| transformers {transformers.__version__} | families |", "| --- | --- |"]
    for text in order:
        names = by_text[text]
        label = text if text in (WORKS, NOTHING) or text.startswith("not tried") else f"refused: {text}"
        lines.append(f"| {label} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    transformers.logging.set_verbosity(50)
    torch.set_num_threads(1)  # the models are too small for more
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    verdicts = {}
    for name in names or discover():
        verdicts[name] = verdict(name)
        print(f"{name}: {verdicts[name]}", file=sys.stderr, flush=True)
    if "--print" in sys.argv:
        print(table(verdicts), end="")
    elif not names:
        PAGE.write_text(BLOCK.sub(lambda block: block[1] + table(verdicts) + block[3], PAGE.read_text()))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
