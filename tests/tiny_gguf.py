"""A language model small enough to be made in a test: random weights, an alphabet of bytes. Not a test module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make_qwen2(path: Path, *, seed: int = 1) -> Any:
    return make_gguf(path, "qwen2", seed=seed)


def make_gguf(path: Path, architecture: str, *, seed: int = 1) -> Any:
    """Write a model of two layers to `path`, of "qwen2" or "llama"; returns the same model in transformers."""
    import torch
    from gguf import GGUFWriter
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}), "llama": (LlamaConfig, LlamaForCausalLM, {})}
    describe, build, more = kinds[architecture]
    config = describe(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.25,
        **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = build(config).eval().half().float()  # weights that 16 bits hold
    with torch.no_grad():
        model.lm_head.weight[128:257] = 0  # it says plain characters only: bytes of others come out in pieces
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*alphabet(), "<|endoftext|>", "th"])
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, *inner = stem.split(".")
            stem = f"blk.{layer}.{NAMES['.'.join(inner)]}"
        else:
            stem = OUTSIDE[stem]
        if architecture == "llama" and stem.endswith(("attn_q", "attn_k")):  # as the converter orders rotated rows
            heads = config.num_attention_heads if stem.endswith("q") else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"{stem}.{kind}", (value.half() if value.ndim == 2 else value).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def alphabet() -> list[str]:
    """The 256 bytes as byte-level BPE writes them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [byte for byte in range(256) if byte not in plain]
    found = {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(odd)}
    return [found[byte] for byte in range(256)]
