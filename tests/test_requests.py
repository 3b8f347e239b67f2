"""Many requests through the stages of real models: each gets what it gets alone."""

import asyncio

import numpy as np
import pytest
import torch
from staged import SeveralStages
from tiny import SIZES, VOCAB, save_tiny

from bigint8 import BigInt8Error, Int8Config, open_pipeline
from bigint8.options import Workload
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import cpu_device
from bigint8.run.engine import Engine
from bigint8.run.settings import Settings
from bigint8.session import find_model

WORK = Workload(context=96, sequences=6, chunk=24)
PROMPTS = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_tiny(kind, kind != "llama", tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def requests_of(seed):
    """Prompts of unlike lengths, some of which begin alike, and how many tokens each wants."""
    chance = np.random.default_rng(seed)
    system = chance.integers(3, VOCAB, 20)
    prompts = [chance.integers(3, VOCAB, length) for length in chance.integers(1, 60, PROMPTS)]
    prompts = [np.concatenate([system, prompt])[:60] if i % 4 == 0 else prompt for i, prompt in enumerate(prompts)]
    return [(prompt, int(wanted)) for prompt, wanted in zip(prompts, chance.integers(1, 24, PROMPTS), strict=True)]


def pipeline_of(folder, stages):
    found = find_model(folder, Int8Config(dtype="float32"))
    plan = make_plan(found.spec, [cpu_device(share=stages)] * stages, WORK)
    return Engine.of(plan, SeveralStages(plan))


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_prompts_that_arrive_over_time_get_the_tokens_of_each_alone(folders, kind):
    """Over one, two and three stages; with the default int8 activations."""
    wanted = requests_of(len(kind))
    with pipeline_of(folders(kind), 1) as engine:
        alone = [engine.submit(ids, Settings(count)).result(60).tokens for ids, count in wanted]
    assert len({tuple(tokens[:4]) for tokens in alone}) > 8
    for stages in (1, 2, 3):
        with pipeline_of(folders(kind), stages) as engine:
            asked = [engine.submit(ids, Settings(count)) for ids, count in wanted[:8]]
            for _, (ids, count) in zip(_tokens(asked), wanted[8:], strict=False):
                asked.append(engine.submit(ids, Settings(count)))
            together = [completion.result(60).tokens for completion in asked]
            assert together == alone, f"{stages} stages"
            assert engine.stats().running == engine.stats().waiting == 0


def _tokens(completions):
    """The tokens of all these, as they come; more may be appended meanwhile."""
    for completion in completions:
        yield from completion


@pytest.fixture(scope="module")
def tiny(folders):
    with open_pipeline(
        folders("llama"), 1, config=Int8Config(dtype="float32"), workload=WORK, progress=False
    ) as pipeline:
        yield pipeline


IDS = [5, 17, 99, 3, 42, 7]


def test_a_pipeline_of_one_device_gives_the_tokens_of_its_transformers_model(tiny):
    expected = tiny.model.generate(input_ids=torch.tensor([IDS]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    (answer,) = tiny.generate(IDS, max_new_tokens=12, do_sample=False)
    assert answer.tokens == expected[0, len(IDS) :].tolist()
    assert answer.reason == "length" and answer.prompt_tokens == len(IDS)


def test_without_a_limit_an_answer_fills_the_context(tiny):
    (answer,) = tiny.generate([IDS])
    assert len(answer.tokens) == WORK.context - len(IDS)


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(tiny):
    sampled = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 10}
    (alone,) = tiny.generate(IDS, seed=7, **sampled)
    others = [tiny.submit([i, *IDS], seed=i, **sampled) for i in range(3, 9)]
    (among,) = tiny.generate(IDS, seed=7, **sampled)
    assert among.tokens == alone.tokens
    assert tiny.generate(IDS, seed=8, **sampled)[0].tokens != alone.tokens
    assert len({tuple(other.result(60).tokens) for other in others}) > 1


def test_several_answers_to_several_prompts_come_in_order(tiny):
    answers = tiny.generate([IDS, IDS[:3]], do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert [answer.prompt_tokens for answer in answers] == [6, 6, 6, 3, 3, 3]
    assert len({tuple(answer.tokens) for answer in answers[:3]}) > 1


def test_asyncio_tasks_share_the_pipeline(tiny):
    async def both():
        return await asyncio.gather(
            *(tiny.agenerate([5 + i, *IDS], do_sample=False, max_new_tokens=5) for i in range(4))
        )

    found = [answers[0].tokens for answers in asyncio.run(both())]
    assert found == [tiny.generate([5 + i, *IDS], do_sample=False, max_new_tokens=5)[0].tokens for i in range(4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"max_new_tokens": 5, "temprature": 2.0}, "temprature: no such setting"),
        ({"max_new_tokens": 95}, "context of 96"),
        ({"max_new_tokens": 5, "do_sample": True, "top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_by_name(tiny, settings, message):
    with pytest.raises(BigInt8Error, match=message):
        tiny.generate(IDS, **settings)


def test_text_needs_a_tokenizer_and_ids_do_not(tiny):
    with pytest.raises(BigInt8Error, match="no tokenizer could be read"):
        tiny.generate("a text")
    assert tiny.generate(IDS, max_new_tokens=2)[0].text == ""


def test_prompts_without_tokens_or_room_are_refused(tiny):
    with pytest.raises(BigInt8Error, match="no tokens in it"):
        tiny.generate([[]])
    with pytest.raises(BigInt8Error, match="96 tokens leaves no room in a context of 96"):
        tiny.generate([[5] * 96])
