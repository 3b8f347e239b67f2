"""Log probabilities: those of a forward pass of transformers, whatever chooses the tokens, over stages and restarts."""

import numpy as np
import pytest
import torch
from staged import SeveralStages
from test_links import sent_and_read
from test_sampling import V, logits_of, step_of
from tiny import save_tiny

from bigint8 import BigInt8Error, Int8Config, load_sharded_int8
from bigint8.model.step import Result
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import cpu_device
from bigint8.run.engine import Engine
from bigint8.run.sampling import choose
from bigint8.run.settings import MOST_LOGPROBS, Settings
from bigint8.run.wire import result_message, result_of
from bigint8.session import find_model

WORK = Workload(context=96, sequences=6, chunk=24)
PROMPT = [5, 17, 99, 3, 42, 7]
EXACT = Int8Config(dtype="float32", activations="16bit")
WAIT = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", True, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def forward(folder):
    """float64 (tokens, vocabulary): the log probabilities after each token, of the model's own modules."""
    model = load_sharded_int8(folder, config=EXACT, context=WORK.context, progress=False)

    def run(ids):
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_hidden_states=True)  # which pages do not have
        return found.logits[0].double().log_softmax(-1)

    return run


def engine_of(folder, stages, fails=()):
    plan = make_plan(find_model(folder, EXACT).spec, [cpu_device(share=stages)] * stages, WORK)
    return Engine.of(plan, SeveralStages(plan, fails))


def assert_are_those_of(forward, completion, prompt=PROMPT):
    assert len(completion.logprobs) == len(completion.tokens)
    expected = forward([*prompt, *completion.tokens])[len(prompt) - 1 :]
    for token, found, row in zip(completion.tokens, completion.logprobs, expected, strict=False):
        assert found.token == pytest.approx(row[token].item(), abs=1e-4)
        assert len(found.likeliest) == completion.settings.logprobs
        theirs = [value for _, value in found.likeliest]
        assert theirs == sorted(theirs, reverse=True)
        assert theirs == pytest.approx(row.topk(len(theirs)).values.tolist(), abs=1e-4)
        for other, value in found.likeliest:
            assert value == pytest.approx(row[other].item(), abs=1e-4)


@pytest.mark.parametrize("stages", [1, 2])
def test_they_are_those_of_a_forward_pass_before_temperature_and_penalty(folder, forward, stages):
    asked = [
        Settings(12, logprobs=3),
        Settings(12, logprobs=0),
        Settings(12, temperature=1.7, top_k=5, repetition_penalty=1.4, seed=3, logprobs=MOST_LOGPROBS),
    ]
    with engine_of(folder, stages) as engine:
        plain = engine.submit(PROMPT, Settings(12))
        found = [engine.submit(PROMPT, each) for each in asked]
        assert plain.result(WAIT).tokens == found[0].result(WAIT).tokens and plain.logprobs == []
        for completion in found:
            completion.result(WAIT)
            assert_are_those_of(forward, completion)


def test_a_stage_that_is_lost_takes_none_with_it(folder, forward):
    with engine_of(folder, 2, fails=[3, 6, 9]) as engine:
        both = engine.submit(PROMPT, Settings(10, temperature=1.0, sequences=2, logprobs=2)).sequences
        for completion in both:
            completion.result(WAIT)
            assert_are_those_of(forward, completion)
        assert engine.stats().restarts == 3


def test_rows_that_ask_for_more_or_less_or_nothing_stand_side_by_side():
    asked = [Settings(1), Settings(1, logprobs=0), Settings(1, logprobs=4), Settings(1, logprobs=2)]
    logits = logits_of(4).bfloat16()
    found = Result(1, choose(logits, step_of(asked)).numpy())
    assert found.tokens == logits.argmax(-1).tolist()
    expected = logits.double().log_softmax(-1)
    for row in (1, 2, 3):
        likeliest = asked[row].logprobs
        logprobs = found.logprobs(row, likeliest)
        assert logprobs.token == pytest.approx(expected[row].max().item(), abs=1e-6)
        top = expected[row].topk(likeliest)
        assert [value for _, value in logprobs.likeliest] == pytest.approx(top.values.tolist(), abs=1e-6)
        assert [token for token, _ in logprobs.likeliest] == top.indices.tolist()


def test_a_vocabulary_smaller_than_what_is_asked_for_gives_all_of_it():
    logits = logits_of(1)[:, :6]
    logprobs = Result(1, choose(logits, step_of([Settings(1, logprobs=20)])).numpy()).logprobs(0, 20)
    assert len(logprobs.likeliest) == 6
    assert np.exp([value for _, value in logprobs.likeliest]).sum() == pytest.approx(1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("likeliest", [0, 5])
def test_they_cross_a_connection_bit_for_bit(rows, likeliest):
    values = choose(logits_of(rows), step_of([Settings(1, logprobs=likeliest)] * rows)).numpy()
    assert values.shape == (rows, 2 + 2 * likeliest) and likeliest < V
    read = result_of(sent_and_read(result_message(5, values)))
    assert np.array_equal(read.values, values) and read.tokens == values[:, 0].tolist()


def test_more_than_twenty_or_less_than_none_are_refused():
    for count in (-1, MOST_LOGPROBS + 1):
        with pytest.raises(BigInt8Error, match=f"logprobs={count}: must be between 0 and 20"):
            Settings(1, logprobs=count)
