"""One file a method: its equation, its recipe, its wrapper. A line here, and it is one of the package's methods."""

from types import ModuleType as _ModuleType

from peft.methods.adapter import BottleneckAdapter
from peft.methods.bitfit import BitFit
from peft.methods.dora import DoRA
from peft.methods.ia3 import IA3
from peft.methods.ln_tuning import LNTuning
from peft.methods.lora import ALL_LINEARS, LoRA
from peft.methods.lora_plus import lora_plus_groups
from peft.methods.prefix import PrefixTuning
from peft.methods.prompt import PromptTuning
from peft.methods.starts import attach_loftq, attach_pissa
from peft.methods.vera import VeRA

__all__ = [name for name, value in vars().items() if name[0] != "_" and not isinstance(value, _ModuleType)]
