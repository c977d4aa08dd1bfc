import pytest
import torch
from reference.golden import read_golden, weighted_sum

from minitransformer.pretrained import from_gpt2

GOLDEN = read_golden("huggingface_gpt2")
TOKENS, REAL = GOLDEN.input["tokens"], GOLDEN.input["padding_mask"]


def bare():
    """The state dict of `GPT2Model`: no prefix, no head."""
    return {name: GOLDEN.weight[f"transformer.{name}"] for name in GOLDEN.names["GPT2Model"]}


def prefixed():
    """The state dict of `GPT2LMHeadModel`."""
    return {name: GOLDEN.weight[name] for name in GOLDEN.names["GPT2LMHeadModel"]}


def with_buffers():
    """As older files have it: the causal mask is stored."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(2)}
    return bare() | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


@pytest.mark.parametrize("state_dict", [bare, prefixed, with_buffers])
def test_logits_agree_with_hugging_face(state_dict):
    model = from_gpt2(state_dict(), GOLDEN.config)
    torch.testing.assert_close(model(TOKENS), GOLDEN.output["logits"], atol=1e-4, rtol=0)


def test_logits_of_a_left_padded_batch_agree():
    logits = from_gpt2(prefixed(), GOLDEN.config)(TOKENS, REAL)
    torch.testing.assert_close(logits[REAL], GOLDEN.output["padded_logits"][REAL], atol=1e-4, rtol=0)


def test_gradients_agree():
    model = from_gpt2(prefixed(), GOLDEN.config)
    weighted_sum(model(TOKENS, REAL), REAL).backward()
    attention = model.blocks[0].attention
    fused = [attention.query, attention.key, attention.value]
    ours = {
        "wte.weight": model.embedding.token.weight.grad,
        "wpe.weight": model.embedding.position.weight.grad,
        "h.0.attn.c_attn.weight": torch.cat([part.weight.grad for part in fused]).T,
        "h.0.attn.c_attn.bias": torch.cat([part.bias.grad for part in fused]),
        "h.1.mlp.c_proj.weight": model.blocks[1].feedforward.down.weight.grad.T,
        "h.1.ln_1.weight": model.blocks[1].norm_attention.weight.grad,
    }
    assert {f"transformer.{name}" for name in ours} == GOLDEN.gradient.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, GOLDEN.gradient[f"transformer.{name}"], atol=1e-4, rtol=1e-4)


def test_the_model_is_a_copy_in_evaluation_mode():
    weights = {name: tensor.clone() for name, tensor in prefixed().items()}
    model = from_gpt2(weights, GOLDEN.config)
    assert not any(module.training for module in model.modules())
    weights["transformer.wte.weight"].zero_()
    assert model.embedding.token.weight.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_into_float32(dtype):
    model = from_gpt2({name: tensor.to(dtype) for name, tensor in bare().items()}, GOLDEN.config)
    assert torch.equal(model.embedding.token.weight, bare()["wte.weight"].to(dtype).float())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "mish"}, "'mish' is not supported; choose a checkpoint with one of gelu,"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, but only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False, but only True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, but only True"),
        ({"add_cross_attention": True}, "add_cross_attention=True, which is not computed"),
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo' .*, but only 'gpt2'"),
        ({"attn_pdrop": 0.3}, "one dropout rate serves the whole model.*attn_pdrop=0.3; set them to one value"),
        (
            {"n_layer": 3},
            r"lacks h\.2\.\S+ h\.2\.\S+ h\.2\.\S+ and 13 more; config and state dict must be of one checkpoint",
        ),
        ({"n_layer": 1}, r"unexpected tensors: h\.1\.attn\.c_attn\.key\.bias.* that is not wanted, and check"),
        ({"n_inner": None}, r"'h\.0\.mlp\.c_fc\.weight' has shape \(40, 24\), but config says \(96, 24\)"),
        ({"n_embd": 48}, r"c_attn\.weight \(transposed\)' has shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_gpt2(prefixed(), GOLDEN.config | change)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("transformer.h.1.ln_2.bias", None, r"lacks h\.1\.ln_2\.bias; "),
        ("transformer.h.0.attn.c_attn.weight", None, r"lacks h\.0\.attn\.c_attn\.key\.weight, "),
        ("score.weight", torch.zeros(2, 24), "unexpected tensors: score.weight; drop them if they belong to a head"),
        ("transformer.ln_f.weight", torch.zeros(23), r"'ln_f\.weight' has shape \(23,\), but config says \(24,\)"),
        ("transformer.h.0.attn.c_attn.bias", torch.zeros(71), r"c_attn\.bias \(transposed\)' has shape \(71,\)"),
        ("lm_head.weight", torch.zeros(40, 24), "'lm_head.weight' differs from 'wte.weight'.*choose a tied"),
        ("wte.weight", torch.zeros(40, 24), "begin with '' .'wte.weight'. and 'transformer.' "),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(name, tensor, message):
    weights = prefixed()
    weights.pop(name, None)
    with pytest.raises(ValueError, match=message):
        from_gpt2(weights if tensor is None else weights | {name: tensor}, GOLDEN.config)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ValueError, match=r"lacks n_embd, n_head; pass the whole config\.json"):
        from_gpt2(prefixed(), {k: v for k, v in GOLDEN.config.items() if k not in ("n_embd", "n_head")})
