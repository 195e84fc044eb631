"""States written to files and read again, as docs/regularizers.md says it."""

import json

import pytest
import torch


def save_with_torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def save_with_safetensors(state, path):
    """Tensors by ``kind.name``, and numbers as metadata."""
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    kinds = {kind: {} for kind, value in state.items() if isinstance(value, dict)}
    flat = {f"{kind}.{name}": t.contiguous() for kind in kinds for name, t in state[kind].items()}
    numbers = {key: value for key, value in state.items() if key not in kinds}
    safetensors.save_file(flat, path, metadata={"numbers": json.dumps(numbers)})
    with safe_open(path, "pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
        for key in file.keys():  # noqa: SIM118
            kind, name = key.split(".", 1)
            kinds[kind][name] = file.get_tensor(key)
    return {**numbers, **kinds}
