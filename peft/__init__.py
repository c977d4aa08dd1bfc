"""Parameter-efficient fine-tuning from scratch: prefix tuning, prompt tuning, LoRA and adapters as explicit tensors.

Read in this order: functional (all the arithmetic), method, lora, prefix, prompt, adapter, bitfit, ia3, attach.
"""

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
from peft.checkpoint import describe, load, save
from peft.counting import expected_parameters, parameter_table
from peft.many_tasks.task_bank import TaskBank
from peft.merging.combine import combine
from peft.merging.merge import merge, merged_copy, unmerge
from peft.merging.soup import soup
from peft.method import Method, Wrapper
from peft.methods.adapter import BottleneckAdapter
from peft.methods.bitfit import BitFit
from peft.methods.dora import DoRA
from peft.methods.ia3 import IA3
from peft.methods.lora import ALL_LINEARS, LoRA
from peft.methods.lora_plus import lora_plus_groups
from peft.methods.prefix import PrefixTuning
from peft.methods.prompt import PromptTuning

__all__ = [
    "ALL_LINEARS",
    "IA3",
    "AuditError",
    "BitFit",
    "BottleneckAdapter",
    "DoRA",
    "LoRA",
    "Method",
    "PrefixTuning",
    "PromptTuning",
    "TaskBank",
    "Wrapper",
    "attach",
    "attached",
    "combine",
    "describe",
    "detach",
    "disabled",
    "expected_parameters",
    "fold",
    "gradient_audit",
    "load",
    "load_state_dict",
    "lora_plus_groups",
    "merge",
    "merged_copy",
    "parameter_table",
    "save",
    "soup",
    "state_dict",
    "trainable_parameters",
    "unmerge",
]
