"""Host buffers between files and a device: pinned where the device is CUDA, so that a copy is as fast as the bus."""

from __future__ import annotations

from typing import Any

import torch


class HostBuffer:
    """Bytes of host memory, and the copy between them and the device that was issued last."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self.data = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        self.view = memoryview(self.data.numpy().data)
        """The same bytes, for system calls."""
        event: Any = torch.cuda.Event
        # Blocking, since threads that wait for a copy should not keep the others' processors busy.
        self._copied: torch.cuda.Event | None = event(blocking=True) if cuda else None

    def mark(self) -> None:
        """`wait` shall wait for what the calling thread's current stream was given until now."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Block, without holding the interpreter's lock, until the copies before the last `mark` are done."""
        if self._copied is not None:
            self._copied.synchronize()


class Staging:
    """A fixed number of equally large buffers, each allocated when it is first used.

    Pinning memory takes as long as reading some of it, so one of these is made per process and passed on from file to
    file, and the threads that use it pin its buffers side by side.
    """

    def __init__(self, device: torch.device, *, count: int = 16, buffer_bytes: int = 8 << 20) -> None:
        self.device = device
        self.count = count
        self.buffer_bytes = buffer_bytes
        self._buffers: list[HostBuffer | None] = [None] * count

    def __getitem__(self, index: int) -> HostBuffer:
        """The buffer of that number; no two threads may ask for the same one at a time."""
        buffer = self._buffers[index]
        if buffer is None:
            buffer = self._buffers[index] = HostBuffer(self.buffer_bytes, self.device)
        return buffer

    def wait(self) -> None:
        """Block until no buffer has a copy under way."""
        for buffer in self._buffers:
            if buffer is not None:
                buffer.wait()
