"""The launch scripts: from any directory, with the JAX of the machine."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = '#!/usr/bin/env bash\nprintf \'%s\\n\' "$PWD" "${JAX_PLATFORMS:-}" "$@"\n'


@pytest.fixture
def repository(tmp_path):
  """A copy of the scripts; its Python prints the directory and the arguments."""
  root = tmp_path / "a repository"
  shutil.copytree(ROOT / "launch", root / "launch")
  shutil.copy(ROOT / "setup.py", root)
  executable(root / ".venv" / "bin" / "python", PYTHON)
  size = subprocess.run(["cksum", root / "setup.py"], capture_output=True, text=True, check=True)
  for extras in ("base", "cuda"):
    (root / ".venv" / f".installed-{extras}").write_text(size.stdout.split()[0])
  return root


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def launch(repository, folder, *arguments, gpus=""):
  """The lines that Python prints: directory, JAX_PLATFORMS, arguments."""
  folder.mkdir(exist_ok=True)
  executable(folder / "bin" / "nvidia-smi", f"#!/usr/bin/env bash\nprintf '{gpus}'\n")
  environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  done = subprocess.run(
    ["bash", repository / "launch" / "local.sh", *arguments],
    cwd=folder,
    env=environment | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  return done.stdout.splitlines()


@pytest.mark.skipif(os.path.exists("/dev/accel0"), reason="a machine without a TPU")
def test_the_default_run_from_another_directory(repository, tmp_path):
  lines = launch(repository, tmp_path / "elsewhere", "--config.seed=1")
  assert lines == [
    str(tmp_path / "elsewhere"),
    "cpu",
    "-m",
    "spatial_jax.train",
    f"--config={repository}/configs/tiny.py",
    "--config.seed=1",
    "--workdir=runs/tiny",
  ]


def test_a_gpu_gets_its_jax_and_given_flags_are_kept(repository, tmp_path):
  flags = ["--config=my.py", "--workdir=w"]
  lines = launch(repository, tmp_path / "elsewhere", *flags, gpus="GPU 0: H100\\n")
  assert lines[1:] == ["", "-m", "spatial_jax.train", *flags]


def test_help_is_printed_and_nothing_runs(repository, tmp_path):
  lines = launch(repository, tmp_path / "elsewhere", "--help")
  assert "resumes" in " ".join(lines)
  assert any("launch/local.sh" in line for line in lines)
  assert "spatial_jax.train" not in " ".join(lines)


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({}, "cpu"),
    ({"dev/accel0": ""}, "tpu"),
    ({"dev/vfio/0": "", "sys/bus/pci/devices/0000:00:04.0/vendor": "0x1ae0\n"}, "tpu"),
    ({"dev/vfio/0": "", "sys/bus/pci/devices/0000:00:04.0/vendor": "0x8086\n"}, "cpu"),
  ],
)
def test_a_tpu_is_found_by_its_device_files(tmp_path, files, expected):
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  executable(tmp_path / "bin" / "nvidia-smi", "#!/usr/bin/env bash\nexit 1\n")
  done = subprocess.run(
    ["bash", "-c", f". '{ROOT}/launch/setup.sh' && machine '{tmp_path}'"],
    env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == expected
