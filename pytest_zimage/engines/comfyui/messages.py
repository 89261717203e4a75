"""What a ComfyUI server says, typed; fields that are not listed here are skipped.

Timestamps are milliseconds of its wall clock.
"""

from __future__ import annotations

import msgspec
from msgspec import Raw, Struct

# ---- the answer to a prompt ----------------------------------------------


class Accepted(Struct, frozen=True):
    """`POST /prompt` with status 200; `node_errors` may name outputs that will be left out all the same."""

    prompt_id: str
    node_errors: dict[str, NodeErrors] = {}


class Problem(Struct, frozen=True):
    """One reason why a prompt or a node of it is refused."""

    type: str = ""
    message: str = ""
    details: str = ""
    extra_info: dict[str, object] = {}


class NodeErrors(Struct, frozen=True):
    """What is wrong with one node."""

    errors: list[Problem] = []
    class_type: str = ""


class Refused(Struct, frozen=True):
    """`POST /prompt` with status 400."""

    error: Problem
    node_errors: dict[str, NodeErrors] = {}


# ---- the queue ------------------------------------------------------------


class ExtraData(Struct, frozen=True):
    client_id: str = ""
    create_time: int | None = None


class Queued(Struct, frozen=True, array_like=True):
    """One prompt of the queue; the same row stands in the history."""

    number: float
    prompt_id: str
    prompt: Raw = Raw()
    extra_data: ExtraData = ExtraData()


class Queue(Struct, frozen=True):
    queue_running: list[Queued]
    queue_pending: list[Queued]

    def of(self, client: str) -> list[str]:
        """Ids of the prompts that `client` has sent."""
        return [
            row.prompt_id for row in (*self.queue_running, *self.queue_pending) if row.extra_data.client_id == client
        ]

    def __contains__(self, prompt_id: str) -> bool:
        return any(row.prompt_id == prompt_id for row in (*self.queue_running, *self.queue_pending))

    def __len__(self) -> int:
        return len(self._rows())

    def _rows(self) -> list[Queued]:
        return [*self.queue_running, *self.queue_pending]


# ---- a prompt that is over --------------------------------------------------


class ImageFile(Struct, frozen=True):
    filename: str
    subfolder: str
    type: str


class Output(Struct, frozen=True):
    images: list[ImageFile] = []


class Status(Struct, frozen=True):
    status_str: str = ""
    completed: bool = False
    messages: list[tuple[str, Raw]] = []


class Finished(Struct, frozen=True):
    """One prompt of `GET /history/ID`."""

    prompt: Queued
    outputs: dict[str, Raw] = {}
    status: Status | None = None


class Event(Struct, frozen=True):
    """The fields of the events of an execution, each of which has some of them."""

    prompt_id: str = ""
    timestamp: int | None = None
    nodes: list[str] = []
    """`execution_cached`: what did not run."""
    node: str | None = None
    """`executing`: what runs from now on; None: nothing any more."""
    value: float = 0
    max: float = 0
    node_id: str = ""
    node_type: str = ""
    exception_type: str = ""
    exception_message: str = ""
    traceback: list[str] = []


class Message(Struct, frozen=True):
    """A text message of the websocket."""

    type: str
    data: Raw = Raw(b"{}")


# ---- the server -------------------------------------------------------------


class Package(Struct, frozen=True):
    name: str
    installed: str | None = None


class System(Struct, frozen=True):
    comfyui_version: str = ""
    python_version: str = ""
    pytorch_version: str = ""
    argv: list[str] = []
    comfy_package_versions: list[Package] = []


class Device(Struct, frozen=True):
    name: str = ""
    type: str = ""


class SystemStats(Struct, frozen=True):
    system: System
    devices: list[Device] = []


class Inputs(Struct, frozen=True):
    required: dict[str, list[object]] = {}


class NodeInfo(Struct, frozen=True):
    """One class of `GET /object_info/CLASS`."""

    input: Inputs = Inputs()

    def choices(self, name: str) -> tuple[str, ...]:
        """Values that the input takes: a list, or since version 0.3 a type with a list beside it."""
        match self.input.required.get(name, []):
            case [list() as values, *_]:
                return tuple(str(value) for value in values)
            case [_, {"options": list() as values}, *_]:
                return tuple(str(value) for value in values)
        return ()


event_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
message_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
output_decoder: msgspec.json.Decoder[Output] = msgspec.json.Decoder(Output)
