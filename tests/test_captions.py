"""Captions: folders, packed sets, emoji of several vendors, tar files; text encoders."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tarflow_jax import data
from tarflow_jax.data.source import split_of
from tarflow_jax.errors import UserError
from tarflow_jax.text import T5Encoder, WordVectors, open_text_encoder


def png(value, side=16):
    ramp = np.linspace(0, 255, side, dtype=np.uint8)[:, None] // 2 + np.uint8(value % 128)
    file = io.BytesIO()
    Image.fromarray(np.tile(ramp[:, :, None], (1, side, 3))).save(file, "png")
    return file.getvalue()


def write_captioned(folder):
    """40 images in two class folders; captions in metadata.jsonl of one, in text files of the other."""
    root = folder / "images"
    for index in range(40):
        folder = root / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}.png").write_bytes(png(index))
        if index % 2:
            (folder / f"{index:02d}.txt").write_text(f"dog {index}\n\nA dog, number {index}\n")
    lines = [json.dumps({"file_name": f"{index:02d}.png", "text": f"cat {index}"}) for index in range(0, 40, 2)]
    (root / "cat" / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def captioned(tmp_path):
    return write_captioned(tmp_path)


def expected_captions(source):
    """What the fixture says of a source's images, which are known by their first pixel."""
    indices = source.read(range(len(source)))[0][:, 0, 0, 0]
    return [(f"cat {i}",) if i % 2 == 0 else (f"dog {i}", f"A dog, number {i}") for i in indices]


def test_captions_of_a_folder_survive_packing(captioned, tmp_path):
    options = {"data_dir": tmp_path / "data", "image_size": (16, 16)}
    name = data.prepare_source(f"folder:{captioned}", **options)
    for opened in (f"folder:{captioned}", name):
        for split in ("train", "test"):
            source = data.open_source(opened, split, **options)
            assert list(source.captions) == expected_captions(source)
    file = next((tmp_path / "data" / "packed").glob("*/captions-train.jsonl"))
    file.write_text(file.read_text().replace("dog", "cow"))
    with pytest.raises(UserError, match=r"captions-train.jsonl: missing or damaged"):
        data.open_source(name, "train", **options)


def test_metadata_of_another_kind_is_refused(captioned, tmp_path):
    (captioned / "cat" / "metadata.jsonl").write_text('{"name": "00.png"}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: expected an object with file_name and text"):
        data.open_source(f"folder:{captioned}", "train", data_dir=tmp_path / "data")


def test_emoji_of_two_vendors_share_names_and_splits(tmp_path):
    entries = [
        {
            "name": f"THING {index}",
            "short_name": f"thing_{index}",
            "unified": f"1F{index:03X}",
            "category": "Objects",
            "skin_variations": {"1F3FB": {"unified": f"1F{index:03X}-1F3FB"}},
        }
        for index in range(30)
    ]
    codes = [code for entry in entries for code in (entry["unified"], entry["unified"] + "-1F3FB")]
    for package, place in (("emoji-datasource-google", "img/google/64"), ("lobehub-fluent", "assets")):
        with tarfile.open(tmp_path / f"{package}.tgz", "w:gz") as archive:
            ending = "png" if "google" in package else "webp"
            contents = {f"{place}/{code.lower()}.{ending}": png(i // 2, 64) for i, code in enumerate(codes)}
            if "google" in package:
                contents["emoji.json"] = json.dumps(entries).encode()
            for name, content in contents.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    name = data.prepare_source(f"emoji_text:{tmp_path}", data_dir=tmp_path / "data")
    for split in ("train", "test"):
        source = data.open_source(name, split, data_dir=tmp_path / "data")
        indices = source.read(range(len(source)))[0][:, 0, 0, 0]
        wanted = [i for i, entry in enumerate(entries) if split_of(entry["unified"]) == split]
        assert sorted(indices) == sorted(4 * wanted)
        first = int(indices[0])
        assert source.captions[0] == (f"thing {first}", f"thing {first}, google")
        assert any(captions[1] == f"thing {first} with light skin tone, fluent" for captions in source.captions)


@pytest.fixture(scope="module")
def words():
    return WordVectors.from_wordllama(["A flibbertigibbet's hat"], length=4)


def test_word_vectors(words, tmp_path, caplog):
    found = words(["a red heart", "", "Heart, RED", "flibbertigibbet", "one two three four five"])
    assert found.shape == (5, 4, 256)
    assert found.dtype == np.float32
    assert not found[1].any()
    assert not found[0, 3].any()
    np.testing.assert_array_equal(found[0, 1:3], found[2, 1::-1])
    assert found[3, 0].any()
    assert found[4].any(1).all()
    assert not caplog.records
    words(["a zyzzyvaq"])
    assert "left out: zyzzyvaq" in caplog.text
    words.save(tmp_path)
    again = open_text_encoder(tmp_path)
    assert again.fingerprint == words.fingerprint
    np.testing.assert_array_equal(again(["a red heart"]), found[:1])
    (tmp_path / "words.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(UserError, match="is not a text encoder, or damaged"):
        open_text_encoder(tmp_path)


@pytest.mark.slow
def test_t5_pads_with_zeros_and_knows_the_empty_caption(tmp_path):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "heart": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    config = transformers.T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    torch.manual_seed(0)
    network = transformers.T5EncoderModel(config)
    network.save_pretrained(tmp_path)
    text = T5Encoder(str(tmp_path), length=6)
    found = text(["a red heart", "", "red"])
    assert found.shape == (3, 6, 16)
    assert (found.any(2).sum(1) == [4, 1, 2]).all()
    with torch.no_grad():
        alone = network.eval()(input_ids=torch.tensor([[4, 1]])).last_hidden_state.numpy()
    np.testing.assert_allclose(found[2, :2], alone[0], atol=1e-5)
    text.save(tmp_path / "saved")
    np.testing.assert_array_equal(open_text_encoder(tmp_path / "saved")(["red"]), found[2:])
