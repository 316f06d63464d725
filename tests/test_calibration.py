"""Calibration data in every form that users have it in, and the errors for what is none."""

import itertools
import json
import logging
from collections import UserDict

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flash_llm.prune.samples import samples_for

TEXT = "The quick brown fox jumps over the lazy dog. " * 5


def tokenizer(text):
    return {"input_ids": [ord(character) for character in text], "attention_mask": [1] * len(text)}


def ids(text):
    return torch.tensor([ord(character) for character in text])


def read(calibration, nsamples=None, seqlen=16, seed=None, tokenizer=tokenizer):
    return samples_for(None, calibration, tokenizer, nsamples, seqlen, seed)


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_a_text_file_is_cut_into_whole_samples(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    samples = read(path)
    whole = len(TEXT) // 16
    assert equal(samples, list(ids(TEXT)[: whole * 16].view(whole, 1, 16)))
    assert equal(read(str(path)), samples)
    drawn = read(path, nsamples=3, seed=1)
    assert equal(drawn, read(path, nsamples=3, seed=1)) and not equal(drawn, samples[:3])
    assert equal(read(path, seqlen=len(TEXT)), [ids(TEXT)[None]])
    path.write_text("ä€" * 8, encoding="utf-8")
    assert read(path)[0].tolist() == [[228, 8364] * 8]


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_samples_are_spread_over_a_file_instead_of_its_beginning(ending, tmp_path):
    path = tmp_path / f"text{ending}"
    lines = [f"{number:07}\n" for number in range(2_000)]
    if ending == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    else:
        path.write_text("".join(lines))
    every = read(path)
    for nsamples in (1, 3, 7, len(every) - 1, len(every), len(every) + 1):
        indices = [i * len(every) // nsamples for i in range(nsamples)]
        expected = [every[i] for i in indices] if nsamples <= len(every) else every
        chosen = read(path, nsamples)
        assert len(chosen) == len(expected)
        # All of the file is tokenised where it is small; of a large one parts that lie as evenly.
        if nsamples > 100:
            assert equal(chosen, expected)
        starts = [int("".join(map(chr, sample[0].tolist())).split("\n")[-2]) for sample in chosen]
        gaps = torch.tensor([*starts, 2_000]).diff() if nsamples > 1 else torch.tensor([])
        assert all(0.5 <= gap * nsamples / 2_000 <= 1.5 for gap in gaps)
        assert equal(chosen, read(path, nsamples))


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_large_file_is_not_tokenised_whole(ending, tmp_path):
    path = tmp_path / f"text{ending}"
    text = "".join(f"{number:07}\n" for number in range(50_000))
    path.write_text(text if ending == ".txt" else json.dumps({"text": text}))
    lengths = []

    def counting(text):
        lengths.append(len(text))
        return tokenizer(text)

    samples = read(path, nsamples=4, tokenizer=counting)
    assert len(samples) == 4 and sum(lengths) < 2 * 4 * 16 * 64


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
@pytest.mark.parametrize("nsamples", [None, 2])
def test_a_byte_order_mark_is_no_part_of_the_text(ending, nsamples, tmp_path):
    path = tmp_path / f"text{ending}"
    content = TEXT if ending == ".txt" else json.dumps({"text": TEXT})
    path.write_text(content, encoding="utf-8")
    expected = read(path, nsamples)
    path.write_text(content, encoding="utf-8-sig")
    assert equal(read(path, nsamples), expected)


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_a_file_that_is_not_utf8_is_named(ending, tmp_path):
    path = tmp_path / f"text{ending}"
    path.write_text(TEXT, encoding="utf-16")
    with pytest.raises(ValueError, match=f"text{ending} is not UTF-8"):
        read(path)


def test_the_documents_of_a_jsonl_file_are_laid_end_to_end(tmp_path):
    path = tmp_path / "texts.jsonl"
    documents = [TEXT[:5], "", TEXT[5:40], TEXT[40:48], TEXT[48:]]
    lines = [json.dumps({"text": document, "id": 3}) for document in documents]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert equal(read(path), read(tmp_path / "text.txt"))
    assert equal(read(path, nsamples=2), read(tmp_path / "text.txt", nsamples=2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "texts.jsonl, line 3: no JSON"),
        ("[" * 100_000, "texts.jsonl, line 3: no JSON"),
        ('["text"]', 'line 3: must be an object with a string "text"'),
        ('{"content": "x"}', 'line 3: must be an object with a string "text"'),
        ('{"text": 7}', 'line 3: must be an object with a string "text"'),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("missing.txt", None, FileNotFoundError, "missing.txt"),
        ("text.md", TEXT, ValueError, r"must end in \.txt or \.jsonl, got .*text\.md"),
        ("text.txt", "", ValueError, "text.txt holds no tokens"),
        ("texts.jsonl", "\n", ValueError, "texts.jsonl holds no tokens"),
        ("text.txt", "short", ValueError, "text.txt has 5 tokens, fewer than seqlen=16"),
        ("texts.jsonl", '{"text": "short"}', ValueError, "has 5 tokens, fewer than seqlen=16"),
    ],
)
def test_bad_files_are_refused(name, text, error, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read(tmp_path / name)


def test_a_file_needs_a_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="need a tokenizer"):
        read(tmp_path / "text.txt", tokenizer=None)


ROWS = torch.arange(96).view(6, 16)


class Columns:
    """Like a data frame: no Mapping, and iteration yields the names of its columns."""

    def __init__(self, **columns):
        self.columns = columns

    def keys(self):
        return self.columns.keys()

    def __iter__(self):
        return iter(self.columns)

    def __getitem__(self, name):
        return self.columns[name]


@pytest.mark.parametrize(
    "calibration",
    [
        ROWS,
        ROWS.int(),
        list(ROWS),
        [ROWS[:1], ROWS[1:5], ROWS[5]],
        DataLoader(TensorDataset(ROWS), batch_size=4),
        DataLoader(ROWS, batch_size=4),
        DataLoader([{"input_ids": row, "labels": row} for row in ROWS], batch_size=4),
        [{"input_ids": row.tolist(), "attention_mask": [1] * 16} for row in ROWS],
        [{"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}],
        ["".join(map(chr, row.tolist())) for row in ROWS],
        {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)},
        {"input_ids": ROWS.tolist(), "token_type_ids": ROWS.tolist()},
        UserDict(input_ids=ROWS.numpy(), attention_mask=torch.ones(6, 16).numpy()),
        Columns(input_ids=list(ROWS)),
        [{"input_ids": ROWS[:2].tolist()}, UserDict(input_ids=ROWS[2:])],
    ],
    ids=[
        *("tensor", "int32", "rows", "rows and batches", "tensor dataset", "loader of tensors"),
        *("loader of dicts", "tokenized rows", "batch with mask", "strings"),
        *("whole batch", "whole batch of lists", "whole mapping", "columns", "batches of lists"),
    ],
)
@pytest.mark.parametrize("nsamples", [None, 5])
def test_sequences_in_memory_are_rows(calibration, nsamples):
    assert equal(read(calibration, nsamples), list(ROWS[:nsamples, None]))


def test_padding_is_left_out_wherever_it_is():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9], [0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]),
    }
    assert [sample.tolist() for sample in read([batch])] == [[[5, 6, 7]], [[8, 9]]]
    assert [sample.tolist() for sample in read(batch)] == [[[5, 6, 7]], [[8, 9]]]
    ragged = {"input_ids": [[5, 6], [0, 7, 8]], "attention_mask": [[1, 1], [0, 1, 1]]}
    assert [sample.tolist() for sample in read(ragged)] == [[[5, 6]], [[7, 8]]]
    assert [sample.tolist() for sample in read({"input_ids": [5, 6, 7]})] == [[[5, 6, 7]]]


@pytest.mark.hf
@pytest.mark.parametrize("padding", [True, False])
def test_what_a_tokenizer_returns_is_calibration_and_not_its_keys(padding):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[PAD]", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenize = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    tensors = "pt" if padding else None
    batch = tokenize(["a b c", "d e f g h"], padding=padding, return_tensors=tensors)
    expected = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7, 8]])]
    assert equal(read(batch, tokenizer=tokenize), expected)
    assert equal(read([batch, batch], 3, tokenizer=tokenize), [*expected, expected[0]])


def test_longer_sequences_are_cut_and_shorter_ones_reported(caplog):
    with caplog.at_level(logging.WARNING, "flash_llm"):
        samples = read([ROWS[0], ROWS[1, :3], torch.arange(40)])
    assert [sample.shape for sample in samples] == [(1, 16), (1, 3), (1, 16)]
    assert "1 of 3 calibration samples have fewer than seqlen=16 tokens (the shortest 3)" in (
        caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flash_llm"):
        read(ROWS)
    assert not caplog.text


def test_an_endless_iterable_is_read_as_far_as_needed():
    endless = ({"input_ids": row} for row in itertools.cycle(ROWS))
    assert equal(read(endless, nsamples=8), list(torch.cat([ROWS, ROWS[:2]])[:, None]))


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, ValueError, "calibration text is needed"),
        ([], ValueError, "holds no tokens"),
        ([""], ValueError, "holds no tokens"),
        ([torch.empty(2, 0, dtype=torch.int64)], ValueError, "holds no tokens"),
        (7, TypeError, "got int"),
        ([7], TypeError, "got int"),
        ([b"text"], TypeError, "got bytes"),
        ([{"text": "a"}], TypeError, r"must have \"input_ids\", got the keys \['text'\]"),
        ({"train": ["a"]}, TypeError, r"must have \"input_ids\", got the keys \['train'\]"),
        (Columns(text=["a"]), TypeError, r"must have \"input_ids\", got the keys \['text'\]"),
        (
            {"input_ids": [[1], [2]], "attention_mask": [[1]]},
            ValueError,
            "attention_mask must have a row for each of the 2",
        ),
        ([torch.rand(4)], TypeError, "must be int32 or int64, got torch.float32"),
        ([torch.ones(1, 2, 3).long()], ValueError, r"got \[1, 2, 3\]"),
        (
            [{"input_ids": ROWS, "attention_mask": torch.ones(16)}],
            ValueError,
            r"attention_mask must have the shape of input_ids, \[6, 16\], got \[16\]",
        ),
    ],
)
def test_what_is_no_calibration_data_is_refused(calibration, error, message):
    with pytest.raises(error, match=message):
        read(calibration)
