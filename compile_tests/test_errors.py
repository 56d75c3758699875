"""What a careless user meets: one line that says what was wrong, with the value, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retro_ops import RetroConfig, RetroLayer
from retro_ops.benchmarks import throughput
from retro_ops.benchmarks.timing import memory_note, no_room
from retro_ops.cli import main
from retro_ops.models import (
    LocalPrefill,
    RetroCache,
    export_model,
    load_exported,
    load_model,
    load_tokenizer,
    spread,
)
from retro_ops.models.load import layer_devices

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_layer(**changes: Any) -> RetroLayer:
    sizes: dict[str, Any] = {
        "batch_size": 2,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_length": 64,
        "dtype": torch.float32,
    }
    config = changes.pop("config", RetroConfig())
    return RetroLayer(config, **{**sizes, **changes})


def filled_layer() -> RetroLayer:
    layer = make_layer()
    layer.prefill(*torch.zeros(2, 2, 2, 20, 32))
    return layer


def make_model(**changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="retro").eval()


def make_cache(**changes: Any) -> RetroCache:
    return RetroCache(LlamaConfig(**SIZES), **{"max_cache_len": 100, **changes})


def token(heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, heads, 1, 32, dtype=dtype)


def check(call: Callable[[], object], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert words in text
    assert "\n" not in text.strip()


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: make_layer(config=None), TypeError, "config must be a RetroConfig, got None"),
        (lambda: make_layer(config={"a": 1}), TypeError, "must be a RetroConfig, got {'a': 1}"),
        (lambda: make_layer(batch_size="1"), TypeError, "batch_size must be an int, got '1'"),
        (lambda: make_layer(head_dim=32.0), TypeError, "head_dim must be an int, got 32.0"),
        (
            lambda: make_layer(max_length=10**20),
            ValueError,
            "at most 2147483647, got 1000000000000",
        ),
        (lambda: make_layer(device="gpu"), ValueError, "as 'cpu' or 'cuda:0', got 'gpu'"),
        (lambda: make_layer(device=None), ValueError, "as 'cpu' or 'cuda:0', got None"),
        (lambda: make_layer(device="cuda:99"), ValueError, "there is no device 'cuda:99', torch"),
        (lambda: make_layer(device="cuda:99", offload=True), ValueError, "is no device 'cuda:99'"),
        (
            lambda: make_layer(max_length=2**31 - 1, batch_size=2**20),
            MemoryError,
            "1048576 rows of max_length 2,147,483,647 tokens take",
        ),
        (lambda: RetroConfig(cache_ratio=10**400), ValueError, "cache_ratio must lie in 0..1, got"),
        (lambda: make_layer().half(), RuntimeError, "cannot be cast"),
        (lambda: make_layer().to(torch.float64), RuntimeError, "make one with another dtype"),
        (
            lambda: make_layer().prefill([1], [2]),
            TypeError,
            "prefill: keys must be a tensor, got l",
        ),
        (
            lambda: make_layer().prefill(*torch.zeros(2, 2, 2, 9, 32), starts=[0, 0]),
            TypeError,
            "starts must be a tensor, got list",
        ),
        (
            lambda: make_layer().decode(None, token(2), token(2)),
            TypeError,
            "query must be a tensor, got NoneType",
        ),
        (lambda: filled_layer().crop("x"), (TypeError), "data type 'str'"),
        (lambda: filled_layer().crop(1.5), ValueError, "must be one whole number, or [2] of them"),
        (lambda: filled_layer().crop(torch.tensor([1, 2, 3])), ValueError, "got tensor([1, 2, 3])"),
        (lambda: filled_layer().reorder([0, 1]), TypeError, "rows must be a tensor, got list"),
        (lambda: filled_layer().reorder(torch.tensor([0, 2])), ValueError, "in 0..1, got [0, 2]"),
        (lambda: filled_layer().reorder(torch.tensor([0])), ValueError, "must be [2] integers"),
        (lambda: filled_layer().fork([0]), TypeError, "fork: rows must be a tensor, got list"),
        (lambda: filled_layer().fork(torch.tensor([0.5])), ValueError, "of 0..1, got [0.5]"),
    ],
)
def test_layer_says_what_is_wrong(
    call: Callable[[], object], kind: type[Exception], words: str
) -> None:
    check(call, kind, words)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: RetroCache("recall", max_cache_len=9), TypeError, "model.config, got str"),
        (lambda: RetroCache(make_model(), max_cache_len=9), TypeError, "got LlamaForCausalLM"),
        (lambda: make_cache(max_cache_len="9"), TypeError, "max_cache_len must be an int, got '9'"),
        (
            lambda: make_cache(retro_config={"page_size": 4}),
            TypeError,
            "must be a RetroConfig, got {'page_size': 4}",
        ),
        (
            lambda: make_cache(prefill_attention="local"),
            TypeError,
            "must be a function, as LocalPrefill(), got 'local'",
        ),
        (lambda: make_cache().fork([0]), ValueError, "must be a tensor of integers, got [0]"),
        (lambda: LocalPrefill(-1, 0), ValueError, "got -1 and 0"),
        (lambda: load_model("recall", device="gpu"), ValueError, "'cuda:0', got 'gpu'"),
        (lambda: load_model("recall", device="cuda:99"), ValueError, "is no device 'cuda:99'"),
        (lambda: load_model("recall", rope_parameters=[1]), ValueError, "a dictionary, as"),
        (lambda: load_tokenizer("recall"), FileNotFoundError, "take another model for text"),
        (lambda: load_tokenizer("no/where"), FileNotFoundError, "no model 'no/where'"),
        (lambda: spread(make_model(), []), ValueError, "devices must be 1 to 2, one layer or more"),
        (lambda: spread(make_model(), ["cpu"] * 3), ValueError, "for each, got 3"),
        (lambda: spread(make_model(), ["cuda:99"]), ValueError, "is no device 'cuda:99'"),
        (
            lambda: export_model(make_model(), "/no/such/x.pt2", context=64),
            FileNotFoundError,
            "'/no/such' is no folder that can be written to",
        ),
        (lambda: load_exported(__file__), ValueError, "make one with `python -m retro_ops export`"),
    ],
)
def test_models_say_what_is_wrong(
    call: Callable[[], object], kind: type[Exception], words: str
) -> None:
    check(call, kind, words)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    check(lambda: load_model(tmp_path), FileNotFoundError, "not a directory with a model")
    (tmp_path / "config.json").write_text("{}")
    words = "makes nothing of its config.json: Unrecognized model"
    check(lambda: load_model(tmp_path), ValueError, words)
    check(lambda: load_tokenizer(tmp_path), FileNotFoundError, "beside its config.json")


def test_files_that_hold_no_cache_of_the_model(tmp_path: Path) -> None:
    model, path = make_model(), tmp_path / "cache"
    cache = make_cache()
    with torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.int64), past_key_values=cache)
    check(lambda: cache.save(tmp_path), FileNotFoundError, "it is a folder")
    nowhere = tmp_path / "none" / "cache"
    check(lambda: cache.save(nowhere), FileNotFoundError, "there is no folder")
    cache.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]

    def load(config: LlamaConfig = model.config, path: Path = path, **options: Any) -> RetroCache:
        return RetroCache.load(path, config, **options)

    other = LlamaConfig(**{**SIZES, "num_hidden_layers": 3})
    check(lambda: load(other), ValueError, "num_hidden_layers is 2 there, 3 here; load it with the")
    check(lambda: load(device="gpu"), ValueError, "'cuda:0', got 'gpu'")
    check(lambda: load(device="cuda:99"), ValueError, "there is no device 'cuda:99'")
    check(lambda: load(max_cache_len=10), ValueError, "make the layer or cache with a larger max")
    text = tmp_path / "text"
    text.write_text("hello")
    check(lambda: load(path=text), ValueError, "is not a cache that RetroCache.save wrote, or is")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    check(
        lambda: load(path=tmp_path / "other"), ValueError, "not a cache that RetroCache.save wrote"
    )
    assert layer_devices(model) == [torch.device("cpu")] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("demo --device cuda:99", "must be one of cpu"),
        ("demo --seed -1", "argument --seed: must be a whole number from 0 on, got '-1'"),
        ("demo --seed 99999999999999999999", "must be less than 2^63"),
        ("demo --json .", "cannot write '.': it is a folder; name a file in it"),
        ("demo --json none/x.json", "cannot write 'none/x.json': there is no folder 'none'"),
        ("demo --context 262144 --questions 9", "exceed the 262144 tokens that the model reads"),
        ("demo --context 99999999999", "exceed the 262144 tokens that the model reads; make"),
        ("demo --batch-size 100000000", "of 100,000,000 prompts of 32,768 tokens need 12,500,000"),
        ("demo --model .", "no model '.': it is not built in"),
        ("demo --model half", "model 'half': transformers"),
        ("demo --data-path prompts.json", "recall models read token ids: take another model"),
        ("export half --context 99", "makes nothing of its config.json"),
        ("export recall --context 99 --out none/x.pt2", "there is no folder 'none'"),
        ("info --model recall --batch-size 99999999999999999999", "must be less than 2^63"),
        ("info --model half", "makes nothing of its config.json"),
        ("bench decode --dtype fp8", "must be names out of float32,bfloat16,float16, got 'fp8'"),
        (
            "bench export --runner prompts.json",
            "the program retro_runner, got 'prompts.json'; `make",
        ),
        ("bench export --model llama-3-8b,llama", "no model 'llama': it is not built in"),
        ("bench buffer --trace synthetic,llama", "no model 'llama': it is not built in"),
        ("bench buffer --trace recall --context 262144", "reads 262144 tokens, got a text of"),
        ("bench quality --model recall,", "must be names with commas between them, got 'recall,'"),
        ("bench long --tokens 10 --window 3", "bench long: tokens must be a multiple of window"),
        ("bench throughput --model tiny --steps 99999", "throughput: steps must be at most"),
        (
            "bench spread --model tiny --devices 9 --device cpu --context 128",
            "be 1 to 2, one layer",
        ),
        ("longbench --model gemma --data prompts.json", "got 'prompts.json', which is no zip"),
        ("longbench --model gemma --data none", "got 'none', which is not there"),
    ],
)
def test_commands_say_what_is_wrong(
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text(json.dumps([{"input": "a"}]))
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments.split())
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last
    assert last.startswith("retro_ops")


def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the work, not after it. (Root may write everywhere, so the system is asked.)"""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SystemExit):
        main(["info", "--json", str(tmp_path / "x.json")])
    assert f"'{tmp_path}' may not be written to" in capsys.readouterr().err
    check(
        lambda: export_model(make_model(), tmp_path / "x.pt2", context=64),
        FileNotFoundError,
        "is no folder that can be written to",
    )


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_dtype_of_a_cpu_is_float32(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--context", "64", "--questions", "1", "--device", name]) == 0
    assert f"float32 on {name}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info --dtype bf16 --model tiny", "bench long --dtype bf16"])
def test_short_names_of_dtypes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("retro_ops.cli._info", lambda options: seen.append(options.dtype))
    monkeypatch.setattr("retro_ops.cli_bench._bench_long", lambda o: seen.append(o.dtype))
    assert main(command.split()) == 0
    assert seen == ["bfloat16"]


def test_notes_of_what_has_no_room() -> None:
    """Whatever says so: a check before, torch on the host, torch on a GPU. Other errors go on."""
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 55)
    note = no_room(failed.value)
    assert note is not None
    assert note.startswith("does not fit in memory: 144,115,188.1 GB")
    assert no_room(MemoryError("needs 9 GB")) == "does not fit in memory: needs 9 GB"
    assert memory_note(torch.OutOfMemoryError("CUDA out of memory")) == "does not fit in memory"
    pinned = RuntimeError("host_tensor: no room for 9 bytes of pinned host memory, ...")
    assert no_room(pinned) == "does not fit in memory"
    assert no_room(RuntimeError("a bug")) is None
    with pytest.raises(RuntimeError, match="a bug"):
        memory_note(RuntimeError("a bug"))


class FullHost:
    """A study of throughput in which two rows are too many for the host."""

    tokens, device = 64, torch.device("cpu")

    def limits(self, attention: str) -> dict[str, int]:
        return {"rows_host": 2}

    def measure(self, case: throughput.Case) -> list[dict[str, float]]:
        if case.rows == 2:
            raise MemoryError("RetroLayer: offload=True needs 99 GB of host memory")
        return [{"ms": 1.0, "tokens_per_s": 1000.0}]


def test_throughput_notes_what_the_host_lacks() -> None:
    """The row says so, and the others go on."""
    study: Any = FullHost()
    rows = list(throughput._best(study, "retro offloaded", [2, 1], lambda *facts: None))
    assert [row["batch"] for row in rows] == [2, 1]
    assert rows[0]["note"].endswith("needs 99 GB of host memory")
    assert rows[1]["best"] == "yes"


def test_commands_say_that_memory_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line, though torch raises a RuntimeError; other errors of that kind are bugs."""
    monkeypatch.setattr("retro_ops.cli._info", lambda options: torch.empty(1 << 55))
    assert main(["info"]) == 2
    said = capsys.readouterr().err
    assert "does not fit in memory: 144,115,188.1 GB at once; make the context" in said

    def broken(options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("retro_ops.cli._info", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])
