"""What Hugging Face's peft starts LoRA from: PiSSA's factors and residual, LoftQ's factors and rounded weight.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers peft bitsandbytes
    elsewhere/bin/python tests/reference/make_huggingface_starts_golden.py

It needs an environment of its own, since their library and this repository share the import name `peft`. The file it
writes is committed, and `tests/methods/test_starts.py` reads it. Their LoftQ asks for an accelerator; bitsandbytes
rounds on a CPU as well, so here it runs there. It knows no scale: alpha = r.
"""

import inspect
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path = [path for path in sys.path if Path(path or ".").resolve() not in (FOLDER, FOLDER.parents[1])]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import peft  # noqa: E402
from peft.utils import loftq_utils  # noqa: E402

RANK, ALPHA = 3, 5

weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
weight += 2 * torch.outer(weight[:, 0], weight[0])  # one singular value far above the others, as real weights have
golden = {"weight": weight}

linear = torch.nn.Linear(64, 24, bias=False)
linear.weight.data = weight.clone()
config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="pissa", target_modules=["0"])
layer = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
golden |= {"pissa/A": layer.lora_A.default.weight, "pissa/B": layer.lora_B.default.weight}
golden["pissa/residual"] = layer.base_layer.weight

exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), vars(loftq_utils))
for steps in (1, 4):
    Q, A, B = loftq_utils.loftq_init(weight.clone(), num_bits=4, reduced_rank=RANK, num_iter=steps)
    golden |= {f"loftq {steps}/Q": Q, f"loftq {steps}/A": A, f"loftq {steps}/B": B}

golden = {name: tensor.detach().clone().contiguous() for name, tensor in golden.items()}
versions = {"torch": torch.__version__, "peft": peft.__version__}
save_file(golden, FOLDER / "huggingface_starts.safetensors", metadata=versions)
print(f"{sum(t.numel() * t.element_size() for t in golden.values()):,} bytes, {versions}")
