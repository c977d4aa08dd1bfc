"""Parameter-efficient fine-tuning from scratch: prefix tuning, prompt tuning, LoRA and adapters as explicit tensors.

Read in this order: functional (all the arithmetic), method, methods/ (lora, prefix, prompt, adapter, …), attach.
"""

from peft import methods
from peft.attach import attach, attached, detach, disabled, load_state_dict, state_dict, trainable_parameters
from peft.audit import AuditError, gradient_audit
from peft.checkpoint import load, save
from peft.contents import describe
from peft.counting import expected_parameters, parameter_table
from peft.exchange.huggingface import from_huggingface, to_huggingface
from peft.many_tasks.task_bank import TaskBank
from peft.merging.combine import combine, soup
from peft.merging.fold import fold
from peft.merging.merge import merge, merged_copy, unmerge
from peft.method import Method, Wrapper
from peft.methods import *

__all__ = [
    *methods.__all__,
    "AuditError",
    "Method",
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
    "from_huggingface",
    "gradient_audit",
    "load",
    "load_state_dict",
    "merge",
    "merged_copy",
    "parameter_table",
    "save",
    "soup",
    "state_dict",
    "to_huggingface",
    "trainable_parameters",
    "unmerge",
]
