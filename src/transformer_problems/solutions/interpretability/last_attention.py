"""Last-layer attention, the explanation that lies nearest at hand: the baseline."""

from torch import Tensor, nn

from transformer_problems.solutions.interpretability.attention_maps import head_means, reading_of, rows_read
from transformer_problems.solutions.interpretability.attribution import Attribution, pose
from transformer_problems.solutions.interpretability.readable import Readable


class LastAttention:
    """Where the last layer looks from the position that the answer is read at, averaged over heads.

    One forward pass. By then each position holds a mixture of tokens, and the weights say nothing of what is done with
    it: they need not agree with what the answer depends on, and are the same for every target.

    Raises:
        ArgumentError: If the input does not fit the model.
        CombinationError: If the model has no attention weights.

    Source:
        Jain and Wallace 2019, arXiv:1902.10186, who test it. Differs from the paper: self-attention of a Transformer
        in place of attention over a recurrent network's states.

    Example:
        >>> import torch
        >>> from transformer_problems import Decoder, LastAttention, SelfAttention
        >>> model = Decoder(100, 32, 2, lambda: SelfAttention(32, 4))
        >>> LastAttention().explain(model, torch.tensor([[7, 42, 3, 9]])).scores.shape
        torch.Size([1, 4])
    """

    def explain(
        self,
        model: nn.Module | Readable,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        target: int | Tensor | None = None,
    ) -> Attribution:
        case = pose(model, tokens, key_mask=key_mask, target=target)
        scores = rows_read(head_means(case)[-1], reading_of(case))
        return case.attribution(
            "last attention",
            "The share of the last layer's attention, averaged over heads, that the answer's position gives to the "
            "token's, from 0 to 1.",
            scores,
        )
