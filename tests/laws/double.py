"""Float64 also where a model's code asks for float32 (norms, softmax, routers): differences are then who sees whom."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class AllDouble(TorchFunctionMode):
    """Inside, what is float64 stays so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double and func in (torch.Tensor.to, torch.Tensor.type):
            args = (args[0], *(torch.float64 if a is torch.float32 else a for a in args[1:]))
        if double and given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        return func(*args, **given)
