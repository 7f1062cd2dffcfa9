"""The gate in front of the fast engine: ids that are the reference engine's, or not at all."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_models import text_lines, train_byte_bpe, train_sentencepiece, write_telling_bpe

from megakd.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, build_tokenizer
from megakd.data.tokenizers import fast as engines
from megakd.data.tokenizers import scan as engine_scan
from megakd.data.tokenizers.fast import Choice, Engine, choose_engine
from megakd.data.tokenizers.hostile_texts import hostile_texts
from megakd.data.tokenizers.routes import Routes, normalised_guises
from megakd.data.tokenizers.scan_cache import remember
from megakd.errors import UsageError

# Blocks where the engines' tables differ, and some where they do not: a scan of all of Unicode takes seconds.
BLOCKS = (
    range(0x300, 0x400), range(0x600, 0x680), range(0x880, 0x900), range(0xC00, 0xD00), range(0xA7C0, 0xA800),
    range(0xAC00, 0xAC40), range(0x105C0, 0x10600), range(0x10900, 0x10980), range(0x11380, 0x11400),
    range(0x11D80, 0x11E00), range(0x16100, 0x16140), range(0x16D40, 0x16D80), range(0x16E80, 0x16F00),
    range(0x32380, 0x32400),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _a_short_scan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_scan, "SCANNED", BLOCKS)
    monkeypatch.setenv("MEGAKD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_sentencepiece(folder / "sp.model")
    train_byte_bpe(folder / "bpe")
    return folder


class _Fake:
    """A fast engine that is the reference engine but for a planted difference."""

    def __init__(self, tokenizer: Tokenizer, differs: Callable[[str], bool]) -> None:
        self._tokenizer, self._differs = tokenizer, differs

    def encode(self, text: str) -> Sequence[int]:
        ids = self._tokenizer.encode(text)
        return [7] * (len(ids) + 1) if self._differs(text) else ids


def engine_for(tokenizer: Tokenizer, choice: Choice, *, max_resident_bytes: int = 0) -> Engine:
    kind: Any = tokenizer.type
    return Engine(kind, tokenizer.path, choice, lambda: tokenizer, max_resident_bytes=max_resident_bytes)


def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differs: Callable[[str], bool]) -> None:
    def load(kind: Any, content: bytes) -> _Fake:
        (tmp_path / "planted").write_bytes(content)
        return _Fake(build_tokenizer(kind, tmp_path / "planted"), differs)

    monkeypatch.setattr(engines, "_load_bytes", load)
    monkeypatch.setenv("MEGAKD_CACHE_DIR", str(tmp_path / str(len(list(tmp_path.iterdir())))))


def test_the_gate_falls_back_on_one_different_id(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", models / "bpe")
    plant(monkeypatch, tmp_path, lambda text: text == "only in the corpus")
    assert choose_engine(tokenizer, ["fine"]).engine == "gigatoken"
    choice = choose_engine(tokenizer, ["fine", "only in the corpus"])
    assert choice.engine == "reference" and "only in the corpus" in choice.reason
    assert engine_for(tokenizer, choice).encode_batch(["only in the corpus"]).tokens.tolist() != [7] * 9
    with pytest.raises(UsageError, match="only in the corpus"):
        choose_engine(tokenizer, ["only in the corpus"], mode="gigatoken")
    assert choose_engine(tokenizer, [], mode="reference").engine == "reference"


@pytest.mark.slow
def test_the_gate_falls_back_on_any_hostile_string(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", models / "bpe")
    clean = [text for text in hostile_texts(()) if not any(literal in text for literal in tokenizer.literals)]
    for chosen in random.Random(0).sample(clean, 3):
        plant(monkeypatch, tmp_path, lambda text, chosen=chosen: text == chosen)  # type: ignore[misc]
        assert choose_engine(tokenizer, []).engine == "reference"


def test_documents_with_a_control_token_written_out_go_to_the_reference(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", models / "sp.model")
    plant(monkeypatch, tmp_path, lambda text: "</s>" in text)
    choice = choose_engine(tokenizer, [])
    assert choice.engine == "gigatoken" and "</s>" in choice.routed
    assert Choice.from_dict(json.loads(json.dumps(choice.as_dict()))) == choice
    texts = ["plain", "with </s> inside", "", "</s>"]
    ragged, want = engine_for(tokenizer, choice).encode_batch(texts), tokenizer.encode_batch(texts)
    assert ragged.tokens.tolist() == want.tokens.tolist() and ragged.lengths.tolist() == want.lengths.tolist()
    # A guise of the token that a search does not find is a reason to fall back.
    plant(monkeypatch, tmp_path, lambda text: "</s>" in text or "＜／ｓ＞" in text)
    assert choose_engine(tokenizer, []).engine == "reference"


def test_a_model_that_the_fast_engine_cannot_load_falls_back(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: str, content: bytes) -> None:
        raise ValueError("unigram is not supported")

    monkeypatch.setattr(engines, "_load_bytes", refuse)
    choice = choose_engine(build_tokenizer("HuggingFaceTokenizer", models / "bpe"), [])
    assert choice.engine == "reference" and "unigram is not supported" in choice.reason


@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_the_real_fast_engine_gives_the_reference_ids(normalization: str, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    model = train_sentencepiece(tmp_path / "sp.model", normalization=normalization)
    corpus = ["\n".join(text_lines()[i : i + 30]) for i in range(0, 3000, 30)]
    for tokenizer in (SentencePieceTokenizer(model), HuggingFaceTokenizer(models / "bpe/tokenizer.json")):
        choice = choose_engine(tokenizer, corpus)
        # An engine that reloads all the time must give the same ids, too.
        for limit in (0, 1):
            engine = engine_for(tokenizer, choice, max_resident_bytes=limit)
            texts = [*corpus, *hostile_texts(tokenizer.literals), "</s> in <|endoftext|> text"]
            ragged, want = engine.encode_batch(texts), tokenizer.encode_batch(texts)
            assert ragged.tokens.tolist() == want.tokens.tolist()
            assert ragged.lengths.tolist() == want.lengths.tolist()


def test_a_very_long_text_has_the_reference_ids(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(engines, "_LARGE_BYTES", 1000)
    tokenizer = HuggingFaceTokenizer(models / "bpe/tokenizer.json")
    long = "word and wörd " * 100
    for limit in (1, 1 << 30):
        engine = Engine(
            "HuggingFaceTokenizer",
            tokenizer.path,
            Choice("gigatoken", "test"),
            lambda: tokenizer,
            max_resident_bytes=limit,
            turns=tmp_path / "turns.lock",
        )
        assert engine.encode_batch([long, "short"]).lengths[1] == len(tokenizer.encode("short"))
        assert np.array_equal(engine.encode_arrays([long])[0], tokenizer.encode_arrays([long])[0])
    assert (tmp_path / "turns.lock").exists()


def assert_equal_ids(tokenizer: Tokenizer, choice: Choice, texts: Sequence[str]) -> None:
    found, want = engine_for(tokenizer, choice).encode_arrays(texts), tokenizer.encode_arrays(texts)
    wrong = [ascii(text) for text, ids, right in zip(texts, found, want) if not np.array_equal(ids, right)]
    assert not wrong, f"{len(wrong)} of {len(texts)}, the first is {wrong[0]}"


def fuzz(num: int, seed: int, points: Sequence[int], literals: Sequence[str] = ()) -> list[str]:
    """Code points between letters, digits, spaces, marks, punctuation and literals."""
    source = random.Random(seed)
    beside = ["a", "A", "z", "1", "9", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "<", ".", "'s", "'", "-", "$", "\u4e2d"]
    beside += ["\u0301", "\u0323", "\u0650", "\u0651", "\u094d", "\u1161", "\u11a8", "\u0338", "", "", *literals]
    return [
        "".join(
            source.choice(beside) * source.randint(0, 2) + chr(source.choice(points)) * source.choice((1, 1, 1, 2))
            for _ in range(source.randint(1, 6))
        )
        + source.choice(beside)
        for _ in range(num)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "normaliser"), [("gpt2", None), ("gpt4", None), ("qwen2", {"type": "NFC"})])
def test_documents_with_characters_that_only_one_engine_knows_go_to_the_reference(
    rule: str, normaliser: dict[str, str] | None, tmp_path: Path
) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", write_telling_bpe(tmp_path / "t", rule, normaliser=normaliser))
    choice = choose_engine(tokenizer, ["plain text"], mode="gigatoken")
    points = {point for first, last in choice.code_points for point in range(first, last + 1)}
    assert {0x88F, 0xA7CE, 0x10940, 0x10959, 0x323D0} <= points and not points & set(range(0x80, 0x880))
    marks = {0x898, 0x89C, 0x8CA, 0xC3C, 0x113C2, 0x1611E, 0x16D67}  # known to the order and the compositions of NFC
    assert marks <= points if normaliser else marks & points <= {0x16D67}
    texts = ["\U00010940<H", "\u0628\u089c\u0650", "\u0628\u0650\u089c", "\U0001611e\U0001611e\U0001611fa", "\ua7ceA1"]
    source = random.Random(4)
    runs = ["".join(map(chr, source.choices(source.choice(BLOCKS), k=source.randint(2, 5)))) for _ in range(4000)]
    new = [chr(point) for point in (0x16D63, 0x16D67, 0x16D68, 0x16D69, 0x1611E, 0x1611F, 0x16121, 0x16123, 0x113C2)]
    runs += ["".join(source.choices(new, k=source.randint(2, 4))) for _ in range(1000)]
    assert_equal_ids(tokenizer, choice, texts + runs + fuzz(4000, 1, [point for block in BLOCKS for point in block]))


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(folder: Path, tokens: Sequence[tuple[str, Sequence[str]]]) -> Path:
    """Add tokens with these flags to a tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    first = len(content["model"]["vocab"]) + len(content["added_tokens"])
    content["added_tokens"] += [
        {"id": first + i, "content": token, **{flag: flag in flags for flag in FLAGS}}
        for i, (token, flags) in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("num_before", "normaliser"), [(800, None), (70, {"type": "NFC"})])
def test_any_number_of_literals_of_any_kind_is_routed(
    num_before: int, normaliser: dict[str, str] | None, tmp_path: Path
) -> None:
    pytest.importorskip("gigatoken")
    folder = write_telling_bpe(tmp_path / "t", "gpt2", normaliser=normaliser)
    before = [(f"<|control_{i}|>", ("special",)) for i in range(num_before)]
    odd = [
        ("word", ("single_word",)),
        ("<left>", ("lstrip",)),
        ("<right>", ("rstrip",)),
        ("caf\u00e9", ("normalized",)),
    ]
    runs = [(" " * length, ("normalized",)) for length in range(2, 9)]
    tokenizer = build_tokenizer(
        "HuggingFaceTokenizer", add_tokens(folder, [*before, *odd, *runs, ("K|;", ("normalized",))])
    )
    choice = choose_engine(tokenizer, ["plain text"])
    literals = [token for token, _ in odd + before[-1:]]
    texts = ["cafe\u0301 x", "\u212a|\u037e", "swordfish", "a word.", "  <left>  a", "<right>  \n b", " <left>"]
    texts += fuzz(2000, 2, [*range(0x20, 0x7F), 0xE9, 0x301, 0x212A, 0x37E], [*literals, "cafe\u0301", "   ", "Cafe"])
    assert_equal_ids(tokenizer, choice, texts)
    if choice.engine == "gigatoken":
        assert set(literals) < set(choice.routed) and "  " not in choice.routed


def test_routes_find_code_points_and_literals_and_little_else() -> None:
    routes = Routes(
        [(0x88F, 0x88F), (0x10940, 0x10959), (0xFF, 0x101)], ["</s>", "[INST]", "<\uff5cend\u2581of", "x" * 50]
    )
    for text in ("\u088f", "a\U00010959b", "\u00ff", "\u0101", "</s>", "a [INST]", "<\uff5cend of", "y" + "x" * 50):
        assert routes.holds_any(text) and routes.holds_any("z" * 99 + text) and routes.holds_any(text + "z" * 99), text
    for text in ("", "a", "\u0890", "\U0001093f\U0001095a", "\u00fe\u0102", "</ s>", "[INS", "<\uff5cend", "x" * 31):
        assert not routes.holds_any(text), text
    assert not Routes([], []).holds_any("</s>\U00010940") and Routes([], ["a"]).holds_any("ba")
    assert Routes([], [f"<{i}>" for i in range(5000)]).holds_any("a <4999> b")


def test_routes_are_a_search_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(3)
    literals = ["".join(source.choices("ab<>|", k=source.randint(1, 4))) for _ in range(40)]
    for _ in range(20):
        routed = source.sample(literals, 4)
        points = source.sample(range(0x80, 0x3000), 2)
        routes = Routes([(point, point + 5) for point in points], routed)
        for _ in range(300):
            text = "".join(source.choices("abcd<>|\u00e9", k=10)) + chr(source.choice(points) + source.randint(-3, 8))
            want = any(literal in text for literal in routed) or any(
                point <= ord(text[-1]) < point + 6 for point in points
            )
            assert routes.holds_any(text) == want


def test_texts_that_compose_to_a_literal_hold_one_of_its_guises() -> None:
    assert normalised_guises(["<|end|>"]) == set() and 0x212A in normalised_guises(["<|K|>"])
    points = normalised_guises(["caf\u00e9"])
    assert 0x301 in points and 0xE9 not in points


def test_what_is_remembered_survives_damage_and_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        return [len(calls), (1, 2)]

    assert remember("kind", {"a": (1, 2)}, make) == remember("kind", {"a": [1, 2]}, make) == [1, [1, 2]]
    (path,) = (tmp_path / "cache").iterdir()
    for damage in (b"", b"{}", path.read_bytes()[:-5], path.read_bytes().replace(b"2", b"3")):
        path.write_bytes(damage)
        before = len(calls)
        assert remember("kind", {"a": (1, 2)}, make)[0] == before + 1 == remember("kind", {"a": (1, 2)}, make)[0]
    assert list((tmp_path / "cache").iterdir()) == [path]
    assert remember("kind", {"a": 3}, make) == [len(calls), [1, 2]]
    (tmp_path / "file").write_text("")
    for folder in ("/proc/none", str(tmp_path / "file")):
        monkeypatch.setenv("MEGAKD_CACHE_DIR", folder)
        before = len(calls)
        assert remember("kind", {"a": (1, 2)}, make)[0] == before + 1
    monkeypatch.delenv("MEGAKD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    remember("kind", {"a": (1, 2)}, make)
    assert len(list((tmp_path / "xdg/megakd").iterdir())) == 1


def test_dropout_is_switched_off(models: Path, tmp_path: Path) -> None:
    content = json.loads((models / "bpe/tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, whole = (build_tokenizer("HuggingFaceTokenizer", folder) for folder in (tmp_path, models / "bpe"))
    lines = text_lines()[:200]
    assert [ids.tolist() for ids in tokenizer.encode_arrays(lines)] == [
        ids.tolist() for ids in whole.encode_arrays(lines)
    ]
    assert "dropout" in tokenizer.notes[0] and not whole.notes
    assert_equal_ids(tokenizer, choose_engine(tokenizer, lines), lines)


def real_tokenizers() -> list[Path]:
    """Tokenizer files of real models, in the folder that MEGAKD_REAL_TOKENIZERS names: ``*.json``, ``*.model*``."""
    folder = os.environ.get("MEGAKD_REAL_TOKENIZERS", "")
    return sorted((*Path(folder).rglob("*.json"), *Path(folder).rglob("*.model*"))) if folder else []


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "gpt4", "qwen2", "real"])
def test_every_plane_of_unicode(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the whole scan, and its cache
    models = real_tokenizers()
    if name != "real":
        models = [write_telling_bpe(tmp_path / name, name, normaliser={"type": "NFC"})]
    if not models:
        pytest.skip("no real tokenizers: name a folder of them with MEGAKD_REAL_TOKENIZERS")
    points = [point for scanned in engine_scan.SCANNED for point in scanned]
    low = [point for point in points if point < 0x20000]
    for path in models:
        tokenizer = build_tokenizer("SentencePieceTokenizer" if ".model" in path.name else "HuggingFaceTokenizer", path)
        choice = choose_engine(tokenizer, text_lines()[:500], mode="gigatoken")
        texts = fuzz(100_000, 5, points) + fuzz(100_000, 6, low, tokenizer.literals[:3])
        source = random.Random(7)
        starts = source.choices(range(0x80, 0x20000, 16), k=100_000)
        runs = ("".join(chr(start + source.randrange(64)) for _ in range(source.randint(2, 5))) for start in starts)
        texts += [run for run in runs if not any("\ud800" <= each <= "\udfff" for each in run)]
        assert_equal_ids(tokenizer, choice, texts)
