import pytest
import torch

from curate.cuda_graph import Captured


@pytest.mark.gpu
def test_what_is_replayed_is_what_is_run():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    ).cuda()
    captured = Captured(network)
    with torch.inference_mode():
        for rows in (4, 16, 4):
            x = torch.randn(rows, 3, 8, 8, device="cuda")
            first = captured(x)
            expected = network(x)
            assert torch.equal(first, expected)
            captured(torch.full_like(x, torch.nan))
            assert torch.equal(first, expected)  # not written over by the next call
            spread = x.contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(captured(spread), expected)
    assert len(captured._graphs) == 4
