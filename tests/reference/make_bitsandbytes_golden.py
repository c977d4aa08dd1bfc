"""What bitsandbytes makes of a few weights: codes, scales, and the weights they stand for, as a golden file.

    python -m venv /tmp/bitsandbytes && /tmp/bitsandbytes/bin/pip install torch numpy safetensors bitsandbytes
    /tmp/bitsandbytes/bin/python tests/reference/make_bitsandbytes_golden.py

It runs on a processor without an accelerator. The weights are drawn here and kept in the file, so that nobody's
generator matters.
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional as F
from safetensors.torch import save_file

OUT = Path(__file__).with_name("bitsandbytes.safetensors")
CASES = {"nf4": (48, 256, 64), "larger blocks": (16, 256, 128)}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (d_out, d_in, block) in CASES.items():
        weight = torch.randn(d_out, d_in, generator=generator) * 0.02
        weight[0, :block] = 0.0
        codes, state = F.quantize_4bit(weight, blocksize=block, quant_type="nf4")
        tensors |= {f"{name}/weight": weight, f"{name}/codes": codes.flatten(), f"{name}/scales": state.absmax}
        tensors[f"{name}/unpacked"] = F.dequantize_4bit(codes, state)
        codes, state = F.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=True)
        tensors[f"{name}/doubly unpacked"] = F.dequantize_4bit(codes, state)
    tensors["book"] = F.get_4bit_type("nf4", device="cpu")
    save_file(tensors, OUT, metadata={"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__})
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
