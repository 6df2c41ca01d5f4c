"""The arithmetic of an update's cost."""

import pytest
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

from entropo_ray.train.size import Layout, Shape, memory_gib, reference_flops, shape_of, step_flops

QWEN3_06 = Shape(28, 1024, 16, 8, 128, 151_936, 3072, tied=True)
PAIR = {"lengths": [32_000, 24_000], "prompt": 4_000, "actions": 10_560}  # 22 % of what follows the prompt


def test_operations_of_a_pair_of_long_trajectories():
    found = step_flops(QWEN3_06, **PAIR, kept="attention", shared=True, active=440_000_000)
    assert found == 838_436_406_558_720
    assert QWEN3_06.active == pytest.approx(0.44e9, rel=0.01)


def test_recomputation_and_copies_of_a_prompt_cost_what_they_are():
    options = {"kept": "all", "shared": True}
    plain = step_flops(QWEN3_06, **PAIR, **options)
    again = step_flops(QWEN3_06, **PAIR, **options | {"kept": "nothing"})
    apart = step_flops(QWEN3_06, **PAIR, **options | {"shared": False})
    square = 32_000**2 + 24_000**2
    assert again - plain == pytest.approx(2 * QWEN3_06.active * 52_000 + 2 * 28 * 16 * 128 * square)
    assert apart - plain == pytest.approx(6 * QWEN3_06.active * 4_000)
    assert reference_flops(QWEN3_06, **PAIR, shared=True) < plain / 3


def test_a_shape_counts_the_weights_of_the_model():
    dense = Qwen3Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, tie_word_embeddings=True,
    )  # fmt: skip
    norms = 3 * (2 * 32 + 2 * 8) + 32
    assert shape_of(dense).weights == Qwen3ForCausalLM(dense).num_parameters() - norms
    sparse = Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_of(sparse).weights == pytest.approx(30.5e9, rel=0.01)
    assert shape_of(sparse).active == pytest.approx(2.73e9, rel=0.01)
    glm = AutoConfig.for_model(
        "glm4_moe", vocab_size=151_552, hidden_size=4096, num_hidden_layers=46, num_attention_heads=96,
        num_key_value_heads=8, head_dim=128, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8,
        n_shared_experts=1, tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_of(glm).weights == pytest.approx(107e9, rel=0.02)


def test_states_are_divided_as_the_stage_says():
    whole = memory_gib(QWEN3_06, Layout(ranks=8, zero_stage=0), 1, 1)
    assert whole["optimizer"] == pytest.approx(12 * QWEN3_06.weights / 2**30)
    assert whole["buckets"] == pytest.approx(2 * 5e8 / 2**30)  # DeepSpeed's own bound, as the model has more weights
    alone = memory_gib(QWEN3_06, Layout(zero_stage=0, bytes=4), 1, 1)
    assert alone["buckets"] == 0
    assert alone["optimizer"] == pytest.approx(8 * QWEN3_06.weights / 2**30)
    for stage, divided in ((1, {"optimizer"}), (2, {"optimizer", "gradients"})):
        found = memory_gib(QWEN3_06, Layout(ranks=8, zero_stage=stage), 1, 1)
        for name in ("weights", "gradients", "optimizer"):
            assert found[name] == pytest.approx(whole[name] / (8 if name in divided else 1))
    assert memory_gib(QWEN3_06, Layout(ranks=8), 1, 1)["weights"] < whole["weights"] / 4
    adapters = memory_gib(QWEN3_06, Layout(zero_stage=0, lora_weights=10**6), 1, 1)
    assert adapters["optimizer"] == pytest.approx(12e6 / 2**30)


def test_activations_grow_with_tokens_and_what_is_kept():
    by_kept = [
        memory_gib(QWEN3_06, Layout(kept=kept), 64_000, 14_000)["activations"]
        for kept in ("nothing", "attention", "all")
    ]
    assert by_kept == sorted(by_kept)
    halved = memory_gib(QWEN3_06, Layout(sequence_parallel=2), 64_000, 14_000)["activations"]
    assert halved == pytest.approx(by_kept[0] / 2)


def test_what_a_trajectory_of_64k_tokens_needs_on_gpus_of_80_gb():
    """Dense 4B on one, 30B-A3B on eight, 106B-A12B on 16 to 64: with which settings, and without which not."""
    dense = Shape(36, 2560, 32, 8, 128, 151_936, 9728, tied=True)
    sparse = Shape(48, 2048, 32, 4, 128, 151_936, 768 * 8, expert_weights=48 * 3 * 2048 * 768 * 120)
    large = Shape(46, 4096, 96, 8, 128, 151_552, 1408 * 9, expert_weights=46 * 3 * 4096 * 1408 * 120)
    tokens, room = 65_536, 72.0  # GiB: the rest of 80 GB is CUDA's, NCCL's and fragments

    def needed(shape, **layout):
        return memory_gib(shape, Layout(**layout), tokens, tokens // 4)["all"]

    assert needed(dense, zero_stage=2) > room > needed(dense, zero_stage=2, offload=True)
    assert needed(dense, zero_stage=0, lora_weights=33_000_000) < room / 2
    assert needed(sparse, ranks=8) > room > needed(sparse, ranks=8, offload=True)
    assert needed(large, ranks=16, sequence_parallel=8) > room
    assert needed(large, ranks=16, sequence_parallel=4, offload=True) < room
    assert needed(large, ranks=32, sequence_parallel=8) < room
    assert needed(large, ranks=64, sequence_parallel=8) < room
