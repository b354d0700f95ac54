"""Arrays under names <-> Flower's records."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from engine.training.federated import Tensors


def arrays(tensors: Tensors) -> ArrayRecord:
    """As Flower sends them: NumPy's own format, never pickle."""
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in tensors.items()})


def tensors_in(content: RecordDict, name: str) -> Tensors:
    """The arrays of a record; none where there is no such record."""
    record = content.array_records.get(name)
    return {} if record is None else {key: value.numpy() for key, value in record.items()}


def content(asked: dict[str, str | int | float], **records: Tensors) -> RecordDict:
    """A message's content: what is asked, and arrays by the name of their record."""
    return RecordDict({"asked": ConfigRecord(dict(asked)), **{name: arrays(value) for name, value in records.items()}})
