"""Small models of transformers, with random weights that are not small: a mistake shows in what they answer."""

import torch
import transformers
from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=6, query_pre_attn_scalar=9, attn_logit_softcapping=2.0),
    "gpt_oss": GptOssConfig(
        **SIZES, sliding_window=6, num_local_experts=2, num_experts_per_tok=1, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
}
CORES = dict(group_size=3, window=4, sink_tokens=1)


def model_of(name, implementation, dtype=torch.float32):
    """One of the models above, the same each time."""
    torch.manual_seed(3)
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict())
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype)
    for n, parameter in model.named_parameters():
        if parameter.dim() > 1 or "sinks" in n:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
