"""update_pages: what may leave the page cache, number for number; the threads that decide it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ops import update_pages
from retro_ops.ops._contract import DecisionHeader, RequestHeader
from retro_ops.ops.update_pages import AGING_STEPS, POLICIES, STAMP_RANKS, USE, reference
from retro_ops.testing import (
    Arguments,
    assert_compiles,
    assert_refused,
    assert_repeats,
    assert_same,
    host_copy,
    on_device,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
policies = pytest.mark.parametrize("policy", POLICIES)


def make(
    policy: str, ranks: int, clusters: int, pages: int, *, rows: int = 2, heads: int = 2, seed=0
) -> Arguments:
    """A cache at its work, gather 200 just reported; some ids are none, or nonsense."""
    generator = torch.Generator().manual_seed(seed)
    groups = (rows, heads)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (*groups, *shape), generator=generator)

    requests = draw(-1, clusters + 3, 3 + ranks).int()
    requests[..., RequestHeader.STEP] = 200
    requests[..., RequestHeader.FREE] = draw(0, pages + 1)
    requests[..., RequestHeader.MISSED] = draw(0, pages + 1)
    cached = draw(0, 5, clusters).to(torch.uint8)
    cached[torch.rand(cached.shape, generator=generator) < 0.5] = 0
    history = draw(0, 4, clusters + 1, 2)
    history[..., :clusters, 0] = draw(0, 200, clusters) * STAMP_RANKS + draw(0, 9, clusters)
    if policy == "lru2":  # a stamp
        history[..., :clusters, 1] = draw(0, 100, clusters) * STAMP_RANKS
    elif policy == "lfu":
        history[..., :clusters, 1] = draw(0, 3 * USE, clusters)
    history[..., clusters, 0] = 199
    history[..., clusters, 1] = draw(0, pages + 1)
    return {
        "requests": requests,
        "cached": cached,
        "history": history,
        "decisions": draw(-5, 99, 2 + pages).int(),
        "policy": policy,
    }


def on_host(arguments: Arguments, device: str) -> Arguments:
    """Copies in memory that threads of the host can read, whatever the device."""
    return {
        name: host_copy(value, device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def settle(device: str) -> None:
    """Waits until all updates are done that were posted on a device so far."""
    if device != "cpu":
        torch.cuda.synchronize()
        assert idle().endswith("pending 0, failures 0")


def assert_matches(arguments: Arguments, device: str) -> None:
    actual, expected = on_host(arguments, device), on_device(arguments, "cpu")
    update_pages(**actual)
    settle(device)
    reference(**expected)
    for name in ("requests", "cached", "history", "decisions"):
        assert_same(actual[name], expected[name], name)


@policies
@pytest.mark.parametrize(
    ("ranks", "clusters", "pages"),
    [(0, 7, 5), (1, 1, 1), (5, 0, 3), (6, 40, 0), (20, 50, 30), (70, 90, 300)],
    ids=["none asked", "one", "no clusters", "no pages", "many", "all may go"],
)
def test_matches_reference(device: str, policy: str, ranks: int, clusters: int, pages: int) -> None:
    assert_matches(make(policy, ranks, clusters, pages), device)


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"requests": zeros(2, 8)},
            "requests must be [B, Hkv, 3 + R] = [any, any, any], got [2, 8]",
        ),
        (
            {"requests": zeros(2, 2, 8, dtype=torch.int64)},
            "requests must be torch.int32, got torch.int64",
        ),
        (
            {"requests": zeros(2, 8, 2).transpose(1, 2)},
            "requests must be contiguous, got strides [16, 1, 2]",
        ),
        ({"requests": zeros(2, 2, 2)}, "requests must hold 3 + R >= 3 columns, got 2"),
        (
            {"cached": zeros(2, 3, 9, dtype=torch.uint8)},
            "cached must be [B, Hkv, C] = [2, 2, any], got [2, 3, 9]",
        ),
        ({"cached": zeros(2, 2, 9)}, "cached must be torch.uint8, got torch.int32"),
        (
            {"history": zeros(2, 2, 9, 2, dtype=torch.int64)},
            "history must be [B, Hkv, C + 1, 2] = [2, 2, 10, 2], got [2, 2, 9, 2]",
        ),
        (
            {"history": zeros(2, 2, 10, 2, dtype=torch.float64)},
            "history must be torch.int64, got torch.float64",
        ),
        (
            {"decisions": zeros(2, 1, 8)},
            "decisions must be [B, Hkv, 2 + P] = [2, 2, any], got [2, 1, 8]",
        ),
        (
            {"decisions": zeros(2, 2, 8, dtype=torch.int64)},
            "decisions must be torch.int32, got torch.int64",
        ),
        ({"decisions": zeros(2, 2, 1)}, "decisions must hold 2 + P >= 2 columns, got 1"),
        ({"policy": "random"}, "policy must be one of 'lru', 'lru2', 'lfu', got 'random'"),
    ],
)
def test_rejects(change: Arguments, message: str) -> None:
    arguments = {**make("lru", 5, 9, 6), **change}
    assert_refused(update_pages, arguments, f"update_pages: {message}")


@policies
@pytest.mark.parametrize("sizes", [(5, 9, 6), (0, 0, 0)], ids=str)
def test_opcheck(policy: str, sizes: tuple[int, int, int]) -> None:
    arguments = make(policy, *sizes)
    torch.library.opcheck(torch.ops.retro.update_pages.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    first = make("lfu", 5, 9, 6, heads=3)
    second = make("lfu", 8, 21, 12, rows=3, heads=4)
    assert_compiles(update_pages, first, backend=backend)
    assert_compiles(update_pages, first, second, backend=backend)


@pytest.mark.gpu
def test_captures() -> None:
    """Every replay posts, once; what it finds then is what it decides on."""
    made = [make("lfu", 5, 9, 6, seed=seed) for seed in range(3)]
    static = on_host(made[0], "cuda")
    update_pages(**static)
    settle("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_pages(**static)
    posts = torch.ops.retro.update_counts(static["history"])[0]
    assert posts == 1, "capturing posts nothing"
    for replay, arguments in enumerate(made[1:], start=1):
        expected = on_device(arguments, "cpu")
        for name in ("requests", "cached", "history", "decisions"):
            static[name].copy_(arguments[name])
        graph.replay()
        settle("cuda")
        reference(**expected)
        for name in ("requests", "cached", "history", "decisions"):
            assert_same(static[name], expected[name], f"replay {replay}: {name}")
        counts = torch.ops.retro.update_counts(static["history"])
        assert counts[:2] == [1 + replay, 1 + replay]
        assert counts[2] > 0


@pytest.mark.gpu
def test_several_layers_in_one_graph() -> None:
    layers = [on_host(make("lru", 5, 9, 6, seed=seed), "cuda") for seed in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            update_pages(**layer, join=layer is layers[-1])
            torch.zeros(3, device="cuda")  # another kernel between them
    for _ in range(2):
        graph.replay()
    settle("cuda")
    for layer in layers:
        posts, updates, _ = torch.ops.retro.update_counts(layer["history"])
        assert posts == 2
        assert 1 <= updates <= 2
        assert (layer["decisions"][..., DecisionHeader.STEP] == 200).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["requests", "cached", "history", "decisions"])
def test_rejects_memory_of_the_gpu(name: str) -> None:
    arguments = on_host(make("lru", 5, 9, 6), "cuda")
    arguments[name] = arguments[name].clone()
    message = (
        f"update_pages: {name} must be a host tensor, which threads of the host can read; make it "
        "with torch.ops.retro.host_tensor"
    )
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        update_pages(**arguments)


@pytest.mark.gpu
def test_another_policy_takes_over_on_a_gpu() -> None:
    actual, expected = on_host(make("lru", 40, 300, 200), "cuda"), make("lru", 40, 300, 200)
    for step, policy in ((200, "lru"), (201, "lfu"), (202, "lru2")):
        for each in (actual, expected):
            each["requests"][..., RequestHeader.STEP] = step
            each["policy"] = policy
        update_pages(**actual)
        settle("cuda")
        update_pages(**expected)
    assert_same(actual["history"], expected["history"])
    assert_same(actual["decisions"], expected["decisions"])


@pytest.mark.gpu
def test_memory_that_is_freed_takes_its_updates_with_it() -> None:
    """Posted, and gone before any thread may have come to it."""
    like = torch.empty(0, device="cuda")
    before = torch.ops.retro.host_bytes(like)
    for seed in range(30):
        layer = on_host(make("lfu", 70, 3000, 2000, seed=seed), "cuda")
        assert torch.ops.retro.host_bytes(like) > before
        update_pages(**layer)
        del layer
    assert torch.ops.retro.host_bytes(like) == before
    settle("cuda")


@settings(max_examples=200)
@given(
    policy=st.sampled_from(POLICIES),
    ranks=st.sampled_from((0, 1, 2, 17)),
    clusters=st.sampled_from((0, 1, 7, 8, 9, 33)),
    pages=st.sampled_from((0, 1, 2, 9, 40)),
    rows=st.sampled_from((0, 1, 3)),
    seed=st.integers(0, 2**16),
)
def test_decides_on_any_cache(
    device: str, policy: str, ranks: int, clusters: int, pages: int, rows: int, seed: int
) -> None:
    assert_matches(make(policy, ranks, clusters, pages, rows=rows, seed=seed), device)


@policies
def test_repeats(policy: str) -> None:
    assert_repeats(update_pages, make(policy, 40, 300, 200, heads=5))


# What it decides, by hand


class Cache:
    """One row and head; every cluster has one page, and is in."""

    def __init__(self, policy: str, clusters: int, missed: int = 2) -> None:
        self.policy, self.step, self.missed = policy, 0, missed
        self.cached = torch.ones(1, 1, clusters, dtype=torch.uint8)
        self.history = torch.zeros(1, 1, clusters + 1, 2, dtype=torch.int64)
        self.decisions = torch.zeros(1, 1, 2 + clusters, dtype=torch.int32)

    def use(self, *ids: int, step: int | None = None) -> list[int]:
        """The list after a step that retrieves these, best first."""
        self.step = self.step + 1 if step is None else step
        requests = torch.tensor([[[self.step, 0, self.missed, *ids]]], dtype=torch.int32)
        update_pages(requests, self.cached, self.history, self.decisions, self.policy)
        count = int(self.decisions[0, 0, DecisionHeader.COUNT])
        return self.decisions[0, 0, 2 : 2 + count].tolist()


def test_lru_lists_the_longest_unused_first_and_of_a_step_the_lowest_rank() -> None:
    cache = Cache("lru", 5, missed=1)
    cache.use(4, 2, 0)
    assert cache.use(3) == [1, 0, 2, 4]
    assert cache.use(1, 0) == [2, 4, 3, 0]


def test_lru2_lists_those_used_once_first() -> None:
    cache = Cache("lru2", 4)
    for used in (0, 1, 2, 0):
        listed = cache.use(used)
    assert listed == [3, 1, 2, 0]
    cache.use(1)
    assert cache.use(2) == [3, 0, 1, 2]


def test_lfu_lists_the_least_used_first_and_forgets() -> None:
    cache = Cache("lfu", 3, missed=9)
    for _ in range(4):
        cache.use(0)
    assert cache.use(1) == [2, 1, 0]
    # Six halvings later four uses weigh less than one, and the newer use decides.
    assert cache.use(1, step=6 * AGING_STEPS + 10) == [2, 0, 1]
    assert cache.use(2, step=20 * AGING_STEPS)[-1] == 2


def test_the_list_covers_four_times_the_worst_step_lately() -> None:
    cache = Cache("lru", 100, missed=16)
    assert len(cache.use(0)) == 64
    cache.missed = 0
    lengths = [len(cache.use(0)) for _ in range(12)]
    assert lengths == [56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 0]
    cache.missed = 1000
    assert len(cache.use(0)) == 100


def test_a_gather_that_was_seen_changes_nothing() -> None:
    cache = Cache("lfu", 3)
    for _ in range(3):
        cache.use(0)
    before = cache.history.clone(), cache.decisions.clone()
    cache.use(1, step=3)
    assert_same(cache.history, before[0])
    assert_same(cache.decisions, before[1])


# Memory that a GPU shares: what its library calls


class Params(ctypes.Structure):
    """UpdatePagesParams."""

    _fields_: ClassVar = [
        ("policy", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("tasks", "ranks", "clusters", "pages")),
        *((name, ctypes.c_void_p) for name in ("requests", "cached", "history", "decisions")),
    ]


class Api(ctypes.Structure):
    """WorkerApi."""

    _fields_: ClassVar = [
        ("make", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(Params))),
        ("post", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("drop", ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_double)),
        ("count", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64 * 3))),
    ]


def shared_job(api: Api, layer: Arguments) -> int:
    rows, heads, clusters = layer["cached"].shape
    return api.make(
        Params(
            POLICIES.index(layer["policy"]),
            rows * heads,
            layer["requests"].shape[2] - 3,
            clusters,
            layer["decisions"].shape[2] - 2,
            *(layer[name].data_ptr() for name in ("requests", "cached", "history", "decisions")),
        )
    )


@policies
def test_a_job_on_shared_memory_decides_the_same(policy: str) -> None:
    api = Api.from_address(torch.ops.retro.worker_api())
    actual, expected = make(policy, 40, 300, 200), make(policy, 40, 300, 200)
    job = shared_job(api, actual)
    counts = (ctypes.c_int64 * 3)()
    for step in (200, 201, 202):
        for each in (actual, expected):
            each["requests"][..., RequestHeader.STEP] = step
        api.post(job)
        assert idle().endswith("pending 0, failures 0")
        update_pages(**expected)
    api.count(job, ctypes.byref(counts))
    assert list(counts[:2]) == [3, 3]
    assert counts[2] > 0
    assert api.drop(job, 0.0)
    for each in (actual, expected):
        each["requests"][..., RequestHeader.STEP] = 203
    api.post(job)  # as the graph of a layer that is gone does
    assert idle().endswith("pending 0, failures 0")
    api.count(job, ctypes.byref(counts))
    assert list(counts[:2]) == [4, 3]
    for name in ("history", "decisions"):
        assert_same(actual[name], expected[name], name)


def test_dropped_memory_is_not_touched() -> None:
    """Jobs are dropped while they wait or run; what they wrote by then stays, and nothing more."""
    api = Api.from_address(torch.ops.retro.worker_api())
    for seed in range(40):
        layer = make("lfu", 70, 3000, 2000, rows=4, seed=seed)
        job = shared_job(api, layer)
        api.post(job)
        assert api.drop(job, 10.0)
        before = layer["history"].clone(), layer["decisions"].clone()
        assert idle().endswith("pending 0, failures 0")
        assert_same(layer["history"], before[0])
        assert_same(layer["decisions"], before[1])


# The worker pool


def post_update_pages(arguments: Arguments) -> None:
    torch.ops.retro.post_update_pages(**arguments)


def idle(seconds: float = 10.0) -> str:
    return torch.ops.retro.worker_pool(seconds)


@policies
def test_a_posted_update_decides_the_same(policy: str) -> None:
    actual, expected = make(policy, 40, 300, 200), make(policy, 40, 300, 200)
    post_update_pages(actual)
    update_pages(**expected)
    assert idle().endswith("pending 0, failures 0")
    for name in ("requests", "cached", "history", "decisions"):
        assert_same(actual[name], expected[name], name)


def test_posted_updates_of_many_layers() -> None:
    """A layer's steps come one after the other; what is posted twice before it runs runs once."""
    layers = [make("lru", 40, 300, 200, seed=seed) for seed in range(20)]
    for step in range(201, 260):
        for layer in layers:
            layer["requests"][..., RequestHeader.STEP] = step
            post_update_pages(layer)
    assert idle().endswith("pending 0, failures 0")
    for layer in layers:
        post_update_pages(layer)
    assert idle().endswith("pending 0, failures 0")
    for layer in layers:
        assert (layer["decisions"][..., DecisionHeader.STEP] == 259).all()
        assert (layer["history"][:, :, 300, 0] == 259).all()


def test_another_policy_may_follow() -> None:
    actual, expected = make("lru", 40, 300, 200), make("lru", 40, 300, 200)
    for step, policy in ((200, "lru"), (201, "lfu"), (202, "lru2"), (203, "lru2")):
        for each in (actual, expected):
            each["requests"][..., RequestHeader.STEP] = step
            each["policy"] = policy
        post_update_pages(actual)
        assert idle().endswith("pending 0, failures 0")
        update_pages(**expected)
    assert_same(actual["history"], expected["history"])
    assert_same(actual["decisions"], expected["decisions"])


def test_a_posted_update_keeps_its_memory() -> None:
    for seed in range(50):
        post_update_pages(make("lfu", 70, 3000, 2000, seed=seed))
    assert idle().endswith("pending 0, failures 0")


def test_refused_updates_are_not_posted() -> None:
    arguments = {**make("lru", 5, 9, 6), "policy": "random"}
    message = "update_pages: policy must be one of 'lru', 'lru2', 'lfu', got 'random'"
    assert_refused(torch.ops.retro.post_update_pages, arguments, message)


def run_python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'compile_tests'}"}
    return subprocess.run(
        [sys.executable, "-c", "from test_update_pages import *\n" + code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        **options,  # type: ignore[call-overload]
    )


def test_threads_start_with_the_first_update() -> None:
    ran = run_python(
        "print(idle())\npost_update_pages(make('lru', 5, 9, 6))\n"
        "print(idle(), len(os.sched_getaffinity(0)))"
    )
    assert ran.returncode == 0, ran.stderr
    before, after = ran.stdout.splitlines()
    assert before == "threads 0, pending 0, failures 0"
    threads, processors = int(after.split()[1].rstrip(",")), int(after.split()[-1])
    assert threads == min(processors, 8)


def test_threads_run_where_the_process_may() -> None:
    """Not where the thread may that happens to post first."""
    ran = run_python(
        """
import threading
everywhere = os.sched_getaffinity(0)
allowed = sorted(everywhere)[:1]
os.sched_setaffinity(os.getpid(), allowed)
def post():
    os.sched_setaffinity(0, everywhere)  # of this thread
    post_update_pages(make('lru', 5, 9, 6))
thread = threading.Thread(target=post)
thread.start()
thread.join()
assert idle().startswith("threads 1, ")
found = []
for task in Path("/proc/self/task").iterdir():
    if (task / "comm").read_text().strip() == "retro_pages":
        found.append(os.sched_getaffinity(int(task.name)))
assert found == [set(allowed)], found
"""
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyboardInterrupt", "os._exit(3)"])
def test_a_process_ends_with_updates_under_way(end: str) -> None:
    """The tensors are Python's, which ends first: no thread may want its lock any more."""
    ran = run_python(
        f"layers = [make('lfu', 70, 30000, 20000, seed=seed) for seed in range(5)]\n"
        f"for layer in layers: post_update_pages(layer)\n{end}"
    )
    expected = {"": 0, "sys.exit(3)": 3, "os._exit(3)": 3, "raise KeyboardInterrupt": -2}[end]
    assert ran.returncode == expected, ran.stderr


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Forked with updates under way, and again from the child."""
    ran = run_python(
        """
layer = make('lfu', 70, 3000, 2000)
def post(step):
    layer["requests"][..., RequestHeader.STEP] = step
    post_update_pages(layer)
    assert idle().endswith("pending 0, failures 0")
    assert (layer["decisions"][..., DecisionHeader.STEP] == step).all()
def in_child(run):
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
for _ in range(20):
    post_update_pages(make('lfu', 70, 3000, 2000))
layer["requests"][..., RequestHeader.STEP] = 300
post_update_pages(layer)
in_child(lambda: (post(301), in_child(lambda: post(302)), post(303)))
post(304)
"""
    )
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def pool_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool alone, with jobs that a test program makes."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("pool") / "pool"
    sources = [ROOT / "compile_tests" / "worker_pool_program.cpp", ROOT / "csrc/worker_pool.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"]
    compiled = subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
    return program


@pytest.mark.parametrize(
    "case", ["rounds", "again", "parts", "throws", "stall", "exit", "never", "fork", "many"]
)
def test_pool(pool_program: Path, case: str) -> None:
    ran = subprocess.run([str(pool_program), case], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
