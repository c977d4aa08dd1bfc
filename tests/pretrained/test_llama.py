import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.golden import weighted_sum
from reference.llama_shapes import SHAPES, text, weight
from safetensors.torch import load_file, save_file

from minitransformer import Transformer
from minitransformer.cache import KVCache
from minitransformer.pretrained import from_llama, from_pretrained

HERE = Path(__file__).parents[1] / "reference"
CONFIGS = json.loads((HERE / "huggingface_llama.json").read_text())["config"]
GOLDEN = load_file(HERE / "huggingface_llama.safetensors")
TOKENS, REAL = text()
SMALL = "two for four"
every_shape = pytest.mark.parametrize("name", SHAPES)


def state_dict(name, **changes):
    """As Hugging Face's class writes it; a tied head is left out, as its files leave it out."""
    config = CONFIGS[name] | changes
    d, d_ff, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    d_head = config.get("head_dim") or d // heads
    widths = {"q": heads * d_head, "k": config["num_key_value_heads"] * d_head}
    widths["v"] = widths["k"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        linear = {f"self_attn.{part}_proj": (width, d) for part, width in widths.items()}
        linear |= {"self_attn.o_proj": (d, widths["q"]), "mlp.gate_proj": (d_ff, d), "mlp.up_proj": (d_ff, d)}
        linear |= {"mlp.down_proj": (d, d_ff)}
        for part, shape in linear.items():
            shapes[f"model.layers.{i}.{part}.weight"] = shape
            biased = config.get("attention_bias") if "attn" in part else config.get("mlp_bias")
            if biased or (config["model_type"] == "qwen2" and part[-6:-5] in "qkv"):
                shapes[f"model.layers.{i}.{part}.bias"] = shape[:1]
        shapes |= {f"model.layers.{i}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return {tensor: weight(tensor, shape) for tensor, shape in shapes.items()}


def model_of(name) -> Transformer:
    return from_llama(state_dict(name), CONFIGS[name])


@every_shape
def test_logits_agree_with_hugging_face(name):
    logits = model_of(name)(TOKENS)
    torch.testing.assert_close(logits, GOLDEN[f"{name}/logits"], atol=1e-4, rtol=0)


@every_shape
def test_logits_and_gradients_agree_under_left_padding(name):
    model = model_of(name)
    logits = model(TOKENS, REAL)
    torch.testing.assert_close(logits[REAL], GOLDEN[f"{name}/padded"], atol=1e-4, rtol=0)
    weighted_sum(logits, REAL).backward()
    gradient = model.blocks[0].attention.key.weight.grad
    torch.testing.assert_close(gradient, GOLDEN[f"{name}/gradient"], atol=1e-4, rtol=1e-4)


@every_shape
def test_reading_in_pieces_through_a_cache_gives_the_same_logits(name):
    model, cache = model_of(name), KVCache(CONFIGS[name]["num_hidden_layers"])
    pieces = [model(TOKENS[:, cut], REAL[:, cut], cache=cache) for cut in (slice(0, 4), slice(4, 6), slice(6, 7))]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[REAL], GOLDEN[f"{name}/padded"], atol=1e-4, rtol=0)
    n_kv_heads, d_head = CONFIGS[name]["num_key_value_heads"], model.config.d_head
    assert cache.layers[0].key.shape == cache.layers[0].value.shape == (3, n_kv_heads, 7, d_head)


@every_shape
def test_greedy_words_agree_with_hugging_face(name):
    model, expected = model_of(name), GOLDEN[f"{name}/words"]
    assert torch.equal(model.generate(TOKENS, 6)[:, 7:], expected)
    assert torch.equal(model.generate(TOKENS, 6, use_cache=False)[:, 7:], expected)


def test_the_numbers_of_parameters_are_those_of_hugging_face():
    for name in SHAPES:
        ours = sum(p.numel() for p in model_of(name).parameters())
        assert ours == sum(tensor.numel() for tensor in state_dict(name).values())


@pytest.mark.parametrize("name", ["tied", SMALL])
def test_the_head_is_tied_where_the_config_says_so_saved_or_not(name):
    weights, tied = state_dict(name), CONFIGS[name]["tie_word_embeddings"]
    assert model_of(name).config.lm_head == ("tied" if tied else "untied")
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        logits = from_llama(weights, CONFIGS[name])(TOKENS)
        torch.testing.assert_close(logits, GOLDEN[f"{name}/logits"], atol=1e-4, rtol=0)
        weights["lm_head.weight"][0, 0] += 1
        with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'embed_tokens.weight'"):
            from_llama(weights, CONFIGS[name])


def test_without_a_head_there_are_hidden_states_only():
    weights = {n.removeprefix("model."): t for n, t in state_dict(SMALL).items() if n != "lm_head.weight"}
    bare = from_llama(weights, CONFIGS[SMALL])  # as LlamaModel writes it
    left = from_llama(state_dict(SMALL), CONFIGS[SMALL], leave_out=("lm_head.",))
    assert bare.config.lm_head == left.config.lm_head == "none"
    assert torch.equal(bare.hidden(TOKENS), left.hidden(TOKENS))


def older(config):
    """As the library wrote it before its version 5."""
    angles = config["rope_parameters"]["rope_theta"]
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "layer_types")}
    return config | {"rope_theta": angles, "rope_scaling": None}


@pytest.mark.parametrize("name", ["as SmolLM2", "qwen2 tied", "mistral"])
def test_older_configs_and_files_are_read(name):
    weights = state_dict(name) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    logits = from_llama(weights, older(CONFIGS[name]))(TOKENS)
    torch.testing.assert_close(logits, GOLDEN[f"{name}/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["as SmolLM2", "qwen2", "mistral wide"])
@pytest.mark.parametrize("named_by", ["model_type", "architectures"])
def test_a_folder_is_read_by_its_model_type_or_its_class(tmp_path, name, named_by):
    kind = CONFIGS[name]["model_type"]
    named = {"model_type": {"model_type": kind}, "architectures": {"model_type": None}}[named_by]
    named["architectures"] = [f"{kind.capitalize()}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | named))
    save_file(state_dict(name), tmp_path / "model.safetensors")
    torch.testing.assert_close(from_pretrained(tmp_path)(TOKENS), GOLDEN[f"{name}/logits"], atol=1e-4, rtol=0)


def test_a_window_that_hides_nothing_makes_no_difference():
    config = CONFIGS["mistral"] | {"sliding_window": 16}
    logits = from_llama(state_dict("mistral"), config)(TOKENS)
    torch.testing.assert_close(logits, GOLDEN["mistral/logits"], atol=1e-4, rtol=0)


SCALED = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "name, change, message",
    [
        (SMALL, {"rope_parameters": SCALED}, "rope_parameters=.*llama3.*, but only plain rotary angles"),
        (SMALL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*linear.*, but only plain"),
        (SMALL, {"rope_scaling": {"factor": 2.0}}, "rope_scaling=.*factor.*, but only plain"),
        (SMALL, {"rope_parameters": "yarn"}, "rope_parameters='yarn', but only plain"),
        (SMALL, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5, which is not"),
        (SMALL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, which is not computed"),
        (SMALL, {"rope_theta": 7.0}, "rope_theta=7.0 and 10000.0; keep the right"),
        (SMALL, {"rope_interleaved": True}, "rope_interleaved=True, which is not computed"),
        (SMALL, {"hidden_act": "mish"}, r"'mish' is not supported; .* gelu,.* silu, swish"),
        (SMALL, {"attention_dropout": 0.1}, "attention_dropout=0.1, which is not computed"),
        (SMALL, {"num_local_experts": 8}, "num_local_experts=8, which is not computed"),
        (SMALL, {"use_parallel_residual": True}, "use_parallel_residual=True, which is not computed"),
        (SMALL, {"quantization_config": {"bits": 4}}, "quantization_config=.*, but only False"),
        (SMALL, {"num_key_value_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        (SMALL, {"num_key_value_heads": 0}, "num_key_value_heads=0, which is no size"),
        (SMALL, {"num_key_value_heads": 1}, "k_proj.weight' has shape .12, 24., but config says .6, 24."),
        (SMALL, {"attention_bias": True}, "lacks layers.0.self_attn.k_proj.bias"),
        (SMALL, {"tie_word_embeddings": True}, "'lm_head.weight' differs from 'embed_tokens.weight'"),
        (SMALL, {"model_type": "gemma"}, "model_type='gemma' .*, but only 'llama' is supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True, which is not computed"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with 'sliding_attention'"),
        ("mistral", {"sliding_window": 15}, r"sliding_window=15, but only windows as long as .* \(16\)"),
        ("mistral", {"max_position_embeddings": 5000, "sliding_window": 4096}, "sliding_window=4096"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        from_llama(state_dict(name), CONFIGS[name] | change)


@pytest.mark.parametrize(
    "change",
    [
        *({name: 0.5} for name in ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier")),
        *({name: True} for name in ("qk_norm", "use_qk_norm", "alibi", "use_bidirectional_attention")),
        *({name: 4} for name in ("moe_num_experts", "attention_chunk_size", "clip_qkv", "rotary_dim", "scale_emb")),
        {"no_rope_layers": [1, 0]},
        {"final_logit_softcapping": 30},
    ],
    ids=lambda change: next(iter(change)),
)
def test_options_that_change_the_arithmetic_are_never_ignored(change):
    ((option, value),) = change.items()
    with pytest.raises(ValueError, match=rf"config has {option}=.*, which is not computed"):
        from_llama(state_dict(SMALL), CONFIGS[SMALL] | change)
    for off in (None, False, 0, 1, 1.0) if isinstance(value, float) else (None, False, 0, []):
        from_llama(state_dict(SMALL), CONFIGS[SMALL] | {option: off})


def test_a_window_that_is_not_stated_is_mistrals_own():
    config = {n: value for n, value in CONFIGS["mistral"].items() if n != "sliding_window"}
    with pytest.raises(ValueError, match="sliding_window=4096"):
        from_llama(state_dict("mistral"), config | {"max_position_embeddings": 8192})


def test_the_model_can_be_made_of_the_tensors_themselves():
    half = {name: tensor.bfloat16() for name, tensor in state_dict(SMALL).items()}
    places = {tensor.data_ptr() for tensor in half.values()}
    same = from_llama(half, CONFIGS[SMALL], assign=True)
    assert {p.data_ptr() for p in same.parameters()} == places
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in same.parameters())
    copy = from_llama(half, CONFIGS[SMALL])
    assert not {p.data_ptr() for p in copy.parameters()} & places
    assert {p.dtype for p in copy.parameters()} == {torch.float32} and not same.training
    torch.testing.assert_close(same.float()(TOKENS), copy(TOKENS))


def test_reading_a_checkpoint_draws_nothing(tmp_path):
    """First weights would be overwritten; drawing them without memory would import PyTorch's compiler."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[SMALL]))
    save_file(state_dict(SMALL), tmp_path / "model.safetensors")
    code = (
        "import sys, torch; from minitransformer.pretrained import from_pretrained; before = torch.get_rng_state();"
        f"from_pretrained({str(tmp_path)!r}); assert torch.equal(torch.get_rng_state(), before);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
