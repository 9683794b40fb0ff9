import hashlib
import os
from pathlib import Path

import pytest

from fleet.errors import FleetError
from fleet.server.tokens import TokenFile, Tokens


def sha(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def test_a_token_opens_its_variant_alone():
    tokens = Tokens({"a": sha("one"), "b": sha("two")})
    assert [tokens.opens(token) for token in ("one", "two")] == ["a", "b"]
    # Neither an empty token, nor another, nor what the file holds opens anything.
    for token in ("", "three", "One", "one ", sha("one"), "\udcff"):
        assert tokens.opens(token) is None
    assert sha("one") not in repr(vars(tokens))


def test_a_file_of_tokens(tmp_path: Path):
    path = tmp_path / "tokens.yaml"
    path.write_text(f"# who\na: {sha('one')}\n\"b c\": '{sha('two')}'\n007: {sha('three')}\n")
    tokens = TokenFile(path).tokens()
    assert len(tokens) == 3
    assert [tokens.opens(t) for t in ("one", "two", "three")] == ["a", "b c", "007"]


def test_a_changed_file_is_read_again(tmp_path: Path):
    path = tmp_path / "tokens.yaml"
    path.write_text(f"a: {sha('one')}\n")
    file = TokenFile(path)
    before = file.tokens()
    assert file.tokens() is before
    path.write_text(f"a: {sha('new')}\n")
    os.utime(path, ns=(1, 1))
    after = file.tokens()
    assert [after.opens("one"), after.opens("new")] == [None, "a"]


def test_ten_thousand_tokens(tmp_path: Path):
    path = tmp_path / "tokens.yaml"
    path.write_text("".join(f"v{i}: {sha(str(i))}\n" for i in range(10_000)))
    assert TokenFile(path).tokens().opens("9999") == "v9999"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no tokens; wanted lines `variant: SHA-256`"),
        ("- a\n", "holds no tokens"),
        ("a: }\n", "line 1: is not YAML"),
        ("a: swordfish\n", "line 1: 'a': found no SHA-256 (64 digits of 0-9a-f)"),
        (f"a: {sha('x').upper()}\n", "'a': found no SHA-256"),
        (f"a: {sha('x')[:-1]}\n", "'a': found no SHA-256"),
        (f"a: [{sha('x')}]\n", "'a': found no SHA-256"),
        (f"a: {sha('x')}\nb: {sha('x')}\n", "line 2: 'b' has the token of 'a'"),
        (f"a: {sha('x')}\na: {sha('y')}\n", "line 2: 'a' is there twice"),
        (f"[a, b]: {sha('x')}\n", "line 1: wanted `variant: SHA-256`"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(FleetError) as caught:
        TokenFile(path).tokens()
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    # It may be the token itself that somebody wrote there.
    assert "swordfish" not in str(caught.value)


def test_every_problem_is_told(tmp_path: Path):
    path = tmp_path / "tokens.yaml"
    path.write_text("a: 1\nb: 2\n")
    with pytest.raises(FleetError, match=r"line 1: 'a'[^\n]*\n[^\n]*line 2: 'b'"):
        TokenFile(path).tokens()


def test_no_file_and_no_text(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        TokenFile(tmp_path / "none.yaml").tokens()
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FleetError, match="is not a text file in UTF-8"):
        TokenFile(tmp_path / "bytes.yaml").tokens()
