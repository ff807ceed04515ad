"""The example files for clusters are what their tools read; the house test parses the commands in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import liam_scale
from loaders.synthetic import simulate_mudata

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


def shell_of(number: int) -> str:
    """The script of the Nextflow module (0) or its stub (1), with what Nextflow fills in."""
    text = (EXAMPLES / "nextflow/liamscale/integrate/main.nf").read_text()
    script = re.findall(r'"""\n(.*?)"""', text, flags=re.S)[number]
    given = {"h5mu": "in.h5mu", "batch_key": "sample", "task.cpus": "1", "task.process": "P", "prefix": "a_liam"}
    given["args"] = "--max-epochs 1 --model.n-hidden 8"
    script = re.sub(r"\$\{([\w.]+)\}", lambda found: given[found.group(1)], script).replace("\\$", "$")
    script = script.replace("\\\\\n", "\\\n")
    return re.sub(r"^    ", "", script, flags=re.M).replace("END_VERSIONS", "END").replace("<<-END", "<<END")


def as_installed(folder: Path) -> dict[str, str]:
    """An environment in which `liam-scale` and `python` are those of these very files."""
    (folder / "bin").mkdir()
    for name, command in (("liam-scale", f"{sys.executable} -m liam_scale.cli"), ("python", sys.executable)):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **paths}


def test_every_file_is_in_the_format_of_its_tool() -> None:
    for path in EXAMPLES.rglob("*.y*ml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    program = (EXAMPLES / "ray_train.py").read_text()
    compile(program, "ray_train.py", "exec")
    assert program.count("\n") <= 35
    job = read("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    container, *others = worker["template"]["spec"]["containers"]
    assert others == []
    assert container["name"] == "pytorch", "the operator looks for that name"
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    task = read("skypilot.yaml")
    assert set(task) <= {"name", "resources", "num_nodes", "file_mounts", "setup", "run", "workdir", "envs"}
    assert task["resources"]["use_spot"]


def test_the_recipe_asks_for_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.sub(r"^torch\b", "pytorch", name).replace(">=", " >=") for name in project["dependencies"]}
    recipe = read("conda/recipe.yaml")
    assert set(recipe["requirements"]["run"]) == wanted | {f"python {project['requires-python']}"}
    scripts = [f"{name} = {target}" for name, target in project["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {*recipe["requirements"]["host"]} == {
        f"python {project['requires-python']}",
        "pip",
        *(name.replace(">=", " >=") for name in build),
    }


def test_images_and_the_pages_install_extras_that_there_are() -> None:
    text = (EXAMPLES / "Dockerfile").read_text()
    lines = re.sub("^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    instructions = [line.split()[0] for line in lines]
    assert set(instructions) <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "CMD", "USER"}
    assert instructions.index("USER") > max(n for n, name in enumerate(instructions) if name == "RUN"), "root builds"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {name for found in re.findall(r"EXTRAS=(\S+)", text) for name in found.split(",")}
    asked |= {*yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())["python"]["install"][0]["extra_requirements"]}
    assert asked <= set(extras)
    for path in ("skypilot.yaml", "nextflow/liamscale/integrate/environment.yml"):
        (found,) = re.findall(r"liam-scale\[([\w,]+)\]", (EXAMPLES / path).read_text())
        assert {*found.split(",")} <= set(extras)


def test_the_module_of_nextflow_is_whole() -> None:
    """Brackets close, what `main.nf` takes and gives is what `meta.yml` says, and the stub makes every output."""
    text = (EXAMPLES / "nextflow/liamscale/integrate/main.nf").read_text()
    for opens, closes in ("{}", "()", "[]"):
        assert text.count(opens) == text.count(closes)
    about = read("nextflow/liamscale/integrate/meta.yml")
    assert text.startswith("process LIAMSCALE_INTEGRATE {")
    assert about["name"] == "liamscale_integrate"
    assert re.findall(r"emit: (\w+)", text) == list(about["output"])
    script, stub = re.findall(r'"""\n(.*?)"""', text, flags=re.S)
    for made in ("${prefix}.h5mu", "${prefix}_report", "versions.yml"):
        assert made in script
        assert made in stub


def test_the_stub_of_the_nextflow_module_makes_every_output(tmp_path: Path) -> None:
    """Its shell script, as `nextflow run -stub` fills it in, makes what the module promises."""
    script = shell_of(1)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=as_installed(tmp_path))
    assert done.returncode == 0
    assert (tmp_path / "a_liam.h5mu").exists()
    assert (tmp_path / "a_liam_report").is_dir()
    assert yaml.safe_load((tmp_path / "versions.yml").read_text()) == {"P": {"liam-scale": liam_scale.__version__}}


def test_the_module_of_nextflow_is_groovy(tmp_path: Path) -> None:
    """Nextflow's language is Groovy, whose own compiler reads the module."""
    if shutil.which("groovy") is None:
        pytest.skip("needs groovy: apt-get install groovy")
    module, reader = EXAMPLES / "nextflow/liamscale/integrate/main.nf", tmp_path / "read.groovy"
    reader.write_text("new GroovyShell().parse(new File(args[0]))\n")
    done = subprocess.run(["groovy", str(reader), str(module)], capture_output=True, text=True)
    if "JAVA_HOME" in done.stdout + done.stderr:
        pytest.skip("groovy finds no Java")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_script_of_the_nextflow_module_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shell script, with what Nextflow fills in, on 120 cells."""
    mudata = pytest.importorskip("mudata")
    pytest.importorskip("scanpy", reason="evaluate is an extra: pip install liam-scale[evaluate]")
    tiny = {"num_genes": 40, "num_peaks": 60, "genes_per_cell": 10, "peaks_per_cell": 20, "num_samples": 2}
    simulate_mudata(num_cells=120, **tiny).write(tmp_path / "in.h5mu")
    script = shell_of(0).replace("--out a_liam_report", "--out a_liam_report --scib none --no-plots")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=as_installed(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert mudata.read_h5mu(tmp_path / "a_liam.h5mu").obsm["X_liam"].shape == (120, 20)
    assert (tmp_path / "a_liam_report" / "report.html").exists()
    assert yaml.safe_load((tmp_path / "versions.yml").read_text()) == {"P": {"liam-scale": liam_scale.__version__}}


def test_the_workflow_of_snakemake_plans_its_four_steps(tmp_path: Path) -> None:
    if shutil.which("snakemake") is None:
        pytest.skip("needs snakemake: pip install snakemake")
    (tmp_path / "a.h5mu").touch()
    command = ["snakemake", "-n", "--snakefile", str(EXAMPLES / "Snakefile"), "--cores", "1", "--config"]
    done = subprocess.run([*command, "sources=a.h5mu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = re.findall(r"^rule (\w+):$", done.stdout + done.stderr, flags=re.M)
    assert planned[-5:] == ["ingest", "train", "embed", "evaluate", "all"]
