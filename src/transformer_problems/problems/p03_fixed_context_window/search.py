"""Problem 3's retrieval: which passage is found for a question, and what a reader answers who sees it."""

import torch
from torch import Tensor, nn

from transformer_problems.lab.data.passkey import FIRST_KEY_TOKEN, QUERY_TOKEN
from transformer_problems.models.decoder import Decoder
from transformer_problems.problems.p03_fixed_context_window.documents import WINDOW, Documents, spelled, unspelled
from transformer_problems.solutions.memory.hashed_ngrams import HashedNgrams
from transformer_problems.solutions.memory.retrieval import (
    BM25Index,
    PassageIndex,
    RetrievalAugmented,
    VectorIndex,
    chunk_tokens,
    words,
)

_PASSAGE_LEN, _PASSAGE_STRIDE = 24, 16  # a passage and a question fit the window; passages overlap by more than a fact
_FEATURES = 512  # numbers that the vector index keeps of a passage
_BM25_ENTRY = 8  # bytes that bm25s keeps of a word in a passage: its score and the passage's number


class Search:
    """Passages of a corpus in an index, and a reader who sees the best one and the question in its window.

    Args:
        arm: "rag_vector" or "rag_bm25".
        corpus: Spelled texts.
    """

    def __init__(self, arm: str, corpus: list[str]) -> None:
        self.passages = [passage for text in corpus for passage in _passages(text)]
        self.is_vector = arm == "rag_vector"
        index: PassageIndex
        if self.is_vector:
            index = vectors = VectorIndex(HashedNgrams(_FEATURES).fitted(self.passages))
            vectors.add(self.passages)
        else:
            index = by_words = BM25Index()
            by_words.add(self.passages)
        # one passage, for a reader that does not compare names could not tell two keys apart
        template = f"{{passages}}{{query}}{chr(QUERY_TOKEN)}"
        self._augmented = RetrievalAugmented(index, num_passages=1, template=template, separator="")

    def prompts(self, questions: Tensor) -> list[str]:
        """What the reader is given for each question, [B, FACT_LEN]."""
        queries = [spelled(question[:-1]) for question in questions.tolist()]
        return [self._augmented.prompt(query, max_len=WINDOW).text for query in queries]

    def hits(self, documents: Documents) -> list[bool]:
        """Whether the prompt of each document's question holds its whole fact.

        A passage that begins within the name is no hit, though it can still hold the key, and so answer the question.
        """
        facts = map(spelled, documents.facts.tolist())
        return [fact in prompt for fact, prompt in zip(facts, self.prompts(documents.questions), strict=True)]

    def answers(self, model: Decoder, questions: Tensor) -> Tensor:
        """The likeliest key after each prompt, [B]; shorter prompts are padded in front."""
        prompts = [unspelled(prompt) for prompt in self.prompts(questions)]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=questions.device)
        lengths = torch.tensor([len(p) for p in prompts], device=questions.device)
        key_mask = torch.arange(longest, device=questions.device) >= longest - lengths[:, None]
        with torch.no_grad():
            last = model.body(tokens, key_mask=key_mask)[:, -1]
        return nn.functional.linear(last, model.body.embedding.weight[FIRST_KEY_TOKEN:]).argmax(dim=1)

    def stored_bytes(self, text: str) -> int:
        """What the index keeps of a text: its passages, and their vectors or an entry for each of their words."""
        passages = _passages(text)
        if self.is_vector:
            return sum(4 * _FEATURES + len(passage) for passage in passages)
        return sum(_BM25_ENTRY * len(set(words(passage))) + len(passage) for passage in passages)


def _passages(text: str) -> list[str]:
    return chunk_tokens(text, _PASSAGE_LEN, _PASSAGE_STRIDE)
