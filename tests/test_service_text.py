"""The text of a real model over HTTP: characters that several tokens make, its chat template, its probabilities."""

import math

import openai
import pytest
import torch
from serving import NAME, loaded, serving

from bigint8.options import Workload

WORK = Workload(context=256, sequences=4)
WIDE = "Repeat: 你好，世界 🎉🎊 ñandú. Repeat: 你好，世界 🎉🎊 ñandú. Repeat: 你好，世界"
"""What a small model goes on repeating: characters of up to four tokens."""


@pytest.fixture(scope="module")
def service(smollm2):
    with loaded(smollm2, WORK) as pipeline, serving(pipeline) as service:
        yield service


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_what_transformers_generates_from_the_template(service, client):
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = service.pipeline.text
    ids = text.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    found = service.pipeline.model.generate(input_ids=ids, do_sample=False, max_new_tokens=24)
    expected = text.decode(found[0, ids.shape[1] :].tolist())
    asked = {"model": NAME, "messages": turns, "temperature": 0, "max_tokens": 24}
    assert client.chat.completions.create(**asked).choices[0].message.content == expected
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert "Paris" in expected


def test_characters_of_several_tokens_come_whole(client):
    asked = {"model": NAME, "prompt": WIDE, "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**asked).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole and "\ufffd" not in whole
    assert any(ord(character) > 0xFFFF for character in whole), "the model has not repeated a wide character"
    assert not any("\ufffd" in piece for piece in pieces)
    stop = next(character for character in whole if ord(character) > 0xFFFF)
    assert client.completions.create(**asked, stop=stop).choices[0].text == whole[: whole.index(stop)]


def test_log_probabilities_are_those_of_a_forward_pass(service, client):
    asked = {"model": NAME, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 6, "logprobs": 5}
    (choice,) = client.completions.create(**asked).choices
    text = service.pipeline.text
    ids = text.plain(asked["prompt"])
    answer = text.plain(asked["prompt"] + choice.text)[len(ids) :]
    with torch.no_grad():
        logits = service.pipeline.model(torch.tensor([[*ids, *answer]])).logits[0].double().log_softmax(-1)
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text and told.tokens[0] == " Paris"
    for place, (token, logprob, top) in enumerate(zip(answer, told.token_logprobs, told.top_logprobs, strict=True)):
        expected = logits[len(ids) - 1 + place]
        assert logprob == pytest.approx(expected[token].item(), abs=1e-3)
        assert sorted(top.values()) == pytest.approx(sorted(expected.topk(5).values.tolist()), abs=1e-3)
        assert sum(map(math.exp, top.values())) <= 1
