"""Tests of rows.py, readers.py, convert.py, features.py, dry_run.py; of examples from records."""

import io
import json
import re

import pytest
import torch
from PIL import Image

import checkpoint
import convert
import data
import dry_run
import features
import readers
import rows
import sft
import train
from model import LLaVA, LLaVAConfig, TextConfig, add_adapter, init_weights, select_trainable
from readers import Conversation, Pair, read_conversations, read_pairs, read_prompts
from rows import DataError, ParquetImage, open_image
from vision import ImageSettings, VisionConfig, preprocess

SETTINGS = ImageSettings(size=12, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
PATCHES = 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data.train_tokenizer(sft.world_texts(30), path, 600)
    return data.Tokenizer(path)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400,
    )
    model = LLaVA(LLaVAConfig(
        vision=VisionConfig(16, 32, 2, 2, image_size=12, patch_size=4), text=text,
        image_token=tokenizer.image_token, pad_token=tokenizer.pad_token,
    ))
    init_weights(model, 0)
    return model


def picture(seed, kind="PNG", size=(20, 10)):
    """Bytes of a picture that is different for every seed."""
    buffer = io.BytesIO()
    colour = (seed * 67 % 256, seed * 31 % 256, 200 - seed)
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("ok.jpg", "b.jpg", "c.jpg")):
        (tmp_path / name).write_bytes(picture(seed, "JPEG"))
    return tmp_path


def write_lines(folder, *lines):
    path = folder / "rows.jsonl"
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in lines)
    path.write_bytes(b"\n".join(lines))
    return path


def write_json(folder, content, name="rows.json"):
    path = folder / name
    path.write_text(json.dumps(content, indent=1))
    return path


def said(*values, first="human"):
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


# ==================================================================================== rows, plain

GOOD = {"image": "ok.jpg", "question": "What?", "chosen": "A car.", "rejected": "A bus."}


def test_plain_rows_in_lines_and_in_an_array(folder):
    prompt = {**GOOD, "prompt": "What?\n<image>"}
    del prompt["question"]
    from_lines = read_pairs([write_lines(folder, GOOD, b"", prompt)])
    assert [p.question for p in from_lines] == ["What?", "What?"]
    assert from_lines[1].name.endswith("rows.jsonl row 3")  # as an editor counts lines
    assert open_image("x", from_lines[0].image).size == (20, 10)
    array = write_json(folder, [GOOD, prompt], "array.txt")  # the content decides, not the name
    array.write_bytes(b"\xef\xbb\xbf" + array.read_bytes())  # as some editors save it
    for one, other in zip(from_lines, read_pairs([array])):
        assert (one.image, one.question, one.chosen) == (other.image, other.question, other.chosen)
    assert read_pairs([array])[1].name.endswith("array.txt row 2")


def test_images_are_looked_for_beside_the_file_or_where_told(folder, tmp_path_factory):
    path = write_lines(folder, GOOD)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    elsewhere.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="row 1: no image 'ok.jpg' in .*point --images"):
        read_pairs([elsewhere])
    assert read_pairs([elsewhere], folder)[0].image == read_pairs([path])[0].image


@pytest.mark.parametrize("row,message", [
    (b'{"image": "ok.jpg", "que', "row 2: not valid JSON"),
    (b'{"image": "ok.jpg\xff"}', "row 2: not valid JSON"),
    (b"[" * 100_000, "row 2: not valid JSON"),
    ([1, 2], "row 2: expected an object, found a list"),
    (GOOD | {"chosen": ""}, "row 2: field 'chosen' is missing or empty"),
    (GOOD | {"chosen": 7}, "row 2: field 'chosen' is missing or empty"),
    (GOOD | {"rejected": " "}, "row 2: field 'rejected' is missing or empty"),
    ({k: GOOD[k] for k in ("image", "chosen", "rejected")}, "row 2: field 'question' is missing"),
    ({k: GOOD[k] for k in ("question", "chosen", "rejected")}, "row 2: field 'image' is missing"),
    ({"image": "ok.jpg", "label": 1}, "row 2: no preference among its fields (image, label)"),
    (GOOD | {"chosen": "A bus. "}, "row 2: chosen and rejected are the same"),
    (GOOD | {"question": "<image> or <image>?"}, "row 2: 2 <image> in the question, but one image"),
    (GOOD | {"question": "<image>\n"}, "row 2: there is nothing but <image> in the question"),
    (GOOD | {"rejected": "A <image>."}, "row 2: field 'rejected' contains <image>"),
    (GOOD | {"history": [["Where?"]]}, "row 2: history should be a list of [question, answer]"),
    (GOOD | {"image": "no.jpg"}, "row 2: no image 'no.jpg'"),
    (GOOD | {"image": ["ok.jpg", "b.jpg"]}, "row 2: image should be the name of one file"),
    (GOOD | {"image": "a\0b"}, "row 2: image 'a\\x00b' is no file name"),
    (GOOD | {"image": "a" * 5000}, "row 2: image"),
    (GOOD | {"image": "../rows.jsonl"}, "row 2: image '../rows.jsonl' lies outside"),
    (GOOD | {"image": "/etc/passwd"}, "row 2: image '/etc/passwd' lies outside"),
    ({"image": "ok.jpg", "conversations": said("<image>?", "Yes.")},
     "row 2: a conversation without two answers to compare"),
])
def test_bad_rows_are_named_or_skipped(folder, row, message):
    path = write_lines(folder, GOOD, row, GOOD)
    with pytest.raises(DataError, match=re.escape(message)):
        read_pairs([path])
    skipped = []
    assert len(read_pairs([path], None, skipped)) == 2
    assert len(skipped) == 1 and message in skipped[0] and str(path) in skipped[0]


def test_bad_files_are_named(folder):
    half = write_json(folder, [GOOD, GOOD])
    half.write_text(half.read_text()[:100])
    for paths, message in [
        ([half], "rows.json: not valid JSON .*is the file whole"),
        ([folder / "none.jsonl"], "none.jsonl: no such file"),
        ([folder / "*.nothing"], "nothing: no such file"),
        ([folder], "a folder; name its files"),
        ([write_lines(folder)], "no usable row in .*rows.jsonl"),
    ]:
        with pytest.raises(DataError, match=message):
            read_pairs(paths)
    with pytest.raises(DataError, match="no usable row in .*the first one: .*row 1: not valid"):
        read_pairs([write_lines(folder, b"{")], None, [])


def test_patterns(folder):
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        (folder / name).write_text(json.dumps(GOOD))
    found = rows.find_files([str(folder / "odd[1].jsonl"), str(folder / "[ab].jsonl")])
    assert [path.name for path in found] == ["odd[1].jsonl", "a.jsonl", "b.jsonl"]


# ================================================================================== rows, parquet


def write_parquet(path, rows, group=2):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def rlhf_v(seed, **changes):
    texts = {"question": f"What {seed}?", "chosen": "A tree.", "rejected": "A house."}
    return {"ds_name": "RLHF-V", "image": {"bytes": picture(seed), "path": f"{seed}.png"},
            "text": json.dumps(texts), "origin_dataset": "x", "origin_split": "{}", "idx": seed,
            "image_path": f"{seed}.png", **changes}


def rlaif_v(seed, **changes):
    return {"ds_name": "RLAIF-V", "image": {"bytes": picture(seed), "path": f"{seed}.png"},
            "question": f"What {seed}?", "chosen": "A tree.", "rejected": "A house.",
            "origin_dataset": "x", "origin_split": "{}", "idx": str(seed), "image_path": "",
            **changes}


@pytest.mark.parametrize("make", [rlhf_v, rlaif_v])
def test_both_parquet_schemas(tmp_path, make):
    write_parquet(tmp_path / "a.parquet", [make(i) for i in range(5)])
    pairs = read_pairs([str(tmp_path / "*.parquet")])
    assert [p.name[-5:] for p in pairs] == ["row 1", "row 2", "row 3", "row 4", "row 5"]
    assert [p.question for p in pairs] == [f"What {i}?" for i in range(5)]
    assert {(p.chosen, p.rejected) for p in pairs} == {("A tree.", "A house.")}
    assert pairs[3].image == ParquetImage(tmp_path / "a.parquet", 1, 1, "3.png")
    assert [p.image.read() for p in pairs] == [picture(i) for i in range(5)]


def test_parquet_images_stay_on_disk_until_asked_for(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [rlhf_v(i) for i in range(6)])
    parquet = pytest.importorskip("pyarrow.parquet")
    read, asked = parquet.ParquetFile.read_row_group, []

    def spy(self, group, columns):
        asked.append((group, "image.bytes" in columns or "image" in columns))
        return read(self, group, columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", spy)
    pairs = read_pairs([path])
    assert asked == [(0, False), (1, False), (2, False)]  # texts only, group by group
    asked.clear()
    for pair in pairs:
        open_image(pair.name, pair.image)
    assert asked == [(0, True), (1, True), (2, True)]  # each group of images once, in order


def test_images_may_be_plain_bytes_or_names(folder):
    pair = {"question": "What?", "chosen": "A tree.", "rejected": "A house."}
    path = write_parquet(folder / "bytes.parquet", [{"image": picture(3), **pair}])
    assert read_pairs([path])[0].image.read() == picture(3)
    path = write_parquet(folder / "names.parquet", [{"image": "ok.jpg", **pair}])
    assert read_pairs([path])[0].image == folder.resolve() / "ok.jpg"


def test_bad_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [rlhf_v(0), rlhf_v(1, text='{"question": "Wh')])
    with pytest.raises(DataError, match="a.parquet row 2: text is not valid JSON"):
        read_pairs([path])
    skipped = []
    assert len(read_pairs([path], None, skipped)) == 1 and len(skipped) == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet: not a whole parquet file"):
        read_pairs([path])
    other = write_parquet(tmp_path / "b.parquet", [{"id": 1, "caption": "A tree."}])
    with pytest.raises(DataError, match=r"b.parquet row 1: no preference .*\(id, caption\)"):
        read_pairs([other])
    empty = write_parquet(tmp_path / "c.parquet", [rlaif_v(0, image={"bytes": None, "path": "x"})])
    with pytest.raises(DataError, match="c.parquet row 1: the image holds no bytes"):
        open_image("c.parquet row 1", read_pairs([empty])[0].image)


# ========================================================================= rows with conversations


def preference(**changes):
    turns = said("Where is it?\n<image>", "At home.", "What is it?", "to be replaced")
    return {"id": "1", "image": "ok.jpg", "conversations": turns, "preference": 2,
            "output_1": {"from": "llava", "value": "A bus."},
            "output_2": {"from": "llava", "value": "A car."}, "hallucination": True, **changes}


def test_human_preferences(folder):
    path = write_json(folder, [preference(), preference(preference=1)])
    second, first = read_pairs([path])
    assert (second.chosen, second.rejected) == ("A car.", "A bus.")
    assert (first.chosen, first.rejected) == ("A bus.", "A car.")
    assert second.history == [("Where is it?", "At home.")] and second.question == "What is it?"


@pytest.mark.parametrize("changes,message", [
    ({"preference": 0}, "preference is 0, not 1 or 2"),
    ({"preference": "2"}, "preference is '2', not 1 or 2"),
    ({"output_1": {"value": ""}}, "field 'output_1' is missing or empty"),
    ({"output_2": "A car."}, "field 'output_2' is missing or empty"),
    ({"output_2": {"value": "A bus."}}, "chosen and rejected are the same"),
    ({"conversations": said("<image>?", "Yes.", "What?")}, "the last turn should be from 'gpt'"),
    ({"conversations": said("What?", "Yes.")}, "0 <image> in the conversation, but 1 images"),
    ({"conversations": []}, "field 'conversations' is missing or empty"),
    ({"conversations": ["<image>?"]}, "turn 1 should have 'from' and 'value'"),
    ({"image": None}, "1 <image> in the conversation, but 0 images"),
])
def test_bad_preferences_are_named(folder, changes, message):
    path = write_json(folder, [preference(), preference(**changes), preference()])
    with pytest.raises(DataError, match=re.escape(f"row 2: {message}")):
        read_pairs([path])
    assert len(read_pairs([path], None, [])) == 2


def test_conversations(folder):
    path = write_json(folder, [
        {"id": 0, "image": "ok.jpg", "conversations": said("<image>\nWhat is it? ", "A car.",
                                                           " And now?", " Still. ")},
        {"id": 1, "conversations": said("Hello.", "Good day.")},
        {"id": 2, "image": "b.jpg", "conversations": said("Welcome!", "What?<image>", "A cat.",
                                                          first="gpt")},
        preference(), GOOD,
    ])
    image, text, greeted, ranked, plain = read_conversations([path])
    # what surrounds <image> goes with it; all else is left as it is, as in LLaVA's own code
    assert image.turns == [("What is it?", "A car."), (" And now?", " Still. ")]
    assert text.image is None and text.turns == [("Hello.", "Good day.")]
    assert greeted.turns == [("What?", "A cat.")]
    assert ranked.turns == [("Where is it?", "At home."), ("What is it?", "A car.")]
    assert plain.turns == [("What?", "A car.")] and plain.image.name == "ok.jpg"


@pytest.mark.parametrize("turns,message", [
    (said("What?", "A car."), "0 <image> in the conversation, but 1 images"),
    (said("<image> <image> What?", "A car."), "2 <image> in the conversation, but 1 images"),
    (said("<image> What?", "A <image>."), "2 <image> in the conversation, but 1 images"),
    (said("What?", "A car.", "<image> What?", "A car."), "should stand in the first turn"),
    (said("<image>", "A car."), "turn 1, from 'human', is empty"),
    (said("<image> What?", ""), "turn 2, from 'gpt', is empty"),
    (said("<image> What?", "A car.", "And?"), "the last turn is a question"),
    (said("<image> What?") * 2, "turn 2 is from 'human', not 'gpt'"),
    ([{"from": "human"}], "turn 1, from 'human', is empty"),
    (said("Hello", first="gpt"), "no question"),
    ("What?", "field 'conversations' is missing or empty"),
])
def test_bad_conversations_are_named(folder, turns, message):
    good = {"image": "ok.jpg", "conversations": said("<image> What?", "A car.")}
    path = write_json(folder, [good, {"image": "ok.jpg", "conversations": turns}, good])
    with pytest.raises(DataError, match=re.escape("row 2: ") + ".*" + re.escape(message)):
        read_conversations([path])
    assert len(read_conversations([path], None, [])) == 2


def test_prompts_and_captions(folder):
    turns = said("Is it red?\n<image>", "to be written", "And?", "No.")
    path = write_json(folder, [
        {"image": "ok.jpg", "conversations": turns},
        {"image": "ok.jpg", "conversations": turns[:1], "caption_type": 6, "length_bonus": 0.5},
        GOOD,
    ])
    plain, yes_no, pair = read_prompts([path])
    assert (plain.question, plain.caption_type, plain.length_bonus) == ("Is it red?", 1, 1.0)
    assert (yes_no.caption_type, yes_no.length_bonus) == (6, 0.5)
    assert pair.question == "What?"
    for changes, message in [({"caption_type": 8}, "caption_type is 8, not 1 to 7"),
                             ({"length_bonus": "x"}, "length_bonus is 'x', not a number"),
                             ({"image": ""}, "field 'image' is missing or empty")]:
        with pytest.raises(DataError, match=f"row 1: {message}"):
            row = {"image": "ok.jpg", "conversations": turns, **changes}
            read_prompts([write_json(folder, [row])])
    captions = readers.read_captions(write_json(folder, {"ok.jpg": ["A car."], "x/b.jpg": ["B."]}))
    assert readers.captions_of("row 1", plain.image, captions) == ["A car."]
    stored = ParquetImage(folder / "a.parquet", 0, 0, "data/x/b.jpg")
    assert readers.captions_of("row 1", stored, captions) == ["B."]
    with pytest.raises(DataError, match="row 1: no captions for image .*c.jpg"):
        readers.captions_of("row 1", folder / "c.jpg", captions)
    with pytest.raises(DataError, match="'ok.jpg' should have a list of captions"):
        readers.read_captions(write_json(folder, {"ok.jpg": "A car."}))


# ========================================================================================= images


def test_bad_images_are_named(tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.bmp")
    for content in (whole[: len(whole) // 2], b"no image at all",
                    (tmp_path / "picture.bmp").read_bytes()):
        with pytest.raises(DataError, match="rows.jsonl row 5: cannot read image"):
            open_image("rows.jsonl row 5", content)
    with pytest.raises(DataError, match="rows.jsonl row 5: the image holds no bytes"):
        open_image("rows.jsonl row 5", b"")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 64 x 64 is now a bomb
    with pytest.raises(DataError, match="row 6: cannot read image"):
        open_image("row 6", whole)


def test_images_are_upright_and_transparency_is_white(tmp_path):
    turned = Image.new("RGB", (30, 10), "red")
    turned.getexif()[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert open_image("x", tmp_path / "turned.jpg").size == (10, 30)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image = open_image("x", tmp_path / "clear.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


# ======================================================================= from records to examples


def joint(tokenizer, *rounds):
    """A whole conversation, each round tokenized at once, as the public code does."""
    ids = [tokenizer.bos_token]
    for text in rounds:
        ids += tokenizer.encode(text, eos=True)
    return ids


def test_a_conversation_is_the_joint_tokenization(tokenizer):
    turns = [("Is there a car?", "Yes, a red car."), (" And\n a bus? ", " No. "),
             ("Sure?", "\nYes")]
    conversation = Conversation("row 1", b"x", turns)
    example = data.conversation_example(conversation, None, tokenizer, PATCHES)
    expected = joint(
        tokenizer, f"{data.SYSTEM} USER: <image>\nIs there a car? ASSISTANT: Yes, a red car.",
        "USER:  And\n a bus?  ASSISTANT:  No. ", "USER: Sure? ASSISTANT: \nYes")
    at = expected.index(tokenizer.image_token)
    expected[at : at + 1] = [tokenizer.image_token] * PATCHES
    assert example.prompt + example.responses[0].tokens == expected
    batch = data.collate([example], tokenizer.pad_token, 400)
    learnt = [t for _, answer in turns for t in tokenizer.encode(answer, eos=True)]
    assert batch.target.tolist() == learnt and batch.groups == 1  # every answer, no question
    # each learnt token is predicted by the slot before it
    tokens = batch.tokens.flatten()
    torch.testing.assert_close(tokens[batch.source + 1], batch.target)


def test_text_alone_has_no_image(tokenizer):
    conversation = Conversation("row 1", None, [("Hello?", "Yes.")])
    example = data.conversation_example(conversation, None, tokenizer, PATCHES)
    assert tokenizer.image_token not in example.prompt
    assert tokenizer.decode(example.prompt) == f"{data.SYSTEM} USER: Hello? ASSISTANT:"


def test_a_pair_keeps_what_was_said_before(tokenizer):
    pair = Pair("row 1", b"x", "Sure?", "Yes.", "No.", [("Is there a car?", "A red car.")])
    example = data.pair_example(pair, None, tokenizer, 1)
    assert example.prompt + example.responses[1].tokens == joint(
        tokenizer, f"{data.SYSTEM} USER: <image>\nIs there a car? ASSISTANT: A red car.",
        "USER: Sure? ASSISTANT: No.")


def test_given_text_is_marked(tokenizer):
    conversation = Conversation("row 1", None, [("Hello?", "Yes."), ("And?", "No.")])
    example = data.conversation_example(conversation, None, tokenizer, 0)
    shown = data.marked(example.responses[0], tokenizer)
    assert re.fullmatch(r"Yes\.</s>\{ ?USER: And\? ASSISTANT:\} ?No\.</s>", shown)


def test_sft_learns_every_answer_of_mixed_rows(tiny, tokenizer):
    with_image = Conversation("a", b"x", [("What?", "A car."), ("And?", "A bus.")])
    text = Conversation("b", None, [("Hello?", "Yes.")])
    examples = [data.conversation_example(c, None, tokenizer, PATCHES) for c in (with_image, text)]
    examples[0].image = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0))
    batch = data.collate(examples, tokenizer.pad_token, 400)
    assert batch.images.shape == (1, 3, 12, 12)
    config = sft.SFTConfig()
    algorithm = sft.SFT(tiny, config, data.Epochs(examples, config, 0))
    loss, _ = algorithm.loss(batch)
    logps = []
    for example in examples:
        tokens = torch.tensor([example.prompt + example.responses[0].tokens])
        image = None if example.image is None else example.image[None]
        logp = tiny.logits(image, tokens).log_softmax(-1)[0]
        for i, weight in enumerate(example.responses[0].weight):
            if weight:
                at = len(example.prompt) + i
                logps.append(logp[at - 1, tokens[0, at]])
    torch.testing.assert_close(loss, -torch.stack(logps).mean())


# ======================================================================================= features


def named(folder, *names):
    return [(f"row {i}", name and folder / name) for i, name in enumerate(names, 1)]


def test_every_image_is_seen_once_in_batches(tiny, folder, monkeypatch):
    batches, see = [], tiny.image_features
    monkeypatch.setattr(tiny, "image_features", lambda p: batches.append(len(p)) or see(p))
    images = named(folder, "ok.jpg", "b.jpg", None, "ok.jpg", "c.jpg", "b.jpg")
    seen = features.look(tiny, SETTINGS, images)
    assert batches == [3] and seen.store.shape == (3, PATCHES, 16)
    for i, (_, path) in enumerate(images):
        if path is None:
            assert seen[i] is None
            continue
        pixels = preprocess(Image.open(path), SETTINGS.size, SETTINGS.mean, SETTINGS.std)
        torch.testing.assert_close(seen[i], see(pixels[None])[0].detach())
    assert seen[0] is not None and not torch.equal(seen[0], seen[1])
    batches.clear()
    monkeypatch.setattr(features, "BATCH", 2)
    again = features.look(tiny, SETTINGS, images)
    assert batches == [2, 1]
    torch.testing.assert_close(again.store, seen.store)


def test_the_same_bytes_in_parquet_are_seen_once(tiny, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [rlaif_v(0), rlaif_v(1), rlaif_v(0)])
    batches, see = [], tiny.image_features
    monkeypatch.setattr(tiny, "image_features", lambda p: batches.append(len(p)) or see(p))
    seen = features.look(tiny, SETTINGS, [(p.name, p.image) for p in read_pairs([path])])
    assert batches == [2] and seen.places == [0, 1, 0]


def test_unreadable_images_stop_or_are_told_when_asked_for(tiny, folder):
    (folder / "c.jpg").write_bytes(b"no image")
    images = named(folder, "ok.jpg", "c.jpg", "b.jpg", "c.jpg")
    with pytest.raises(DataError, match="row 2: cannot read image c.jpg"):
        features.look(tiny, SETTINGS, images)
    seen = features.look(tiny, SETTINGS, images, stop=False)
    assert not torch.equal(seen[0], seen[2])
    for i in (1, 3):
        with pytest.raises(DataError, match=f"row {i + 1}: cannot read image c.jpg"):
            seen[i]


def test_features_on_disk_are_reused_and_refused(tiny, folder, monkeypatch):
    (folder / "c.jpg").write_bytes(b"no image")
    images = named(folder, "ok.jpg", "c.jpg", None, "b.jpg", "ok.jpg")
    memory = features.look(tiny, SETTINGS, images, folder, stop=False)
    assert not (folder / "features.bin").exists()
    monkeypatch.setattr(features, "LIMIT", 100)
    written = features.look(tiny, SETTINGS, images, folder, stop=False)
    with monkeypatch.context() as patch:
        patch.setattr(features, "fill", None)  # must not be called again
        found = features.look(tiny, SETTINGS, images, folder, stop=False)
        for i in (0, 3, 4):
            assert torch.equal(found[i], memory[i]) and torch.equal(written[i], memory[i])
        assert found[2] is None
        with pytest.raises(DataError, match="row 2: cannot read image"):
            found[1]
        other = ImageSettings(12, SETTINGS.mean, SETTINGS.std, mode="crop")
        for settings, rows_ in ((other, images), (SETTINGS, images[::-1])):
            with pytest.raises(ValueError, match="features.bin belongs to another model"):
                features.look(tiny, settings, rows_, folder)
        (folder / "b.jpg").write_bytes(picture(9, "JPEG", (30, 30)))
        with pytest.raises(ValueError, match="features.bin belongs to another model"):
            features.look(tiny, SETTINGS, images, folder)


def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"features.bin: no 1000000000.0 GB for image features \("):
        features.reserve(tmp_path / "features.bin", 10**18)
    assert not list(tmp_path.iterdir())


# ======================================================================================== convert


def test_parquet_to_lines_and_back(tmp_path):
    rows_ = [rlhf_v(0), rlhf_v(1), rlhf_v(1)]
    rows_.append(rlhf_v(2, image={"bytes": picture(2), "path": "1.png"}))
    rows_.append(rlhf_v(3, image={"bytes": picture(3, "JPEG"), "path": "../../e vil/.x y.png"}))
    source = write_parquet(tmp_path / "a.parquet", rows_)
    lines = tmp_path / "rows.jsonl"
    assert convert.convert([source], lines) == 5
    images = sorted(path.name for path in (tmp_path / "rows_images").iterdir())
    assert images == ["0.png", "1-2.png", "1.png", "x_y.jpg"]  # safe, once each, endings true
    assert convert.convert([lines], tmp_path / "b.parquet") == 5
    before, middle, after = (
        read_pairs([path]) for path in (source, lines, tmp_path / "b.parquet"))
    for one, two, three in zip(before, middle, after):
        for field in ("question", "chosen", "rejected", "history"):
            assert getattr(one, field) == getattr(two, field) == getattr(three, field)
        assert one.image.read() == two.image.read_bytes() == three.image.read()
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "b.parquet")
    first = table.to_pylist()[0]
    assert first.keys() == rows_[0].keys() and first["text"] == rows_[0]["text"]


def test_preferences_to_lines_keep_images_and_history(folder):
    (folder / "sub").mkdir()
    (folder / "ok.jpg").rename(folder / "sub" / "ok.jpg")
    source = write_json(folder, [preference(image="sub/ok.jpg")])
    convert.convert([source], folder / "out.jsonl", folder)
    row = json.loads((folder / "out.jsonl").read_text())
    assert row == {"image": "sub/ok.jpg", "question": "What is it?", "chosen": "A car.",
                   "rejected": "A bus.", "history": [["Where is it?", "At home."]]}
    assert read_pairs([folder / "out.jsonl"], folder)[0].history == [("Where is it?", "At home.")]
    assert not (folder / "out_images").exists()
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="row 1: has earlier turns"):
        convert.convert([source], folder / "out.parquet", folder)
    assert not list(folder.glob("*out.parquet*"))


def test_nothing_is_overwritten_or_left_half(tmp_path, capsys):
    source = write_parquet(tmp_path / "a.parquet", [rlhf_v(0), rlhf_v(1, image={"bytes": b"x"})])
    out = tmp_path / "rows.jsonl"
    assert convert.main(["convert", str(source), str(out)]) == 1
    assert "a.parquet row 2: the image is no JPEG, PNG or WebP" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert convert.main(["convert", str(source), str(out), "--skip_bad_rows"]) == 0
    assert "1 rows left out" in capsys.readouterr().err
    kept = out.read_bytes()
    assert convert.main(["convert", str(source), str(out)]) == 1
    assert "rows.jsonl exists" in capsys.readouterr().err and out.read_bytes() == kept
    assert convert.main(["convert", str(source), str(tmp_path / "rows.csv")]) == 1
    assert "should end in .jsonl or .parquet" in capsys.readouterr().err


# ======================================================================================== dry run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_estimate_is_near_what_autograd_keeps(checkpointing):
    config = TextConfig(100, 64, 176, 3, 4, 2, 256)
    model = LLaVA(LLaVAConfig(VisionConfig(16, 32, 1, 2, 12, 4), config))
    init_weights(model, 0)
    model.decoder.gradient_checkpointing = checkpointing
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, 200, 64, requires_grad=True)
    position = torch.arange(200)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.decoder(x, position)
    estimate = dry_run.activation_bytes(config, 200, 4, checkpointing)
    if checkpointing:  # the block that is computed again is kept in the backward pass only
        estimate -= 200 * 4 * (8 * 64 + 2 * 32 + 4 * 176)
    assert 0.9 < estimate / sum(kept.values()) < 1.1


def test_needs_count_what_is_trained(tiny, tokenizer, folder):
    model = LLaVA(tiny.config)
    init_weights(model, 0)
    add_adapter(model, "a", 4, 8)
    trained = sum(weight.numel() for weight in select_trainable(model, "a"))
    conversation = Conversation("row 1", b"x", [("What?", "A car.")])
    example = data.conversation_example(conversation, None, tokenizer, PATCHES)
    text = dry_run.needs(
        model, sft.SFTConfig(), [example], named(folder, "ok.jpg", "ok.jpg", None), 4)
    total = sum(weight.numel() for weight in model.parameters())
    assert f"{total:,}, of which {trained:,} are trained" in text
    assert f"gradients    {trained * 4 / 1000:.3g} kB" in text
    assert f"optimizer    {trained * 8 / 1000:.3g} kB" in text
    assert f"row of {len(example.prompt) + len(example.responses[0].tokens)} tokens" in text
    assert f"{PATCHES * 16 * 4} bytes for 1 images, in memory" in text


# ================================================================================== the whole way


def test_training_on_conversations_and_parquet(tiny, tokenizer, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    checkpoint.save_llava(tiny, tokenizer, SETTINGS, folder / "model")
    write_json(folder, [
        {"image": "ok.jpg", "conversations": said("<image> What?", "A car.", "And?", "A bus.")},
        {"conversations": said("Hello?", "Yes.")}, {"image": "ok.jpg"},
    ])
    common = ["--model", "model", "--test_scenes", "0", "--log_every", "1", "--batch_size", "2",
              "--device", "cpu"]
    given = ["--algo", "sft", "--data", "rows.json", "--steps", "2", "--out", "sft", *common]
    assert train.main(given) == 1
    assert "rows.json row 3: " in capsys.readouterr().err
    assert train.main([*given, "--skip_bad_rows", "--dry_run"]) == 0
    out, err = capsys.readouterr()
    assert "{USER: And? ASSISTANT:}" in out.replace("{ ", "{") and "activations" in out
    assert "1 rows left out" in err and "row 3" in err
    assert train.main([*given, "--skip_bad_rows", "--overwrite"]) == 0
    assert (folder / "sft" / "model" / "model.safetensors").exists()
    path = write_parquet(folder / "a.parquet", [rlhf_v(i) for i in range(3)])
    monkeypatch.setattr(features, "LIMIT", 100)
    given = ["--algo", "ddpo", "--data", str(path), "--steps", "2", "--out", "ddpo", *common]
    assert train.main(given) == 0
    assert not list((folder / "ddpo").glob("features.*"))  # gigabytes, of no more use
