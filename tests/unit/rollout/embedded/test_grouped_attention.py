import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from megatron_tip.rollout.embedded.grouped_attention import register_grouped_attention


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decoding_with_a_cache_and_left_padding_gives_the_logits_of_sdpa(config_class, kv_heads):
    config = config_class(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def decode() -> torch.Tensor:
        cache, logits = None, []
        for start, end in [(0, 6), (6, 7), (7, 8), (8, 9)]:
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end].long(),
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
        return torch.stack(logits, dim=1)

    with torch.no_grad():
        expected = decode()
        model.set_attn_implementation(register_grouped_attention())
        torch.testing.assert_close(decode(), expected, atol=1e-5, rtol=1e-5)
