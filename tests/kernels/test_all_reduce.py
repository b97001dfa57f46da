"""Sums over ranks that read each other's memory: two and four processes under the interpreter, against float64."""

import mmap
import multiprocessing
import os
import traceback

import pytest
import torch
from accuracy import assert_accurate
from interpreter import interpreted

from evenflow.kernels import all_reduce
from evenflow.kernels.all_reduce import (
    MAX_BYTES,
    MAX_PROGRAMS,
    best_method,
    launch_reduce_add_rms_norm,
    make_peer_buffers,
    num_programs,
    reduce_add_rms_norm,
)
from evenflow.kernels.rms_norm import add_rms_norm
from evenflow.kernels.self_check import check_all_reduce

EPS = 1e-5


def in_ranks(size, work):
    """work(peers) in `size` forked processes, whose buffers are memory that all of them have. Returns the results."""
    buffers = [mmap.mmap(-1, all_reduce.BUFFER_BYTES) for _ in range(size)]
    addresses = [torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffer in buffers]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]

    def run(rank):
        try:
            torch.set_num_threads(1)
            with interpreted():
                found = work(make_peer_buffers(rank, addresses, torch.device("cpu")))
        except BaseException:
            found = traceback.format_exc()
        pipes[rank][1].send(found)
        os._exit(0)  # not the handlers of the process that was forked

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    results = []
    for receiving, _ in pipes:
        assert receiving.poll(100), "a rank hangs"
        results.append(receiving.recv())
    for process in processes:
        process.join()
    assert not [result for result in results if isinstance(result, str)], results
    return results


def inputs(size, num_rows, hidden, dtype):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(size, num_rows, 2 * hidden, generator=generator).to(dtype)[..., :hidden]  # strided
    residual = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    return x, residual, (1 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype)


@pytest.mark.parametrize("method", ["one_shot", "two_shot"])
@pytest.mark.parametrize(
    ("size", "num_rows", "hidden", "dtype"),
    [
        (2, 1, 16, torch.float32),
        (2, 37, 80, torch.float16),
        (4, 7, 200, torch.bfloat16),
    ],
)
def test_every_rank_has_the_sum(method, size, num_rows, hidden, dtype):
    """Three times over, since the halves of the buffer take turns; what one launch leaves behind must not matter."""
    x, residual, weight = inputs(size, num_rows, hidden, dtype)

    def work(peers):
        found = [
            launch_reduce_add_rms_norm(x[peers.rank] * factor, residual, weight, EPS, peers, method)
            for factor in (1, 3, 0.5)
        ]
        assert peers.state.tolist() == [3, 0, 0]
        return [tuple(t.float().numpy() for t in pair) for pair in found]

    found = in_ranks(size, work)
    for turn, factor in enumerate((1, 3, 0.5)):
        shares = x * factor
        exact_sum = residual.double() + shares.double().sum(0)
        exact = exact_sum / (exact_sum.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        eager = add_rms_norm(shares.sum(0), residual, weight, EPS)
        for rank in range(size):
            out, total = (torch.from_numpy(t).to(dtype) for t in found[rank][turn])
            assert_accurate(out, eager[0], exact)
            assert_accurate(total, eager[1], exact_sum)
            assert all((a == b).all() for a, b in zip(found[rank][turn], found[0][turn], strict=True))


@pytest.mark.parametrize("method", ["one_shot", "two_shot"])
def test_a_rank_that_is_missing_makes_nan(method):
    """Of every row, after a bounded wait; or, when the host gives up, after the next look at its word."""
    x, residual, weight = inputs(2, 3, 32, torch.float32)

    def work(peers):
        if peers.rank == 1:
            return 0
        peers.max_polls = 200
        found = [launch_reduce_add_rms_norm(x[0], residual, weight, EPS, peers, method)]
        peers.max_polls = 1 << 28
        peers.abort()
        found.append(launch_reduce_add_rms_norm(x[0], residual, weight, EPS, peers, method))
        return [out.isnan().all().item() for out, _ in found]

    assert in_ranks(2, work)[0] == [True, True]


def test_the_check_at_start_finds_a_wrong_sum(monkeypatch):
    def work(peers):
        return [comparison.is_right for comparison in check_all_reduce(peers, 48, torch.float16)]

    assert in_ranks(2, work) == [[True] * 12] * 2

    def one_share_twice(shares, *rest):
        return reduce_add_rms_norm([shares[0], shares[0]], *rest)

    monkeypatch.setattr("evenflow.kernels.self_check.reduce_add_rms_norm", one_share_twice)
    assert in_ranks(2, work) == [[False] * 12] * 2


def test_the_method_depends_on_the_size():
    peers = make_peer_buffers(0, [0] * 8, torch.device("cpu"))
    for num_rows in (0, 1, 8, 64, 512, 513, 4096, 100_000):
        for hidden in (16, 4096, 5120, 8192):
            x = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device="meta")
            method = best_method(x, peers)
            if method is not None:
                assert num_programs(method, num_rows, hidden, 8) <= MAX_PROGRAMS
                assert x.nbytes <= MAX_BYTES
    assert best_method(torch.empty(8, 4096, dtype=torch.bfloat16, device="meta"), peers) == "one_shot"
    assert best_method(torch.empty(256, 8192, dtype=torch.bfloat16, device="meta"), peers) == "two_shot"
    assert best_method(torch.empty(8, 4096, dtype=torch.float64, device="meta"), peers) is None
    two = make_peer_buffers(0, [0] * 2, torch.device("cpu"))  # one-shot up to MAX_BYTES, if it has programs enough
    assert best_method(torch.empty(512, 8192, dtype=torch.bfloat16, device="meta"), two) == "one_shot"
    assert best_method(torch.empty(1024, 4096, dtype=torch.bfloat16, device="meta"), two) == "two_shot"
    assert best_method(torch.empty(1025, 4096, dtype=torch.bfloat16, device="meta"), two) is None
