"""The library is imported from anywhere, and a file that hides one of its packages is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxattn", "pallas_kernels", "train", "evals", "convert")


def python(folder: Path, *words: str, path: Path = ROOT) -> tuple[int, str, str]:
    """A process in `folder`, which Python searches first; the library lies where an install put it, behind that."""
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("name", ["train", "evals", "convert", "pallas_kernels"])
@pytest.mark.parametrize(
    "imports",
    [
        "from train.start_from import first_state",
        "from evals.sinks import held_out_of",
        "import convert.from_hf",
    ],
)
def test_a_file_that_hides_a_package_is_named_and_not_run(tmp_path, name, imports):
    """As in a notebook beside the user's own train.py."""
    if imports.split()[1].split(".")[0] == name:
        return  # then none of this library's code runs
    (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n", "utf-8")
    code, _, err = python(tmp_path, "-c", imports)
    assert code == 1
    assert err.splitlines()[-1] == (
        f"jaxattn.errors.ShadowedError: {tmp_path / name}.py hides jaxattn's package {name!r}: rename it, or start "
        "Python in another folder."
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["file", "package"])
def test_commands_say_it_in_one_line(tmp_path, kind):
    if kind == "file":
        (tmp_path / "train.py").touch()
    else:
        (tmp_path / "train").mkdir()
        (tmp_path / "train/__init__.py").touch()
    code, out, err = python(tmp_path, "-m", "evals.sinks", "runs/x")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {tmp_path}/train")
    assert "hides jaxattn's package 'train': rename it" in line


def test_text_of_a_checkpoint_needs_the_library_alone(tmp_path):
    """Whatever the user's own train.py, evals.py and convert.py are."""
    for name in ("train", "evals", "convert"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n", "utf-8")
    program = "import jaxattn.text\njaxattn.text.load(__import__('pathlib').Path('x'))"
    code, _, err = python(tmp_path, "-c", program)
    assert code == 1
    assert err.splitlines()[-1].startswith("jaxattn.errors.UserError: x holds no run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("package", ["train", "evals", "convert"])
def test_a_file_called_jaxattn(tmp_path, package):
    (tmp_path / "jaxattn.py").touch()
    code, _, err = python(tmp_path, "-c", f"import {package}")
    assert code == 1
    assert err.splitlines()[-1] == (
        f"ImportError: {tmp_path / 'jaxattn.py'} hides the library jaxattn: rename it, or start Python in another "
        "folder."
    )


def test_a_users_own_train_py_may_use_the_library(tmp_path):
    """Attention needs none of the packages that it hides."""
    program = "import jaxattn\nprint(jaxattn.mechanisms.get('softmax').name)\n"
    (tmp_path / "train.py").write_text(program, "utf-8")
    assert python(tmp_path, "train.py")[:2] == (0, "softmax")


def test_folders_without_code_hide_nothing(tmp_path):
    """Neither data of the user's in train/ nor a clone that is called jaxattn."""
    (tmp_path / "train").mkdir()
    (tmp_path / "jaxattn").symlink_to(ROOT)
    (tmp_path / "script.py").write_text("import jaxattn, train.config_flags\nprint(jaxattn.attend.__name__)\n", "utf-8")
    assert python(tmp_path, "script.py")[:2] == (0, "attend")


def test_an_editable_install_is_a_path_and_every_package_is_typed():
    """What the test above takes for granted; the one below installs it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}
    assert "py.typed" in settings["package-data"]["*"]
    assert all((ROOT / name / "py.typed").is_file() for name in PACKAGES)


@pytest.mark.slow
def test_installs(tmp_path):
    """pip's editable install from a folder that holds the clone as jaxattn, and what a wheel holds."""
    clone = tmp_path / "jaxattn"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    inside = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("*/site-packages")
    (site / "others.pth").write_text("\n".join(x for x in sys.path if x.endswith("site-packages")), "utf-8")
    pip = [inside, "-m", "pip", "-q", "install", "--no-deps"]
    subprocess.run([*pip, "-e", clone], check=True)
    program = "import jaxattn, train, evals, convert, pallas_kernels; print(jaxattn.attend.__name__, train.__file__)"
    for folder in (tmp_path, Path("/")):
        environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
        done = subprocess.run([inside, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == f"attend {clone}/train/__init__.py", done.stderr

    subprocess.run([inside, "-m", "pip", "-q", "wheel", "--no-deps", "-w", tmp_path, clone], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in files if name.split("/")[0] in PACKAGES}
    assert code <= held, "files that an installed library would lack"
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == set(PACKAGES)
