"""The command line, `python -m retro_ops COMMAND` or `retro COMMAND`.

Commands import what they need when they run. Bad input is one line on standard error and exit
status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retro_ops.cli_bench import add_bench
from retro_ops.cli_parts import (
    ATTENTIONS,
    DTYPES,
    Parser,
    add_budgets,
    add_command,
    add_device,
    add_dtype,
    add_json,
    add_offload,
    add_seed,
    budgets,
    device_of,
    dtype_name,
    dtype_of,
    names,
    new_file,
    number,
    numbers,
    print_table,
    progress_bar,
    write_json,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, or 2 for bad input."""
    parser = Parser(prog="retro_ops", description="Long-context decoding with RetroInfer.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_export(commands)
    add_bench(commands)
    _add_ruler(commands)
    _add_longbench(commands)
    _add_info(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, NotImplementedError, ImportError, MemoryError) as error:
        said = str(error)
    except RuntimeError as error:
        from retro_ops.benchmarks.timing import no_room

        why = no_room(error)
        if why is None:
            raise
        said = f"{why}; make the context or the batch smaller"
    else:
        return 0
    print(f"{options.prog}: {' '.join(said.split())}", file=sys.stderr)
    return 2


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands, "demo", _demo, "Ask a model about a long context, dense and retro side by side."
    )
    parser.add_argument(
        "--model",
        default="recall",
        help="recall or recall-128k (in the package), gemma, a directory, or a model of the hub",
    )
    parser.add_argument("--context", type=number(1), help="tokens (recall: 32768, text: 16384)")
    parser.add_argument("--batch-size", type=number(1), default=1, help="rows at once")
    parser.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    parser.add_argument("--records", type=number(1), help="recall: planted (context / 16)")
    parser.add_argument(
        "--questions",
        type=number(1),
        help="recall: asked in one context (64); text: contexts with a fact each, at depths from "
        "the beginning to the end (one for each row of a batch)",
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        help='text models: a JSON file, [{"input": str, "outputs": str}, ...]; '
        "without it, facts are hidden in prose",
    )
    parser.add_argument("--max-new-tokens", type=number(2), default=16, help="text models")
    add_dtype(parser)
    add_device(parser)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile retro's decode step into one graph",
    )
    add_seed(parser, 0)
    add_json(parser)
    add_offload(parser)
    add_budgets(parser)


def _demo(options: argparse.Namespace) -> None:
    from retro_ops.models import demo, load_model, load_tokenizer
    from retro_ops.models.recall import is_recall

    config = budgets(options)
    _check_offload(options)
    prompts = demo.read_prompts(options.data_path) if options.data_path else None
    place, name = device_of(options), dtype_of(options)
    with progress_bar() as progress:
        progress(f"loading {options.model}", 0, 1)
        model = load_model(options.model, dtype=DTYPES[name], device=place)
        shared: dict[str, Any] = {
            "batch_size": options.batch_size,
            "attentions": options.attention,
            "config": config,
            "offload": options.offload,
            "compile_step": options.compile,
            "progress": progress,
        }
        if prompts is None and is_recall(options.model):
            context = options.context or 32768
            records = options.records or max(context // 16, 1)
            questions = options.questions or min(64, records)
            results = demo.recall_demo(
                model,
                context=context,
                records=records,
                questions=questions,
                seed=options.seed,
                **shared,
            )
            title = f"{records:,} records in {context:,} tokens"
        else:
            tokenizer = load_tokenizer(options.model)
            if prompts is None:
                context = options.context or 16384
                count = options.questions or options.batch_size
                demo.check_batch(
                    model,
                    options.batch_size,
                    context,
                    attentions=options.attention,
                    config=config,
                    offload=options.offload,
                )
                depths = [(i + 0.5) / count for i in range(count)]
                prompts = demo.hidden_facts(tokenizer, context, depths, seed=options.seed)
                title = f"facts hidden in {context:,} tokens of prose"
            else:
                title = f"{len(prompts)} prompts of {options.data_path.name}"
            results = demo.text_demo(
                model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, **shared
            )
    title = f"{options.model}, {title}, batch {options.batch_size}, {name} on {place}"
    columns = {
        "attention": [result.attention for result in results],
        "right answers": [f"{result.right} of {result.questions}" for result in results],
        "prefill s": [f"{result.prefill_seconds:.2f}" for result in results],
        "of it index build s": [f"{result.build_seconds:.2f}" for result in results],
        "first step s": [f"{result.first_step_seconds:.2f}" for result in results],
        "ms per token": [f"{result.step_milliseconds:.2f}" for result in results],
        "KV MB read per token": [f"{result.kv_bytes_per_token / 1e6:.2f}" for result in results],
    }
    if options.offload:
        columns["of it from slow memory"] = [
            "" if (slow := result.slow_bytes_per_token) is None else f"{slow / 1e6:.2f}"
            for result in results
        ]
        columns["page hit ratio"] = [
            "" if result.hit_ratio is None else f"{result.hit_ratio:.2f}" for result in results
        ]
    print_table(title, columns)
    for result in results:
        for answer in result.answers[:4]:
            print(f"{result.attention} wrote: {' '.join(answer.split())}")
    write_json(options.json, [dataclasses.asdict(result) for result in results])


def _check_offload(options: argparse.Namespace) -> None:
    if options.offload and "retro" not in options.attention:
        raise ValueError(
            f"--offload is for retro attention, got --attention {','.join(options.attention)}; "
            "add retro, or leave --offload out"
        )


def package_file(text: str) -> Path:
    """A parser of packages to write."""
    path = new_file(text)
    if path.suffix != ".pt2":
        raise argparse.ArgumentTypeError(f"must be a file *.pt2, got {text!r}")
    return path


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands, "export", _export, "Write a model as a package that runs without Python."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="recall or recall-128k (in the package), gemma, a directory, or a model of the hub",
    )
    parser.add_argument(
        "--context",
        type=number(1),
        required=True,
        help="tokens that a row can hold, prompt and generated ones",
    )
    parser.add_argument("--batch-size", type=number(1), default=1, help="rows; no other number")
    parser.add_argument("--out", type=package_file, default="model.pt2", metavar="FILE")
    add_offload(parser)
    add_dtype(parser)
    add_device(parser)
    add_json(parser)
    add_budgets(parser)


def _export(options: argparse.Namespace) -> None:
    import time

    from retro_ops.models import export_model, load_model

    config = budgets(options)
    place, name = device_of(options), dtype_of(options)
    begin = time.perf_counter()
    with progress_bar() as progress:
        progress(f"loading {options.model}", 0, 5)
        model = load_model(options.model, dtype=DTYPES[name], device=place, context=options.context)
        metadata = export_model(
            model,
            options.out,
            context=options.context,
            batch_size=options.batch_size,
            config=config,
            offload=options.offload,
            name=options.model,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    megabytes = options.out.stat().st_size / 1e6
    print(
        f"{options.out}: {options.model}, {name} on {metadata['retro.device']}, batch "
        f"{options.batch_size}, up to {options.context:,} tokens, "
        f"{'offloaded, ' * options.offload}{megabytes:.1f} MB, "
        f"in {seconds:.0f} s"
    )
    print(f"It needs version {metadata['retro.ops']} of the op library: {_library()}")
    figures = {**metadata, "megabytes": megabytes, "seconds": seconds}
    write_json(options.json, figures)


def _library() -> str:
    """Where the op library is, as one would type it here."""
    from retro_ops._library import find_library

    path, here = find_library("_C"), Path.cwd()
    inside = path is not None and path.resolve().is_relative_to(here)
    return str(path.resolve().relative_to(here) if path is not None and inside else path)


def _add_evaluation(parser: Parser, out: str) -> None:
    """What `ruler` and `longbench` have in common."""
    parser.add_argument("--model", required=True, help="gemma, a directory, or a model of the hub")
    parser.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    parser.add_argument("--batch-size", type=number(1), default=1, help="prompts at once")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the model's chat template (if it has one)",
    )
    add_dtype(parser)
    add_device(parser)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile retro's decode step into one graph (on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=new_file,
        default=out,
        metavar="FILE.jsonl",
        help="every answer as soon as it is there; a run that was cut off goes on from it",
    )
    add_json(parser)
    add_offload(parser)
    add_budgets(parser)


def _ask(
    options: argparse.Namespace,
    make_questions: Callable[[Any], list[Any]],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Questions for a tokenizer, what each attention answered, and what that was done with.

    Args:
        make_questions: of the form of prompts.
    """
    from retro_ops.benchmarks import evaluation, machine
    from retro_ops.models import load_model, load_tokenizer

    config = budgets(options)
    _check_offload(options)
    place, name = device_of(options), dtype_of(options)
    records = evaluation.Records(options.out)
    if records.dropped:
        print(f"{options.out}: took away an unfinished line", file=sys.stderr)
    tokenizer = load_tokenizer(options.model)
    form = evaluation.PromptForm(tokenizer, options.chat)
    questions = make_questions(form)
    outcomes = evaluation.ask(
        lambda: load_model(options.model, dtype=DTYPES[name], device=place),
        tokenizer,
        questions,
        name=options.model,
        dtype=name,
        attentions=options.attention,
        batch_size=options.batch_size,
        config=config,
        offload=options.offload,
        compile_step=place.type == "cuda" if options.compile is None else options.compile,
        records=records,
        progress=progress,
    )
    facts = {
        "model": options.model,
        "chat": form.chat,
        "dtype": name,
        "config": dataclasses.asdict(config),
        "offload": options.offload,
        "answers": {
            each.attention: {
                "of_earlier_runs": each.reused,
                "new": len(each.predictions) - each.reused,
                "seconds": each.seconds,
                **_page_figures(each.page_use),
            }
            for each in outcomes
        },
        **machine.facts(place),
    }
    return questions, outcomes, facts


def _page_figures(use: Any) -> dict[str, Any]:
    """Of the new answers of an offloaded run, what its page caches did."""
    if use is None:
        return {}
    return {"hit_ratio": use.hit_ratio, "slow_bytes_per_token": use.slow_bytes_per_token}


def _print_answers(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    for attention, counts in facts["answers"].items():
        print(
            f"{attention}: {counts['new']} answers in {counts['seconds']:.0f} s, "
            f"{counts['of_earlier_runs']} of earlier runs, all in {options.out}"
        )
        if counts.get("hit_ratio") is not None:
            print(
                f"{attention}, offloaded: page hit ratio {counts['hit_ratio']:.2f}, "
                f"{counts['slow_bytes_per_token'] / 1e6:.2f} MB a token from slow memory"
            )


def _chosen_tasks(text: str, allowed: Sequence[str]) -> list[str]:
    """Names of tasks, or all; only the command knows which there are."""
    if text == "all":
        return list(allowed)
    try:
        return names(allowed)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--tasks {error}") from error


def _add_ruler(commands: Any) -> None:
    parser = add_command(
        commands, "ruler", _ruler, "Score a model on the 13 tasks of RULER, dense and retro."
    )
    parser.add_argument("--context", type=numbers, default="4096", help="tokens, with the answer")
    parser.add_argument("--tasks", default="all", help="names with commas")
    parser.add_argument("--samples", type=number(1), default=25, help="of each task and length")
    add_seed(parser, 42)
    parser.add_argument(
        "--essays", type=Path, metavar="DIR", help="*.txt to hide facts in (generated prose)"
    )
    parser.add_argument("--squad", type=Path, metavar="FILE", help="for qa_1 (made-up facts)")
    parser.add_argument("--hotpotqa", type=Path, metavar="FILE", help="for qa_2 (made-up facts)")
    parser.add_argument("--plot", type=new_file, metavar="FILE.png", help="draw a heat map")
    _add_evaluation(parser, "ruler.jsonl")


def _ruler(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import ruler
    from retro_ops.benchmarks.ruler_tasks import TASKS

    tasks = _chosen_tasks(options.tasks, list(TASKS))
    with progress_bar() as progress:

        def make_questions(form: Any) -> list[Any]:
            return ruler.make_questions(
                form,
                tasks=tasks,
                lengths=sorted(set(options.context)),
                samples=options.samples,
                seed=options.seed,
                essays=options.essays,
                squad=options.squad,
                hotpotqa=options.hotpotqa,
                progress=progress,
            )

        questions, outcomes, facts = _ask(options, make_questions, progress)
    rows = ruler.results(questions, outcomes)
    print_table(
        f"RULER, {options.model}, {options.samples} samples a task, {facts['dtype']}, "
        f"{facts['machine']}, per cent",
        ruler.table(rows),
    )
    for line in ruler.summary(rows):
        print(line)
    _print_answers(options, facts)
    write_json(options.json, {"seed": options.seed, **facts, "results": rows})
    if options.plot is not None:
        ruler.draw(rows, options.plot)


def _add_longbench(commands: Any) -> None:
    parser = add_command(
        commands, "longbench", _longbench, "Score a model on the 21 tasks of LongBench, version 1."
    )
    parser.add_argument(
        "--data",
        default="hub",
        help="a directory with TASK.jsonl, the published data.zip, or hub, which downloads that",
    )
    parser.add_argument("--tasks", default="all", help="names with commas, or en, or zh")
    parser.add_argument("--samples", type=number(1), help="of each task, the first ones (all)")
    parser.add_argument(
        "--context",
        type=number(1),
        default=8192,
        help="tokens, with the answer; the middle of longer prompts is left out",
    )
    _add_evaluation(parser, "longbench.jsonl")


def _longbench(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import longbench
    from retro_ops.benchmarks.longbench_tasks import TASKS

    if options.tasks in ("en", "zh"):
        tasks = [name for name, task in TASKS.items() if task.language == options.tasks]
    else:
        tasks = _chosen_tasks(options.tasks, list(TASKS))
    samples = longbench.read_samples(options.data, tasks)
    with progress_bar() as progress:

        def make_questions(form: Any) -> list[Any]:
            return longbench.make_questions(
                form,
                samples,
                length=options.context,
                most=options.samples,
                progress=progress,
            )

        questions, outcomes, facts = _ask(options, make_questions, progress)
    rows = longbench.results(questions, outcomes)
    print_table(
        f"LongBench, {options.model}, {options.context:,} tokens, {facts['dtype']}, "
        f"{facts['machine']}, per cent",
        longbench.table(rows),
    )
    _print_answers(options, facts)
    write_json(options.json, {**facts, "context": options.context, "results": rows})


def _add_info(commands: Any) -> None:
    parser = add_command(
        commands,
        "info",
        _info,
        "Say what is installed, what it runs on, and whether it works; of a model, what memory it "
        "would take.",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try every op on every device, for some seconds",
    )
    add_json(parser)
    group = parser.add_argument_group("memory of a model, of which nothing but its config is read")
    group.add_argument(
        "--model",
        help="recall or recall-128k (in the package), gemma, a directory, a model of the hub, or a "
        "shape: llama-3-8b, llama-3.1-8b, qwen2.5-7b, qwen2.5-72b",
    )
    group.add_argument(
        "--context", type=number(2), default=131072, help="tokens of a row, prompt and answer"
    )
    group.add_argument("--batch-size", type=number(1), default=1, help="rows at once")
    add_offload(group)
    group.add_argument(
        "--dtype", type=dtype_name, choices=DTYPES, help="of the model (as its config says)"
    )
    group.add_argument(
        "--prefill-chunk", type=number(2), help="tokens of a prompt at once (all of them)"
    )
    group.add_argument(
        "--devices", type=number(0), help="GPUs; 0: the CPU (those that are there; else 0, or 1)"
    )
    group.add_argument(
        "--device-memory", type=gibibytes, metavar="GiB", help="of each GPU (what is free, or 80)"
    )
    group.add_argument(
        "--host-memory", type=gibibytes, metavar="GiB", help="of the host (what is free)"
    )
    add_budgets(parser)


def gibibytes(text: str) -> int:
    """A parser of GiB; the result is bytes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1 << 30:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, got {text!r}")
    return round(value * (1 << 30))


def _memory(options: argparse.Namespace) -> Any:
    """What there is to plan for: what is asked for, else what is free here."""
    from retro_ops.models.memory import GIB, Memory, free_memory

    free = free_memory()
    count = options.devices
    if count is None:
        count = len(free.devices) or (1 if options.device_memory else 0)
    devices = free.devices[:count]
    if options.device_memory:
        devices = (options.device_memory,) * count
    elif len(devices) < count:
        devices = (80 * GIB,) * count
    return Memory(options.host_memory or free.host, devices)


def _info_memory(options: argparse.Namespace) -> None:
    from retro_ops.models.memory import GIB
    from retro_ops.models.plan import ACTIVATIONS, PARTS, Planner, load_config

    memory = _memory(options)
    config = load_config(options.model)
    planner = Planner(
        config,
        budgets(options),
        dtype=DTYPES.get(options.dtype),
        offload=options.offload,
        devices=memory.devices,
        prefill_chunk=options.prefill_chunk,
    )
    plan = planner.plan(options.context, options.batch_size)
    lines: dict[str, dict[str, int]] = {
        part: {place: parts[part] for place, parts in plan.places.items() if part in parts}
        for part in PARTS
    }
    lines = {part: line for part, line in lines.items() if any(line.values())}
    lines["at most"] = {place: plan.total(place) for place in plan.places}
    lines["there is"] = {place: memory.of(place) for place in plan.places}
    rows, tokens = f"{options.batch_size:,}", f"{options.context:,}"
    dtype = str(planner.dtype).removeprefix("torch.")
    print_table(
        f"{options.model}, {tokens} tokens, batch {rows}, {dtype}"
        f"{', offloaded' if options.offload else ''}: GiB",
        {
            "part": list(lines),
            **{
                place: [
                    f"{line[place] / GIB:,.3f}" if place in line else "" for line in lines.values()
                ]
                for place in plan.places
            },
        },
    )
    if all(name in lines for name in ACTIVATIONS):
        print("Of the two kinds of activations only the larger counts.")
    batch = planner.largest_batch(options.context, memory)
    longest = planner.longest_context(options.batch_size, memory)
    lacks = plan.lacks(memory)
    print(f"It does not fit: {lacks}." if lacks else "It fits.")
    print(f"Largest batch of {tokens} tokens: {batch:,}.")
    print(f"Longest context of {rows} {'row' if rows == '1' else 'rows'}: {longest:,} tokens.")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and positions < options.context:
        print(f"The config is of a model for up to {positions:,} tokens.")
    write_json(
        options.json,
        {
            "model": options.model,
            "context": options.context,
            "batch_size": options.batch_size,
            "dtype": dtype,
            "offload": options.offload,
            "bytes": plan.places,
            "total_bytes": lines["at most"],
            "there_bytes": lines["there is"],
            "fits": not lacks,
            "largest_batch": batch,
            "longest_context": longest,
        },
    )


def _info(options: argparse.Namespace) -> None:
    if options.model is not None:
        _info_memory(options)
        return
    from retro_ops import doctor

    facts, hints = doctor.facts(), doctor.hints()
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:{width}} {value}")
    for hint in hints:
        print(f"hint: {hint}")
    checks = []
    if options.check:
        checks = list(doctor.self_test())
        devices = dict.fromkeys(check.device for check in checks)
        for place in devices:
            here = [check for check in checks if check.device == place]
            right = sum(not check.problem for check in here)
            print(f"{'self-test':{width}} {right} of {len(here)} ops are right on {place}")
    wrong = [check for check in checks if check.problem]
    for check in wrong:
        print(f"wrong: {check.op} on {check.device}: {check.problem}")
    figures = {**facts, "hints": hints, "checks": [dataclasses.asdict(check) for check in checks]}
    write_json(options.json, figures)
    if wrong:
        raise SystemExit(
            f"{options.prog}: {len(wrong)} of {len(checks)} self-tests failed; report the lines "
            "above, with those that say what is installed"
        )
