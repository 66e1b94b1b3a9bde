"""Counts GPUs through the driver when it is imported, as some libraries do."""

import torch

torch._C._cuda_getDeviceCount()
