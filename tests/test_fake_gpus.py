"""One process, several devices: what a block needs is where it computes, for every family and for odd device maps.

The GPUs are not there: `pretend` keeps the values on the CPU, and torch's fake tensors say which devices may meet.
"""

import copy
import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pretend
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pretend import pretending
from pretend_cuda import PretendCuda, install
from tiny import SIZES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from bigint8 import BigInt8Error, Int8Config, load_sharded_int8
from bigint8.load import device_map
from bigint8.plan.devices import Device
from bigint8.run.stages import LocalStages

PROMPT = torch.tensor([[5, 17, 99, 3, 42, 7]])
PADDED = torch.tensor([[0, 0, 0, 5, 17], [9, 8, 7, 6, 5], [0, 0, 33, 44, 55]])
PADDED_MASK = (PADDED != 0).long()
KEPT = Int8Config(activations="16bit")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendCuda:
    receive = LocalStages.receive

    def pretend_to_receive(stages, timeout):
        with pretending():  # the engine runs steps in a thread of its own
            return receive(stages, timeout)

    monkeypatch.setattr(LocalStages, "receive", pretend_to_receive)
    return install(monkeypatch, find_races=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of tiny models, each saved once."""
    made = {}

    def save(kind="llama", tied=True, dtype=torch.float16):
        if (kind, tied, dtype) not in made:
            made[kind, tied, dtype] = save_tiny(kind, tied, tmp_path_factory.mktemp(kind), dtype, "10GB")
        return made[kind, tied, dtype]

    return save


def load(folder, device_map="auto", config=KEPT, **kwargs):
    options = {"context": 64, "batch_size": 3, "progress": False} | kwargs
    with pretending():
        return load_sharded_int8(folder, device_map, config=config, **options)


def where(tensor):
    return str(tensor.device)


def two_steps(model, device, ids=PROMPT):
    """Logits of a prompt, of a token after it, and the cache that both left."""
    with pretending(), torch.no_grad():
        first = model(ids.to(device), past_key_values=DynamicCache(config=model.config), logits_to_keep=0)
        assert where(first.logits) == device and first.logits.shape[:2] == ids.shape
        second = model(ids[:, :1].to(device), past_key_values=first.past_key_values)
        assert where(second.logits) == device and second.logits.shape[:2] == (len(ids), 1)
        return first.logits.cpu(), second.logits.cpu(), second.past_key_values


def blocks_of(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


_on_one_gpu: dict = {}


def on_one_gpu(folder, config, dtype):
    """Logits of a prompt, and of a token after it."""
    key = folder, config, dtype
    if key not in _on_one_gpu:
        _on_one_gpu[key] = two_steps(load(folder, "cuda:0", config, dtype=dtype), "cuda:0")[:2]
    return _on_one_gpu[key]


def check(model, folder, devices=("cuda:0",), config=KEPT):
    """The logits are those of one device, wherever the prompt is, and each block's keys and values lie with it."""
    expected = on_one_gpu(folder, config, model.plan.dtype)
    for device in devices:
        first, second, cache = two_steps(model, device)
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
        for block, layer in zip(blocks_of(model), cache.layers, strict=True):
            there = {where(weight) for name, weight in block.named_parameters() if "att" in name}
            assert {where(layer.keys), where(layer.values)} <= there


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_two_gpus_give_the_logits_of_one(cuda, saved, kind, tied):
    model = load(saved(kind, tied))
    assert set(model.hf_device_map.values()) == {0, 1}
    check(model, saved(kind, tied))


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_sending_inputs_to_the_layers_that_own_tensors_is_not_enough(cuda, saved, monkeypatch, kind):
    """The proof that the test above can fail: this is what the loader did once."""

    def follow_layers(model, named, device_of):
        for name, module in model.named_modules():
            if module._parameters or module._buffers:
                hook = AlignDevicesHook(execution_device=device_of(name), skip_keys="past_key_values")
                add_hook_to_module(module, hook)

    monkeypatch.setattr(device_map, "follow_devices", follow_layers)
    model = load(saved(kind))
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0 and cuda:1|same device.*cuda:1 and cuda:0"):
        two_steps(model, "cuda:0")


@pytest.mark.parametrize("kind", ["llama", "mistral", "opt-350m", "bloom", "gpt2"])
def test_what_a_gpu_cannot_hold_computes_on_the_cpu(cuda, saved, kind):
    folder = saved(kind)
    blocks = (
        "transformer.h" if kind in ("bloom", "gpt2") else "model.decoder.layers" if "opt" in kind else "model.layers"
    )
    model = load(folder, {"": 0, f"{blocks}.1": "cpu", f"{blocks}.3": "cpu"}, dtype="float32")
    first, second, cache = two_steps(model, "cuda:0")
    expected = on_one_gpu(folder, KEPT, "float32")
    assert torch.allclose(first, expected[0], atol=1e-4) and torch.allclose(second, expected[1], atol=1e-4)
    assert [where(layer.keys) for layer in cache.layers][:4] == ["cuda:0", "cpu", "cuda:0", "cpu"]


ODD_MAPS = {
    "a block": {"": 0, "model.layers.3": 1},
    "half a block": {"model.layers.1.mlp": 1, "": 0},
    "the other half": {"model.layers.1.self_attn": 1, "": 0},
    "one matrix": {"": 0, "model.layers.1.self_attn.q_proj": 1, "model.layers.2.mlp.down_proj": 1},
    "a block after one elsewhere": {"": 0, "model.layers.0": 1, "model.layers.1.mlp": 1},
    "a list": {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 0, "lm_head": 1},
    "the base model": {"model": 1, "lm_head": 0},
    "embeddings apart": {"model.embed_tokens": 1, "": 0},
    "the norm apart": {"model.norm": 1, "": 0},
    "every second block": {"": 0, **{f"model.layers.{i}": 1 for i in (1, 3)}},
    "every part by name": {
        "model.embed_tokens": 1,
        **{f"model.layers.{i}.{part}": (i + j) % 2 for i in range(5) for j, part in enumerate(
            ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"))},
        "model.norm": 0,
        "lm_head": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("named", ODD_MAPS.values(), ids=ODD_MAPS)
def test_any_device_map_gives_the_logits_of_one_gpu(cuda, saved, named):
    """Also where the prompt is not where the embeddings are."""
    everywhere = ("cuda:0", "cuda:1", "cpu")
    check(load(saved(tied=False), named), saved(tied=False), everywhere if "model" in named else everywhere[1:2])


def test_a_model_that_calls_past_its_base_model_follows_too(cuda, saved):
    """OPT's head calls the decoder, which lies below the mapped name."""
    check(load(saved("opt", False), {"model": 1, "lm_head": 0}), saved("opt", False))
    check(load(saved("opt", False), {"": 0, "model.decoder.embed_positions": 1}), saved("opt", False))


@pytest.mark.parametrize("kind", ["llama", "opt-350m", "gpt2"])
def test_an_int8_head_that_is_tied_lies_with_the_embeddings(cuda, saved, kind):
    config = Int8Config(int8_head=True, activations="16bit")
    model = load(saved(kind), config=config)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embeddings.weight and head.scale is embeddings.scale and where(head.weight) == "cuda:0"
    check(model, saved(kind), config=config)


@pytest.mark.parametrize("tied", [True, False])
def test_16_bit_tables_of_a_float32_model_follow(cuda, saved, tied):
    model = load(saved("llama", tied), dtype="float32")
    assert model.get_output_embeddings().weight.dtype == torch.float16 and model.dtype == torch.float32
    check(model, saved("llama", tied))


# --- generate ---


def generate(model, device, ids=PADDED, mask=PADDED_MASK, **options):
    with pretending():
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
        return model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options).cpu()


OPTIONS = (
    {},
    {"num_beams": 2},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 2},
    {"cache_implementation": "static"},
)


@pytest.mark.parametrize("kind", ["llama", "mistral", "bloom"])
def test_generate_gives_the_tokens_of_one_gpu(cuda, saved, kind):
    model, one = (load(saved(kind), device, batch_size=6) for device in ("auto", "cuda:0"))
    for options in OPTIONS if kind == "llama" else OPTIONS[:1]:
        single = "prompt_lookup_num_tokens" in options
        ids, mask = (PROMPT, torch.ones_like(PROMPT)) if single else (PADDED, PADDED_MASK)
        expected = generate(one, "cuda:0", ids, mask, **options)
        assert torch.equal(generate(model, "cuda:0", ids, mask, **options), expected), options
    assert torch.equal(generate(model, "cpu", ids, mask, **options), expected)


# --- what holds whatever the devices ---


def test_a_model_over_two_gpus_holds_to_its_plan(cuda, saved):
    model = load(saved(), context=8, batch_size=1)
    with pytest.raises(BigInt8Error, match=r"9 tokens.*context of 8"):
        two_steps(model, "cuda:0", torch.ones(1, 9, dtype=torch.long))


def test_a_long_prompt_over_two_gpus_runs_in_chunks(cuda, saved):
    model = load(saved("llama", False))
    seen = []
    blocks_of(model)[4].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    expected = two_steps(model, "cuda:0")[0]
    model.plan = dataclasses.replace(model.plan, workload=dataclasses.replace(model.plan.workload, chunk=4))
    assert torch.allclose(two_steps(model, "cuda:0")[0], expected, atol=2e-2)
    assert seen == [6, 1, 4, 2, 1]


def test_its_memory_goes_when_the_model_does(cuda, saved):
    model = load(saved())
    two_steps(model, "cuda:0")
    weight = weakref.ref(blocks_of(model)[3])
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_mask_goes_to_each_device_once(cuda, saved, monkeypatch):
    """And not to each block there."""
    model, sent = load(saved("bloom")), []

    def watch(func, args, kwargs, result):
        if func is torch.ops.aten._to_copy.default and result.numel() and where(result) == "cuda:1" != where(args[0]):
            sent.append(tuple(result.shape))

    monkeypatch.setattr(pretend, "watchers", [watch])
    two_steps(model, "cuda:0")
    assert len(sent) == len(set(sent)) and len(sent) >= 4


def test_a_mask_that_is_changed_between_two_calls_of_the_base_model_is_sent_again(cuda, saved):
    """Nobody calls the model itself here, whose forward pass would forget what was sent."""
    model = load(saved("llama"))
    changed = torch.zeros(1, 1, 6, 6)
    changed[..., :3] = -1e9
    with pretending(), torch.no_grad():
        ids, mask, changed = PROMPT.to("cuda:0"), torch.zeros(1, 1, 6, 6).to("cuda:0"), changed.to("cuda:0")
        model.model(input_ids=ids, attention_mask=mask)
        expected = model.model(input_ids=ids, attention_mask=changed).last_hidden_state
        mask.copy_(changed)
        found = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(found.cpu(), expected.cpu())


def test_a_copy_of_the_model_follows_too(cuda, saved):
    model = load(saved())
    first = two_steps(model, "cuda:0")[0]
    with pretending():
        other = copy.deepcopy(model)
    assert torch.equal(two_steps(other, "cuda:0")[0], first)


def test_two_threads_may_use_it_at_once(cuda, saved):
    model = load(saved())
    expected = two_steps(model, "cuda:0")[0]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: two_steps(model, "cuda:0")[0], range(2)):
            assert torch.equal(found, expected)


def test_each_gpu_prepares_for_the_rows_that_a_batch_of_prompts_brings(cuda, saved):
    load(saved(), context=64, batch_size=3)
    ((weights, dtype, rows, activations),) = cuda.prepared
    assert {where(weight) for weight in weights} == {"cuda:0", "cuda:1"}
    assert (dtype, rows, activations) == (torch.float16, 3 * 64 + 3, "16bit")


@pytest.mark.parametrize(("model_type", "tied"), [("stablelm", False), ("stablelm", True), ("gemma2", True)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_family_that_is_not_in_the_table_follows_accelerates_map(
    cuda, model_type, tied, dtype, tmp_path, monkeypatch
):
    config = AutoConfig.for_model(
        model_type, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path)
    gpus = [Device(f"cuda:{i}", "a GPU", 50_000, "float16") for i in range(2)]
    monkeypatch.setattr(device_map, "cuda_devices", lambda: gpus)
    model = load(tmp_path, dtype=dtype)
    assert len(set(model.hf_device_map.values())) > 1
    first, second, _ = two_steps(model, "cuda:0")
    one = two_steps(load(tmp_path, "cpu", dtype=dtype), "cpu")
    assert torch.allclose(first, one[0], atol=1e-2) and torch.allclose(second, one[1], atol=1e-2)
