"""The contestants: what each arm takes for the evidence, as one score for each token."""

import itertools
from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from transformer_problems.core.seeding import derive_seed, generator
from transformer_problems.models.encoder import Encoder
from transformer_problems.problems.p15_poor_interpretability.planted import BLANK_TOKEN, Planted
from transformer_problems.solutions.interpretability.activation_patching import activation_patching
from transformer_problems.solutions.interpretability.activations import collect_activations
from transformer_problems.solutions.interpretability.attribution import Attribution, Explainer
from transformer_problems.solutions.interpretability.flow import AttentionFlow
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.integrated_gradients import IntegratedGradients
from transformer_problems.solutions.interpretability.last_attention import LastAttention
from transformer_problems.solutions.interpretability.probing import ProbeScores, probe
from transformer_problems.solutions.interpretability.random_scores import RandomScores
from transformer_problems.solutions.interpretability.readable import readable
from transformer_problems.solutions.interpretability.rollout import AttentionRollout
from transformer_problems.solutions.interpretability.smooth_grad import SmoothGrad

STEPS = 16  # of integrated gradients, and noisy copies of SmoothGrad
READ_AT = 0  # the position of the answer

Explanation = Callable[[Planted], Attribution]


def explanation_of(arm: str, model: Encoder, known: Planted, seed: int) -> Explanation:
    """How an arm explains the right class of a batch.

    Args:
        known: Examples whose evidence may be learned from.
        seed: Of whatever is drawn.
    """
    if arm == "probing":
        return EvidenceProbe(model, known)
    if arm == "mechanistic":
        return lambda planted: patched_tokens(model, planted)
    reader = readable(model, read_at=READ_AT)
    draws = itertools.count(derive_seed(seed, "random scores"))
    makers: dict[str, Callable[[], Explainer]] = {
        "last_attention": LastAttention,
        "rollout": AttentionRollout,
        "flow": AttentionFlow,
        "gradient_x_input": GradientXInput,
        "integrated": lambda: IntegratedGradients(steps=STEPS, baseline_token=BLANK_TOKEN),
        "smooth_grad": lambda: SmoothGrad(samples=STEPS, seed=seed),
        "random": lambda: RandomScores(seed=next(draws)),
    }
    return lambda planted: makers[arm]().explain(reader, planted.tokens, target=planted.answers)


class EvidenceProbe:
    """A linear probe of each token's last hidden state: does the token tell the answer?

    Trained where the evidence is known, which no other arm is told. Its scores are log-odds.
    """

    def __init__(self, model: Encoder, known: Planted) -> None:
        self.model = model
        chosen = probed_labels(known) >= 0
        hidden = last_hidden(model, known.tokens)[chosen].double().numpy()
        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        self.classifier.fit(hidden, known.evidence.cpu()[chosen].numpy())

    def __call__(self, planted: Planted) -> Attribution:
        hidden = last_hidden(self.model, planted.tokens)
        odds = torch.as_tensor(self.classifier.decision_function(hidden.flatten(0, 1).double().numpy()))
        scores = odds.to(planted.tokens.device).view(planted.tokens.shape)
        return Attribution(scores, "The log-odds that the token tells the answer.", planted.answers, "probe")


def probe_scores(model: Encoder, known: Planted) -> ProbeScores:
    """How well such a probe tells evidence from other tokens of held-out sequences, beside control tasks."""
    hidden = {"last": last_hidden(model, known.tokens)}
    return probe(hidden, probed_labels(known), known.tokens)["last"]


def last_hidden(model: Encoder, tokens: Tensor) -> Tensor:
    """What the last layer gives, [B, N, C], on the CPU."""
    path = f"body.blocks.{len(model.body.blocks) - 1}"
    return collect_activations(model, tokens, [path])[path]


def probed_labels(planted: Planted) -> Tensor:
    """1 for evidence, 0 for as many other tokens drawn from each sequence, -100 for the rest, [B, N] on the CPU."""
    evidence, candidates = planted.evidence.cpu(), planted.candidates.cpu()
    others = torch.rand(evidence.shape, generator=generator(0, "probed")).masked_fill(evidence | ~candidates, -1.0)
    chosen = others.topk(int(evidence[0].sum()), dim=1).indices
    return torch.full(evidence.shape, -100).scatter(1, chosen, 0).masked_fill(evidence, 1)


def patched_tokens(model: Encoder, planted: Planted) -> Attribution:
    """What each token alone, put at its place in another text, adds to the logit of the answer, by patching."""
    rows = [_patched(model, planted.rows(row, row + 1)) for row in range(len(planted))]
    meaning = "What the token, alone in another text, adds to the answer's logit."
    return Attribution(torch.stack(rows).to(planted.tokens.device), meaning, planted.answers, "patching")


def _patched(model: Encoder, one: Planted) -> Tensor:
    def metric(logits: Tensor) -> Tensor:
        return answer_logits(logits, one.answers).mean()

    # All tokens of the other text differ, so that which of them are given back does not tell where evidence is.
    found = activation_patching(model, one.tokens, one.other_text, metric, ["body.embedding"])
    return found.restored[0] * (found.clean - found.corrupted)


def answer_logits(logits: Tensor, answers: Tensor) -> Tensor:
    """The logit of each answer where it is read, [B, N, classes] -> [B]."""
    return logits[torch.arange(len(answers), device=answers.device), READ_AT, answers]
