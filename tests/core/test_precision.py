"""The arithmetic modes set what they say, and give the caller's settings back."""

import pytest
import torch

from neon.runtime.precision import arithmetic

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _given_back():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def settings() -> tuple[bool, bool, bool]:
    backends = torch.backends
    return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("precision", "inside", "product"),
    [
        ("fp32", (False, False, False), torch.float32),
        ("tf32", (True, True, False), torch.float32),
        ("bf16", (True, True, True), torch.bfloat16),
        ("fp16", (True, True, True), torch.float16),
    ],
)
@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_inside_and_afterwards(precision, inside, product, before):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    with arithmetic(CPU, precision):
        assert settings() == inside
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == product
    assert settings() == (*before, False)


def test_exact_inside_a_callers_autocast():
    with torch.autocast("cpu", torch.bfloat16), arithmetic(CPU, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
