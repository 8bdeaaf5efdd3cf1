"""What is known of the data sets that `prepare_data.py` prepares, and from where.

`rows` are the counts that a prepared set may have. Checksums are known of the BuPO authors' files
(github.com/Trae1ounG/BuPO, data/, at d3a85c6), taken from that repository; of what the hub has,
only row counts are known:

    deepmath-103k   103,110: the data set's card until May 2025; 103,022: what the hub serves since
                    its questions were revised, as projects that pinned it say
    dapo-17k        1,791,700 rows in the hub's file; 17,398 distinct prompts, as counted by
                    open-r1/DAPO-Math-17k-Processed, which removed the repeats
    math500, aime24, aime25, amc23   500, 30, 30, 40: the benchmarks' sizes, and the authors' files
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# Around every question of DAPO-Math-17k
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
_DAPO_AFTER = 'Remember to put your answer on its own line after "Answer:".'


def dapo_question(prompt: str) -> str:
    """The question alone; what has no such words around it is one already."""
    inside = prompt.strip()
    if not (inside.startswith(_DAPO_BEFORE) and inside.endswith(_DAPO_AFTER)):
        return prompt
    return inside.removeprefix(_DAPO_BEFORE).removesuffix(_DAPO_AFTER).strip()


def whole_number(answer: str) -> str:
    """`027` and `27.0` are 27; what is no whole number stays as it is."""
    return str(int(float(answer))) if re.fullmatch(r"-?\d+(\.0+)?", answer) else answer


def as_it_is(text: str) -> str:
    """No change."""
    return text


@dataclass(frozen=True)
class Known:
    """One data set."""

    hub: str  # as data.train
    rows: tuple[int, ...]
    trains: bool = False  # else it evaluates
    repeats: bool = False  # rows that ask the same are one
    source_rows: tuple[int, ...] = ()  # before that
    question: Callable[[str], str] = as_it_is
    answer: Callable[[str], str] = as_it_is
    difficulty: str | None = None  # column
    file_sha256: str | None = None  # of the authors' file
    content: str | None = None  # of the same, see `prepare_data.content_of`


DATA = {
    "deepmath-103k": Known(
        hub="zwhe99/DeepMath-103K",
        rows=(103_022, 103_110),
        trains=True,
        difficulty="difficulty",
    ),
    "deepmath-5k": Known(
        hub="zwhe99/DeepMath-103K",
        rows=(5_000,),
        trains=True,
        difficulty="difficulty",
        file_sha256="4ace761c54c99b2cdc46662da81421445a47bac8ad818b6a427c0cf97ec37339",
        content="dde61a0f66f1817edc7d763039a3cafb3861220576a3daae35d9e62b899f5413",
    ),
    "dapo-17k": Known(
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        rows=(17_398,),
        trains=True,
        repeats=True,
        source_rows=(1_791_700, 17_398),  # the latter where the repeats are gone already
        question=dapo_question,
    ),
    "math500": Known(
        hub="HuggingFaceH4/MATH-500:test",
        rows=(500,),
        difficulty="level",
        file_sha256="e7c34997f374c0cc98acbf052929d3547c1a67ea16986b01689d37251c42828e",
        content="82eead4b2e21e3fde33de84edc7ebbb74e3d5faeb9a00a5bfb8d0b99e05b4973",
    ),
    "aime24": Known(
        hub="HuggingFaceH4/aime_2024",
        rows=(30,),
        answer=whole_number,
        file_sha256="8dc6b75fdb433896b546a4bb699fa16c006f13d04992806d055e3d2fe9734acd",
        content="0696bd9cc3afab184fbbafd5ad28917039506793a29d6f84d24b2c51d167c263",
    ),
    "aime25": Known(
        hub="math-ai/aime25:test",
        rows=(30,),
        answer=whole_number,
        file_sha256="02db9c62b1588640b8a4cb6c940f5fb9839cb6b165efb5dd02ac8d4f1cffe1b7",
        content="6c4c11288b883198e1f27c45b9d4113c9c2ef0ab26df0495644dc0fba6bf4107",
    ),
    "amc23": Known(
        hub="math-ai/amc23:test",
        rows=(40,),
        answer=whole_number,
        file_sha256="96d034c67abe018bbb35726fc3a73c4e940d3ec7fcad62b2ea65064844cdd8f1",
        content="b06c227dfca431332662b56911e149fa188f7b6488439df8116a22e49216c51c",
    ),
}

# Difficulty -> rows of the authors' 5,000. They do not say how they drew them from the 103K, and of
# their file this is what another draw can have in common with it.
FIVE_THOUSAND = {
    -1.0: 1,
    1.0: 1,
    1.5: 3,
    2.0: 3,
    2.5: 5,
    3.0: 165,
    3.5: 50,
    4.0: 276,
    4.5: 210,
    5.0: 776,
    5.5: 724,
    6.0: 838,
    6.5: 388,
    7.0: 423,
    7.5: 309,
    8.0: 562,
    8.5: 192,
    9.0: 72,
    9.5: 2,
}
