"""A denoiser that knows the truth: the exact posterior of a first-order Markov chain.

From "Is Your Diffusion Sampler Actually Correct?" (arXiv 2602.19619): with the model's error gone,
every difference between what is sampled and the chain is the sampler's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.device import TEST_DEVICE
from tests.engine.tiny import CONFIG
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import DecoderConfig, ForwardBatch, ModelSpec
from vdiff_kserve.sampler import DecodingParams

STATES = 6
MASK, EOS, VOCAB = STATES, STATES + 1, STATES + 2


def transition_matrix() -> Tensor:
    """float64 [states, states]: a chain that stays where it is, surer in some states.

    So posteriors of all degrees of confidence occur, and the further two positions are apart, the
    less writing them at once does to their transitions.
    """
    staying = torch.tensor([0.97, 0.92, 0.85, 0.75, 0.65, 0.55], dtype=torch.float64)
    matrix = ((1 - staying) / (STATES - 1))[:, None].repeat(1, STATES)
    return matrix.diagonal_scatter(staying)


TRANSITIONS = transition_matrix()


class MarkovPosterior(nn.Module):
    """Has a decoder's face; its logits are the log posterior of every position. Computed on the
    host, they are decoded where tests compute.

    The first token of a canvas is given; masked positions follow from it and from all others that
    are committed.
    """

    stages = 1
    vocab_shard = None

    def __init__(self, transitions: Tensor = TRANSITIONS) -> None:
        super().__init__()
        self.transitions = transitions
        self.config: DecoderConfig = replace(CONFIG, vocab_size=VOCAB, hidden_size=VOCAB)
        self.device, self.dtype = TEST_DEVICE, torch.float64
        self.passes = 0

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.passes += 1
        canvases = batch.input_ids.cpu().split([span.queries for span in batch.spans])
        longest = max(len(canvas) for canvas in canvases)
        padded = torch.full((len(canvases), longest), MASK)
        for row, canvas in enumerate(canvases):
            padded[row, : len(canvas)] = canvas
        posterior = log_posterior(padded, self.transitions)
        wanted = [
            posterior[row, span.output_start : span.output_start + span.outputs]
            for row, span in enumerate(batch.spans)
        ]
        return torch.cat(wanted).to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


class MarkovChain(MarkovPosterior):
    """The same chain as a causal model: the logits at a token are those of its successor."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.passes += 1
        tokens = batch.input_ids
        if batch.output_tokens is not None:
            tokens = tokens[batch.output_tokens]
        following = self.transitions[tokens.cpu().clamp(max=STATES - 1)]
        return specials_impossible(following.log()).to(self.device)


def log_posterior(canvases: Tensor, transitions: Tensor) -> Tensor:
    """log p(token at a position | all written tokens): [rows, length, vocab], by forward-backward.

    Masks right of a canvas's end say nothing and change nothing.
    """
    rows, length = canvases.shape
    evidence = torch.ones(rows, length, STATES, dtype=torch.float64)
    written = canvases < STATES
    evidence[written] = nn.functional.one_hot(canvases[written], STATES).double()
    forward, backward = evidence.clone(), torch.ones_like(evidence)
    for i in range(1, length):
        message = forward[:, i - 1] @ transitions
        forward[:, i] *= message / message.sum(-1, keepdim=True)
    for i in range(length - 2, -1, -1):
        message = (backward[:, i + 1] * evidence[:, i + 1]) @ transitions.T
        backward[:, i] = message / message.sum(-1, keepdim=True)
    product = forward * backward
    return specials_impossible((product / product.sum(-1, keepdim=True)).log())


def specials_impossible(log_probability: Tensor) -> Tensor:
    return nn.functional.pad(log_probability, (0, VOCAB - STATES), value=-torch.inf)


def sample(
    sequences: int, length: int = 16, *, with_chain: bool = False, seed: int = 0, **decoding: Any
) -> tuple[Tensor, float]:
    """Sequences that the engine writes with the true posterior, and its tokens per forward.

    Returns:
        int64 [sequences, 1 + length], the given first state included.
    """
    posterior = MarkovPosterior()
    spec = ModelSpec("markov", posterior.config, MASK, EOS, None, 64, length)
    engine = Engine(
        posterior,  # type: ignore[arg-type]
        spec,
        EngineConfig(max_num_seqs=512, max_queue=sequences),
        MarkovChain() if with_chain else None,  # type: ignore[arg-type]
    )
    decoding = {"block_length": length, "temperature": 1.0} | decoding
    requests = [
        GenerationRequest((i % STATES,), length, DecodingParams(seed=seed + i, **decoding))
        for i in range(sequences)
    ]
    engine.start()
    results = engine.generate(requests)
    engine.stop()
    written = torch.tensor([result.token_ids for result in results])
    prompts = torch.tensor([request.prompt_ids for request in requests])
    per_forward = sum(result.stats.tokens_per_forward for result in results) / sequences
    return torch.cat([prompts, written], dim=1), per_forward


def transition_counts(sequences: Tensor) -> Tensor:
    """float64 [states, states], how often each state followed each."""
    pairs = sequences[:, :-1] * STATES + sequences[:, 1:]
    return torch.bincount(pairs.flatten(), minlength=STATES**2).reshape(STATES, STATES).double()


def chi_square(counts: Tensor, probability: Tensor) -> float:
    """Pearson's statistic of the rows of `counts` against the rows of `probability`."""
    expected = counts.sum(-1, keepdim=True) * probability
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_limit(degrees: int, sigmas: float = 3.3) -> float:
    """The statistic that is exceeded as seldom as a normal variable exceeds `sigmas`
    (Wilson and Hilferty's approximation); 3.3 is one time in two thousand."""
    a = 2 / (9 * degrees)
    return degrees * (1 - a + sigmas * a**0.5) ** 3


def transition_gap(sequences: Tensor) -> float:
    """How far the transitions are from the chain's: chi-square per transition, 0 when equal."""
    counts = transition_counts(sequences)
    return chi_square(counts, TRANSITIONS) / float(counts.sum())


def trigram_chi_square(sequences: Tensor) -> float:
    """Pearson's statistic of each state given the two before it: 180 degrees of freedom."""
    triples = (sequences[:, :-2] * STATES + sequences[:, 1:-1]) * STATES + sequences[:, 2:]
    counts = torch.bincount(triples.flatten(), minlength=STATES**3).double()
    counts = counts.reshape(STATES**2, STATES)
    seen = counts.sum(-1) > 0
    return chi_square(counts[seen], TRANSITIONS.repeat(STATES, 1)[seen])
