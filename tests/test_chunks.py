"""Long prompts run in chunks, in one process and over stages: logits and tokens are those of the whole prompt."""

import dataclasses
import weakref

import pytest
import torch
from staged import SeveralStages
from tiny import SIZES, save_tiny
from transformers import DynamicCache

from bigint8 import Int8Config, WorkerError, load_sharded_int8
from bigint8.checkpoint.headers import open_checkpoint
from bigint8.model.config import read_hf_config
from bigint8.plan.cut import make_plan
from bigint8.plan.devices import cpu_device
from bigint8.run.driver import PipelineModel
from bigint8.run.engine import Engine
from bigint8.run.local import engine_of

IDS = torch.tensor([[5, 17, 99, 3, 42, 7, 8, 61, 23, 24, 90, 33, 2]])
PADDED = torch.tensor([[0] * 6 + [5, 17, 99, 3, 42], list(range(60, 71)), [0, 0, 0, *range(20, 28)]])
MASK = (PADDED != 0).long()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each tiny model, loaded once in float32: with 16-bit activations a prompt's chunks give its very values."""
    made = {}

    def model(kind):
        if kind not in made:
            folder = save_tiny(kind, True, tmp_path_factory.mktemp(kind), shard="10GB")
            made[kind] = load_sharded_int8(
                folder, "cpu", config=Int8Config(activations="16bit"), dtype="float32", context=64, batch_size=6,
                progress=False,
            )  # fmt: skip
        return made[kind]

    return model


@pytest.fixture(params=sorted(SIZES))
def model(models, request):
    return models(request.param)


def in_chunks(model, chunk):
    """The same model, whose prompts run in chunks of so many tokens."""
    twin = object.__new__(type(model))
    twin.__dict__ = dict(model.__dict__)
    twin.plan = dataclasses.replace(model.plan, workload=dataclasses.replace(model.plan.workload, chunk=chunk))
    twin.engine = engine_of(model, twin.plan)
    weakref.finalize(twin, twin.engine.close)
    return twin


def chunks_seen(model):
    """How many tokens the first block is given at a time."""
    seen = []
    block = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    return seen, hook


def logits(model, ids, keep, cache=None, **kwargs):
    with torch.no_grad():
        cache = DynamicCache(config=model.config) if cache is None else cache
        return model(ids, past_key_values=cache, logits_to_keep=keep, **kwargs)


KEEPS = [0, 1, 3, torch.tensor([12]), torch.tensor([0, 4, 5, 12]), torch.tensor([2]), torch.tensor([-1, 3, -13])]


@pytest.mark.parametrize("chunk", [4, 5, 12])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(model, chunk):
    whole, parts = model, in_chunks(model, chunk)
    for keep in KEEPS:
        expected, found = logits(whole, IDS, keep), logits(parts, IDS, keep)
        assert found.logits.shape == expected.logits.shape
        assert torch.allclose(found.logits, expected.logits, atol=1e-4), keep
        assert found.past_key_values.get_seq_length() == IDS.shape[1]
    more = torch.tensor([[77, 3, 9, 4, 1, 60]])  # goes on in chunks, too
    expected = logits(whole, more, 0, logits(whole, IDS, 1).past_key_values)
    found = logits(parts, more, 0, logits(parts, IDS, 1).past_key_values)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)


def generate(model, ids=PADDED, mask=MASK, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generate_gives_the_tokens_of_the_whole_prompt(model, options):
    """Of a padded batch; with beams; where several tokens are tried at once."""
    batch = (IDS, torch.ones_like(IDS)) if "prompt_lookup_num_tokens" in options else (PADDED, MASK)
    assert torch.equal(generate(in_chunks(model, 4), *batch, **options), generate(model, *batch, **options))


def test_the_chunks_are_as_long_as_the_plan_says(models):
    model = models("llama")
    seen, hook = chunks_seen(model)
    try:
        generate(in_chunks(model, 4), max_new_tokens=2)
        assert seen == [4, 4, 3, 1]  # with a hook, through the model's own modules
        seen.clear()
        generate(in_chunks(model, 4), max_new_tokens=2, use_cache=False)
        assert seen == [11, 12]  # nothing is kept of a chunk: the prompt runs whole
    finally:
        hook.remove()


def test_without_a_cache_the_tokens_are_the_same(model):
    assert torch.equal(generate(in_chunks(model, 4), use_cache=False), generate(model, use_cache=False))


def test_a_prompt_with_more_to_it_than_tokens_runs_whole(models):
    model = models("gpt2")
    kinds = torch.randint(0, 9, IDS.shape, generator=torch.Generator().manual_seed(0))
    expected = logits(model, IDS, 0, token_type_ids=kinds).logits
    assert not torch.allclose(expected, logits(model, IDS, 0).logits, atol=1e-3)
    assert torch.equal(logits(in_chunks(model, 4), IDS, 0, token_type_ids=kinds).logits, expected)


# --- over stages ---


@pytest.fixture
def staged():
    """Makes the same model over two stages; its engine ends with the test."""
    engines = []

    def make(one, chunk, fails=()):
        checkpoint = open_checkpoint(one.plan.spec.folder)
        workload = dataclasses.replace(one.plan.workload, chunk=chunk)
        plan = make_plan(one.plan.spec, [cpu_device(share=2)] * 2, workload)
        stages = SeveralStages(plan, fails)
        engines.append(Engine.of(plan, stages))
        return PipelineModel(read_hf_config(checkpoint, plan.spec.access), engines[-1], plan), stages

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_stages_give_the_tokens_of_one_process(model, staged, options):
    several, stages = staged(model, 4)
    assert torch.equal(generate(several, **options), generate(model, **options))
    assert max(stages.rows) == 4


@pytest.mark.parametrize("keep", KEEPS, ids=str)
def test_stages_give_the_logits_of_one_process(models, staged, keep):
    model = models("llama")
    several, stages = staged(model, 5)
    with torch.no_grad():
        found = several(IDS, use_cache=True, logits_to_keep=keep)
        assert torch.allclose(found.logits, logits(model, IDS, keep).logits, atol=1e-4)
        assert stages.rows == [5, 5, 3] and found.past_key_values.get_seq_length() == 13


@pytest.mark.parametrize("fails", [[1], [2], [3], [5], [2, 4, 9]], ids=str)
@pytest.mark.parametrize("kind", ["opt", "mistral"])
def test_a_stage_that_is_lost_in_any_chunk_changes_nothing(models, staged, kind, fails):
    """Its keys and values are computed anew from the tokens; those of the other stage stay."""
    model = models(kind)
    several, stages = staged(model, 4, fails)
    undisturbed, others = staged(model, 4)
    assert torch.equal(generate(several), generate(undisturbed))
    assert stages.number > others.number


def test_logits_that_are_named_from_either_end_survive_a_lost_stage(models, staged):
    model = models("llama")
    first, more = IDS[:, :10], IDS[:, 10:]
    for keep in (torch.tensor([-1]), torch.tensor([0]), torch.tensor([1, -2])):
        found = []
        for lost in (False, True):
            several, stages = staged(model, 4)
            with torch.no_grad():
                state = several(first, use_cache=True)
                stages.fails = {stages.number + 1} if lost else set()
                found.append(several(more, past_key_values=state.past_key_values, logits_to_keep=keep).logits)
        assert torch.equal(*found)


def test_a_stage_that_is_always_lost_is_an_error(models, staged):
    several, _ = staged(models("llama"), 4, range(1, 100))
    with torch.no_grad(), pytest.raises(WorkerError, match="4 times in a row"):
        several(IDS, logits_to_keep=1)


def test_a_finished_batch_leaves_nothing_with_the_stages(models, staged):
    several, _ = staged(models("llama"), 4, [1])
    free = several.engine.stats().free_pages
    generate(several)
    generate(several, use_cache=False)
    assert several.engine.stats().free_pages == free
