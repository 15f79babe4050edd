"""What this machine has: cores, memory, the GPUs that ranks may use."""

import os

import pytest
from config_samples import runnable

from launcher.facts import find_gpus, gather_facts, host_memory, multiplies_bfloat16, usable_cores
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
