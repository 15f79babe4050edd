"""What this machine has: cores, memory, the GPUs that ranks may use."""

import importlib.metadata
import os
from dataclasses import replace

import pytest
from config_samples import facts_of, runnable

from launcher.facts import gather_facts, host_memory, multiplies_bfloat16, usable_cores
from launcher.gpus import Gpu, TorchBuild, amd_gpus, build_of, find_gpus, torch_build
from launcher.plan import make_plan
from launcher.preflight import preflight_problems
from trainer.config.loading import load_config
from trainer.failures import UserError


@pytest.mark.parametrize(
    ("cpuinfo", "quick"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx avx2 fma\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512bw\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("cpu\t: POWER9\n", True),
    ],
)
def test_which_cpus_multiply_bfloat16(cpuinfo, quick):
    assert multiplies_bfloat16(cpuinfo) == quick


def test_facts_of_this_machine(tmp_path):
    facts = gather_facts(load_config(runnable(tmp_path), ["cluster.environment.DS_ACCELERATOR=cpu"]))
    assert facts.gpus == ()
    assert 1 <= facts.cores == usable_cores() <= os.cpu_count()
    total, available = host_memory()
    assert 0 < available <= total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert facts.disk_free > 0


NVIDIA_SMI = """#!/bin/sh
case "$1" in
--query-gpu=*)
    echo '0, GPU-aaaa1, NVIDIA A, 1024, [N/A]'
    echo '1, GPU-bbbb2, NVIDIA B, 2048, Disabled' ;;
esac
"""
# A GPU that is whole, and one that is cut in two: in one listing their UUIDs, in the other their memory
NVIDIA_SMI_MIG = """#!/bin/sh
case "$1" in
--query-gpu=*)
    echo '0, GPU-aaaa1, NVIDIA A100, 40960, Disabled'
    echo '1, GPU-bbbb2, NVIDIA A100, [Insufficient Permissions], Enabled' ;;
-q) cat <<'END'
<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
    <gpu id="00000000:07:00.0"><mig_devices>None</mig_devices><uuid>GPU-aaaa1</uuid></gpu>
    <gpu id="00000000:0F:00.0">
        <mig_devices>
            <mig_device><index>0</index><fb_memory_usage><total>20096 MiB</total></fb_memory_usage></mig_device>
            <mig_device><index>1</index><fb_memory_usage><total>4864 MiB</total></fb_memory_usage></mig_device>
        </mig_devices>
        <uuid>GPU-bbbb2</uuid>
    </gpu>
</nvidia_smi_log>
END
;;
-L)
    echo 'GPU 0: NVIDIA A100 (UUID: GPU-aaaa1)'
    echo 'GPU 1: NVIDIA A100 (UUID: GPU-bbbb2)'
    echo '  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4)'
    echo '  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed)' ;;
esac
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name into the way."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):  # other tests set the latter
        monkeypatch.delenv(name, raising=False)

    def write(text):
        program = folder / "nvidia-smi"
        program.write_text(text)
        program.chmod(0o755)

    return write


def gpus(**environment):
    return [(gpu.name, gpu.memory >> 20) for gpu in find_gpus(environment)]


def test_gpus_come_from_nvidia_smi(nvidia_smi):
    nvidia_smi(NVIDIA_SMI)
    assert gpus() == [("NVIDIA A", 1024), ("NVIDIA B", 2048)]
    assert gpus(CUDA_VISIBLE_DEVICES="1,0") == [("NVIDIA B", 2048), ("NVIDIA A", 1024)]
    assert gpus(CUDA_VISIBLE_DEVICES="GPU-bbbb") == [("NVIDIA B", 2048)]
    assert gpus(CUDA_VISIBLE_DEVICES="1, 0") == [("NVIDIA B", 2048), ("NVIDIA A", 1024)]
    assert gpus(CUDA_VISIBLE_DEVICES="0,7,1") == [("NVIDIA A", 1024)]
    assert gpus(CUDA_VISIBLE_DEVICES="") == gpus(DS_ACCELERATOR="cpu") == []
    nvidia_smi("#!/bin/sh\nexit 9\n")
    assert gpus() == []


def test_of_mig_instances_a_process_sees_one(nvidia_smi):
    nvidia_smi(NVIDIA_SMI_MIG)
    large, small = ("NVIDIA A100 MIG 3g.20gb", 20096), ("NVIDIA A100 MIG 1g.5gb", 4864)
    assert gpus(CUDA_VISIBLE_DEVICES="MIG-cba663e8-9bed") == [small]
    assert gpus(CUDA_VISIBLE_DEVICES="MIG-cba663e8-9bed,MIG-c6d4f1ef-42e4") == [small]
    assert gpus(CUDA_VISIBLE_DEVICES="1") == gpus(CUDA_VISIBLE_DEVICES="GPU-bbbb2") == gpus() == [large]
    assert gpus(CUDA_VISIBLE_DEVICES="0") == [("NVIDIA A100", 40960)]
    nvidia_smi(NVIDIA_SMI_MIG.replace("-L)", "-L) exit 0"))  # nobody has made instances
    assert gpus() == [("NVIDIA A100", 40960)]
    assert gpus(CUDA_VISIBLE_DEVICES="1") == []


@pytest.mark.parametrize("program", [NVIDIA_SMI, NVIDIA_SMI_MIG, "#!/bin/sh\nexit 9\n"])
def test_gpus_that_are_named_and_not_here_are_no_cpu(tmp_path, nvidia_smi, monkeypatch, program):
    nvidia_smi(program)
    path = runnable(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-feee0c61")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES is 'MIG-feee0c61'.*cluster.gpus_per_node=0"):
        gather_facts(load_config(path))
    assert gather_facts(load_config(path, ["cluster.gpus_per_node=0"])).gpus == ()
    assert gather_facts(load_config(path, ['cluster={"backend": "ssh", "hosts": ["a"]}'])).gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert gather_facts(load_config(path)).gpus == ()


def test_amd_gpus_are_those_with_memory_that_a_job_may_use(tmp_path):
    def node(number, simd_count, *banks):
        folder = tmp_path / str(number)
        for index, (kind, size) in enumerate(banks):
            (folder / f"mem_banks/{index}").mkdir(parents=True)
            (folder / f"mem_banks/{index}/properties").write_text(f"heap_type {kind}\nsize_in_bytes {size << 20}\n")
        lines = f"cpu_cores_count 0\nsimd_count {simd_count}\ngfx_target_version 90010\n"
        (folder / "properties").write_text(lines)

    node(0, 0, (0, 512))  # a CPU
    node(10, 440, (1, 64), (2, 32))
    node(9, 440, (1, 64))
    node(2, 8, (0, 128))  # shares the host's memory
    node(3, 440, (1, 64))
    (tmp_path / "3/properties").unlink()
    (tmp_path / "3/properties").mkdir()  # cannot be read, like one of another job

    def memory(**environment):
        return [gpu.memory >> 20 for gpu in amd_gpus(environment, tmp_path)]

    assert memory() == [64, 96]
    assert memory(ROCR_VISIBLE_DEVICES="1,0", HIP_VISIBLE_DEVICES="0") == [64]
    assert memory(ROCR_VISIBLE_DEVICES="") == []
    assert amd_gpus({}, tmp_path / "none") == ()


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", ("2.9.0+cpu", None)),
        ("__version__ = '2.9.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", ("2.9.0", "cuda")),
        ("__version__ = '2.9.0'\ndebug = False\ncuda = None\nhip = '7.0'\n", ("2.9.0", "hip")),
        ("__version__ = made()\ncuda = None\nhip = None\n", None),
        ("who knows\n", None),
    ],
)
def test_what_torch_is_built_for_is_read_from_its_files(text, build):
    assert build_of(text) == (build and TorchBuild(*build))


def test_torch_built_without_cuda_is_refused_where_gpus_are_to_be_used(tmp_path):
    found = torch_build()
    assert found.version == importlib.metadata.version("torch")
    gpu = Gpu("NVIDIA B", 80 << 30)
    for overrides, build, refused in (
        ([], TorchBuild("2.9.0+cpu", None), True),
        ([], TorchBuild("2.9.0", "cuda"), False),
        ([], None, False),
        (["cluster.gpus_per_node=0"], TorchBuild("2.9.0+cpu", None), False),
        (['cluster={"backend": "ssh", "hosts": ["a"], "gpus_per_node": 1}'], TorchBuild("2.9.0+cpu", None), False),
    ):
        config = load_config(runnable(tmp_path), ["cluster.processes_per_node=1", *overrides])
        facts = replace(facts_of(config, (gpu,)), torch=build)
        problems = preflight_problems(config, make_plan(config, facts), facts)
        assert len(problems) == refused
        assert all("torch 2.9.0+cpu is a build without CUDA" in problem for problem in problems)
