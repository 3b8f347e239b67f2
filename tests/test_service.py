"""OpenAI's interface over HTTP: official clients, every parameter, every request that is refused."""

import asyncio
import json
import math

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, TEMPLATE, WAIT, WORK, Service, loaded, save_model, serving, until

from bigint8.run.settings import Settings
from bigint8.service.limits import KEY_VARIABLE, Keys, Limits

PROMPT = "w5 w17 w99"
IDS = [5, 17, 99]
ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    with loaded(save_model(tmp_path_factory.mktemp("model") / "model")) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def service(pipeline):
    with serving(pipeline, Limits(body_bytes=200_000, queue=8)) as service:
        yield service


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(service: Service, ids, count=ANSWER_TOKENS):
    """The words of the likeliest answer, as the engine gives it: w2 ends it, w0 is left out."""
    found = service.pipeline.engine.submit(ids, Settings(count, eos=frozenset([2]))).result(WAIT).tokens
    return [f"w{token}" for token in found if token not in (0, 2)]


def text_after(service: Service, ids, count=ANSWER_TOKENS):
    """The same as a text that goes on behind the prompt's."""
    return "".join(f" {word}" for word in greedy(service, ids, count))


# --- answers -------------------------------------------------------------------------------------------------------


def test_a_prompt_as_text_or_token_ids_is_continued(service, client):
    expected = text_after(service, IDS)
    for prompt in (PROMPT, IDS):
        answer = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=ANSWER_TOKENS)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (expected, "length", None)
        assert answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens == ANSWER_TOKENS
        assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == NAME


def test_a_list_of_prompts_gives_the_answers_in_their_order(service, client):
    prompts = [[5, 17, 99], [9, 8], [100]]
    asked = {"temperature": 0, "max_tokens": 4, "n": 2}
    for form in (prompts, [" ".join(f"w{token}" for token in ids) for ids in prompts]):
        answer = client.completions.create(model=NAME, prompt=form, **asked)
        expected = [text_after(service, ids, 4) for ids in prompts for _ in range(2)]
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 24)


def test_a_stream_has_the_text_of_the_whole_answer_and_its_usage_at_the_end(client):
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 9, "seed": 3, "n": 3}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts, reasons = ["", "", ""], [None] * 3
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.id == chunks[0].id
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and len(set(texts)) == 3
    assert reasons == ["length"] * 3
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    plain = list(client.completions.create(**asked, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_a_conversation_goes_through_the_chat_template(service, client):
    turns = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": [{"type": "text", "text": "w8"}]}]
    expected = " ".join(greedy(service, [3, 9, 3, 8, 4], 7))
    asked = {"model": NAME, "messages": turns, "temperature": 0, "max_completion_tokens": 7}
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    assert answer.usage.prompt_tokens == 5 and answer.object == "chat.completion"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    again = [answer.choices[0].message.model_dump(), {"role": "user", "content": "w1"}]
    assert client.chat.completions.create(model=NAME, messages=again, max_tokens=1).usage.completion_tokens == 1


def test_langchain_chats_unchanged(service):
    chat = ChatOpenAI(base_url=f"{service.url}/v1", api_key="none", model=NAME, temperature=0, max_tokens=6)
    expected = " ".join(greedy(service, [3, 9, 4], 6))
    answer = chat.invoke("w9")
    assert answer.content == expected and answer.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in chat.stream("w9")) == expected
    assert [each.content for each in chat.batch(["w9", "w9"])] == [expected] * 2


def test_an_answer_ends_before_a_stop_string_whether_it_streams_or_not(service, client):
    words = greedy(service, IDS, 30)
    whole = "".join(f" {word}" for word in words)
    at = next(i for i in range(8, 20) if words[i] not in words[:i])
    half = words[at][: len(words[at]) - 1]  # the token's text goes on behind it
    for stop, cut in ((words[at], whole.index(words[at])), ([f" {half}", "nothing"], whole.index(f" {half}"))):
        asked = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": stop}
        (choice,) = client.completions.create(**asked).choices
        assert (choice.text, choice.finish_reason) == (whole[:cut], "stop")
        chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
        assert "".join(chunk.text for chunk in chunks) == whole[:cut] and chunks[-1].finish_reason == "stop"
    across = whole[whole.index(words[at]) - 3 :][:6]  # a stop string over two tokens
    asked = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": across}
    assert client.completions.create(**asked).choices[0].text == whole[: whole.index(across)]


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(service, client):
    """Sampled hot, so that w2 comes before long."""
    found = [
        client.completions.create(model=NAME, prompt=PROMPT, temperature=2, max_tokens=900, seed=seed, logprobs=0)
        for seed in range(3)
    ]
    ended = [each for each in found if each.choices[0].finish_reason == "stop"]
    assert ended, "none of the answers has met the end token"
    for each in ended:
        assert "w2" not in each.choices[0].text.split()
        assert len(each.choices[0].logprobs.tokens) == each.usage.completion_tokens - 1


def test_a_seed_repeats_an_answer_and_without_one_answers_differ(client):
    def ask(**more):
        return client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20, **more).choices[0].text

    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert ask() != ask()
    assert ask(top_p=1e-6) == ask(temperature=0) == ask(seed=5, extra_body={"top_k": 1})
    assert ask(temperature=0, extra_body={"repetition_penalty": 1.8}) != ask(temperature=0)
    assert ask(seed=5, extra_body={"min_p": 1.0}) == ask(temperature=0)


def test_echo_says_the_prompt_first(service, client):
    asked = {"model": NAME, "prompt": [PROMPT, "w1"], "temperature": 0, "max_tokens": 2, "echo": True}
    expected = [PROMPT + text_after(service, IDS, 2), "w1" + text_after(service, [1], 2)]
    assert [choice.text for choice in client.completions.create(**asked).choices] == expected
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_log_probabilities_are_those_of_the_engine(service, client):
    engine = service.pipeline.engine
    expected = engine.submit(IDS, Settings(6, logprobs=4))
    expected.result(WAIT)
    asked = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 4}
    (choice,) = client.completions.create(**asked).choices
    assert choice.logprobs.token_logprobs == pytest.approx([each.token for each in expected.logprobs])
    for told, each in zip(choice.logprobs.top_logprobs, expected.logprobs, strict=True):
        assert told == {f" w{token}": pytest.approx(value) for token, value in each.likeliest}
    starts = choice.logprobs.text_offset
    spoken = [choice.text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert spoken == choice.logprobs.tokens
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    streamed = [value for part in parts if part for value in part.token_logprobs]
    assert streamed == choice.logprobs.token_logprobs


def test_log_probabilities_of_a_chat(service, client):
    asked = {"model": NAME, "messages": [{"role": "user", "content": "w9"}], "max_tokens": 5, "seed": 1}
    (plain,) = client.chat.completions.create(**asked).choices
    assert plain.logprobs is None
    (choice,) = client.chat.completions.create(**asked, logprobs=True, top_logprobs=20).choices
    assert choice.message.content == plain.message.content
    assert len(choice.logprobs.content) == 5
    for entry in choice.logprobs.content:
        assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 20
        assert 0 < sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1 + 1e-6
    chunks = list(client.chat.completions.create(**asked, logprobs=True, stream=True))
    told = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [each.logprob for each in told] == pytest.approx([each.logprob for each in choice.logprobs.content])


def test_what_is_asked_for_at_once_is_answered_together(service):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            asked = (
                client.completions.create(model=NAME, prompt=[5, token], max_tokens=40, temperature=0)
                for token in range(10, 18)
            )
            return await asyncio.gather(*asked)

    expected = [text_after(service, [5, token], 40) for token in range(10, 18)]
    assert [each.choices[0].text for each in asyncio.run(ask_all())] == expected


# --- what is refused -----------------------------------------------------------------------------------------------


def body(**more):
    return {"model": NAME, "prompt": PROMPT, **more}


def chat_body(**more):
    return {"model": NAME, "messages": [{"role": "user", "content": "w1"}], **more}


LONG = "w1 " * WORK.context
REFUSED = {
    "another model": ("completions", body(model="gpt-4"), 404, "model_not_found", "model"),
    "no model": ("completions", {"prompt": "w1"}, 400, "invalid_value", "model"),
    "no prompt": ("completions", {"model": NAME}, 400, "invalid_value", "prompt"),
    "an empty prompt": ("completions", body(prompt=""), 400, "invalid_value", "prompt"),
    "no prompts": ("completions", body(prompt=[]), 400, "invalid_value", "prompt"),
    "an empty one among prompts": ("completions", body(prompt=[[1], []]), 400, "invalid_value", "prompt"),
    "a prompt that is a number": ("completions", body(prompt=7), 400, "invalid_value", "prompt"),
    "a token beyond the vocabulary": ("completions", body(prompt=[1, 128]), 400, "invalid_value", "prompt"),
    "a token below none": ("completions", body(prompt=[-1]), 400, "invalid_value", "prompt"),
    "half a character": ("completions", body(prompt="\ud800"), 400, "invalid_value", "prompt"),
    "a prompt beyond the context": ("completions", body(prompt=LONG), 400, "context_length_exceeded", "prompt"),
    "more prompts than wait": ("completions", body(prompt=["w1"] * 9), 400, "invalid_value", "prompt"),
    "no tokens": ("completions", body(max_tokens=0), 400, "invalid_value", "max_tokens"),
    "less than no tokens": ("completions", body(max_tokens=-5), 400, "invalid_value", "max_tokens"),
    "more tokens than room": ("completions", body(max_tokens=WORK.context), 400, "context_length_exceeded", "prompt"),
    "tokens without end": ("completions", body(max_tokens=10**30), 400, "invalid_value", "max_tokens"),
    "a number in quotes": ("completions", body(max_tokens="5"), 400, "invalid_value", "max_tokens"),
    "heat below zero": ("completions", body(temperature=-0.1), 400, "invalid_value", "temperature"),
    "heat above two": ("completions", body(temperature=2.1), 400, "invalid_value", "temperature"),
    "no nucleus": ("completions", body(top_p=0), 400, "invalid_value", "top_p"),
    "five stops": ("completions", body(stop=list("abcde")), 400, "invalid_value", "stop"),
    "an empty stop": ("completions", body(stop=""), 400, "invalid_value", "stop"),
    "no answers": ("completions", body(n=0), 400, "invalid_value", "n"),
    "more answers than sequences": ("completions", body(n=5), 400, None, None),
    "six log probabilities": ("completions", body(logprobs=6), 400, "invalid_value", "logprobs"),
    "log probabilities of a prompt": ("completions", body(logprobs=1, echo=True), 400, "unsupported_parameter", "echo"),
    "the best of many": ("completions", body(best_of=3), 400, "unsupported_parameter", "best_of"),
    "a suffix": ("completions", body(suffix="w1"), 400, "unsupported_parameter", "suffix"),
    "a bias": ("completions", body(logit_bias={"5": 1}), 400, "unsupported_parameter", "logit_bias"),
    "a penalty": ("completions", body(presence_penalty=0.5), 400, "unsupported_parameter", "presence_penalty"),
    "an unknown parameter": ("completions", body(max_token=5), 400, "unknown_parameter", "max_token"),
    "options of no stream": ("completions", body(stream_options={}), 400, "invalid_value", "stream_options"),
    "a list": ("completions", [1], 400, None, None),
    "tools": ("chat/completions", chat_body(tools=[{"type": "function"}]), 400, "unsupported_parameter", "tools"),
    "a schema": (
        "chat/completions", chat_body(response_format={"type": "json_object"}), 400, "unsupported_parameter",
        "response_format",
    ),
    "no turns": ("chat/completions", {"model": NAME, "messages": []}, 400, "invalid_value", "messages"),
    "a turn of a tool": (
        "chat/completions", {"model": NAME, "messages": [{"role": "tool", "content": "w1"}]}, 400, "invalid_value",
        "messages",
    ),
    "a picture": (
        "chat/completions",
        {"model": NAME, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400, "invalid_value", "messages",
    ),
    "a turn the template refuses": (
        "chat/completions", {"model": NAME, "messages": [{"role": "system", "content": "w1"}]}, 400, "invalid_value",
        "messages",
    ),
    "the likeliest alone": ("chat/completions", chat_body(top_logprobs=2), 400, "invalid_value", "top_logprobs"),
    "too many of them": (
        "chat/completions", chat_body(logprobs=True, top_logprobs=21), 400, "invalid_value", "top_logprobs",
    ),
    "a conversation beyond the context": (
        "chat/completions", chat_body(messages=[{"role": "user", "content": LONG}]), 400, "context_length_exceeded",
        "messages",
    ),
}  # fmt: skip


def assert_refused(response, status, code=None, param=None, said=""):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert isinstance(error["message"], str) and said in error["message"] and "Traceback" not in error["message"]
    expected = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert error["type"] == ("server_error" if status >= 500 else expected)


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_with_its_status_and_the_parameters_name(service, case):
    path, content, status, code, param = REFUSED[case]
    for stream in (False, True):
        sent = {**content, "stream": stream} if stream and isinstance(content, dict) else content
        if stream and case == "options of no stream":
            continue
        response = service.client.post(
            f"/v1/{path}", content=json.dumps(sent), headers={"content-type": "application/json"}
        )
        assert_refused(response, status, code, param)
    assert service.idle()


def test_values_that_change_nothing_are_taken(service):
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "metadata": None, "stop": None,
        "n": None, "top_k": -1, "stream": False, "stream_options": None, "seed": None, "max_tokens": 1,
    }  # fmt: skip
    assert service.complete(**neutral, suffix=None, best_of=1, logprobs=None, echo=False).status_code == 200
    chat = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "logprobs": False,
        "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"],
    }  # fmt: skip
    assert service.client.post("/v1/chat/completions", json=chat_body(**neutral, **chat)).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"{", b"null", b'{"model": "tiny", "prompt": NaN}', b"\xff\xfe", b"[" * 50_000])
def test_what_is_no_json_is_refused(service, sent):
    response = service.client.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}
    plain = service.client.post("/v1/completions", content=json.dumps(body()), headers={"content-type": "text/plain"})
    assert_refused(plain, 400, said="application/json")


def test_unknown_paths_and_methods_are_refused(service):
    assert_refused(service.client.get("/v1/embeddings"), 404, "not_found", said="GET /v1/embeddings")
    assert_refused(service.client.get("/v1/completions"), 405, "method_not_allowed")
    assert_refused(service.client.delete("/health"), 405, "method_not_allowed")
    assert_refused(service.client.get("/v1/models/gpt-4"), 404, "model_not_found", "model")


def test_a_body_that_is_too_large_is_refused_whether_its_size_is_told_or_not(service):
    large = json.dumps(body(prompt="w1 " * 100_000)).encode()
    headers = {"content-type": "application/json"}
    told = service.client.post("/v1/completions", content=large, headers=headers)
    assert_refused(told, 413, "request_too_large", said="200,000 bytes")
    pieces = (large[start : start + 10_000] for start in range(0, len(large), 10_000))
    chunked = service.client.post("/v1/completions", content=pieces, headers=headers)
    assert_refused(chunked, 413, "request_too_large")
    assert service.complete(max_tokens=1).status_code == 200, "the same connection goes on"


def test_a_model_without_a_chat_template_says_so(tmp_path):
    with loaded(save_model(tmp_path / "plain", chats=False)) as plain, serving(plain) as service:
        response = service.client.post("/v1/chat/completions", json=chat_body())
        assert_refused(response, 400, "no_chat_template", "messages", said="/v1/completions")


# --- keys ----------------------------------------------------------------------------------------------------------


def test_with_keys_only_those_who_have_one_are_answered(pipeline):
    with serving(pipeline, keys=("first", "second")) as service:
        for path in ("/v1/models", "/stats", "/metrics", "/v1/nowhere"):
            assert_refused(service.client.get(path), 401, "invalid_api_key")
        for wrong in ("Bearer third", "Bearer", "Basic first", "first", "Bearer first2", "Bearer fïrst"):
            response = service.client.post("/v1/completions", json=body(), headers={"authorization": wrong.encode()})
            assert_refused(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key) as client:
                assert client.completions.create(model=NAME, prompt="w1", max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            openai.OpenAI(base_url=f"{service.url}/v1", api_key="no").models.list()
        assert service.client.get("/health").status_code == 200
        assert service.client.get("/").status_code == 200


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert not Keys.from_environment()
    monkeypatch.setenv(KEY_VARIABLE, " one, two ,")
    keys = Keys.from_environment()
    assert keys.allow(b"Bearer one") and keys.allow(b"bearer two") and not keys.allow(b"Bearer one, two")
    monkeypatch.setenv(KEY_VARIABLE, " ,")
    with pytest.raises(Exception, match=f"{KEY_VARIABLE} has no key in it"):
        Keys.from_environment()


# --- what it tells of itself ---------------------------------------------------------------------------------------


def test_the_model_is_listed(service, client):
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME).id == NAME
    assert service.client.get(f"/v1/models/{NAME}").json()["max_model_len"] == WORK.context


def metrics_of(service):
    text = service.client.get("/metrics").text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}


def test_metrics_count_requests_tokens_and_times(service):
    before = metrics_of(service)
    service.complete(max_tokens=7, temperature=0)
    service.complete(max_tokens=0)
    service.client.get("/nowhere/at/all")
    until(lambda: metrics_of(service)["bigint8_generated_tokens_total",] > before["bigint8_generated_tokens_total",])
    after = metrics_of(service)

    def more(*name):
        return after[name] - before.get(name, 0)

    assert more("bigint8_requests_total", "/v1/completions", "200") == 1
    assert more("bigint8_requests_total", "/v1/completions", "400") == 1
    assert more("bigint8_requests_total", "404", "other") == 1
    assert more("bigint8_prompt_tokens_total") == 3 and more("bigint8_generated_tokens_total") == 7
    assert more("bigint8_first_token_seconds_count") == 1
    assert more("bigint8_request_seconds_count", "/v1/completions") == 2
    assert after["bigint8_ready",] == 1 and after["bigint8_running",] == after["bigint8_queue",] == 0
    assert after["bigint8_free_pages", "0"] == service.pipeline.plan.pages[0]
    assert 0 <= after["bigint8_stage_busy_share", "0"] <= 1 and after["bigint8_stage_busy_seconds_total", "0"] > 0
    assert after["bigint8_restarts_total",] == 0


def test_statistics_for_the_page(service):
    said = service.client.get("/stats").json()
    assert said["model"] == NAME and said["health"] == {"status": "ok"} and said["chats"] is True
    (stage,) = said["stages"]
    assert (stage["device"], stage["first_block"], stage["last_block"]) == ("cpu", 0, 5)
    assert said["slow"] == [] and "times_planned" in stage  # one stage is slow beside no other
    assert said["pages"] == list(service.pipeline.plan.pages)


def test_the_template_of_these_tests_is_one_that_a_tokenizer_runs(service):
    assert service.pipeline.text.tokenizer.chat_template == TEMPLATE
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok"}
