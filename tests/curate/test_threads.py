import threading
import time

import pytest
import torch

from curate.threads import in_threads, on_stream, one_by_one, one_thread

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # nothing is put on a device here


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


def test_every_item_is_worked_on_once_in_threads_of_one_core():
    seen, threads = [], set()
    both = threading.Barrier(2, timeout=30)

    def work(item):
        if item < 2:
            both.wait()  # passes only if two work at a time
        threads.add((threading.current_thread().name, torch.get_num_threads()))
        seen.append(item)

    before = torch.__config__.parallel_info()  # also of what is the whole process's
    with in_threads(CPU) as each:
        each(work, range(50))
        each(work, iter([50]))
        each(work, [])
    assert sorted(seen) == list(range(51))
    assert {cores for _, cores in threads} == {1}
    assert len({name for name, _ in threads}) == 2
    assert torch.__config__.parallel_info() == before
    assert not any(thread.name.startswith("rows") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_failing_item_names_the_error(threads):
    torch.set_num_threads(threads)
    later_failed = threading.Event()

    def work(item):
        if item == 3:
            if threads == 2:
                assert later_failed.wait(30)  # item 4 has failed before this one does
            raise ValueError("item 3")
        if item > 3:
            later_failed.set()
            raise KeyError(item)

    for _ in range(3):
        later_failed.clear()
        with pytest.raises(ValueError, match="item 3"), in_threads(CPU) as each:
            each(work, range(8))
        assert torch.get_num_threads() == threads


def test_after_an_error_items_that_wait_are_not_begun():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.001)
        raise ValueError(item)

    with pytest.raises(ValueError, match=r"^0$"), in_threads(CPU) as each:
        each(work, range(2000))
    assert len(begun) < 2000 and torch.get_num_threads() == 2


def test_an_error_between_calls_gives_the_threads_back():
    with pytest.raises(RuntimeError, match="outside"), in_threads(CPU) as each:
        each(lambda item: None, range(4))
        raise RuntimeError("outside")
    assert torch.get_num_threads() == 2


def test_one_core_works_in_order_and_here():
    torch.set_num_threads(1)
    seen = []
    with in_threads(CPU) as each:
        assert each is one_by_one
        each(lambda item: seen.append((item, threading.get_ident())), range(5))
        assert torch.get_num_threads() == 1
    assert seen == [(item, threading.get_ident()) for item in range(5)]


@pytest.mark.parametrize("gpus", [1, 3])
def test_two_threads_for_each_gpu(gpus):
    """One reads rows while the other waits for the device."""
    together = threading.Barrier(2 * gpus, timeout=30)
    with in_threads(*[CUDA] * gpus) as each:
        each(lambda item: together.wait(), range(4 * gpus))


def test_a_stream_is_for_gpus_only():
    with on_stream(CPU):
        assert torch.ones(2).sum() == 2


def test_more_cores_than_threads_share_them(monkeypatch):
    """So many threads only; each has its part of the cores."""
    seen = []
    monkeypatch.setattr("curate.threads._MOST_THREADS", 2)
    torch.set_num_threads(5)
    with in_threads(CPU) as each:
        each(lambda item: seen.append(torch.get_num_threads()), range(4))
    assert seen == [2] * 4 and torch.get_num_threads() == 5


def test_one_thread_is_given_back():
    with one_thread(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="inside"), one_thread(CPU):
        raise ValueError("inside")
    assert torch.get_num_threads() == 2
    with one_thread(CUDA):
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with one_thread(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1


def test_one_thread_inside_threads_and_threads_one_after_the_other():
    def work(item):
        with one_thread(CPU):
            torch.ones(10).sum()

    for _ in range(3):
        with in_threads(CPU) as each:
            each(work, range(4))
        assert torch.get_num_threads() == 2
