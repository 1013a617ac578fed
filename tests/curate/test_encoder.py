import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from curate.encoder import load_encoder, resolve_precision
from curate.errors import ModelError
from curate.fast_blocks import TextTower

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
TEXTS = ["a cat", "a dog on the grass", "", "x " * 100]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def trained(config_file):
    """An open_clip model with weights of its own, built without our loader."""
    from open_clip.model import CLIP

    with torch.random.fork_rng():
        torch.manual_seed(7)
        return CLIP(**CONFIG).eval()


@pytest.fixture(scope="module")
def weights_file(config_file, trained):
    path = config_file.parent / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def encoder(config_file, weights_file):
    return load_exact(config_file, weights_file, batch_size=16)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def load_exact(model, weights, **options):
    """In float32, which "auto" is not on every CPU."""
    options = {"device": "cpu", "precision": "fp32", **options}
    return load_encoder(str(model), weights and str(weights), **options)


def images(n, size=32, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((n, 3, size, size), dtype=np.float32)
    )


def photo(size=(50, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TestOpenClip:
    def test_images_equal_open_clips_own(self, encoder, trained):
        batch = images(5)
        with torch.inference_mode():
            expected = trained.encode_image(batch, normalize=True).numpy()
        got = encoder.encode_images(batch)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)

    def test_texts_equal_open_clips_own(self, encoder, trained):
        import open_clip

        with torch.inference_mode():
            tokens = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
            expected = trained.encode_text(tokens, normalize=True).numpy()
        np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected, atol=2e-6)

    def test_preprocess_is_the_validation_transform(self, encoder):
        from open_clip import image_transform

        expected = image_transform(32, is_train=False)(photo())
        assert torch.equal(encoder.preprocess(photo()), expected)
        assert expected.shape == (3, 32, 32)

    def test_preprocess_in_threads(self, encoder):
        photos = [photo(seed=i) for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(encoder.preprocess, photos))
        assert all(map(torch.equal, results, map(encoder.preprocess, photos)))

    def test_facts(self, encoder):
        assert encoder.width == 32
        assert encoder.has_text
        assert encoder.precision == "fp32"
        assert encoder.name.endswith("tiny.json")

    def test_nothing_in_nothing_out(self, encoder):
        assert encoder.encode_images(images(0)).shape == (0, 32)
        assert encoder.encode_texts([]).shape == (0, 32)

    def test_one_image_is_not_a_batch(self, encoder):
        with pytest.raises(ValueError, match="a batch is"):
            encoder.encode_images(images(1)[0])

    def test_root_logger_is_left_alone(self, config_file, weights_file):
        import logging

        before = list(logging.getLogger().handlers), list(logging.getLogger().filters)
        load_encoder(str(config_file), str(weights_file), device="cpu")
        assert before == (list(logging.getLogger().handlers), list(logging.getLogger().filters))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
class TestBatches:
    """A row's vector depends on the row: not on its batch, the batch size or the threads."""

    @pytest.fixture
    def load(self, config_file, weights_file, precision):
        return partial(load_exact, config_file, weights_file, precision=precision)

    @pytest.mark.parametrize("batch_size", [1, 24, 64])
    def test_images_bit_for_bit(self, load, batch_size):
        encoder = load(batch_size=batch_size)
        assert encoder.batch_size % 16 == 0
        batch = images(130)
        reference = load(batch_size=32).encode_images(batch)
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(130)[: 130 - 17 * seed]
            assert np.array_equal(encoder.encode_images(batch[order]), reference[order])
        for row in (0, 1, 77, 129):
            assert np.array_equal(encoder.encode_images(batch[row : row + 1])[0], reference[row])

    def test_texts_bit_for_bit(self, load):
        encoder = load(batch_size=16)
        texts = [f"a photo of number {i}" + " and more" * (i % 5) for i in range(50)]
        reference = encoder.encode_texts(texts)
        order = np.random.default_rng(0).permutation(50)[:41]
        assert np.array_equal(encoder.encode_texts([texts[i] for i in order]), reference[order])
        assert np.array_equal(encoder.encode_texts(texts[7:8])[0], reference[7])
        assert np.array_equal(load(batch_size=64).encode_texts(texts), reference)

    def test_any_number_of_threads(self, load):
        encoder, batch = load(batch_size=16), images(70)
        reference = encoder.encode_images(batch), encoder.encode_texts(TEXTS)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert encoder.rows_at_once == 16 * threads
            assert np.array_equal(encoder.encode_images(batch), reference[0])
            assert np.array_equal(encoder.encode_texts(TEXTS), reference[1])
            assert torch.get_num_threads() == threads

    def test_a_run_has_one_core_to_itself(self, load, monkeypatch):
        """Large products would differ in their last bits if more threads shared them."""
        seen = []
        run = TextTower.__call__

        def watched(tower, tokens, ends):
            seen.append((torch.get_num_threads(), len(tokens)))
            return run(tower, tokens, ends)

        monkeypatch.setattr(TextTower, "__call__", watched)
        torch.set_num_threads(2)
        load().encode_texts(["one"] * 40)
        assert seen == [(1, 16)] * 3

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_run_that_fails_is_told(self, load, threads):
        torch.set_num_threads(threads)
        with pytest.raises(RuntimeError):
            load().encode_images(images(40, size=16))
        assert torch.get_num_threads() == threads


class TestTexts:
    """Texts run in groups of like length."""

    def test_many_lengths_equal_open_clips_own(self, encoder, trained):
        import open_clip

        texts = [" ".join(["word"] * (i * 7 % 19)) for i in range(60)]
        with torch.inference_mode():
            tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
            expected = trained.encode_text(tokens, normalize=True).numpy()
        np.testing.assert_allclose(encoder.encode_texts(texts), expected, atol=2e-6)

    def test_a_text_is_cut_at_its_own_end(self, config_file, weights_file, monkeypatch):
        """Begin and end and 3 words are 5 tokens, of which 8 are computed, of 16."""
        seen = []
        run = TextTower.__call__

        def watched(tower, tokens, ends):
            seen.append((tuple(tokens.shape), sorted(set(ends.tolist()))))
            return run(tower, tokens, ends)

        monkeypatch.setattr(TextTower, "__call__", watched)
        encoder = load_exact(config_file, weights_file, batch_size=64)
        encoder.encode_texts(["one two three"] * 17 + ["", "word " * 30, "one two"])
        assert seen == [((16, 16), [15]), ((16, 8), [4]), ((16, 8), [4]), ((16, 4), [1, 3])]

    def test_texts_that_look_ahead_run_whole(self, tmp_path):
        import open_clip
        from open_clip.model import CLIP

        config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True}}
        (tmp_path / "both.json").write_text(json.dumps(config))
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = CLIP(**config).eval()
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors"
        )
        got = load_exact(tmp_path / "both.json", tmp_path / "w.safetensors").encode_texts(TEXTS)
        with torch.inference_mode():
            tokens = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
            expected = model.encode_text(tokens, normalize=True).numpy()
        np.testing.assert_allclose(got, expected, atol=2e-6)


class TestBatchSize:
    def test_batch_size_must_be_positive(self, config_file, weights_file):
        with pytest.raises(ValueError, match="at least 1"):
            load_encoder(str(config_file), str(weights_file), device="cpu", batch_size=0)


class TestFiles:
    @pytest.mark.parametrize("layout", ["plain", "checkpoint", "compiled"])
    def test_torch_files(self, tmp_path, config_file, trained, encoder, layout):
        state = trained.state_dict()
        if layout == "checkpoint":
            state = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
        elif layout == "compiled":
            state = {f"module._orig_mod.{k}": v for k, v in state.items()}
        torch.save(state, tmp_path / "weights.pt")
        got = load_exact(config_file, tmp_path / "weights.pt")
        np.testing.assert_allclose(
            got.encode_images(images(3)), encoder.encode_images(images(3)), atol=2e-6
        )

    def test_float16_file(self, tmp_path, config_file, trained, encoder):
        state = {k: v.half().contiguous() for k, v in trained.state_dict().items()}
        save_file(state, tmp_path / "half.safetensors")
        got = load_exact(config_file, tmp_path / "half.safetensors")
        assert got.precision == "fp32"
        np.testing.assert_allclose(
            got.encode_images(images(3)), encoder.encode_images(images(3)), atol=5e-3
        )

    @pytest.mark.parametrize("prefix", ["", "local-dir:"])
    def test_folder(self, tmp_path, trained, encoder, weights_file, prefix):
        mean = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
        content = {"model_cfg": CONFIG, "preprocess_cfg": mean}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=r"has 0 \.safetensors files"):
            load_encoder(f"{prefix}{tmp_path}", device="cpu")
        (tmp_path / "model.safetensors").write_bytes(weights_file.read_bytes())
        got = load_exact(f"{prefix}{tmp_path}", None, batch_size=16)
        assert np.array_equal(got.encode_images(images(3)), encoder.encode_images(images(3)))
        white = got.preprocess(Image.new("RGB", (9, 9), "white"))
        assert torch.equal(white, torch.ones(3, 32, 32))
        assert got.fingerprint != encoder.fingerprint

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not a readable"),
            ("[]", "embed_dim, vision_cfg, text_cfg missing"),
            (json.dumps({**CONFIG, "colour": 1}), "cannot build"),
        ],
    )
    def test_bad_configs(self, tmp_path, content, message):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            load_encoder(str(tmp_path / "bad.json"), "random", device="cpu")

    def test_config_needs_weights(self, config_file):
        with pytest.raises(ModelError, match="--pretrained FILE"):
            load_encoder(str(config_file), device="cpu")


class TestRandom:
    def test_repeats_warns_and_leaves_the_seed_alone(self, config_file, caplog):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        a = load_encoder(str(config_file), "random", device="cpu")
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(4)
        b = load_encoder(str(config_file), "none", device="cpu")
        assert np.array_equal(a.encode_images(images(3)), b.encode_images(images(3)))
        assert a.fingerprint == b.fingerprint
        assert "mean little" in caplog.text


class TestFingerprint:
    def test_follows_what_changes_vectors(self, tmp_path, config_file, weights_file, encoder):
        def fingerprint(model=config_file, weights=weights_file, **options):
            return load_exact(model, weights, **options).fingerprint

        moved = tmp_path / "other-name.json"
        moved.write_text(json.dumps(CONFIG))
        squash = tmp_path / "squash.json"
        squash.write_text(
            json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "squash"}})
        )
        assert fingerprint(moved, batch_size=64) == encoder.fingerprint
        others = [
            fingerprint(precision="bf16"),
            fingerprint(weights="random"),
            fingerprint(model=squash),
        ]
        assert len({encoder.fingerprint, *others}) == 4


class TestPrecision:
    def test_resolve(self):
        cpu = torch.device("cpu")
        assert resolve_precision("fp32", cpu) == "fp32"
        assert resolve_precision("bf16", cpu) == "bf16"
        with pytest.raises(ValueError, match="fp16 is for GPUs"):
            resolve_precision("fp16", cpu)
        with pytest.raises(ValueError, match="use auto, fp32, bf16, fp16"):
            resolve_precision("double", cpu)

    @pytest.mark.parametrize(
        ("bf16", "amx", "expected"),
        [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")],
    )
    def test_auto_on_the_cpu(self, monkeypatch, bf16, amx, expected):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        assert resolve_precision("auto", torch.device("cpu")) == expected

    def test_auto_where_torch_does_not_tell(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
        assert resolve_precision("auto", torch.device("cpu")) == "fp32"

    def test_bf16_on_the_cpu(self, config_file, weights_file, encoder):
        got = load_encoder(str(config_file), str(weights_file), device="cpu", precision="bf16")
        batch = images(20)
        vectors = got.encode_images(batch)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert (vectors * encoder.encode_images(batch)).sum(1).min() > 0.999
        assert (got.encode_texts(TEXTS) * encoder.encode_texts(TEXTS)).sum(1).min() > 0.999
        assert np.array_equal(got.encode_images(batch[5:9]), vectors[5:9])


class TestNames:
    @pytest.mark.parametrize("model", ["ViT-B32", "vit-b-32x"])
    def test_unknown_model(self, model):
        with pytest.raises(ModelError, match=r"Close: .*ViT-B-32.*list_models"):
            load_encoder(model, device="cpu")

    def test_unknown_tag(self):
        with pytest.raises(ModelError, match=r"did you mean 'laion2b_s34b_b79k'.*known: openai"):
            load_encoder("ViT-B-32", "laion2b_s34b_b79", device="cpu")

    def test_a_tag_is_needed_where_there_are_many(self):
        with pytest.raises(ModelError, match=r"needs --pretrained TAG.*laion2b_s32b_b82k"):
            load_encoder("ViT-L/14", device="cpu")

    def test_hub_models_bring_their_weights(self):
        with pytest.raises(ModelError, match="brings its own weights"):
            load_encoder("hf-hub:laion/model", "openai", device="cpu")

    def test_a_file_for_a_published_model_gets_that_models_preprocessing(self):
        from curate.model_sources import _usual_preprocess

        usual = _usual_preprocess("ViT-B-16-SigLIP", ["webli"], warn=True)
        assert usual["mean"] == (0.5, 0.5, 0.5)
        assert usual["resize_mode"] == "squash"
        assert _usual_preprocess("anything", [], warn=True) == {}


@pytest.mark.usefixtures("no_hub")
class TestWithoutNetwork:
    @pytest.mark.parametrize(
        ("model", "pretrained", "parts"),
        [
            ("ViT-B-32", None, ["laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]),
            ("ViT-B-32", "openai", ["--model ViT-B-32-quickgelu --pretrained FILE.safetensors"]),
            ("hf-hub:some/model", None, ["some/model", "--model FOLDER"]),
            ("timm:vit_tiny_patch16_224", None, ["timm:vit_tiny_patch16_224", "--pretrained FILE"]),
        ],
    )
    def test_fails_fast_and_says_what_to_do(self, model, pretrained, parts):
        import open_clip  # noqa: F401 - its import takes seconds, and is not what is timed
        import timm  # noqa: F401

        start = time.perf_counter()
        with pytest.raises(ModelError) as error:
            load_encoder(model, pretrained, device="cpu")
        assert time.perf_counter() - start < 10
        message = str(error.value)
        assert message.count("\n") == 1
        for part in [*parts, "127.0.0.1:9", "HF_HOME", "--embeddings"]:
            assert part in message
        assert constants.HF_HUB_OFFLINE is False

    def test_the_cache_is_enough_but_must_hold_the_weights(self, tmp_path, weights_file, encoder):
        snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0a"
        snapshot.mkdir(parents=True)
        (tmp_path / "models--me--tiny" / "refs").mkdir()
        (tmp_path / "models--me--tiny" / "refs" / "main").write_text("0a")
        (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
        # open_clip alone would go on with random weights.
        with pytest.raises(ModelError, match=r"hf-hub:me/tiny .*failed"):
            load_encoder("hf-hub:me/tiny", device="cpu")
        (snapshot / "open_clip_model.safetensors").write_bytes(weights_file.read_bytes())
        got = load_exact("hf-hub:me/tiny", None, batch_size=16)
        assert np.array_equal(got.encode_images(images(3)), encoder.encode_images(images(3)))
        assert np.array_equal(got.encode_texts(TEXTS), encoder.encode_texts(TEXTS))

    def test_local_models_ask_for_nothing(self, config_file, weights_file, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("a request")

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        load_encoder(str(config_file), str(weights_file), device="cpu")


class TestTimm:
    @pytest.fixture(scope="class")
    def tiny(self):
        return load_encoder("timm:vit_tiny_patch16_224", "random", device="cpu", batch_size=16)

    def test_images_only(self, tiny):
        assert (tiny.width, tiny.has_text) == (192, False)
        batch = torch.stack([tiny.preprocess(photo(seed=i)) for i in range(3)])
        assert batch.shape == (3, 3, 224, 224)
        vectors = tiny.encode_images(batch)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert np.array_equal(tiny.encode_images(batch[2:])[0], vectors[2])
        with pytest.raises(ValueError, match="images only"):
            tiny.encode_texts(["a"])

    def test_a_classifiers_file(self, tmp_path):
        import timm

        with torch.random.fork_rng():
            model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        encoder = load_encoder(
            "timm:vit_tiny_patch16_224",
            str(tmp_path / "weights.safetensors"),
            device="cpu",
            precision="fp32",
            batch_size=16,
        )
        batch = images(2, size=224)
        with torch.inference_mode():
            expected = model.forward_head(model.forward_features(batch), pre_logits=True)
            expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
        np.testing.assert_allclose(encoder.encode_images(batch), expected, atol=2e-6)

    def test_unknown_names(self):
        with pytest.raises(ModelError, match=r"Close: timm:vit_tiny_patch16_224"):
            load_encoder("timm:vit_tiny_patch16_22", device="cpu")
        with pytest.raises(ModelError, match="augreg_in21k"):
            load_encoder("timm:vit_tiny_patch16_224", "imagenet", device="cpu")
