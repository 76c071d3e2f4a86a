"""Tiny random causal language models of Hugging Face architectures, saved to disk."""

from pathlib import Path
from typing import Any

import torch

D_VOCAB = 30
_WIDTH = 16
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0}
_COMMON = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0}
_HIDDEN = {"hidden_size": _WIDTH, "num_hidden_layers": 2, "intermediate_size": 24, "initializer_range": 0.3}
_GPT = {"n_positions": 24, "n_embd": _WIDTH, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
_OPT = {"hidden_size": _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "init_std": 0.3,
        "max_position_embeddings": 24, "word_embed_proj_dim": _WIDTH, "pad_token_id": 1}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT),
    "neox": ("GPTNeoX", {**_HIDDEN, "num_attention_heads": 2, "max_position_embeddings": 24}),
    "opt": ("OPT", _OPT),
    "bloom": ("Bloom", {"hidden_size": _WIDTH, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "llama": ("Llama", {**_HIDDEN, **_GROUPED}),
    "qwen2": ("Qwen2", {**_HIDDEN, **_GROUPED}),
    "mistral": ("Mistral", {**_HIDDEN, **_GROUPED, "head_dim": 4}),
    "gemma": ("Gemma", {**_HIDDEN, **_GROUPED, "head_dim": 4}),
    "gemma2": ("Gemma2", {**_HIDDEN, **_GROUPED, "head_dim": 4, "query_pre_attn_scalar": 4}),
    "olmo": ("Olmo", {**_HIDDEN, **_GROUPED}),
    "olmo2": ("Olmo2", {**_HIDDEN, **_GROUPED}),
}
"""The prefix of each architecture's classes, and its config."""


def made(name: str, seed: int = 0, **changes: Any) -> Any:
    """Make a model with random weights; the global generator is left as it was."""
    import transformers

    prefix, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{prefix}Config")(**_COMMON, **{**settings, **changes})
    kind = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, f"{prefix}{kind}")(config).eval()


def saved(name: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Make a model, save it to a directory, and return it as it was saved."""
    from birthlens.model.directory import quiet

    model = made(name, seed, **changes).to(dtype)
    with quiet():
        model.save_pretrained(directory)
    return model
