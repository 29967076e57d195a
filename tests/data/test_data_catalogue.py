"""What a run says that it has consumed is what its batches held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_jax.cli.main import main
from qwen3_jax.data import DataConfig, SourceConfig, make_loader, write_catalogue
from qwen3_jax.data.config import Encoding
from qwen3_jax.data.tokenize import tokenize_source
from qwen3_jax.text.tokenizer import load_tokenizer, train_sentencepiece

LETTERS = "qzj"  # in no marker


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Twenty steps of a run in two processes with checkpoints at steps 10 and 20, and the tokens by their letter.

    `web` has documents of q (English, by their label) and of z (declared: de, fr); `code`, tokenised, has those of j.
    """
    folder = tmp_path_factory.mktemp("run")
    train_sentencepiece(["12"], folder / "tokenizer.model", vocab_size=300)
    web = [{"text": LETTERS[0] * 9, "labels": {"language": "en", "domain": "math"}}, {"text": LETTERS[1] * 9}]
    for name, records in (("web", web), ("code", [{"text": LETTERS[2] * 9, "labels": {"domain": "code"}}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records * 10))
    code = SourceConfig("code", (str(folder / "code.jsonl"),), licence="MIT", origin="forge", languages=("c",))
    tokenize_source(code, Encoding(str(folder)), folder / "code", workers=1)
    sources = (
        SourceConfig("web", (str(folder / "web.jsonl"),), 3, "CC-BY-4.0", languages=("de", "fr")),
        SourceConfig("code", (str(folder / "code" / "*.arrayrecord"),), 1),
    )
    config = DataConfig(sources, str(folder), sequence_length=20, batch_size=4)
    write_catalogue(config, folder)
    loaders = [make_loader(config, rows) for rows in ((0, 1), (2, 3))]
    tokens = dict.fromkeys(LETTERS, 0)
    tokenizer = load_tokenizer(folder)
    for step in range(1, 21):
        for i, loader in enumerate(loaders):
            batch = next(loader)
            for letter in tokens:
                tokens[letter] += tokenizer.decode(batch["tokens"].ravel().tolist()).count(letter)
            if step % 10 == 0:
                directory = folder / "checkpoints" / str(step) / "data"
                directory.mkdir(parents=True, exist_ok=True)
                (directory / f"process_{i}.json").write_text(json.dumps(loader.get_state()))
    return folder, tokens


def test_report_is_what_the_batches_held(run: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a document's ten tokens nine are its letter, and nine are targets."""
    folder, letters = run
    main(["data", "report", str(folder), "--json"])
    report = json.loads(capsys.readouterr().out)
    a, b, c = (letters[letter] // 9 for letter in LETTERS)

    def counts(documents: int) -> dict[str, int]:
        return {"documents": documents, "tokens": 10 * documents, "loss_tokens": 9 * documents}

    assert report["step"] == 20
    assert report["shares"] == {
        "source": {"web": counts(a + b), "code": counts(c)},
        "licence": {"CC-BY-4.0": counts(a + b), "MIT": counts(c)},
        "language": {"en": counts(a), "de+fr": counts(b), "c": counts(c)},
        "domain": {"math": counts(a), "unknown": counts(b), "code": counts(c)},
    }
    assert min(a, b, c) > 10
    # Open rows hold drawn documents that no batch has held yet.
    assert report["epochs"]["web"] * 20 == pytest.approx(a + b + 4 * 16 * 2 * 3 / 4, abs=30)


def test_report_as_table_and_plot(run: tuple[Path, dict[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    main(["data", "report", str(folder), "--plot", str(folder / "shares.png")])
    printed = capsys.readouterr().out
    for word in ("consumed up to step 20", "CC-BY-4.0", "de+fr", "in the loss", "shares.png"):
        assert word in printed
    assert (folder / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_directories_without_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "report", str(tmp_path)])
    assert "holds no sources.json; use the output_dir of a training run" in capsys.readouterr().err
    (tmp_path / "sources.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["data", "report", str(tmp_path)])
    assert "has no checkpoint" in capsys.readouterr().err
