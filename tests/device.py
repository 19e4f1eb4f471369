"""Where tests of the engine and of golden data compute."""

import os

import torch

TEST_DEVICE = torch.device(os.environ.get("VDIFF_TEST_DEVICE", "cpu"))
