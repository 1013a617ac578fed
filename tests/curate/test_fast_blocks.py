"""The quick form of open_clip's blocks against open_clip itself, and what it must leave alone."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from torch.nn.functional import cosine_similarity

from curate import fast_blocks
from curate.fast_blocks import TextTower, is_causal, speed_up

VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 3}
END = 99


def network(kind=CLIP, vision=None, text=None, **options):
    """A model whose every weight matters: open_clip starts biases at 0 and norms at 1."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = kind(32, {**VISION, **(vision or {})}, {**TEXT, **(text or {})}, **options)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


def pixels(n=5, height=32, width=32):
    return torch.from_numpy(
        np.random.default_rng(0).standard_normal((n, 3, height, width), dtype=np.float32)
    )


def token_rows(lengths=(1, 2, 3, 7, 15)):
    """Begin, so many words, the end, and other small numbers where open_clip writes zeros."""
    rng = np.random.default_rng(1)
    rows = rng.integers(1, 90, (len(lengths), 16))
    for row, length in zip(rows, lengths, strict=True):
        row[length] = END
    return torch.from_numpy(rows)


class TestImages:
    @pytest.mark.parametrize(
        "vision",
        [
            {},
            {"pool_type": "avg"},
            {"ls_init_value": 0.3},
            {"no_ln_pre": True},
            {"final_ln_after_pool": True},
            {"attentional_pool": True, "attn_pooler_heads": 4},
            {"output_tokens": True},
            {"patch_dropout": 0.5},
            {"layers": 1},
        ],
        ids=lambda vision: ",".join(vision) or "plain",
    )
    @pytest.mark.parametrize("quick_gelu", [False, True])
    def test_equal_open_clips_own(self, vision, quick_gelu):
        model = network(vision=vision, quick_gelu=quick_gelu)
        fast = deepcopy(model)
        assert speed_up(fast)
        expected, got = model.encode_image(pixels()), fast.encode_image(pixels())
        if "output_tokens" in vision:
            (expected, tokens), (got, got_tokens) = expected, got
            torch.testing.assert_close(got_tokens, tokens, atol=2e-5, rtol=1e-5)
        assert expected.std() > 0.1
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)

    def test_the_last_block_computes_the_class_token_only(self):
        model = network()
        assert speed_up(model)
        seen = []
        model.visual.transformer.register_forward_hook(lambda *given: seen.append(given[2].shape))
        model.encode_image(pixels())
        assert seen == [(5, 1, 64)]

    def test_images_that_are_not_square(self):
        model = network(vision={"image_size": (16, 40)})
        fast = deepcopy(model)
        assert speed_up(fast)
        rows = pixels(3, 16, 40)
        torch.testing.assert_close(
            fast.encode_image(rows), model.encode_image(rows), atol=2e-5, rtol=1e-5
        )

    @pytest.mark.parametrize("packs", [True, False])
    def test_bfloat16(self, packs, monkeypatch):
        if not packs:
            monkeypatch.setattr(fast_blocks, "_packed", lambda weight: None)
        model = network()
        fast = deepcopy(model).bfloat16()
        assert speed_up(fast)
        got = fast.encode_image(pixels().bfloat16())
        assert got.dtype == torch.bfloat16
        assert cosine_similarity(got.float(), model.encode_image(pixels())).min() > 0.999

    @pytest.mark.parametrize(
        "vision",
        [
            {"layers": [1, 1, 1, 1]},
            {"block_type": "custom"},
            {"qk_norm": True},
        ],
    )
    def test_other_towers_stay_as_they_are(self, vision):
        model = network(vision=vision)
        before = [id(module) for module in model.modules()]
        assert not speed_up(model)
        assert before == [id(module) for module in model.modules()]

    def test_a_model_of_timm_stays_as_it_is(self):
        assert not speed_up(nn.Sequential(nn.Linear(2, 2)))

    def test_an_unusual_activation_stays_as_it_is(self):
        model = network()
        model.visual.transformer.resblocks[1].mlp[1] = nn.GELU(approximate="tanh")
        assert not speed_up(model)


class TestTexts:
    @pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
    @pytest.mark.parametrize("fast", [False, True])
    @pytest.mark.parametrize(
        "text", [{}, {"pool_type": "eos", "eos_id": END}, {"proj_bias": True}, {"layers": 1}]
    )
    def test_cut_texts_equal_whole_ones(self, kind, fast, text):
        model, rows = network(kind, text=text), token_rows()
        expected = model.encode_text(rows)
        assert is_causal(model)
        tower = TextTower(model, fast=fast)
        ends = tower.ends(rows)
        assert ends.tolist() == [1, 2, 3, 7, 15]
        assert expected.std() > 0.1
        torch.testing.assert_close(tower(rows, ends), expected, atol=2e-5, rtol=1e-5)
        for length in (8, 12):
            there = ends < length
            got = tower(rows[there, :length], ends[there])
            torch.testing.assert_close(got, expected[there], atol=2e-5, rtol=1e-5)

    def test_bfloat16(self):
        model, rows = network(), token_rows()
        tower = TextTower(deepcopy(model).bfloat16(), fast=True)
        got = tower(rows, tower.ends(rows))
        assert got.dtype == torch.bfloat16
        assert cosine_similarity(got.float(), model.encode_text(rows)).min() > 0.999

    @pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
    @pytest.mark.parametrize(
        "text", [{"no_causal_mask": True}, {"pool_type": "first"}, {"pool_type": "last"}]
    )
    def test_texts_that_must_stay_whole(self, kind, text):
        assert not is_causal(network(kind, text=text))

    @pytest.mark.parametrize("text", [{"embed_cls": True}, {"output_tokens": True}])
    def test_coca_texts_stay_whole(self, text):
        assert not is_causal(network(CustomTextCLIP, text=text))

    def test_a_mask_that_looks_ahead_keeps_texts_whole(self):
        model = network()
        model.attn_mask[2, 3] = 0
        assert not is_causal(model)

    def test_other_models_stay_whole(self):
        assert not is_causal(nn.Linear(2, 2))
        model = network(CustomTextCLIP)
        model.text = nn.Identity()
        assert not is_causal(model)


def test_weights_that_torch_cannot_pack(monkeypatch):
    """Its operators are for its own compiler and may go; the plain product is the same layer."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=rng).bfloat16()
    bias, x = torch.randn(32, generator=rng).bfloat16(), torch.randn(3, 7, 16, generator=rng)
    expected = nn.functional.gelu(x @ weight.float().T + bias.float())
    for supported in (True, False):
        with monkeypatch.context() as patch:
            if not supported:
                patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None, raising=False)
                patch.setattr(
                    torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False
                )
                assert fast_blocks._packed(weight) is None
            layer = fast_blocks._Linear(weight, bias, gelu=True)
        torch.testing.assert_close(layer(x.bfloat16()).float(), expected, atol=0.1, rtol=0.02)
