import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from curate.checkpoints import file_sha256, load_strictly, read_state_dict
from curate.errors import ModelError

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # The digest of "abc" in FIPS 180-4.
    assert file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_layouts_of_torch_files(tmp_path, prefix, wrapper):
    content = {prefix + name: value for name, value in STATE.items()}
    torch.save({"epoch": 1, wrapper: content} if wrapper else content, tmp_path / "a.pt")
    state = read_state_dict(tmp_path / "a.pt")
    assert state.keys() == STATE.keys()
    assert torch.equal(state["weight"], STATE["weight"])


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    module = torch.nn.Linear(3, 2)
    load_strictly(module, read_state_dict(tmp_path / "a.safetensors"), source="a")
    assert torch.equal(module.weight, STATE["weight"])


def test_float16_enters_a_float32_module():
    module = torch.nn.Linear(3, 2)
    load_strictly(module, {name: value.half() for name, value in STATE.items()}, source="a")
    assert module.weight.dtype == torch.float32


def test_a_pickle_with_code_is_not_run(tmp_path):
    trace = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (trace.touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(ModelError, match=r"run code.*safetensors"):
            read_state_dict(tmp_path / name)
    assert not trace.exists()


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(ModelError, match="TorchScript"):
        read_state_dict(tmp_path / "jit.pt")


def test_wrong_keys_and_shapes_are_named():
    state = {"weight": torch.zeros(3, 3), **{f"stray{i}": torch.zeros(1) for i in range(5)}}
    module = torch.nn.Linear(3, 2)
    with pytest.raises(ModelError) as error:
        load_strictly(module, state, source="a.safetensors")
    for part in ("a.safetensors", "bias", "stray2 and 2 more", "weight (3, 3)", "(2, 3)"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 a broken zip"])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged|not a readable"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"epoch": 1}, "epoch is not a tensor"), ([1], "holds no parameters"), ({}, "no parameters")],
)
def test_files_without_parameters(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=message):
        read_state_dict(tmp_path / "a.pt")


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match="are not a file"):
        read_state_dict(tmp_path / "b.pt")
