"""The contracts of the slots as runnable checks, for this package's modules and for yours."""

from transformer_problems.testing.contract import Check, ContractReport
from transformer_problems.testing.mixer import check_mixer
from transformer_problems.testing.operation import check_attention_op
from transformer_problems.testing.position import check_position

__all__ = ["Check", "ContractReport", "check_attention_op", "check_mixer", "check_position"]
