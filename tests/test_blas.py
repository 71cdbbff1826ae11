"""Dense algebra in one thread, and the number of threads before and after."""

import threading
import time

import numpy as np
import pytest
import scipy.linalg  # noqa: F401  # whose BLAS is another than NumPy's
from threadpoolctl import threadpool_info, threadpool_limits

import curvax as cx
from curvax.blas import one_thread


def threads():
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


@pytest.fixture
def three_threads():
    with threadpool_limits(3, user_api="blas"):
        if threads() != {3}:
            pytest.skip("BLAS has no threads to be set")
        yield


def test_the_number_is_set_and_set_back(three_threads):
    with one_thread():
        assert threads() == {1}
        with one_thread():
            assert threads() == {1}
        assert threads() == {1}
    assert threads() == {3}
    with pytest.raises(ZeroDivisionError), one_thread():
        1 / 0  # noqa: B018
    assert threads() == {3}


def test_contexts_that_overlap_in_two_threads(three_threads):
    """In either order of their ends the number is the old one afterwards."""
    for mine_first in (True, False):
        began, end = threading.Event(), threading.Event()

        def other(began=began, end=end):
            with one_thread():
                began.set()
                end.wait()

        thread = threading.Thread(target=other)
        with one_thread():
            thread.start()
            began.wait()
            if not mine_first:
                end.set()
                thread.join()
        end.set()
        thread.join()
        assert threads() == {3}


def test_solves_leave_no_thread_that_spins(three_threads):
    """Of OpenBLAS the threads wait for more work at a core's cost, after 26 rows and more."""
    n = 200
    matrix = np.diag(np.linspace(1, 2, n) ** 8).astype(np.float32)
    operator = cx.from_matvec(lambda v: matrix @ v, np.zeros(n, np.float32))
    seen, busy = [], []

    def look(progress):
        seen.append(threads())
        start = time.process_time()
        time.sleep(0.05)
        busy.append(time.process_time() - start)

    cx.eigsh(operator, 10, tol=1e-4, max_basis=60, callback=look)
    assert len(seen) > 5 and all(number == {3} for number in seen)
    assert np.median(busy) < 0.025
    assert threads() == {3}
