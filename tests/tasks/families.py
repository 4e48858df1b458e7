"""Tiny configurations of any family of the installed library, made of the names of its sizes."""

from typing import Any

from transformers import CONFIG_MAPPING

WIDTH, HEADS, DEPTH, POSITIONS = 16, 2, 2, 64


def _all(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


_SIZES: dict[str, Any] = {
    **_all(WIDTH, "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"),
    **_all(WIDTH, "d_embed", "input_embedding_size", "output_embedding_size", "d_latents", "embed_dim"),
    **_all(WIDTH, "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner", "dff"),
    **_all(
        WIDTH, "feed_forward_size", "n_inner", "hidden_dim", "ffn_hidden_size", "inner_dim", "shared_intermediate_size"
    ),
    **_all(WIDTH, "moe_intermediate_size", "shared_expert_intermediate_size", "intra_bottleneck_size", "q_lora_rank"),
    **_all(WIDTH, "true_hidden_size", "kv_lora_rank", "attention_hidden_size", "kv_channels", "prompt_mid_dim"),
    **_all(WIDTH, "pronunciation_embed_dim", "shape_embed_dim", "projection_dim"),
    **_all(DEPTH, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    **_all(DEPTH, "num_decoder_layers", "num_encoder_layers", "num_self_attends_per_block", "depth"),
    **_all(HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads"),
    **_all(HEADS, "encoder_attention_heads", "decoder_attention_heads", "num_self_attention_heads", "n_mamba_heads"),
    **_all(HEADS, "linear_num_key_heads", "linear_num_value_heads", "num_cross_attention_heads"),
    **_all(WIDTH // HEADS, "head_dim", "d_kv", "attention_head_size", "v_head_dim", "qk_nope_head_dim"),
    **_all(WIDTH // HEADS, "qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"),
    **_all(WIDTH // HEADS, "attention_head_dim", "index_head_dim"),
    **_all(
        4, "num_experts", "num_local_experts", "n_routed_experts", "num_latents", "q_groups", "k_groups", "v_groups"
    ),
    **_all(1, "n_group", "topk_group", "num_nextn_predict_layers", "mamba_d_state"),
    **_all(2, "num_experts_per_tok", "moe_topk", "n_shared_experts", "moe_top_k"),
    **_all(POSITIONS, "max_position_embeddings", "n_positions", "max_seq_len", "max_source_positions"),
    **_all([1] * DEPTH, "block_sizes"),
    **_all([[["global", "local"], DEPTH // 2]], "attention_types"),
    **_all([8] * DEPTH, "attention_window"),
    **_all(["local"] * DEPTH, "attn_layers"),
    **_all([8, 8], "axial_pos_shape"),
    **_all([8, 8], "axial_pos_embds_dim"),
    **_all(
        8, "local_attn_chunk_length", "lsh_attn_chunk_length", "num_landmarks", "segment_means_seq_len", "patch_size"
    ),
    **_all(32, "image_size", "input_size"),
}

_MAMBA = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": WIDTH}
# What the sizes above leave open, or contradict, in some families.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "lilt": {"hidden_size": 24, "intermediate_size": 24},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "mistral4": {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "qk_head_dim": 8, "head_dim": 4},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "zamba": {**_MAMBA, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        **_MAMBA,
        "mamba_headdim": WIDTH,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}


def tiny_config(family: str, vocab_size: int) -> dict[str, Any]:
    """`model_type` and sizes of a model of a family, as `task.teacher.config` takes them."""
    return {"model_type": family, **_tiny(CONFIG_MAPPING[family]().to_dict(), vocab_size), **_OF_FAMILY.get(family, {})}


def _tiny(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    sizes = _SIZES | {"vocab_size": vocab_size, "pad_token_id": 0}
    found = {
        name: sizes[name]
        for name, value in config.items()
        # A list where others have one number is of stages, not of layers, and stays as it is.
        if name in sizes and not (isinstance(value, list | tuple) and not isinstance(sizes[name], list))
    }
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = {"model_type": value["model_type"], **_tiny(value, vocab_size)}
    return found
