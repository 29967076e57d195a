"""A file of answers that only grows, so that a run that was killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class AnswerFile:
    """JSON lines appended to `path`, each in one write; the lines of an earlier run are kept.

    A process that dies at any moment leaves whole lines, and perhaps the beginning of one more, which is cut off when
    the file is opened again. Two processes cannot have it open at once.

    settings: what the answers depend on; kept in `<path>.run.json`, so that a file is not continued under others.

    Raises:
      ValueError: a file in use by another process, with lines that are not ours, or begun under other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        if not path.parent.is_dir():
            raise ValueError(f"output: {str(path.parent)!r} is not a directory; use a file in one")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(
                f"output: {str(path)!r} is not a regular file; use a file, which a later run can go on with"
            )
        self.path = path
        # By `(id as JSON text, sample)` the line and the digest of the record that was answered.
        self._answered: dict[tuple[str, int], tuple[int, str]] = {}
        self._errors: set[str] = set()  # as JSON text: there may be as many as lines
        self._settings_path = path.with_name(path.name + ".run.json")
        self._file = self._open()
        try:
            self._read()
            self._check(settings)
        except ValueError:
            self._file.close()
            raise

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        line = memoryview(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        while line:
            line = line[self._file.write(line) :]

    def holds(self, key: str, sample: int, digest: str) -> bool:
        """Whether the answer number `sample` to the record with this id and digest is there.

        Raises:
          ValueError: the id was answered for another record.
        """
        if (key, sample) not in self._answered:
            return False
        line, answered = self._answered[key, sample]
        if answered != digest:
            raise ValueError(
                f"output: {str(self.path)!r} answers id {key} as it was on line {line}, which has changed since; use "
                "another id for it, or another output"
            )
        return True

    def write_errors(self, errors: Sequence[Mapping[str, Any]]) -> None:
        """Makes `errors` the file's only errors: those of lines that were mended since are removed."""
        wanted = {json.dumps(error) for error in errors}
        if not self._errors <= wanted:
            partial = self.path.with_name(self.path.name + ".partial")
            with self.path.open("rb") as old, partial.open("wb") as new:
                new.writelines(line for line in old if "error" not in json.loads(line))
                new.flush()
                os.fsync(new.fileno())
            os.replace(partial, self.path)
            self._file.close()
            self._file, self._errors = self._open(), set()
        for error in errors:
            if json.dumps(error) not in self._errors:
                self.write(error)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _open(self) -> IO[bytes]:
        """The file, locked."""
        try:
            file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise ValueError(f"output: {str(self.path)!r}: {error.strerror}; use a file that can be written") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(
                f"output: {str(self.path)!r} is being written by another process; use another file"
            ) from None
        return file

    def _read(self) -> None:
        if self._file.seek(0, os.SEEK_END) and not self._settings_path.is_file():
            raise ValueError(
                f"output: {str(self.path)!r} exists, without the {self._settings_path.name!r} of a run; use another"
            )
        self._file.seek(0)
        whole = 0
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    record = json.loads(line)
                    if "error" in record:
                        self._errors.add(json.dumps(record))
                    else:
                        key = json.dumps(record["id"]), record["sample"]
                        self._answered[key] = record["line"], record["record"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"output: {str(self.path)!r} exists, and line {number} is not an answer; use another file"
                    ) from None
        self._file.truncate(whole)

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self._settings_path
        if not self._answered and not self._errors:
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
            return
        try:
            begun = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"output: {str(path)!r} is not the record of a run; use another output") from None
        now = json.loads(json.dumps(settings))
        for name in {**begun, **now}:
            if begun.get(name) != now.get(name):
                raise ValueError(
                    f"output: {str(self.path)!r} was begun with {name} {begun.get(name)!r}, not {now.get(name)!r}; "
                    "use the same, or another file"
                )
