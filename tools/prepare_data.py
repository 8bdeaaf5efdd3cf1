"""The BuPO paper's data and its neighbours as parquet files of one schema, with checksums.

    python tools/prepare_data.py math500 aime24 aime25 amc23 --out data
    python tools/prepare_data.py deepmath-5k --out data --source deepmath-5k.parquet
    python tools/prepare_data.py --verify data

Without `--source`, a data set comes from the hub; see `known_data.py` for which one and for what is
known of it. `--source` is a hub id or a file in the layout of the hub or of the authors, whose five
files are known by their SHA-256. The rows are

    prompt      chat messages: the paper's system message, and the question. `data.prompt_template`
                puts something else around it
    question    alone
    answer      text
    source      the data set's name
    index       the row that it was, from 0; of repeats, the first
    difficulty  DeepMath's, or the level in MATH; else null

Beside NAME.parquet, NAME.json has the counts, what was dropped, and two checksums: of the file, and
of its content, which is the same in whatever order (the sum of the SHA-256 of each question with
its answer, modulo 2^256). overlap.json says for each training set which questions of each test set
it asks, by the rule of `data.contamination`.

deepmath-5k is the authors' file where that is the source. Otherwise it is drawn from DeepMath-103K:
as many rows of each difficulty as their file has, those of a difficulty whose questions have the
smallest SHA-256. These are other questions than theirs; nobody has said how theirs were chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tools share is in modules of their own

from megatron_bupo.config.schema import DataConfig
from megatron_bupo.data.contamination import Asked
from megatron_bupo.data.questions import BOXED, read_question
from megatron_bupo.data.rows import read_rows
from megatron_bupo.durable import replace_text, replacing
from megatron_bupo.errors import InputError
from tools.known_data import DATA, FIVE_THOUSAND, Known

OVERLAP = "overlap.json"
EXAMPLES = 20
TEXTS = ("question", "answer", "source")


@dataclass(frozen=True)
class Item:
    """A row of a prepared data set."""

    question: str
    answer: str
    source: str
    index: int
    difficulty: float | None


@dataclass(frozen=True)
class Dropped:
    """Rows of the source that the prepared set leaves out."""

    repeats: int = 0
    repeats_with_another_answer: int = 0
    not_drawn: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: done, or all is as it was; 1: something has changed; 2: what was asked for cannot be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DATA))
    parser.add_argument("--out", metavar="DIR", help="directory to write to")
    parser.add_argument("--source", metavar="FILE_OR_HUB_ID", help="of the one NAME")
    parser.add_argument("--rows", metavar="N", type=int, help="where a data set has been revised")
    parser.add_argument("--verify", metavar="DIR", help="compare what is there with its checksums")
    args = parser.parse_args(argv)
    try:
        if args.verify is not None:
            return verify(Path(args.verify).expanduser())
        prepare(args.names, args.out, source=args.source, rows=args.rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(names: Sequence[str], out: str | None, *, source: str | None, rows: int | None) -> None:
    """Write each of `names` and what they have in common to `out`."""
    for name in names:
        if name not in DATA:
            raise InputError(f"NAME={name}", "is not known", f"choose from {', '.join(DATA)}")
    if not names or out is None:
        raise InputError("NAME and --out", "are both needed", "see --help")
    if len(names) > 1 and (source or rows):
        raise InputError("--source, --rows", "are of one data set", "name one")
    directory = Path(out).expanduser()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--out {out}", "is not a directory", "name another")
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        _prepare(name, directory, source or DATA[name].hub, rows)
    overlap = overlap_of(directory)
    replace_text(directory / OVERLAP, json.dumps(overlap, indent=2) + "\n")
    for train, tests in overlap.items():
        for test, found in tests.items():
            print(f"{train} asks {found['asked']} of the {found['of']} questions of {test}")


def _prepare(name: str, directory: Path, source: str, rows: int | None) -> None:
    known = DATA[name]
    sha256 = _sha256(Path(source)) if Path(source).is_file() else None
    items, read, dropped = _items(name, known, source, sha256)
    expected = (rows,) if rows else known.rows
    way_out = f"--rows {len(items)} takes it as it is, if the data set has been revised"
    if known.source_rows and not rows and read not in known.source_rows:
        counts = " or ".join(f"{count:,}" for count in known.source_rows)
        raise InputError(source, f"has {read:,} rows, and {name} has {counts}", way_out)
    if len(items) not in expected:
        counts = " or ".join(f"{count:,}" for count in expected)
        raise InputError(source, f"gives {len(items):,} rows of {name}, not {counts}", way_out)
    path, content = directory / f"{name}.parquet", content_of(items)
    with replacing(path) as file:
        _write_parquet(file, items)
    manifest = {
        "name": name,
        "source": source,
        "source_sha256": sha256,
        "source_is_the_authors_file": sha256 is not None and sha256 == known.file_sha256,
        "source_rows": read,
        "rows": len(items),
        "dropped": asdict(dropped),
        "content": content,
        # null: of this data set, no content is known
        "content_is_the_authors": None if known.content is None else content == known.content,
        "file_sha256": _sha256(path),
    }
    replace_text(directory / f"{name}.json", json.dumps(manifest, indent=2) + "\n")
    print(f"{path}: {len(items):,} rows of {read:,}, content {content[:12]}")


def _items(
    name: str, known: Known, source: str, sha256: str | None
) -> tuple[list[Item], int, Dropped]:
    """The rows to write, how many the source has, and which were left out."""
    if known.repeats:
        items, dropped = _first_of_each(_read(name, known, source))
        return items, len(items) + dropped.repeats, dropped
    items = list(_read(name, known, source))
    read, dropped = len(items), Dropped()
    if name == "deepmath-5k" and sha256 != known.file_sha256:
        items = _draw(items, source)
        dropped = Dropped(not_drawn=read - len(items))
    return items, read, dropped


def _read(name: str, known: Known, source: str) -> Iterator[Item]:
    for row in read_rows(source, key="--source"):
        question = read_question(row, DataConfig())
        level = row.values.get(known.difficulty) if known.difficulty else None
        if level is not None and not isinstance(level, int | float):
            reason = f"its {known.difficulty} is no number but {level!r:.40}"
            raise InputError(row.where, reason, "mend the row")
        asked, answer = known.question(question.asked), known.answer(question.answer)
        yield Item(asked, answer, name, row.index, None if level is None else float(level))


def _first_of_each(items: Iterable[Item]) -> tuple[list[Item], Dropped]:
    first: dict[str, Item] = {}
    agrees = Counter(first.setdefault(i.question, i).answer == i.answer for i in items)
    return list(first.values()), Dropped(agrees.total() - len(first), agrees[False])


def _draw(items: Sequence[Item], source: str) -> list[Item]:
    """As many of each difficulty as the authors' file has, in the order of the source."""
    levels: dict[float | None, list[Item]] = defaultdict(list)
    for item in items:
        levels[item.difficulty].append(item)
    drawn = []
    for level, count in FIVE_THOUSAND.items():
        if len(levels[level]) < count:
            there = f"has {len(levels[level])} rows of difficulty {level:g}, and {count} are needed"
            reason = f"is not the authors' deepmath-5k.parquet, and to draw from it {there}"
            raise InputError(source, reason, "name DeepMath-103K or that file")
        drawn += sorted(levels[level], key=lambda item: _digest(item.question))[:count]
    return sorted(drawn, key=lambda item: item.index)


def content_of(items: Iterable[Item]) -> str:
    """The checksum of questions with their answers, whatever their order."""
    pairs = (json.dumps([item.question, item.answer], ensure_ascii=False) for item in items)
    return f"{sum(int(_digest(pair), 16) for pair in pairs) % 2**256:064x}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_parquet(file: IO[bytes], items: Sequence[Item]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    types = {"prompt": pa.list_(message)} | dict.fromkeys(TEXTS, pa.string())
    schema = pa.schema(types | {"index": pa.int64(), "difficulty": pa.float64()})
    system = {"role": "system", "content": BOXED}
    rows = [
        {"prompt": [system, {"role": "user", "content": item.question}], **asdict(item)}
        for item in items
    ]
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")


def _items_of(path: Path) -> list[Item]:
    fields = Item.__dataclass_fields__
    rows = [row.values for row in read_rows(str(path))]
    return [Item(**{name: row.get(name) for name in fields}) for row in rows]  # type: ignore[arg-type]


def overlap_of(directory: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """For each training set there, and each test set: the questions of the latter that it asks."""
    there = {name: path for name in DATA if (path := directory / f"{name}.parquet").is_file()}
    trains = [name for name in there if DATA[name].trains]
    tests = {name: _items_of(there[name]) for name in there if not DATA[name].trains}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for train in trains if tests else ():
        asking = _items_of(there[train])
        for test, items in tests.items():
            asked = Asked((item.question, item) for item in items)
            pairs = [[i.index, m.index] for i in asking if (m := asked.match(i.question))]
            number = len({index for _, index in pairs})
            what = {"asked": number, "of": len(items), "rows": pairs[:EXAMPLES]}
            found.setdefault(train, {})[test] = what
    return found


def verify(directory: Path) -> int:
    """Say of each prepared set in `directory` whether it is what its manifest says."""
    manifests = [path for name in DATA if (path := directory / f"{name}.json").is_file()]
    if not manifests:
        raise InputError(f"--verify {directory}", "holds no prepared data set", "prepare one")
    told: Counter[bool] = Counter()
    for path in manifests:
        wrong = _differences(path)
        told[not wrong] += 1
        print(f"{path.stem}: {'; '.join(wrong) or 'as it was written'}")
    try:
        overlap = json.loads((directory / OVERLAP).read_bytes()) == overlap_of(directory)
    except (OSError, ValueError, TypeError):  # InputError is a ValueError
        overlap = False
    print(f"{OVERLAP}: {'as it was written' if overlap else 'is not that of these files'}")
    return int(told[False] > 0 or not overlap)


def _differences(path: Path) -> list[str]:
    """What `path`, a manifest, says that its data set is not."""
    data = path.with_suffix(".parquet")
    try:
        said = json.loads(path.read_bytes())
        wanted = said["rows"], said["content"], said["file_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path.name} is not a manifest ({type(error).__name__}: {error})"]
    if not data.is_file():
        return [f"{data.name} is missing"]
    try:
        items = _items_of(data)
        found = len(items), content_of(items), _sha256(data)
    except (InputError, TypeError) as error:
        return [str(error)]
    names = "rows", "content", "file_sha256"
    pairs = zip(names, wanted, found, strict=True)
    return [f"{name} is {is_now}, not {was}" for name, was, is_now in pairs if was != is_now]


if __name__ == "__main__":
    sys.exit(main())
