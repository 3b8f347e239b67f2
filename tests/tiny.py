"""Tiny random models of the true families, saved as real checkpoints."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "mistral": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 8,
    },
    "qwen2": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 3, "max_position_embeddings": 128, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 2,
    },
    "qwen3": {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    },
    "opt": {
        "hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 48,
    },
    "opt-350m": {  # the odd one: a narrow embedding, norms after the blocks
        "hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False,
    },
    "bloom": {"hidden_size": 48, "n_layer": 5, "n_head": 6},
    "gpt_neox": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 48, "n_layer": 5, "n_head": 4, "n_positions": 128},
    "phi": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}  # fmt: skip

SIX_FAMILIES = ("llama", "opt", "bloom", "gpt_neox", "gpt2", "phi")
VOCAB = 128
NOISE = {"bloom": 0.12, "opt-350m": 0.12, "phi": 0.5}
"""Size of the random weights, 0.2 elsewhere: large enough that greedy decoding does not repeat one token."""


def tiny_config(kind: str, tied: bool, **others: Any) -> Any:
    model_type = kind.partition("-")[0]
    return AutoConfig.for_model(
        model_type, vocab_size=VOCAB, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        **(SIZES[kind] | others),
    )  # fmt: skip


def tiny_model(kind: str, tied: bool, dtype: torch.dtype = torch.float16, **others: Any) -> Any:
    """A random model whose blocks outweigh its embeddings: it does not just repeat its last token.

    `others` are further keys of its config.
    """
    torch.manual_seed(sum(map(ord, kind)) + 2 * tied)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tied, **others))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE.get(kind, 0.2))
            if parameter is model.get_input_embeddings().weight:
                parameter.mul_(0.1)
            parameter.data = parameter.data.to(dtype)  # not the rotary frequencies: transformers keeps them in float32
    return model.eval()


def save_tiny(kind: str, tied: bool, folder: Path, dtype: torch.dtype = torch.float16, shard: str = "60KB") -> Path:
    """A sharded checkpoint of a tiny random model."""
    tiny_model(kind, tied, dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
