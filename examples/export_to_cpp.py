"""A model as one file, run by a C++ program without Python; its tokens compared with generate's.

Exports the model, builds the runner as `make runner` does unless it is there, lets it continue a
prompt, and lets `model.generate` do the same. `docs/export.md` explains each step. It needs a
checkout (the runner's source) and a C++ compiler, and takes about a minute.

    python examples/export_to_cpp.py
    python examples/export_to_cpp.py --model gemma --prompt "The capital of France is"
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from retro_ops.models import RetroCache, export_model, load_model, load_tokenizer
from retro_ops.models.recall import is_recall, make_task

ROOT = Path(__file__).resolve().parents[1]


def token_ids(model: str, prompt: str | None, context: int, new_tokens: int) -> Tensor:
    """What the model is to continue, `[1, T]`: the prompt; a question to a recall model; tokens
    that mean nothing."""
    if prompt is not None:
        return load_tokenizer(model)(prompt, return_tensors="pt").input_ids
    length = context - new_tokens - 3
    if length < 16:
        raise ValueError(f"a context of {context} tokens has no room for a prompt")
    if is_recall(model):
        body, questions, _ = make_task(length, length // 16, 1)
        return torch.cat((body, questions[:, 0]), dim=1)
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(0))


def run(runner: Path, package: Path, ids: Tensor, new_tokens: int) -> tuple[list[int], str]:
    """Tokens that the C++ program writes, and what it says of its times."""
    libraries = [path for path in sorted(torch.ops.loaded_libraries) if "retro_ops" in path]
    options = [word for path in libraries for word in ("--ops", path)]
    command = [str(runner), str(package), *options, "--new-tokens", str(new_tokens)]
    line = " ".join(map(str, ids[0].tolist())) + "\n"
    ran = subprocess.run(command, input=line, capture_output=True, text=True)
    if ran.returncode:
        raise OSError(ran.stderr.strip())
    return [int(word) for word in ran.stdout.split()], ran.stderr.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if both write the same tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="recall", help="name or directory (%(default)s)")
    parser.add_argument("--prompt", help="text to continue (tokens up to the context)")
    parser.add_argument("--context", type=int, default=4096, help="prompt and answer (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--runner", type=Path, default=ROOT / "build" / "retro_runner")
    options = parser.parse_args(arguments)
    try:
        if not options.runner.is_file():
            build = ["setup.py", "--quiet", "build_runner", "--output", str(options.runner)]
            subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
        ids = token_ids(options.model, options.prompt, options.context, options.new_tokens)
        # Where roundings differ, two tokens may be as good as each other: not in float32.
        model = load_model(options.model, dtype=torch.float32, context=options.context)
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "model.pt2"
            export_model(model, package, context=options.context, name=options.model)
            print(f"exported: {package.stat().st_size / 1e6:.1f} MB")
            written, times = run(options.runner, package, ids, options.new_tokens)
        cache = RetroCache(model.config, max_cache_len=options.context)
        out = model.generate(
            ids.to(model.device),
            past_key_values=cache,
            max_new_tokens=options.new_tokens,
            do_sample=False,
        )
    except (OSError, ValueError, MemoryError, subprocess.CalledProcessError) as error:
        parser.error(str(error))
    expected = out[0, ids.shape[1] :].tolist()
    print("C++:   ", *written)
    print("Python:", *expected)
    print(times)
    print("the same tokens" if written == expected else "DIFFERENT TOKENS")
    return 0 if written == expected else 1


if __name__ == "__main__":
    sys.exit(main())
