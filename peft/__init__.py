"""Parameter-efficient fine-tuning from scratch: prefix tuning, prompt tuning, LoRA and adapters as explicit tensors.

Read in this order: functional (all the arithmetic), method, then lora, prefix, prompt, adapter, and attach.
"""

from peft.adapter import BottleneckAdapter
from peft.attach import (
    attach,
    attached,
    detach,
    disabled,
    fold,
    load_state_dict,
    state_dict,
    trainable_parameters,
)
from peft.audit import AuditError, gradient_audit
from peft.checkpoint import load, save
from peft.counting import expected_parameters, parameter_table
from peft.lora import ALL_LINEARS, LoRA
from peft.merge import merge, unmerge
from peft.method import Method, Wrapper
from peft.prefix import PrefixTuning
from peft.prompt import PromptTuning

__all__ = [
    "ALL_LINEARS",
    "AuditError",
    "BottleneckAdapter",
    "LoRA",
    "Method",
    "PrefixTuning",
    "PromptTuning",
    "Wrapper",
    "attach",
    "attached",
    "detach",
    "disabled",
    "expected_parameters",
    "fold",
    "gradient_audit",
    "load",
    "load_state_dict",
    "merge",
    "parameter_table",
    "save",
    "state_dict",
    "trainable_parameters",
    "unmerge",
]
