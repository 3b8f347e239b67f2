"""The choice of tokens, held against transformers' own processors, and against what chance promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bigint8.errors import BigInt8Error
from bigint8.model.step import CHOICE, Step
from bigint8.run.sampling import chance, choose
from bigint8.run.settings import Settings, settings_from

V = 300


PINNED = [0.5243459416779314, 0.30213903321684277, 0.05588332997080059]
"""Chance of seed 7 at index 0 and 1, and of the largest seed at index 5."""


def step_of(asked, histories=None, indices=None):
    """A step that keeps a row for each of these settings."""
    choices = np.stack([each.choice() for each in asked]) if asked else np.zeros(0, CHOICE)
    choices["index"] = indices if indices is not None else 0
    none = np.zeros(0, np.int32)
    ends = np.cumsum([len(each) for each in histories]).astype(np.int32) if histories else none
    history = np.concatenate([np.array(each, np.int32) for each in histories]) if histories else none
    return Step(1, none, none, none, none, 0, np.zeros((1, 0, 0), np.int32), none, choices, history, ends)


def logits_of(rows, seed=0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def processed(scores_1V, asked, history):
    """What transformers makes of the scores, in its own order."""
    rules = LogitsProcessorList()
    if asked.repetition_penalty != 1:
        rules.append(RepetitionPenaltyLogitsProcessor(asked.repetition_penalty))
    rules.append(TemperatureLogitsWarper(asked.temperature))
    if asked.top_k:
        rules.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        rules.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        rules.append(MinPLogitsWarper(asked.min_p))
    return rules(torch.tensor([history]), scores_1V.clone())


sampled = st.builds(
    Settings,
    max_new_tokens=st.just(1),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 50, V, 2 * V]),
    top_p=st.sampled_from([0.1, 0.9, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)


def test_greedy_is_the_likeliest_token():
    logits = logits_of(4).bfloat16()
    tokens = choose(logits, step_of([Settings(1)] * 4))
    assert tokens.dtype == torch.int32 and tokens.tolist() == logits.argmax(-1).tolist()


def test_a_step_that_keeps_no_row_chooses_nothing():
    assert choose(logits_of(0), step_of([])).tolist() == []


@settings(max_examples=200, deadline=None)
@given(asked=sampled, seed=st.integers(0, 1000), ties=st.booleans())
def test_a_sampled_token_is_where_transformers_distribution_has_it(asked, seed, ties):
    """The same scores, cut at the same tokens, and the number of chance picks from the same sums."""
    scores = logits_of(1, seed)
    scores = scores.round() if ties and asked.top_p == 1 else scores  # which of equal tokens top-p cuts is left open
    history = list(range(0, V, 7))
    token = choose(scores, step_of([asked], [history if asked.repetition_penalty != 1 else []])).item()
    sums = processed(scores, asked, history)[0].double().softmax(-1).cumsum(-1)
    point = chance(asked.seed, 0)
    assert sums[token] > point - 1e-6 and (token == 0 or sums[token - 1] <= point + 1e-6)
    assert token == 0 or sums[token] > sums[token - 1], "a token that was cut"


@settings(max_examples=60, deadline=None)
@given(
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 0.9999]), top_k=st.sampled_from([0, 2000]), seed=st.integers(0, 999)
)
def test_the_nucleus_of_a_large_vocabulary_is_that_of_transformers(top_p, top_k, seed):
    """Also where more tokens belong to it than are tried first."""
    scores = torch.randn(1, 5000, generator=torch.Generator().manual_seed(seed)) * (0.5 + seed % 7)
    asked = Settings(1, temperature=1.0, top_p=top_p, top_k=top_k, seed=seed)
    sums = processed(scores, asked, [])[0].double().softmax(-1).cumsum(-1)
    token, point = choose(scores, step_of([asked])).item(), chance(seed, 0)
    assert sums[token] > point - 1e-3 and (token == 0 or sums[token - 1] <= point + 1e-3)
    assert token == 0 or sums[token] > sums[token - 1]


@settings(max_examples=50, deadline=None)
@given(asked=st.lists(st.one_of(sampled, st.just(Settings(1))), min_size=1, max_size=6), data=st.data())
def test_a_token_does_not_depend_on_what_else_is_in_the_step(asked, data):
    logits = logits_of(len(asked))
    histories = [list(range(n, V, 11)) if each.repetition_penalty != 1 else [] for n, each in enumerate(asked)]
    together = choose(logits, step_of(asked, histories)).tolist()
    row = data.draw(st.integers(0, len(asked) - 1))
    assert (
        choose(logits[row : row + 1], step_of(asked[row : row + 1], histories[row : row + 1])).item() == together[row]
    )


def test_a_penalty_holds_for_the_likeliest_token_too():
    logits = torch.tensor([[3.0, 2.0, -1.0], [3.0, 2.0, -1.0]])
    asked = [Settings(1, repetition_penalty=2.0), Settings(1)]
    assert choose(logits, step_of(asked, [[0, 0], []])).tolist() == [1, 0]


def test_tokens_come_as_often_as_they_are_likely():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    asked, count = Settings(1, temperature=1.0, seed=3), 4000
    step = step_of([asked] * count, indices=np.arange(count))
    found = torch.bincount(choose(weights.log().expand(count, 4), step).long(), minlength=4) / count
    assert torch.allclose(found, weights, atol=0.03)


def test_chance_depends_on_seed_and_index_alone_and_is_the_same_everywhere():
    assert chance(0, 0) == chance(0, 0) != chance(0, 1) != chance(1, 0)
    assert [chance(7, 0), chance(7, 1), chance(2**64 - 1, 5)] == PINNED
    numbers = np.array([chance(seed, index) for seed in range(100) for index in range(100)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(np.histogram(numbers, 10, (0, 1))[0] - 1000).max() < 150
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


# --- settings ------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_generation_config():
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1, max_new_tokens=9,
        eos_token_id=[2, 5], stop_strings="END", num_return_sequences=3, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    assert settings_from(config, 4, seed=8) == Settings(
        9, frozenset([2, 5]), ("END",), 0.6, 20, 0.95, 0.1, 1.1, seed=8, sequences=3
    )


def test_what_a_config_leaves_open_is_as_in_transformers():
    assert settings_from(GenerationConfig(), 4) == Settings(20)
    assert settings_from(GenerationConfig(do_sample=True), 4) == Settings(20, temperature=1.0, top_k=50)
    assert settings_from(GenerationConfig(temperature=0.3, eos_token_id=2), 4) == Settings(20, frozenset([2]))
    assert settings_from(GenerationConfig(max_length=10), 4).max_new_tokens == 6
    with pytest.raises(BigInt8Error, match=r"12 tokens leaves no room in max_length=10; set max_new_tokens"):
        settings_from(GenerationConfig(max_length=10), 12)


def test_a_config_with_the_defaults_written_out_is_fine():
    written = {name: value for name, value in GenerationConfig._get_default_generation_params().items() if value}
    assert settings_from(GenerationConfig(**written | {"max_length": 24}), 4) == Settings(20)


@pytest.mark.parametrize(
    "unsupported",
    [
        {"num_beams": 4},
        {"typical_p": 0.9},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3]]},
        {"guidance_scale": 2.0},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_not_supported_is_refused_by_name(unsupported):
    name = next(iter(unsupported))
    with pytest.raises(BigInt8Error, match=rf"{name}=.*pipe.model.generate"):
        settings_from(GenerationConfig(**unsupported), 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_a_value_out_of_range_is_refused_by_name(wrong):
    name = next(iter(wrong))
    with pytest.raises(BigInt8Error, match=f"{name}=.*must be"):
        Settings(**{"max_new_tokens": 1} | wrong)
