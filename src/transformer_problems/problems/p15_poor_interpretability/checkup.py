"""Does a look at its attention tell what its answer rests on?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transformer_problems.checkpoints.checkup import Visit
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, Remedy
from transformer_problems.core.records import Interval
from transformer_problems.lab.statistics import paired_ratio
from transformer_problems.problems.p15_poor_interpretability.mean_state import MeanState
from transformer_problems.solutions.interpretability.attribution import Explainer
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.last_attention import LastAttention
from transformer_problems.solutions.interpretability.readable import Readable, readable
from transformer_problems.solutions.interpretability.rollout import AttentionRollout

_NUM_TEXTS, _LENGTH = 12, 24
_SHARES = (0.1, 0.2, 0.4)  # of the tokens, deleted
_NUM_RANDOM = 3
_EXPLAINERS: Mapping[str, Explainer] = {
    "attention": LastAttention(),
    "rollout": AttentionRollout(),
    "gradient_x_input": GradientXInput(),
}
_ALIKE = 1e-5  # scores nearer than this share of the largest say the same of two tokens: float32 rounds 100x finer
_STILL = 1e-6  # an answer that moves less has not moved, in float32


class AttentionCheckup:
    """Deletes the tokens that an explanation names, and as many at random, and compares how far the answer moves.

    This is the comprehensiveness of DeYoung et al. 2020 (arXiv:1911.03429), but of the whole answer: of a causal
    model's next token, or a masked one's token in the middle, the share of probability that goes elsewhere; of an
    encoder without a head (1 - cosine) / 2 of the mean state. Tokens are deleted through the attention mask. Special
    ones, and the one that is read, stay; of those that an explanation scores alike, some are deleted at random.
    """

    problem = 15
    not_for: Mapping[Kind, str] = {"image": "what an answer owes to each part of an input is looked for in text alone"}
    needs_floats = "its linear layers hold int8 codes, through which no gradients flow"

    def examine(self, visit: Visit) -> Examination:
        trial = _pose(visit)
        draws = visit.generator("deletions")
        random = torch.stack([trial.moved(trial.drawn(draws)) for _ in range(_NUM_RANDOM)])
        own = {}
        for name, explainer in _EXPLAINERS.items():
            scores = explainer.explain(trial.answer, trial.tokens).scores.abs().cpu()
            own[name] = trial.moved(scores + _ALIKE * scores.max(dim=1, keepdim=True).values * trial.drawn(draws))
        ratios = {name: _ratio(random, moved) for name, moved in own.items()}
        read = ratios["attention"]
        return Examination(
            {"attention_faithfulness": read},
            f"deleting what attention names moves the answer {read.value:.1f}x as far as deleting random tokens",
            _remedies(ratios, visit.subject),
            Curve(
                "How far the answer moves without the tokens that attention names",
                "tokens deleted (%)",
                "answer moved (%)",
                _line(own["attention"]),
                {"random tokens": _line(random.mean(dim=0)), "gradient x input": _line(own["gradient_x_input"])},
            ),
            {f"{name}_to_random_ratio": ratio.value for name, ratio in ratios.items()},
        )


@dataclass(frozen=True, slots=True)
class _Trial:
    """Texts that a model answers, and what of them may be deleted.

    Args:
        tokens: [B, N]
        kept: True for tokens that stay, [B, N].
        whole: The answers to the whole texts.
    """

    answer: Readable
    tokens: Tensor
    kept: Tensor
    whole: Tensor

    def drawn(self, draws: torch.Generator) -> Tensor:
        """A random score for each token, [B, N]."""
        return torch.rand(self.tokens.shape, generator=draws)

    def moved(self, scores: Tensor) -> Tensor:
        """How far the answers move without the tokens scored highest, by share deleted, [shares, B]."""
        num_free = (~self.kept).sum(dim=1, keepdim=True)
        free = scores.to(self.kept.device).masked_fill(self.kept, -torch.inf)
        rank = free.argsort(dim=1, descending=True).argsort(dim=1)
        left = [_answers(self.answer, self.tokens, rank >= (share * num_free).ceil()) for share in _SHARES]
        compare = _angle if isinstance(self.answer, MeanState) else _elsewhere
        return torch.stack([compare(self.whole, now) for now in left]).double().cpu()


@torch.no_grad()
def _answers(answer: Readable, tokens: Tensor, key_mask: Tensor) -> Tensor:
    """Mean states [B, C], or probabilities [B, V]."""
    if isinstance(answer, MeanState):
        return answer.state(tokens, key_mask=key_mask)
    return answer.logits(tokens, key_mask=key_mask).float().softmax(dim=1)


def _angle(whole: Tensor, now: Tensor) -> Tensor:
    return (1 - nn.functional.cosine_similarity(whole, now)) / 2


def _elsewhere(whole: Tensor, now: Tensor) -> Tensor:
    """The share of probability that two answers do not have in common."""
    return (whole - now).abs().sum(dim=1) / 2


def _pose(visit: Visit) -> _Trial:
    """What is asked of the model: the next token, a masked one, or a state."""
    subject = visit.subject
    tokens = visit.texts(_NUM_TEXTS, min(_LENGTH, subject.trained_len or _LENGTH))["input_ids"]
    reader = subject.tokenizer
    marks = [reader.bos_token_id, reader.eos_token_id, reader.cls_token_id, reader.sep_token_id]
    kept = torch.isin(tokens, torch.tensor([mark for mark in marks if mark is not None], device=tokens.device))
    if subject.has_loss:
        read_at = tokens.shape[1] - 1 if subject.kind == "causal" else tokens.shape[1] // 2
        kept[:, read_at] = True
        if subject.kind == "encoder":
            tokens[:, read_at] = subject.mask_id
        answer = readable(subject.model, read_at=read_at)
    else:
        answer = MeanState(subject, tokens)
    return _Trial(answer, tokens, kept, _answers(answer, tokens, torch.ones_like(kept)))


def _ratio(random: Tensor, own: Tensor) -> Interval:
    """How many times as far the answers move [shares, B] as by random deletions [draws, shares, B].

    The mean over draws is one of logs, as that over texts is, so that another random draw comes to 1.
    """
    before = random.mean(dim=1).clamp_min(_STILL).log().mean(dim=0).exp()
    return paired_ratio(before[None].numpy(), own.mean(dim=0).clamp_min(_STILL)[None].numpy())


def _line(moved: Tensor) -> tuple[tuple[float, float], ...]:
    return tuple((100 * share, 100 * float(mean)) for share, mean in zip(_SHARES, moved.mean(dim=1), strict=True))


def _remedies(ratios: Mapping[str, Interval], subject: Subject) -> tuple[Remedy, ...]:
    """Factors are what the other explanations reached on this model, over what its attention did."""
    attention, rollout, gradient = (ratios[name].value for name in _EXPLAINERS)
    num_heads = subject.num_layers * subject.num_heads
    return (
        Remedy("saliency-methods", f"gradient x input names what moves it {gradient:.1f}x", gradient / attention),
        Remedy("attention-rollout", f"rollout names what moves it {rollout:.1f}x", rollout / attention),
        Remedy("mechanistic-interpretability", f"which of {num_heads} heads an answer needs, by {num_heads} passes"),
        Remedy("probing-models", f"what each of {subject.num_layers} layers knows, given labels"),
    )


CHECKUP = AttentionCheckup()
