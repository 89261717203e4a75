"""The canary leaves no trace in the model's memory figures; through a scripted torch that counts as torch does."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest

from pytest_zimage.engines.protocol import CanaryTimed, Reported
from pytest_zimage.probes.canary import Aside, time_canary

MIB, GIB = 1 << 20, 1 << 30
MATRIX = 2 * 8192**2


class OutOfMemoryError(RuntimeError):
    pass


class Tensor:
    def __init__(self, cuda, size):
        self.cuda, self.size = cuda, 0
        cuda.take(size)
        self.size = size

    def normal_(self, generator):
        assert generator.seeded
        return self

    def copy_(self, source):
        self.cuda.run("copy", 2 * self.size)

    def __del__(self):
        self.cuda.free_again(self.size)


class Generator:
    seeded = False

    def __init__(self, device):
        assert device == "cuda:0"

    def manual_seed(self, seed):
        self.seeded = True
        return self


class Event:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, 0.0

    def record(self):
        self.at = self.cuda.now_ms

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return later.at - self.at


class Cuda:
    """An allocator with peaks and a cache, and a device that takes its time."""

    def __init__(self, total=80 * GIB, keeps_pools=False):
        self.total, self.keeps_pools = total, keeps_pools
        self.allocated = self.reserved = self.peak = self.reserved_peak = 0
        self.pool = None
        self.cached = 0
        self.emptied = 0
        self.now_ms = 0.0
        self.speed = {"matmul": 790e12 / 1e3, "copy": 4e12 / 1e3}
        self.ran: list[str] = []

    def take(self, size):
        if self.reserved + size > self.total:
            raise OutOfMemoryError("CUDA out of memory")
        self.allocated += size
        from_cache = min(size, self.cached) if self.pool is None else 0
        self.cached -= from_cache
        self.reserved += size - from_cache
        self.peak, self.reserved_peak = max(self.peak, self.allocated), max(self.reserved_peak, self.reserved)

    def free_again(self, size):
        self.allocated -= size
        if self.pool is None:
            self.cached += size
        else:
            self.pool.freed += size

    def run(self, what, amount):
        self.ran.append(what)
        self.now_ms += amount / self.speed[what]

    def MemPool(self):
        cuda = self

        class Pool:
            freed = 0

            def __del__(self):
                if cuda.keeps_pools:
                    cuda.cached += self.freed
                else:
                    cuda.reserved -= self.freed

        return Pool()

    @contextmanager
    def use_mem_pool(self, pool):
        self.pool = pool
        try:
            yield
        finally:
            self.pool = None

    def device(self, device):
        return nullcontext()

    def Event(self, enable_timing):
        return Event(self)

    def mem_get_info(self, device):
        return self.total - self.reserved, self.total

    def max_memory_allocated(self, device):
        return self.peak

    def max_memory_reserved(self, device):
        return self.reserved_peak

    def memory_reserved(self, device):
        return self.reserved

    def reset_peak_memory_stats(self, device):
        self.peak, self.reserved_peak = self.allocated, self.reserved

    def empty_cache(self):
        self.emptied += 1
        self.reserved -= self.cached
        self.cached = 0


class Torch:
    bfloat16, uint8 = "bfloat16", "uint8"
    OutOfMemoryError = OutOfMemoryError
    Generator = Generator

    def __init__(self, **cuda):
        self.cuda = Cuda(**cuda)

    def inference_mode(self):
        return nullcontext()

    def empty(self, *shape, dtype, device):
        assert (device, len(shape)) == ("cuda:0", 2)
        return Tensor(self.cuda, 2 * shape[0] * shape[1])

    def zeros(self, size, dtype, device):
        return Tensor(self.cuda, size)

    def empty_like(self, other):
        return Tensor(self.cuda, other.size)

    def mm(self, left, right, out):
        self.cuda.run("matmul", 2 * 8192**3)


def reported(torch) -> Reported:
    """As `probes.memory` makes it."""
    return Reported(1, "VmHWM", 1, torch.cuda.max_memory_allocated(""), torch.cuda.max_memory_reserved(""), None)


def sung(torch, aside) -> CanaryTimed:
    with aside.taken():
        return time_canary(torch, "cuda:0")


def test_the_cpu_has_no_canary():
    assert time_canary(None, "cpu") == CanaryTimed(None, None)
    with Aside(None, "cpu").taken():
        pass
    told = Reported(1, "VmHWM", 1, None, None, None)
    assert Aside(None, "cpu").corrected(told) == told


def test_speeds_are_those_of_the_device():
    torch = Torch()
    timed = time_canary(torch, "cuda:0")
    assert timed.matmul_tflops == pytest.approx(790)
    assert timed.copy_gb_s == pytest.approx(4000)
    assert timed.notes == ()


@pytest.mark.parametrize("speed", [0.02, 1, 100])
def test_it_is_short_on_any_device(speed):
    torch = Torch()
    torch.cuda.speed = {name: rate * speed for name, rate in torch.cuda.speed.items()}
    time_canary(torch, "cuda:0")
    assert torch.cuda.now_ms < 70 or torch.cuda.ran.count("matmul") <= 8
    assert 8 <= torch.cuda.ran.count("matmul") <= 26


def test_a_single_slow_call_is_no_slow_device():
    torch = Torch()
    plain = torch.mm

    def mm(left, right, out):
        plain(left, right, out)
        if torch.cuda.ran.count("matmul") == 20:
            torch.cuda.now_ms += 50

    torch.mm = mm
    assert time_canary(torch, "cuda:0").matmul_tflops == pytest.approx(790)


def test_the_models_peaks_are_what_they_were():
    torch = Torch()
    aside = Aside(torch, "cuda:0")
    model = Tensor(torch.cuda, 20 * MIB)
    before = reported(torch)
    timed = sung(torch, aside)
    assert timed.matmul_tflops is not None
    assert torch.cuda.emptied == 0
    assert (torch.cuda.allocated, torch.cuda.reserved) == (20 * MIB, 20 * MIB)
    assert aside.corrected(reported(torch)) == before
    del model


def test_without_the_care_they_would_not_be():
    """The fault that the tests above guard against."""
    torch = Torch()
    time_canary(torch, "cuda:0")
    assert reported(torch).device_peak_bytes >= 3 * MATRIX


def test_a_higher_peak_of_the_model_counts_wherever_it_comes():
    torch = Torch()
    aside = Aside(torch, "cuda:0")
    early = Tensor(torch.cuda, 7 * MIB)
    del early
    sung(torch, aside)
    assert aside.corrected(reported(torch)).device_peak_bytes == 7 * MIB
    late = Tensor(torch.cuda, 9 * MIB)
    sung(torch, aside)
    assert aside.corrected(reported(torch)).device_peak_bytes == 9 * MIB
    del late


def test_what_the_model_has_cached_stays_cached():
    """Else its next image would pay for memory that the one before had found ready."""
    torch = Torch()
    activations = Tensor(torch.cuda, 100 * MIB)
    del activations
    sung(torch, Aside(torch, "cuda:0"))
    assert (torch.cuda.cached, torch.cuda.emptied) == (100 * MIB, 0)


def test_a_torch_that_keeps_the_pool_is_made_to_give_it_back():
    torch = Torch(keeps_pools=True)
    aside = Aside(torch, "cuda:0")
    model = Tensor(torch.cuda, 20 * MIB)
    before = reported(torch)
    sung(torch, aside)
    assert (torch.cuda.emptied, torch.cuda.reserved) == (1, 20 * MIB)
    assert aside.corrected(reported(torch)) == before
    del model


def test_too_little_memory_for_large_buffers_takes_smaller_ones():
    torch = Torch(total=2 * GIB)
    assert sung(torch, Aside(torch, "cuda:0")).copy_gb_s == pytest.approx(4000)


@pytest.mark.parametrize(
    ("total", "notes"),
    [
        (500 * MIB, ("copy canary not timed: 121,634,816 bytes are free",)),
        (100 * MIB, ("matmul canary not timed: out of device memory",)),
    ],
)
def test_no_memory_is_a_note_and_no_crash(total, notes):
    torch = Torch(total=total)
    timed = sung(torch, Aside(torch, "cuda:0"))
    assert timed.copy_gb_s is None
    assert (timed.matmul_tflops is None) == ("matmul" in notes[0])
    assert timed.notes[0] == notes[0]
    assert torch.cuda.allocated == 0


def test_the_matrix_library_out_of_memory_is_a_note_too():
    torch = Torch()

    def mm(left, right, out):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    torch.mm = mm
    timed = time_canary(torch, "cuda:0")
    assert timed.notes == ("matmul canary not timed: out of device memory",)
    assert timed.copy_gb_s is not None


def test_another_error_of_the_device_is_no_note():
    torch = Torch()

    def mm(left, right, out):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.mm = mm
    with pytest.raises(RuntimeError, match="illegal memory access"):
        time_canary(torch, "cuda:0")
