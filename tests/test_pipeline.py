"""The pipeline over Ray workers: the same tokens as in one process, each byte read once, workers that may die."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from tiny import SIX_FAMILIES, save_tiny, tiny_model
from transformers import AutoTokenizer, TextIteratorStreamer

from bigint8 import BigInt8Error, Cluster, Int8Config, WorkerError, load_sharded_int8, open_pipeline
from bigint8.model.config import read_generation_config, read_hf_config
from bigint8.options import Access, Workload
from bigint8.plan.cut import make_plan
from bigint8.run.driver import PagedCache, PipelineModel
from bigint8.run.engine import Engine
from bigint8.session import find_model

WORK = Workload(context=100, sequences=4)

engines = {}
"""The engine of each pipeline's last load: it ends before the next."""


@pytest.fixture(scope="module", autouse=True)
def ended():
    """An engine that goes on would mend the pipeline of the tests that come after these."""
    yield
    for engine in (engine for made in engines.values() for engine in made):
        engine.close()
    engines.clear()


def load(pipeline, folder, workers, dtype="float32", work=WORK, copied=False, **config):
    """A model on the first `workers` workers, and the reports of their loads. `copied`: with a copied head."""
    found = find_model(folder, Int8Config(dtype=dtype, **config))
    spec = found.spec.with_copied_head() if copied else found.spec
    plan = make_plan(spec, pipeline.devices()[:workers], work)
    for engine in engines.pop(pipeline, ()):
        engine.close()
    reports = pipeline.load(plan, progress=False)
    engine = Engine.of(plan, pipeline)
    engines[pipeline] = [engine]
    model = PipelineModel(read_hf_config(found.checkpoint, Access()), engine, plan)
    model.generation_config = read_generation_config(Path(folder)) or model.generation_config
    return model, reports


def in_one_process(folder, dtype="float32", **kwargs):
    return load_sharded_int8(
        folder, dtype=dtype, context=WORK.context, batch_size=WORK.sequences, progress=False, **kwargs
    )


def greedy(model, ids, tokens, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **kwargs
    )


PROMPT = torch.tensor([[5, 17, 99, 3, 42, 7]])
PADDED = torch.tensor([[0, 0, 0, 5, 17], [9, 8, 7, 6, 5], [0, 0, 33, 44, 55]])
PADDED_MASK = (PADDED != 0).long()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [*SIX_FAMILIES, "opt-350m", "qwen2", "mistral"])
def test_tokens_are_those_of_one_process_over_one_two_and_three_workers(pipeline, kind, tied, tmp_path):
    save_tiny(kind, tied, tmp_path)
    one = in_one_process(tmp_path)
    single, batch = greedy(one, PROMPT, 16), greedy(one, PADDED, 16, PADDED_MASK)
    assert single.shape == (1, 22) and len(set(single[0, 6:].tolist())) > 1
    for workers in (1, 2, 3):
        model, _ = load(pipeline, tmp_path, workers)
        assert torch.equal(greedy(model, PROMPT, 16), single), f"{workers} workers"
        assert torch.equal(greedy(model, PADDED, 16, PADDED_MASK), batch), f"{workers} workers, padded batch"


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom", "gpt2"])
def test_a_copied_head_in_the_last_worker_gives_the_tokens_of_one_process(pipeline, kind, tmp_path):
    save_tiny(kind, True, tmp_path)
    expected = greedy(in_one_process(tmp_path), PADDED, 16, PADDED_MASK)
    for workers in (2, 3):
        model, reports = load(pipeline, tmp_path, workers, copied=True)
        assert torch.equal(greedy(model, PADDED, 16, PADDED_MASK), expected), f"{workers} workers"
        loaded = [sum(report.device_bytes.values()) for report in reports]
        assert loaded == [stage.weight_bytes for stage in model.plan.stages] and model.plan.copied_head_bytes > 0


@pytest.mark.usefixtures("on_running_workers")
def test_a_pipeline_plans_a_copied_head_by_itself_where_that_is_faster(tmp_path):
    """Of two blocks, one for each worker, the first attends to all, the second to a window."""
    tiny_model("qwen2", True, num_hidden_layers=2, max_window_layers=1).save_pretrained(tmp_path)
    expected = greedy(in_one_process(tmp_path), PROMPT, 16)
    with open_pipeline(
        tmp_path, 2, config=Int8Config(dtype="float32"), workload=WORK, cluster=Cluster("cpu"), progress=False
    ) as pipe:
        assert len(pipe.plan.stages) == 2 and pipe.plan.copied_head_bytes > 0
        assert "the output head is a copy of the embeddings" in pipe.plan.notes[0]
        assert torch.equal(greedy(pipe.model, PROMPT, 16), expected)
        (answer,) = pipe.generate(PROMPT[0].tolist(), max_new_tokens=16, do_sample=False)
        assert answer.tokens == expected[0, 6:].tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", SIX_FAMILIES)
def test_stages_keep_a_16_bit_dtype(pipeline, kind, dtype, tmp_path):
    save_tiny(kind, True, tmp_path)
    one = in_one_process(tmp_path, dtype=dtype)
    model, _ = load(pipeline, tmp_path, 2, dtype=dtype)
    with torch.no_grad():
        ours, theirs = model(PADDED, attention_mask=PADDED_MASK).logits, one(PADDED, attention_mask=PADDED_MASK).logits
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def smollm2_inputs(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    prompts = ["The capital of France is", "Water boils at a temperature of", "My favourite"]
    return tokenizer(prompts[:1], return_tensors="pt"), tokenizer(prompts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_smollm2_writes_the_same_64_tokens(pipeline, smollm2, smollm2_inputs, workers, one_smollm2):
    model, _ = load(pipeline, smollm2, workers)
    for inputs, expected in zip(smollm2_inputs, one_smollm2, strict=True):
        tokens = greedy(model, inputs["input_ids"], 64, inputs["attention_mask"])
        assert torch.equal(tokens, expected)


@pytest.fixture(scope="module")
def one_smollm2(smollm2, smollm2_inputs):
    model = in_one_process(smollm2)
    return [greedy(model, inputs["input_ids"], 64, inputs["attention_mask"]) for inputs in smollm2_inputs]


def test_all_of_generate_works(pipeline, tmp_path):
    """Beam search reorders the workers' caches, assisted decoding crops them, sampling needs the logits alone."""
    save_tiny("llama", True, tmp_path)
    one = in_one_process(tmp_path)
    model, _ = load(pipeline, tmp_path, 2)
    for options in (
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ):
        assert torch.equal(greedy(model, PROMPT, 12, **options), greedy(one, PROMPT, 12, **options)), options
    sampled = []
    for each in (one, model):
        torch.manual_seed(0)
        sampled.append(each.generate(input_ids=PROMPT, do_sample=True, top_k=20, max_new_tokens=12, pad_token_id=0))
    assert torch.equal(*sampled)
    with torch.no_grad():
        assert torch.allclose(model(PROMPT).logits, one(PROMPT).logits, atol=1e-5)


def test_text_is_streamed_as_it_is_made(pipeline, smollm2, smollm2_inputs):
    model, _ = load(pipeline, smollm2, 2)
    streamer = TextIteratorStreamer(AutoTokenizer.from_pretrained(smollm2), skip_prompt=True)
    greedy(model, smollm2_inputs[0]["input_ids"], 8, streamer=streamer)
    pieces = [piece for piece in streamer if piece]
    assert len(pieces) > 2 and "Paris" in "".join(pieces)


def test_the_pages_of_a_sequence_are_free_when_the_caller_forgets_it(pipeline, tmp_path):
    save_tiny("llama", True, tmp_path)
    model, _ = load(pipeline, tmp_path, 2)
    free = model.engine.stats().free_pages
    output = greedy(model, PROMPT, 4, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, PagedCache)
    assert model.engine.stats().free_pages == (free[0] - 1,)
    more = model(output.sequences[:, -1:], past_key_values=output.past_key_values)
    assert more.logits.shape[1] == 1 and more.past_key_values.get_seq_length() == output.sequences.shape[1]
    del output, more
    assert model.engine.stats().free_pages == free


@pytest.mark.parametrize(
    ("victim", "options", "copied"), [(0, {}, False), (1, {}, False), (1, {"num_beams": 3}, False), (1, {}, True)]
)
def test_a_worker_that_dies_is_replaced_and_the_text_goes_on(pipeline, tmp_path, victim, options, copied):
    """The caller sees a pause. With 16-bit activations a prefill gives the very values that decoding gave."""
    save_tiny("opt", True, tmp_path)
    one = in_one_process(tmp_path, config=Int8Config(activations="16bit"))
    expected = greedy(one, PADDED, 20, PADDED_MASK, **options)
    model, _ = load(pipeline, tmp_path, 2, copied=copied, activations="16bit")

    class KillAfterTen:
        seen = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.seen += 1
            if self.seen == 10:
                os.kill(pipeline.infos[victim].pid, signal.SIGKILL)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    killed = pipeline.infos[victim].pid
    assert torch.equal(greedy(model, PADDED, 20, PADDED_MASK, stopping_criteria=[KillAfterTen()], **options), expected)
    assert pipeline.infos[victim].pid != killed and not psutil.pid_exists(killed)


def test_a_death_in_one_sequence_does_not_change_another(pipeline, tmp_path):
    """The second sequence rests while the worker dies and is replaced for the first; then it goes on."""
    save_tiny("llama", False, tmp_path)
    model, _ = load(pipeline, tmp_path, 2, activations="16bit")
    other = PROMPT.flip(1)
    with torch.no_grad():
        first, second = model(PROMPT, use_cache=True), model(other, use_cache=True)
        expected = model(torch.cat([other, PROMPT[:, :1]], dim=1), logits_to_keep=1).logits
        os.kill(pipeline.infos[1].pid, signal.SIGKILL)
        model(PROMPT[:, :1], past_key_values=first.past_key_values)
        resumed = model(PROMPT[:, :1], past_key_values=second.past_key_values).logits
    assert torch.allclose(resumed, expected, atol=1e-5)


def test_two_threads_generate_at_once(pipeline, tmp_path):
    save_tiny("gpt_neox", False, tmp_path)
    model, _ = load(pipeline, tmp_path, 2)
    prompts = [PROMPT, PROMPT.flip(1), PADDED[1:2]]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda prompt: greedy(model, prompt, 12), prompts))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_a_call_that_is_refused_does_not_spoil_the_next(pipeline, tmp_path):
    save_tiny("llama", False, tmp_path)
    model, _ = load(pipeline, tmp_path, 2, activations="16bit")
    with torch.no_grad():
        state = model(PROMPT, use_cache=True)
        expected = model(torch.cat([PROMPT, PROMPT[:, :1]], dim=1), logits_to_keep=1).logits
        for wrong in ({"logits_to_keep": torch.tensor([5])}, {"attention_mask": torch.zeros(1, 7)}):
            with pytest.raises(BigInt8Error):
                model(PROMPT[:, :1], past_key_values=state.past_key_values, **wrong)
        resumed = model(PROMPT[:, :1], past_key_values=state.past_key_values).logits
    assert torch.equal(resumed, expected)


def test_a_model_whose_workers_loaded_another_is_refused(pipeline, tmp_path):
    save_tiny("llama", False, tmp_path)
    old, _ = load(pipeline, tmp_path, 1)
    load(pipeline, tmp_path, 2)
    with pytest.raises(WorkerError, match="engine has ended"):
        old(PROMPT)


def test_a_sequence_longer_than_the_context_is_refused(pipeline, tmp_path):
    save_tiny("llama", True, tmp_path)
    model, _ = load(pipeline, tmp_path, 2, work=Workload(context=8))
    with pytest.raises(BigInt8Error, match=r"9 tokens.*context of 8"):
        greedy(model, PROMPT, 12)
