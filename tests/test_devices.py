"""Device profiles: contract suite over all files, error texts, host detection on fake /proc trees."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgetrain import devices, hostinfo, schema
from edgetrain.devices import detect_host, list_profiles, load_profile
from edgetrain.errors import ProfileError
from edgetrain.hostinfo import host_facts

ROOT = Path(__file__).parent.parent
FOLDER = devices._profile_folder()
REQUIRED = ("raspberrypi3", "raspberrypi4", "raspberrypi5", "raspberrypizero2w", "jetsonnano-cpu", "rock5b")
GENERIC = ("generic-aarch64", "generic-x86_64")
BOARDS = tuple(name for name in list_profiles() if not load_profile(name).generic)
UNITS = ("_mhz", "_kib", "_mib", "_gflops", "_gb_per_s", "_w", "_lanes", "_per_cycle")
COUNTS = {"cores", "little_cores", "l2_shared_by_cores", "threads", "batch_size", "epochs"}
RATIOS = {"lr", "momentum", "weight_decay", "warmup_fraction", "label_smoothing", "clip_norm"}


@pytest.fixture(params=list_profiles())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def table_of(name: str) -> dict:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


# Contract of every profile


def test_the_required_profiles_exist():
    assert set(REQUIRED) <= set(BOARDS)
    assert set(list_profiles()) - set(BOARDS) == set(GENERIC)


def test_file_and_profile_have_the_same_name(name):
    assert load_profile(name).name == name


def test_every_number_has_a_unit_in_its_key(name):
    numbers = [key for key, value in devices._leaves(table_of(name)) if type(value) in (int, float)]
    assert len(numbers) > 15
    for key in numbers:
        last = key.split(".")[-1]
        assert last.endswith(UNITS) or last in COUNTS | RATIOS, key


def test_every_number_has_a_source_that_says_something(name):
    sources = load_profile(name).sources
    for key, value in devices._leaves(table_of(name)):
        if type(value) in (int, float):
            source = sources.get(key) or sources.get(key.rsplit(".", 1)[0], "")
            assert len(source) > 8, key


def test_measured_values_name_their_measurement(name):
    profile = load_profile(name)
    for key in ("float32_measured_gflops", "memory_copy_gb_per_s"):
        if getattr(profile, key) is not None:
            assert profile.sources[key].startswith("measured:")


def test_peak_follows_from_cores_clock_and_lanes(name):
    p = load_profile(name)
    assert p.clock_mhz and p.simd_fma_per_cycle and p.float32_peak_gflops
    peak = p.cores * p.clock_mhz / 1000 * p.simd_float32_lanes * 2 * p.simd_fma_per_cycle
    assert p.float32_peak_gflops == pytest.approx(peak, rel=1e-3)
    assert p.sources["float32_peak_gflops"].startswith("derived:")


def test_defaults_fit_the_device(name):
    p = load_profile(name)
    assert p.threads == p.cores
    assert p.batch_size % p.simd_float32_lanes == 0
    assert 64 <= p.memory_budget_mib <= p.ram_mib // 2
    assert p.recipe.lr * 64 / p.batch_size <= 0.1 and not p.recipe.decay_bias_and_norm


def test_streams_are_learned_with_edge_on_boards_and_densely_elsewhere(name):
    assert load_profile(name).recipe.stream_recipe == ("edge" if name in BOARDS else "dense")
    assert "of streams: recipe" in load_profile(name).summary()


def test_profiles_name_recipes_that_there_are():
    from typing import get_type_hints

    from edgetrain.cli.config import RECIPES

    hint = get_type_hints(devices.Recipe, include_extras=True)["stream_recipe"]
    assert set(hint.__metadata__[0].choices) == set(RECIPES)


def test_dict_is_json_and_complete(name):
    profile = load_profile(name)
    back = json.loads(json.dumps(profile.to_dict()))
    assert back == profile.to_dict()
    assert back["defaults"]["recipe"]["lr"] == profile.recipe.lr


def test_summary_shows_units_and_no_none(name):
    text = load_profile(name).summary()
    assert text.startswith(f"{name}: ") and "None" not in text
    assert all(unit in text for unit in ("MHz", "KiB", "MiB", "GFLOPS", "GB/s", "lanes", "epochs"))


def test_profile_is_frozen(name):
    with pytest.raises(AttributeError):
        load_profile(name).cores = 1  # type: ignore[misc]


def test_boards_are_recognised_by_text_no_other_board_claims():
    claims = [match for name in BOARDS for match in load_profile(name).device_tree_match]
    assert len(claims) == len(set(claims)) and all(load_profile(n).device_tree_match for n in BOARDS)
    assert not any(a != b and a in b for a in claims for b in claims)


@pytest.mark.parametrize("path", sorted((ROOT / "edgetrain").rglob("*.py")), ids=lambda p: p.name)
def test_no_board_is_named_in_code(path):
    text = path.read_text(encoding="utf-8").lower()
    assert [board for board in BOARDS if board in text] == []


# Errors


GOOD = (FOLDER / "raspberrypi4.toml").read_text(encoding="utf-8")
BAD = {
    "unknown key": ('cpu = "', 'cpus = "', "unknown key 'cpus'; did you mean 'cpu'?"),
    "unknown nested key": (
        "momentum = 0.9",
        "momentun = 0.9",
        "'defaults.recipe.momentun'; did you mean 'defaults.recipe.momentum'?",
    ),
    "missing": ("clock_mhz = 1500\n", "", "key 'clock_mhz' is missing"),
    "missing nested": ("threads = 4\n", "", "key 'defaults.threads' is missing"),
    "text for number": (
        "ram_mib = 1024",
        'ram_mib = "1 GB"',
        "key 'ram_mib' is '1 GB', expected a whole number from 1",
    ),
    "true for number": ("cores = 4", "cores = true", "key 'cores' is True, expected a whole number"),
    "fraction for count": (
        "cores = 4",
        "cores = 4.5",
        "key 'cores' is 4.5, expected a whole number from 1 to 4096",
    ),
    "number for text": ('simd = "neon"', "simd = 4", "key 'simd' is 4, expected a text"),
    "number for truth": (
        "nesterov = true",
        "nesterov = 1",
        "'defaults.recipe.nesterov' is 1, expected true or false",
    ),
    "out of range": (
        "lr = 0.05",
        "lr = 50.0",
        "'defaults.recipe.lr' is 50.0, expected a number from 1e-08 to 10",
    ),
    "not a number": ("lr = 0.05", "lr = nan", "'defaults.recipe.lr' is nan, expected a number"),
    "not a choice": (
        '"cosine"',
        '"cosin"',
        "'defaults.recipe.schedule' is 'cosin', expected one of 'constant', 'cosine'",
    ),
    "lanes": ("lanes = 4", "lanes = 5", "key 'simd_float32_lanes' is 5, expected one of 1, 4, 8, 16"),
    "list": ('device_tree_match = ["', 'device_tree_match = [3, "', "expected a list of texts"),
    "no source": ('l2_kib = "Rasp', 'l3_kib = "Rasp', "[sources] names 'l3_kib', which the file lacks"),
    "empty source": (
        'l2_kib = "Raspberry Pi documentation, processors, BCM2711"', 'l2_kib = " "',
        "key 'sources.l2_kib' is ' ', expected a text that says something",
    ),
    "source of a wrong kind": (
        'l2_kib = "Raspberry Pi documentation, processors, BCM2711"', "l2_kib = 7",
        "key 'sources.l2_kib' is 7, expected a text that says something",
    ),
    "number without source": (
        "power_load_w = 7.2",
        "power_load_w = 7.2\nl3_kib = 64",
        "key 'l3_kib' is 64 without a source; add 'l3_kib' to [sources]",
    ),
    "recipe without source": (
        '"defaults.recipe" = ',
        '"defaults.recipe.lr" = ',
        "'defaults.recipe.momentum' is 0.9 without a source",
    ),
    "wrong peak": (
        "float32_peak_gflops = 48.0",
        "float32_peak_gflops = 96.0",
        "is 96.0, expected cores x clock x lanes",
    ),
    "too many threads": (
        "threads = 4",
        "threads = 5",
        "'defaults.threads' is 5, expected at most cores + little_cores = 4",
    ),
    "budget over memory": (
        "budget_mib = 512",
        "budget_mib = 2048",
        "is 2048, expected at most ram_mib = 1024",
    ),
    "not TOML": ("cores = 4", "cores 4", "cannot be read as a TOML file"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_names_file_key_value_and_expectation(case, tmp_path):
    old, new, message = BAD[case]
    assert GOOD.count(old) >= 1
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_value_where_a_table_belongs():
    table = table_of("rock5b") | {"defaults": 3}
    with pytest.raises(ProfileError, match=r"^x\.toml: key 'defaults' is 3, expected a table$"):
        schema.build(devices.DeviceProfile, table, Path("x.toml"))


def test_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(
        ProfileError, match="unknown device profile 'raspberypi4'; did you mean 'raspberrypi4'"
    ) as caught:
        load_profile("raspberypi4")
    assert all(name in str(caught.value) for name in (*list_profiles(), "host"))


def test_missing_file_is_a_profile_error():
    with pytest.raises(ProfileError, match=r"nowhere\.toml: cannot be read"):
        load_profile("nowhere.toml")


def test_a_path_loads_as_text_and_as_path():
    path = FOLDER / "rock5b.toml"
    assert load_profile(path) == load_profile(str(path)) == load_profile("rock5b")


def test_profiles_are_found_inside_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "edgetrain"
    (package / "device_profiles").mkdir(parents=True)
    (package / "device_profiles" / "mine.toml").write_text("")
    monkeypatch.setattr(devices, "__file__", str(package / "devices.py"))
    assert list_profiles() == ("mine",)


def test_no_profiles_at_all_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "__file__", str(tmp_path / "edgetrain" / "devices.py"))
    with pytest.raises(ProfileError, match="reinstall edgetrain"):
        list_profiles()


# Host detection


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def cpu_files(cpu: int, khz: int, l2: str, shared: str) -> dict[str, str]:
    base = f"sys/devices/system/cpu/cpu{cpu}"
    caches = {
        0: ("Data", "1", "32K", str(cpu)),
        1: ("Instruction", "1", "48K", str(cpu)),
        2: ("Unified", "2", l2, shared),
    }
    files = {f"{base}/cpufreq/cpuinfo_max_freq": f"{khz}\n", f"{base}/cpufreq/scaling_cur_freq": "600000\n",
             f"{base}/cpufreq/scaling_governor": "ondemand\n"}  # fmt: skip
    for index, values in caches.items():
        keys = ("type", "level", "size", "shared_cpu_list")
        files |= {f"{base}/cache/index{index}/{k}": v + "\n" for k, v in zip(keys, values, strict=True)}
    return files


def arm_tree(root: Path, model: str, khz: list[int], *, total_kib: int = 3_900_000) -> Path:
    files = {
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n",
        "proc/meminfo": f"MemTotal:  {total_kib} kB\nMemAvailable: 1048576 kB\n",
        "proc/device-tree/model": model + "\0",
        "proc/self/cgroup": "0::/user.slice/app.scope\n",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    }
    for cpu, clock in enumerate(khz):
        files |= cpu_files(cpu, clock, "1024K", f"0-{len(khz) - 1}")
    return write_tree(root, files)


def test_a_board_keeps_its_published_numbers(tmp_path):
    arm_tree(tmp_path, "Raspberry Pi 4 Model B Rev 1.1", [1_500_000] * 4)
    host, board = detect_host(tmp_path, cpus=range(4), machine="aarch64"), load_profile("raspberrypi4")
    assert host.name == "host" and host.description == "Raspberry Pi 4 Model B Rev 1.1"
    assert host.power_load_w == board.power_load_w and host.recipe == board.recipe and host.cpu == board.cpu
    assert host.float32_measured_gflops == board.float32_measured_gflops
    assert host.sources["power_load_w"].startswith("profile raspberrypi4: ")
    assert host.ram_mib == 3808 and host.sources["ram_mib"] == "detected: proc/meminfo"
    assert (host.l1d_kib, host.l2_kib, host.l2_shared_by_cores) == (32, 1024, 4)
    assert host.memory_budget_mib == 1904 and host.threads == 4


def test_a_board_at_another_clock_gets_a_new_peak_and_no_measured_rate(tmp_path):
    arm_tree(tmp_path, "Raspberry Pi 4 Model B Rev 1.4", [1_800_000] * 4)
    host = detect_host(tmp_path, cpus=range(4), machine="aarch64")
    assert host.clock_mhz == 1800 and host.float32_peak_gflops == pytest.approx(57.6)
    assert host.float32_measured_gflops is None and "float32_measured_gflops" not in host.sources


def test_slow_cores_are_counted_apart(tmp_path):
    arm_tree(tmp_path, "Radxa ROCK 5B", [1_800_000] * 4 + [2_256_000] * 2 + [2_352_000] * 2)
    host = detect_host(tmp_path, cpus=range(8), machine="aarch64")
    assert (host.cores, host.little_cores, host.threads, host.clock_mhz) == (4, 4, 4, 2352)


def test_unknown_board_takes_the_generic_recipe_but_not_its_guesses(tmp_path):
    arm_tree(tmp_path, "Some New Board", [2_000_000] * 2)
    host = detect_host(tmp_path, cpus={0}, machine="arm64")
    assert host.architecture == "aarch64" and host.simd == "neon" and host.simd_float32_lanes == 4
    assert host.recipe == load_profile("generic-aarch64").recipe
    assert host.cores == 1 and host.clock_mhz == 2000
    assert host.float32_peak_gflops is None and host.memory_bandwidth_peak_gb_per_s is None
    assert "None" not in host.summary()


@pytest.mark.parametrize(
    ("flags", "lanes"), [("sse2 avx avx2 fma avx512f", 16), ("sse2 avx avx2 fma", 8), ("sse2", 4)]
)
def test_lanes_follow_the_x86_flags(tmp_path, flags, lanes):
    cpuinfo = f"processor : 0\nmodel name\t: Chip 3000\ncpu MHz\t\t: 2596.146\nflags\t\t: fpu {flags}\n"
    write_tree(tmp_path, {"proc/cpuinfo": cpuinfo, "proc/meminfo": "MemTotal: 2097152 kB\n"})
    host = detect_host(tmp_path, cpus={0, 1}, machine="x86_64")
    assert host.simd_float32_lanes == lanes and host.cpu == "Chip 3000" and host.ram_mib == 2048
    assert host.clock_mhz == 2596.146 and host.sources["clock_mhz"] == "detected: proc/cpuinfo, cpu MHz now"
    assert host.l2_kib is None and host.batch_size == load_profile("generic-x86_64").batch_size


@pytest.mark.parametrize(
    ("cgroup", "path"),
    [
        ("0::/user.slice/app.scope\n", "sys/fs/cgroup/user.slice/memory.max"),
        ("0::/\n", "sys/fs/cgroup/memory.max"),
        ("9:cpuset:/\n4:memory:/docker/ab\n", "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes"),
    ],
    ids=["v2-parent", "v2-root", "v1"],
)
def test_the_memory_limit_of_the_control_group_counts(tmp_path, cgroup, path):
    arm_tree(tmp_path, "Some New Board", [2_000_000])
    write_tree(tmp_path, {"proc/self/cgroup": cgroup, path: f"{512 << 20}\n"})
    host = detect_host(tmp_path, cpus={0}, machine="aarch64")
    assert host.ram_mib == 512 and host.sources["ram_mib"] == f"detected: {path}"
    assert host.memory_budget_mib == 256


def test_no_limit_is_no_limit(tmp_path):
    arm_tree(tmp_path, "Some New Board", [2_000_000])
    write_tree(tmp_path, {"sys/fs/cgroup/user.slice/app.scope/memory.max": "max\n"})
    assert detect_host(tmp_path, cpus={0}, machine="aarch64").ram_mib == 3808


def test_an_empty_tree_and_unknown_architecture_still_give_a_profile(tmp_path):
    host = detect_host(tmp_path, cpus={0}, machine="riscv64")
    assert (host.architecture, host.simd, host.simd_float32_lanes) == ("riscv64", "scalar", 1)
    assert host.cpu == "unknown" and host.ram_mib > 0


def test_every_number_of_a_detected_host_has_a_source(tmp_path):
    arm_tree(tmp_path, "Raspberry Pi 5 Model B Rev 1.0", [2_400_000] * 4)
    for host in (detect_host(), detect_host(tmp_path, cpus=range(4), machine="aarch64")):
        for key, value in devices._leaves(host.to_dict()):
            if type(value) in (int, float) and not key.startswith("defaults.recipe."):
                assert key in host.sources, key
        assert all(math.isfinite(v) for _, v in devices._leaves(host.to_dict()) if isinstance(v, float))


def test_host_is_a_name():
    assert load_profile("host") == detect_host()


def test_facts_of_a_board(tmp_path, monkeypatch):
    monkeypatch.setattr(hostinfo, "_affinity", lambda: range(4))
    arm_tree(tmp_path, "Raspberry Pi 5 Model B Rev 1.0", [2_400_000] * 4)
    facts = host_facts(tmp_path)
    assert facts["temperature_c"] == 48.312 and facts["governor"] == "ondemand" and facts["clock_mhz"] == 600
    assert facts["throttled"] == ["under-voltage", "throttled"]
    assert facts["board"].endswith("Rev 1.0") and facts["ram_available_mib"] == 1024


def test_facts_of_this_machine_are_json_and_name_versions():
    facts = json.loads(json.dumps(host_facts()))
    assert facts["packages"]["numpy"][0].isdigit() and facts["cores"] >= 1
    assert {"architecture", "kernel", "python", "ram_mib", "temperature_c", "throttled"} <= set(facts)


def test_import_and_facts_load_no_heavy_package():
    code = (
        "import sys, edgetrain.devices as d, edgetrain.hostinfo as h; d.load_profile('host'); h.host_facts();"
        "print([m for m in ('numpy', 'numba', 'onnx', 'msgspec') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_machine_code_depends_on(tmp_path):
    chip = "processor\t: {}\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"
    write_tree(tmp_path, {"proc/cpuinfo": chip.format(0, "0xd05") + chip.format(1, "0xd0b")})
    found = hostinfo.processor(tmp_path)
    assert {"CPU part: 0xd05", "CPU part: 0xd0b", "CPU implementer: 0x41", "Features: fp asimd"} < set(found)
    assert len(found) == 5  # and the architecture; nothing that changes from start to start, such as the clock
