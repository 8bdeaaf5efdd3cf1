from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bupo.config.schema import RewardConfig
from megatron_bupo.errors import InputError
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.types import Grade, Prompt, Rollout, RolloutGroup
from tests.moments import LIMIT_S, until

ROOT = Path(__file__).parents[2]
FUNCTIONS = '''
import ctypes, os, signal, subprocess, sys, time

def act(response, answer):
    """Does what the response says."""
    if response == "sleep": time.sleep(1000)
    if response == "loop":
        while True: pass
    if response == "stubborn":
        while True:
            try: time.sleep(1000)
            except BaseException: pass
    if response == "in C": sum(range(10**15))
    if response == "exit": os._exit(3)
    if response == "quit": sys.exit(4)
    if response == "crash": ctypes.string_at(0)
    if response == "raise": raise KeyError("lost")
    if response == "text": return "1.0"
    if response == "nan": return float("nan")
    if response == "none": return None
    if response == "long": raise ValueError("x" * 10_000 + chr(10))
    if response == "print":
        print("printed")
        os.write(1, b"written")
    if response == "parent": return os.getppid()
    if response == "torch": return "torch" in sys.modules
    if response == "leave a child and hang":
        child = subprocess.Popen(["sleep", "1000"])
        with open(answer, "w") as file: file.write(str(child.pid))
        sum(range(10**15))
    return response == answer

def pid(response, answer):
    return os.getpid()
'''


@pytest.fixture
def functions(tmp_path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def grader(functions):
    grader = Grader(RewardConfig(f"{functions}:act", timeout_s=0.5))
    yield grader
    grader.close()


def group(*responses: str, answer: str = "7", index: int = 0) -> RolloutGroup:
    prompt = Prompt(index, (1, 2), answer, "3+4=", {"n": index})
    rollouts = (Rollout(prompt, (5,), text, (0.0,), (0.0,), "stop", 0) for text in responses)
    return RolloutGroup(prompt, tuple(rollouts))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def ends_soon(pid: int) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_grades_come_back_in_the_shape_of_the_groups(grader) -> None:
    groups = [group("7", "8"), group("8", "8", "7", answer="8", index=1), group(index=2)]
    rewards = [[grade.reward for grade in grades] for grades in grader.grade(groups)]
    assert rewards == [[1.0, 0.0], [1.0, 1.0, 0.0], []]
    assert grader.grade([]) == []


@pytest.mark.parametrize(
    ("response", "warning"),
    [
        ("raise", "raised KeyError: 'lost' (functions.py:"),
        ("quit", "raised SystemExit: 4"),
        ("text", "returned '1.0', a str, not a number"),
        ("none", "returned None, a NoneType, not a number"),
        ("nan", "returned nan"),
        ("sleep", "took longer than 0.5 s"),
        ("loop", "took longer than 0.5 s"),
        ("stubborn", "took longer than 0.5 s and was killed"),
        ("in C", "took longer than 0.5 s and was killed"),
        ("exit", "ended its process with exit code 3"),
        ("crash", "ended its process with signal SIGSEGV"),
    ],
)
def test_a_failure_costs_its_own_rollout_the_reward_and_no_other(
    grader, response: str, warning: str
) -> None:
    started = time.monotonic()
    [first, failed, last], [other] = grader.grade([group("7", response, "7"), group("7")])
    assert time.monotonic() - started < 60
    assert failed.reward == 0.0
    assert warning in (failed.warning or "")
    assert (first, last, other) == (Grade(1.0),) * 3


@pytest.mark.slow
def test_every_hanging_rollout_costs_about_one_time_limit(grader) -> None:
    grader.grade([group("7")])
    started = time.monotonic()
    [grades] = grader.grade([group(*["sleep", "in C", "7", "exit"] * 3)])
    assert [g.reward for g in grades] == [0.0, 0.0, 1.0, 0.0] * 3
    assert sum(g.warning is not None for g in grades) == 9
    assert time.monotonic() - started < 60


def test_a_long_message_is_cut_to_one_short_line(grader) -> None:
    [[grade]] = grader.grade([group("long")])
    assert "ValueError: xxx" in grade.warning
    assert len(grade.warning) < 250
    assert "\n" not in grade.warning


def test_what_a_function_prints_goes_to_stderr_and_disturbs_nothing(functions, capfd) -> None:
    grader = Grader(RewardConfig(f"{functions}:act"))
    assert grader.grade([group("print", "7")]) == [[Grade(0.0), Grade(1.0)]]
    grader.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "printed" in err
    assert "written" in err


def test_a_batch_larger_than_the_socket_buffer_does_not_jam(grader) -> None:
    answer = "7" * 100_000
    grades = grader.grade([group(answer, "8", answer=answer, index=i) for i in range(100)])
    assert grades == [[Grade(1.0), Grade(0.0)]] * 100


def test_the_grading_process_does_without_torch(grader) -> None:
    assert grader.grade([group("torch", "parent")]) == [[Grade(0.0), Grade(float(os.getpid()))]]


def test_the_process_outlives_ctrl_c_is_replaced_when_killed_and_ends_on_close(functions) -> None:
    grader = Grader(RewardConfig(f"{functions}:pid"))

    def pid() -> int:
        [[grade]] = grader.grade([group("7")])
        assert grade.warning is None
        return int(grade.reward)

    first = pid()
    assert os.getsid(first) == first  # the terminal's Ctrl-C does not even reach it
    os.kill(first, signal.SIGINT)
    assert pid() == first
    os.kill(first, signal.SIGKILL)
    assert ends_soon(first)
    second = pid()
    assert second != first
    grader.close()
    assert not is_running(second)


def test_what_a_killed_function_has_started_is_killed_with_it(functions, tmp_path) -> None:
    grader, note = Grader(RewardConfig(f"{functions}:act", timeout_s=2)), tmp_path / "pid"
    [[grade]] = grader.grade([group("leave a child and hang", answer=str(note))])
    grader.close()
    assert "was killed" in grade.warning
    assert ends_soon(int(note.read_text()))


@pytest.mark.slow
def test_the_process_dies_with_a_killed_trainer_though_stuck_in_c(functions, tmp_path) -> None:
    note = tmp_path / "pid"
    functions.write_text(
        "import os\ndef hang(response, answer):\n"
        "    with open(answer + '.new', 'w') as file: file.write(str(os.getpid()))\n"
        "    os.rename(answer + '.new', answer)\n"
        "    sum(range(10**15))\n"
    )
    trainer = (
        "from megatron_bupo.config.schema import RewardConfig\n"
        "from megatron_bupo.rewards.grader import Grader\n"
        "from megatron_bupo.types import Prompt, Rollout, RolloutGroup\n"
        f"prompt = Prompt(0, (1,), {str(note)!r}, '')\n"
        "rollout = Rollout(prompt, (5,), '', (0.0,), (0.0,), 'stop', 0)\n"
        f"grader = Grader(RewardConfig('{functions}:hang', timeout_s=100))\n"
        "grader.grade([RolloutGroup(prompt, (rollout,))])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], cwd=ROOT)
    until(note.exists)
    pid = int(note.read_text())
    assert is_running(pid)
    process.kill()
    process.wait()
    assert ends_soon(pid)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import needed_thing\n", "raises ModuleNotFoundError"),
        ("import os\nos._exit(5)\n", "importing it ends the process with exit code 5"),
    ],
)
def test_a_function_that_does_not_import_is_the_users_error(tmp_path, text: str, says: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    grader = Grader(RewardConfig(f"{tmp_path}/bad.py:fn"))
    with pytest.raises(InputError, match=says) as caught:
        grader.grade([group("7")])
    assert str(caught.value).startswith(f"reward.function={tmp_path}/bad.py:fn: ")
    grader.close()


def test_an_answer_that_blows_sympy_up_costs_its_time_limit() -> None:
    grader = Grader(RewardConfig("math", timeout_s=2))
    grader.grade([group(r"\boxed{7}")])
    started = time.monotonic()
    [grades] = grader.grade([group(r"\boxed{7}", r"\boxed{9^{9^{9^9}}}", r"\boxed{14/2}")])
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0]
    assert time.monotonic() - started < 60
    grader.close()
    assert grades[0].warning is None


RANK = """
import sys
import torch.distributed as dist
from megatron_bupo.config.schema import RewardConfig
from megatron_bupo.rewards.grader import Grader
from megatron_bupo.types import Prompt, Rollout, RolloutGroup
rank, world, store, function = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
groups = []
for index in range(3):
    prompt = Prompt(index, (1,), str(index), "")
    texts = [str(index), "raise", "8"][: index + 1]
    rollouts = (Rollout(prompt, (5,), text, (0.0,), (0.0,), "stop", 0) for text in texts)
    groups.append(RolloutGroup(prompt, tuple(rollouts)))
grader = Grader(RewardConfig(function))
print([[(g.reward, bool(g.warning)) for g in grades] for grades in grader.grade(groups)])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_share_the_work_and_agree_on_the_grades(functions, tmp_path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "2", f"{tmp_path}/store", f"{functions}:act"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    grade = "(1.0, False)"
    wanted = f"[[{grade}], [{grade}, (0.0, True)], [{grade}, (0.0, True), (0.0, False)]]\n"
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [wanted, wanted]
