"""The `sd3` command: exit codes, and errors of one line on stderr without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flows.cli import commands
from flows.cli.sample import read_prompts
from flows.local import home
from sd3core.data.store import open_store
from sd3core.files.local_paths import PROJECT

SD3 = [sys.executable, "-m", "flows.cli"]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "-r", "mimi"], "sd3: recipe 'mimi': no recipe of that name; did you mean 'mini'?"),
        (["plan", "-r", "none.yaml"], "sd3: recipe none.yaml: no such file"),
        (["plan", "-s", "pretrain.sample=9"], "sd3: recipe mini: unknown key pretrain.sample; did you mean 'samples'?"),
        (["plan", "-s", "pretrain"], "sd3: override 'pretrain': write it as section.key=value"),
        (["demo", "-r", "mimi"], "sd3: recipe 'mimi': no recipe of that name"),
        (["demo", "--data", "/none"], "sd3: DATA (--data) /none: no such folder"),
        (["deploy", "none.yaml"], "sd3: recipe none.yaml: no such file"),
        (["env"], "sd3: the local services are not running; start them with `.venv/bin/sd3 up`"),
        (
            ["sample", "a circle", "-r", "tiny-test", "--without", "clip"],
            "sd3: --without clip: take one of clip_l, clip_g, t5",
        ),
        (["sample", "a circle", "-r", "tiny-test", "--weights", "best"], "sd3: --weights best: take one of ema, live"),
        (
            ["sample", "a circle", "--sampler", "ddim"],
            "sd3: --sampler ddim: take one of euler, heun, dpm++2m, dpm++2m-sde",
        ),
        (["sample", "a circle", "--schedule", "karras"], "sd3: --schedule karras: take one of reference, textbook"),
        (["sample", "a circle", "--precision", "fp16"], "sd3: --precision fp16: take one of bf16, fp32"),
        (["sample", "a circle", "--device", "tpu"], "sd3: --device tpu: PyTorch has no such device here; take cpu"),
        (["sample", "a circle", "--seeds", "3,4", "--seed", "1"], "sd3: --seeds: leave out --seed and --images"),
        (["sample", "a circle", "-r", "tiny-test"], "sd3: "),  # nothing was trained here
        (
            ["sample", "a circle", "--checkpoint", "/none", "--towers", "/none"],
            "sd3: --towers /none: no vae folder there",
        ),
        (
            ["sample", "a circle", "--checkpoint", "/none"],
            "sd3: file:///none: no config.json (a model) and no DONE.json (a checkpoint) there",
        ),
        (["import", "/none", "out"], "sd3: /none: no such file or folder"),
        (["import", "/bin/ls", "out"], "sd3: /bin/ls: not a safetensors file; get the .safetensors of these weights"),
        (
            ["import", "/sys", "out"],
            "sd3: /sys: no diffusion_pytorch_model.safetensors there; name a .safetensors file",
        ),
        (["import", "/bin/ls", "out", "--dtype", "int8"], "sd3: --dtype int8: take one of float32, bfloat16, float16"),
        (["import", "/bin/ls", "out", "--null", "none"], "sd3: --null none: take one of zeros, empty"),
        (
            ["export", "/none", "out"],
            "sd3: file:///none: no config.json (a model) and no DONE.json (a checkpoint) there",
        ),
        (["export", "/none", "out", "--format", "gguf"], "sd3: --format gguf: take one of diffusers, single-file"),
        (["export", "/none", "out", "--format", "single-file"], "sd3: out: name a file that ends in .safetensors"),
        (["export", "/none", "out", "--weights", "best"], "sd3: --weights best: take one of ema, live"),
        (["export", "/none", "s3://a/b"], "sd3: s3://a/b: name a path on this machine"),
        (
            ["export", "/none", "out", "--run", "x"],
            "sd3: /none, and --run or --recipe: name the one checkpoint or the other",
        ),
        (["export", "a", "b", "out"], "sd3: a, b: name one checkpoint and the output"),
        (["export", "out", "-r", "tiny-test"], "sd3: "),  # nothing was trained here
        (["sample"], "sd3: no prompt: give one or more, or --file with a prompt on each line"),
        (["sample", "-f", "/none"], "sd3: --file /none: cannot be read (No such file or directory)"),
        (["sample", "-f", "/bin/ls"], "sd3: --file /bin/ls: not UTF-8 text"),
        (["sample", "-f", "/dev/null"], "sd3: --file /dev/null: it has no prompt; write one on each line"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_1(sd3, arguments, message):
    code, out, err = sd3(*arguments)
    assert code == 1
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_brackets_in_what_is_printed_are_no_markup(capsys):
    commands.say("/home/My Photos [raw]/[/x]")
    assert capsys.readouterr().out == "/home/My Photos [raw]/[/x]\n"


def test_what_cannot_be_written_at_the_end_is_told_before_the_work(sd3, tmp_path):
    for wrong in (tmp_path, tmp_path / "none" / "x.json"):
        assert (
            sd3("bench", "model", "--json", str(wrong))[2]
            == f"sd3: --json {wrong}: name a file in a folder that exists\n"
        )
    (tmp_path / "file").write_text("")
    assert (
        sd3("photographs", str(tmp_path / "file"))[2]
        == f"sd3: {tmp_path}/file: File exists; name another, or move what is there\n"
    )


def test_a_prefect_server_that_is_not_there_is_named(sd3, tmp_path):
    own = (PROJECT / "infra/recipes/tiny-test.yaml").read_text().replace("name: tiny-test\n", "name: own\n", 1)
    (tmp_path / "own.yaml").write_text(own)
    command = [*SD3, "deploy", str(tmp_path / "own.yaml"), "--api", "http://127.0.0.1:9/api"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "sd3: --api http://127.0.0.1:9/api: no Prefect server that takes deployments answers there ("
    )


def test_a_file_of_prompts_has_one_on_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  ein grüner Kreis \r\n", encoding="utf-8")
    assert read_prompts(path) == ["a red circle", "ein grüner Kreis"]


def test_where_no_run_is_finished_the_command_that_makes_one_is_named(sd3):
    _, _, err = sd3("sample", "a circle", "-r", "tiny-test")
    makes = "`.venv/bin/sd3 demo --recipe tiny-test` makes it"
    assert err == f"sd3: recipe tiny-test is not finished here, nor is another; {makes}\n"


def test_where_other_runs_are_finished_they_are_named(sd3, tmp_path):
    for run, recipe in (("tiny-test", "tiny-test"), ("photos-1", "mini")):
        open_store(str(tmp_path / "store")).put_json(f"runs/{run}/summary.json", {"run": run, "recipe": recipe})
    finished = "finished: photos-1, tiny-test (--recipe tiny-test)\n"
    assert sd3("sample", "a circle")[2] == f"sd3: recipe mini (the default) is not finished here; {finished}"
    assert sd3("sample", "a circle", "-r", "small")[2] == f"sd3: recipe small is not finished here; {finished}"
    _, _, err = sd3("sample", "a circle", "-r", "tiny-test")  # its data are gone, or its settings changed
    makes = "`.venv/bin/sd3 demo --recipe tiny-test` with the same --set makes all that is missing"
    assert (
        f"towers is not finished for this recipe and its settings; {makes}, the deployment 'towers/tiny-test' this alone"
        in err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "No such command 'none'; `.venv/bin/sd3 --help` has what there is"),
        (["plan", "--none"], "No such option: --none; `.venv/bin/sd3 plan --help` has what there is"),
        (["plan", "extra"], "unexpected extra argument"),
        (["import"], "Missing argument 'source'"),
        (["sample", "x", "--images", "0"], "'--images': Input should be greater than or equal to 1"),
        (["sample", "x", "--seed", "-1"], "'--seed': Input should be greater than or equal to 0"),
        (["sample", "x", "--shift", "-1"], "'--shift': Input should be greater than or equal to 0.01"),
        (["sample", "x", "--guidance", "nan"], "'--guidance': Input should be less than or equal to 1000"),
        (["sample", "x", "--guidance", "inf"], "'--guidance': Input should be less than or equal to 1000"),
        (["sample", "x", "--steps", "10001"], "'--steps': Input should be less than or equal to 10000"),
        (["demo", "--data", ""], "'--data': a path that is empty: name a file or a folder"),
        (["demo", "--data", "~nobody-of-that-name/x"], "this machine knows no home of that user"),
        (["bench", "model", "--image-tokens", "-4"], "'--image-tokens': Input should be greater than or equal to 1"),
        (["bench", "model", "--rounds", "many"], "`.venv/bin/sd3 bench model --help` has what there is"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line_and_exit_code_2(sd3, arguments, message):
    code, out, err = sd3(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sd3: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_without_a_command_there_is_help(sd3, arguments):
    code, out, err = sd3(*arguments)
    assert (code, err) == (2, "") and "--help" in out


def test_status_and_down_where_nothing_was_started(sd3):
    assert sd3("status")[:2] == (1, "services: never started here; `.venv/bin/sd3 up` starts them\n")
    assert sd3("down")[:2] == (0, "services: none were started here\n")


def test_the_process_ends_with_the_code():
    """As a shell sees it, from any folder."""
    done = subprocess.run(
        [*SD3, "plan", "-r", "mimi"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("sd3: recipe 'mimi'")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            httpx.ConnectError("refused"),
            "sd3: the Prefect server does not answer; `.venv/bin/sd3 up` starts it again\n",
        ),
        (
            httpx.HTTPStatusError("", request=None, response=httpx.Response(500)),
            "sd3: the Prefect server answers 500 Internal Server Error; HOME/logs/server.log says why\n",
        ),
        (
            PermissionError(13, "Permission denied", "/data/photos"),
            "sd3: /data/photos: Permission denied; give this user the right to it\n",
        ),
        (
            OSError(28, "No space left on device", "/home/store"),
            "sd3: /home/store: No space left on device; make room there, and the same command goes on\n",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(sd3, monkeypatch, tmp_path, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "_load", fail)
    assert sd3("plan") == (1, "", line.replace("HOME", str(tmp_path)))


def test_a_fault_of_the_program_keeps_its_traceback(sd3, monkeypatch):
    monkeypatch.setattr(commands, "_load", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        sd3("plan")


def test_a_machine_without_room_says_so(sd3, monkeypatch, tmp_path):
    """A file that could not be written is named, and keeps what it was."""
    (tmp_path / "services.json").write_text("before")
    monkeypatch.setattr("sd3core.files.whole_output.os.replace", full)
    with pytest.raises(OSError) as raised:
        home.write_whole(tmp_path / "services.json", "after")
    assert raised.value.filename == str(tmp_path / "services.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"services.json": "before"}
    monkeypatch.setattr(home, "LEAST_FREE_MB", 1e12)
    assert home.full_disk().endswith(f"MB are free in {tmp_path}; make room there, and the same command goes on")


def full(*_):
    raise OSError(28, "No space left on device")
