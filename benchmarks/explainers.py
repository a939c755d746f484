"""How faithful explanations of a real checkpoint's answers are, beside random ones.

    python benchmarks/explainers.py --model DIRECTORY --text FILE --threads 2

DIRECTORY is a transformers model with a head for sequence classification, masked or causal language modelling, with its
tokenizer. Each line of FILE is an example. A masked model is asked for the token in the middle of it, a causal one for
the next, a classifier for the class; the answer explained is the model's own. Comprehensiveness is what its probability
loses without the highest scored tokens, high where they were needed; sufficiency what it loses with them alone, low
where they were enough. Tokens are deleted by the mask token, or as keys where there is none. The last column but one is
the paired difference of comprehensiveness to random scores, with its standard error over examples.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformer_problems.core.dependencies import require
from transformer_problems.solutions.interpretability.attribution import Explainer
from transformer_problems.solutions.interpretability.faithfulness import Faithfulness, faithfulness
from transformer_problems.solutions.interpretability.flow import AttentionFlow
from transformer_problems.solutions.interpretability.gradient_x_input import GradientXInput
from transformer_problems.solutions.interpretability.integrated_gradients import IntegratedGradients
from transformer_problems.solutions.interpretability.last_attention import LastAttention
from transformer_problems.solutions.interpretability.random_scores import RandomScores
from transformer_problems.solutions.interpretability.readable import Readable, readable
from transformer_problems.solutions.interpretability.rollout import AttentionRollout
from transformer_problems.solutions.interpretability.smooth_grad import SmoothGrad

CONTROLS = 3  # random rankings of each example
HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForCausalLM")


@dataclass(frozen=True, slots=True)
class Question:
    """One example as it is asked. tokens, keep: [1, N]; keep is True for what is never deleted."""

    model: Readable
    tokens: Tensor
    keep: Tensor


def main() -> None:
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, words=options.words)
    lines = [line for line in options.text.read_text().splitlines() if line.strip()][: options.examples]
    questions = [ask(model, tokenizer, line, options.tokens) for line in lines]
    print(
        f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{len(questions)} examples of up to {options.tokens} tokens, probability of the answer "
        f"{statistics.mean(probability(question) for question in questions):.3f}"
    )
    print(f"{'':<22}{'comprehensiveness':>18}{'sufficiency':>13}{'against random':>20}{'ms':>9}")
    for name, explainer in explainers(tokenizer.mask_token_id, options.steps).items():
        report(name, explainer, questions, tokenizer.mask_token_id)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--words", action="store_true", help="lines are words of vocab.txt with spaces between")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=16, help="of integrated gradients, and copies of SmoothGrad")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def load(folder: Path, *, words: bool) -> tuple[nn.Module, Any]:
    """The model with the head that its config names, and its tokenizer."""
    transformers = require("transformers", extra="peers")
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures or ("none",)
    if not name.endswith(HEADS):
        raise SystemExit(f"--model must name a head, one of {', '.join(HEADS)}; got {name}. Choose another checkpoint.")
    model = getattr(transformers, name).from_pretrained(folder).float().eval()
    tokenizer = words_of(folder) if words else transformers.AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def words_of(folder: Path) -> Any:
    """A tokenizer that looks up words between spaces, for checkpoints that leave cutting to code of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split("\n")) if word}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [(mark, vocab[mark]) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]"
    )


def ask(model: nn.Module, tokenizer: Any, line: str, num_tokens: int) -> Question:
    ids = tokenizer(line, truncation=True, max_length=num_tokens)["input_ids"]
    tokens, keep = torch.tensor([ids]), torch.tensor([[token in tokenizer.all_special_ids for token in ids]])
    if type(model).__name__.endswith("ForMaskedLM"):
        middle = len(ids) // 2
        tokens[0, middle] = tokenizer.mask_token_id
        keep[0, middle] = True
        return Question(readable(model, read_at=middle), tokens, keep)
    if type(model).__name__.endswith("ForCausalLM"):
        keep[0, -1] = True  # where the next token is told
    return Question(readable(model), tokens, keep)


def explainers(mask_token: int | None, steps: int) -> dict[str, Explainer]:
    return {
        "last attention": LastAttention(),
        "rollout": AttentionRollout(),
        "flow": AttentionFlow(),
        "gradient x input": GradientXInput(),
        "integrated gradients": IntegratedGradients(steps=steps, baseline_token=mask_token),
        "smooth grad x input": SmoothGrad(samples=steps),
        "random": RandomScores(),
    }


@torch.no_grad()
def probability(question: Question) -> float:
    return float(question.model.logits(question.tokens).softmax(dim=1).amax())


def report(name: str, explainer: Explainer, questions: list[Question], mask_token: int | None) -> None:
    trusts: list[Faithfulness] = []
    seconds = 0.0
    for number, question in enumerate(questions):  # draws of its own for each, or chance would repeat itself
        if isinstance(explainer, RandomScores):
            explainer = RandomScores(seed=number)
        start = time.perf_counter()
        found = explainer.explain(question.model, question.tokens)
        seconds += time.perf_counter() - start
        asked = question.model, question.tokens, found
        drawn = {"num_controls": CONTROLS, "seed": number}
        trusts.append(faithfulness(*asked, keep=question.keep, mask_token=mask_token, **drawn))
    gains = [float(trust.comprehensiveness - trust.random_comprehensiveness) for trust in trusts]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    print(
        f"{name:<22}{statistics.mean(float(trust.comprehensiveness) for trust in trusts):18.3f}"
        f"{statistics.mean(float(trust.sufficiency) for trust in trusts):13.3f}"
        f"{statistics.mean(gains):+12.3f} ±{error:6.3f}{1e3 * seconds / len(questions):9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
