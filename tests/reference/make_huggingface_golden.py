"""Write the golden files for `from_gpt2` and `from_bert`: tiny random models, run by Hugging Face's own code.

Run it in an environment with transformers installed (it needs neither of our packages):

    python tests/reference/make_huggingface_golden.py

Each model gives two files beside this one. `<model>.safetensors` holds the tensors, their names prefixed by
"weight/", "input/", "output/" or "gradient/"; `<model>.json` holds the config, as config.json would, and the names
in the state dicts that the library's classes write. The gradients are those of a fixed weighted sum of the outputs
at real tokens. The seeds are fixed: a second run writes the same numbers, up to the versions of the libraries.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
N_ROWS, N_TOKENS, N_WORDS = 3, 7, 40


def randomize(model: torch.nn.Module) -> None:
    """Fresh models have zero biases and unit norms, which would hide a swapped name."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p == 1.0))


def weighted_sum(output: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A scalar that every output takes part in: weights 1, 2, … 5, 1, 2, … along the flattened real rows."""
    rows = output[real].flatten()
    return (rows * (torch.arange(len(rows)) % 5 + 1)).sum() / len(rows)


def write(name: str, model: torch.nn.Module, tensors: dict, state_dicts: dict) -> None:
    tensors = {f"weight/{key}": tensor for key, tensor in model.state_dict().items()} | tensors
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors")
    record = {"transformers": transformers.__version__, "config": model.config.to_dict()}
    record["names"] = state_dicts
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def gradients(model: torch.nn.Module, loss: torch.Tensor, names: list[str]) -> dict:
    model.zero_grad()
    loss.backward()
    return {f"gradient/{name}": model.get_parameter(name).grad for name in names}


def gpt2() -> None:
    """Logits of a batch without padding, and of the same tokens with rows padded on the left."""
    config = transformers.GPT2Config(
        vocab_size=N_WORDS,
        n_positions=12,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=40,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    randomize(model)
    tokens = torch.randint(1, N_WORDS, (N_ROWS, N_TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.arange(N_TOKENS) >= torch.tensor([0, 2, 5])[:, None]
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    full = model(tokens)
    padded = model(tokens, attention_mask=real.long(), position_ids=positions)
    names = ["wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"]
    names += ["h.1.mlp.c_proj.weight", "h.1.ln_1.weight"]
    tensors = {"input/tokens": tokens, "input/padding_mask": real}
    tensors |= {"output/logits": full.logits, "output/padded_logits": padded.logits}
    tensors |= gradients(model, weighted_sum(padded.logits, real), [f"transformer.{name}" for name in names])
    state_dicts = {
        "GPT2Model": list(model.transformer.state_dict()),
        "GPT2LMHeadModel": list(model.state_dict()),
    }
    write("huggingface_gpt2", model, tensors, state_dicts)


def bert() -> None:
    """Hidden states and word scores with right padding and two segments."""
    config = transformers.BertConfig(
        vocab_size=N_WORDS,
        max_position_embeddings=12,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
    )
    model = transformers.BertForPreTraining(config).eval()
    randomize(model)
    tokens = torch.randint(1, N_WORDS, (N_ROWS, N_TOKENS), generator=torch.Generator().manual_seed(1))
    real = torch.arange(N_TOKENS) < torch.tensor([7, 4, 2])[:, None]
    segments = (torch.arange(N_TOKENS) >= torch.tensor([4, 2, 1])[:, None]).long()
    out = model(tokens, attention_mask=real.long(), token_type_ids=segments, output_hidden_states=True)
    names = [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight",
        "bert.encoder.layer.0.attention.self.key.weight",
        "bert.encoder.layer.0.attention.output.LayerNorm.bias",
        "bert.encoder.layer.1.intermediate.dense.weight",
        "cls.predictions.transform.dense.weight",
        "cls.predictions.bias",
    ]
    tensors = {"input/tokens": tokens, "input/padding_mask": real, "input/segments": segments}
    tensors |= {"output/hidden": out.hidden_states[-1], "output/logits": out.prediction_logits}
    tensors |= gradients(model, weighted_sum(out.prediction_logits, real), names)
    state_dicts = {
        "BertModel": list(model.bert.state_dict()),
        "BertForMaskedLM": list(transformers.BertForMaskedLM(config).state_dict()),
        "BertForPreTraining": list(model.state_dict()),
    }
    write("huggingface_bert", model, tensors, state_dicts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gpt2()
    bert()
