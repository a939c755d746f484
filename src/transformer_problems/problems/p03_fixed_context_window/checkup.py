"""How far back does the model see, and how much of the user's texts stands beyond that?"""

from collections.abc import Mapping
from math import log2

import torch
from torch import Tensor

from transformer_problems.checkpoints.checkup import Visit, estimate
from transformer_problems.checkpoints.decoding import cache_bytes
from transformer_problems.checkpoints.sizes import told_bytes
from transformer_problems.checkpoints.subject import Kind, Subject
from transformer_problems.core.findings import Curve, Examination, NotApplicable, Remedy
from transformer_problems.core.records import Interval
from transformer_problems.problems.p03_fixed_context_window.lengths import Lengths, measure_lengths

_NUM_TEXTS, _MOST_TOKENS, _NUM_BLOCKS = 3, 256, 8
_FELT = 0.01  # of what the nearest tokens change: less is taken for not seen
_PASSAGE = 128  # tokens of one fetched passage
_CACHED = 8  # tokens, to see what a cache takes for each


class ReachCheckup:
    """Replaces a block of tokens by those of another text, at rising distance, and looks at one token's last state.

    A causal model is read at the last token and an encoder at the first. The reach is the distance of the farthest
    block that changes the state by more than 1% of what the nearest block does.
    """

    problem = 3
    not_for: Mapping[Kind, str] = {"image": "an image is read whole, so that nothing stands outside of its window"}

    @torch.no_grad()
    def examine(self, visit: Visit) -> Examination | NotApplicable:
        window = visit.subject.trained_len
        if window is None:
            return NotApplicable("neither its config nor its tokenizer says how many tokens it reads")
        length = min(window, _MOST_TOKENS)
        block = (length - 1) // _NUM_BLOCKS
        if block == 0:
            return NotApplicable(f"its {window:,} tokens are too few to change some of them at {_NUM_BLOCKS} distances")
        tried = _NUM_BLOCKS * block  # the token that is read, and a rest, stay as they are
        effects = _effects(visit, length, block)
        if not bool((effects[:, 0] > 0).all()):
            return NotApplicable(
                "the texts repeat themselves, so that one part in place of another changes nothing. Give more of them"
            )
        shares = effects / effects[:, :1]  # [texts, blocks], the nearest first
        farthest = (shares > _FELT).long() * torch.arange(1, _NUM_BLOCKS + 1)
        reach = estimate(farthest.amax(dim=1).double() / _NUM_BLOCKS)
        lengths = measure_lengths(visit.subject, visit.material.texts, window) if visit.material.own else None
        is_causal = visit.subject.kind == "causal"
        gain = _gain_of_doubling(visit, length) if is_causal else None
        stored = _stored_tokens(visit) if is_causal else 0
        return Examination(
            {"reach_share": reach} | ({"unread_share": lengths.unread} if lengths else {}),
            _meaning(visit.subject, reach, tried, lengths),
            _remedies(visit.subject, window, reach.value, lengths, gain, stored),
            _curve(shares.mean(dim=0).tolist(), block),
            {"window_tokens": window, "tested_tokens": tried}
            | ({"longest_text_tokens": lengths.longest} if lengths else {})
            | ({"gain_of_doubling_nats": gain} if gain is not None else {}),
        )


def _effects(visit: Visit, length: int, block: int) -> Tensor:
    """Relative change of the state that is read, by distance, [texts, blocks]."""
    body, inputs = visit.subject.body, visit.texts(_NUM_TEXTS, length)
    ids, is_causal = inputs["input_ids"], visit.subject.kind == "causal"
    frame = _frame(visit.subject, ids).cpu()
    where = length - 1 if is_causal else int(frame[0])  # an encoder at its first token that stands for text
    found = []
    for row, other in zip(ids, ids.roll(1, dims=0), strict=True):
        variants = row.repeat(_NUM_BLOCKS + 1, 1)
        for number in range(_NUM_BLOCKS):
            start = where - (number + 1) * block if is_causal else where + 1 + number * block
            place = torch.arange(start, start + block)
            place = place[~frame[place]]
            variants[number + 1, place] = other[place]
        states = (
            body.run({"input_ids": variants, "attention_mask": torch.ones_like(variants)}).output[:, where].double()
        )
        found.append((states[1:] - states[0]).norm(dim=1) / states[0].norm())
        visit.progress(len(found) / _NUM_TEXTS)
    return torch.stack(found).cpu()


def _frame(subject: Subject, ids: Tensor) -> Tensor:
    """Where every text has the same special token, such as [CLS], [N]; it stays when text is replaced."""
    known = set(subject.tokenizer.all_special_ids) - {getattr(subject.tokenizer, "unk_token_id", None)}
    special = torch.isin(ids[0], torch.tensor(sorted(known), device=ids.device))
    return special & (ids == ids[0]).all(dim=0)


def _gain_of_doubling(visit: Visit, length: int) -> float:
    """Nats by which the last tokens are better foretold for each doubling of the history, from a quarter on."""
    inputs, kept = visit.texts(2 * _NUM_TEXTS, length), length // 8

    def loss(size: int) -> float:
        rows = ({name: values[n, -size:][None] for name, values in inputs.items()} for n in range(2 * _NUM_TEXTS))
        return float(torch.stack([visit.subject.losses(row)[:, -kept:].mean() for row in rows]).mean())

    return (loss(length // 4) - loss(length)) / 2


def _stored_tokens(visit: Visit) -> int:
    """Whose keys and values of one layer take as many bytes as the weights; none without a cache."""
    subject, num = visit.subject, min(_CACHED, (visit.subject.narrowest or _CACHED + 1) - 1)
    each = cache_bytes(subject, visit.texts(1, num)["input_ids"])
    return int(subject.weight_bytes * subject.num_layers / each) if each else 0


def _meaning(subject: Subject, reach: Interval, tried: int, lengths: Lengths | None) -> str:
    seen = f"a change {reach.value * tried:.0f} tokens away is felt (of {tried} tried)"
    window = f"its {subject.trained_len:,} tokens"
    if lengths:
        return f"{lengths.unread.value:.0%} of the texts stands beyond {window}; {seen}"
    if subject.hard_limit:
        return f"{seen}; text beyond {subject.hard_limit:,} tokens is refused"
    return f"{seen}; it was trained on {subject.trained_len:,}"


def _curve(shares: list[float], block: int) -> Curve:
    distances = [(number + 0.5) * block for number in range(len(shares))]
    return Curve(
        "How much it feels a change, by distance",
        "tokens away",
        "change, in shares of the nearest",
        tuple(zip(distances, shares, strict=True)),
        {"1%: taken for not felt": tuple((distance, _FELT) for distance in distances)},
        y_log=True,
    )


def _remedies(
    subject: Subject, window: int, reach: float, lengths: Lengths | None, gain: float | None, stored: int
) -> tuple[Remedy, ...]:
    """By how much farther each would reach than the model does now, in tokens; RAG by what it would have to search."""
    now = max(1.0, reach * window)
    room = max(1, window // (2 * _PASSAGE))
    corpus = lengths.total if lengths else window
    promise = f"finds the right passages in any number of them; half its window holds {room:,} of {_PASSAGE} tokens"
    rag = Remedy("rag", promise, max(1.0, corpus / now))
    if gain is None:
        return (rag,)
    width = subject.weight_bytes // subject.num_parameters
    recurrent = (subject.num_layers + 1) * window  # a memory as long as the window for each layer: Dai et al. 2019
    doublings = log2(recurrent / window)
    state = subject.num_layers * 2 * subject.embed_dim * 16 * width  # Gu and Dao 2023: twice the width, 16 numbers each
    fall = max(0.0, gain) * doublings
    size = told_bytes(subject.weight_bytes)
    store = f"recalls {stored:,} tokens by a store for one layer as large as its weights, {size}"
    return (
        rag,
        Remedy(
            "transformer-xl",
            f"reaches {recurrent:,} tokens back, for {fall:.2f} nats less at the {gain:.2f} that doubling gave so far",
            recurrent / now,
        ),
        *((Remedy("external-memory", store, stored / now),) if stored else ()),
        Remedy("mamba", f"history of any length in a state of {state / 1e3:.0f} kB, from which details fade"),
    )


CHECKUP = ReachCheckup()
