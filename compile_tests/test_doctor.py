"""`info`: what it says of an installation, whether it finds a broken op, and its hints."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import retro_ops
from retro_ops import doctor
from retro_ops.cli import main
from retro_ops.testing import cpu_kernel_sets

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_op_is_right(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By the command, on the CPU and on a GPU that is there."""
    file = tmp_path / "info.json"
    assert main(["info", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert figures["retro_ops"] == retro_ops.__version__
    assert figures["torch"].startswith(torch.__version__)
    checks = figures["checks"]
    for kernels in cpu_kernel_sets():
        tried = {check["op"] for check in checks if check["device"] == f"cpu, {kernels}"}
        assert tried == set(retro_ops.__all__) - {"RetroConfig", "RetroLayer"}
        assert f"{len(tried)} of {len(tried)} ops are right on cpu, {kernels}" in printed
    assert [check for check in checks if check["problem"]] == []
    assert any(check["device"] == "cuda" for check in checks) == (
        torch.cuda.is_available() and doctor.find_library("_C_cuda") is not None
    )


@pytest.mark.parametrize("op", doctor.OPS)
def test_a_wrong_op_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the reference that changes here, or what is expected of a layer."""
    calls = CALLS or CALLS.update(doctor._recorded()) or CALLS
    assert doctor._tried(op, calls[op], "cpu") == ""
    if op == "grow_index":
        monkeypatch.setattr(doctor, "dense_attention", lambda query, *kv: query)
    else:
        whole = ("decode_attention", "offloaded_attention")
        module = import_module("retro_ops.ops." + ("merged_attention" if op in whole else op))
        true = module.reference

        def reference(*args: Any, **kwargs: Any) -> Any:
            out = true(*args, **kwargs)
            if out is None:  # it changes the last tensor that it is given
                changed = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
                changed[-1].add_(1)
                return None
            first = out if isinstance(out, torch.Tensor) else out[0]
            first.add_(1)
            return out

        monkeypatch.setattr(module, "reference", reference)
    assert doctor._tried(op, calls[op], "cpu")


CALLS: dict[str, Any] = {}


def test_a_wrong_op_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = doctor.Check("wave_estimate", "cpu, avx2", "result 0: 50 % of it is wrong")
    monkeypatch.setattr(doctor, "self_test", lambda: iter([wrong]))
    with pytest.raises(SystemExit, match="1 of 1 self-tests failed"):
        main(["info"])
    assert "wrong: wave_estimate on cpu, avx2: result 0: 50 % of it" in capsys.readouterr().out


def test_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem has a hint that says what to do, and none is there without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if "nvidia" in name else name)
    monkeypatch.setattr(doctor, "find_library", lambda stem: None)
    assert doctor.hints() == []
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler -O2")
        patch.setattr(doctor.shutil, "which", lambda name: None)
        assert "no C++ compiler (no-such-compiler)" in one(doctor.hints())
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_version_of", lambda package: "5.3.1")
        assert "transformers 5.3.1 is older than 5.17" in one(doctor.hints())
        patch.setattr(doctor, "_version_of", lambda package: "not installed")
        assert "pip install 'retro_ops[models]'" in one(doctor.hints())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        assert "torch uses 1 of 64 cores" in one(doctor.hints())
    with monkeypatch.context() as patch:
        patch.setattr(doctor.shutil, "which", lambda name: name)  # nvidia-smi is there
        assert "was built without CUDA, and there is a GPU" in one(doctor.hints())
        patch.setattr(torch.version, "cuda", "13.0")
        assert "torch sees no GPU" in one(doctor.hints())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        assert "no CUDA op library: build one" in one(doctor.hints())
    with monkeypatch.context() as patch:
        patch.setattr(retro_ops, "__version__", "9.9.9")
        assert "the Python package of 9.9.9: build it anew" in one(doctor.hints())


def one(hints: list[str]) -> str:
    assert len(hints) == 1, hints
    return hints[0]
