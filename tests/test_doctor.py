"""Every line of the doctor says what was found and, where that will not do, what to do; a secret is never read out."""

import json
import socket

import pytest
import torch

from tokenflex import cli, doctor
from tokenflex.doctor import FAIL, OK, WARN, Finding, as_json, examine, worst


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_this_machine_is_fit_and_whatever_is_not_has_an_advice(tmp_path):
    findings = examine([tmp_path], is_thorough=False)
    assert worst(findings) in (OK, WARN), [finding for finding in findings if finding.status == FAIL]
    for finding in findings:
        assert bool(finding.advice) == (finding.status != OK), finding
    assert {
        "python",
        "torch",
        "deepspeed",
        "gpu",
        "kernels",
        "compiler",
        "cpu",
        "shared memory",
        "file limit",
        "hub",
    } <= by_name(findings).keys()
    assert json.loads(json.dumps(as_json(findings)))["findings"][0]["name"] == "python"


def test_the_cheap_form_writes_nothing_and_the_thorough_one_leaves_nothing(tmp_path, monkeypatch):
    before = tmp_path.stat().st_mtime_ns
    disk = by_name(examine([tmp_path / "not" / "there"], is_thorough=False))[f"disk {tmp_path / 'not' / 'there'}"]
    assert f"free in {tmp_path}" in disk.found and "MB/s" not in disk.found
    assert tmp_path.stat().st_mtime_ns == before
    monkeypatch.setattr(doctor, "BLOCK", 2**20)
    monkeypatch.setattr(doctor, "SLOW_DISK", 0)
    assert "MB/s" in by_name(examine([tmp_path]))[f"disk {tmp_path}"].found
    assert not list(tmp_path.iterdir())


def test_secrets_stay_secret(monkeypatch, capsys):
    secrets = {"HF_TOKEN": "hf_donttell", "WANDB_API_KEY": "0123secret", "HF_HUB_OFFLINE": "1"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor", "--quick"]) == 0 and cli.main(["doctor", "--quick", "--json"]) == 0
    text = capsys.readouterr().out
    assert "a token in the environment, offline" in text and "logs online" in text
    assert "donttell" not in text and "0123secret" not in text


@pytest.mark.parametrize("asked, status, part", [
    ("torch>=99", WARN, "outside of >=99"),
    ("no-such-package>=1", FAIL, "pip install 'no-such-package>=1'"),
    ("torch>=2; sys_platform == 'nowhere'", None, ""),
])  # fmt: skip
def test_versions_outside_of_the_range_are_named(monkeypatch, asked, status, part):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [asked])
    found = list(doctor._packages())
    assert [item.status for item in found] == ([status] if status else [])
    assert all(part in item.advice for item in found)


def test_what_is_too_little_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "MIN_SHARED", 2**60)
    monkeypatch.setattr(doctor, "MIN_FILES", 2**40)
    monkeypatch.setattr(doctor, "MIN_FREE", 2**60)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = by_name(examine([tmp_path], is_thorough=False))
    for name, part in (
        ("shared memory", "--shm-size"),
        ("file limit", "ulimit -n"),
        (f"disk {tmp_path}", "make room"),
        ("compiler", "apt install g++"),
    ):
        assert found[name].status == WARN and part in found[name].advice, found[name]
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e15)
    monkeypatch.setattr(doctor, "BLOCK", 2**20)
    assert "a faster disk" in by_name(examine([tmp_path]))[f"disk {tmp_path}"].advice
    monkeypatch.setattr(doctor.os, "access", lambda *anything: False)
    findings = examine([tmp_path], is_thorough=False)
    assert worst(findings) == FAIL and "cannot be written to" in by_name(findings)[f"disk {tmp_path}"].found


def test_a_taken_port_is_found():
    with socket.create_server(("", 0)) as server:
        (finding,) = doctor._port(server.getsockname()[1])
    assert finding.status == WARN and "taken" in finding.found and "MASTER_PORT" in finding.advice
    assert list(doctor._port(None)) == []


def test_an_old_driver_is_found(tmp_path):
    path = tmp_path / "version"
    for version, status in (("470.182.03", WARN), ("580.65.06", OK)):
        path.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Thu\nGCC version: gcc 12.2.0\n")
        (finding,) = doctor._driver(path)
        assert (finding.status, finding.found) == (status, version)


def test_wrong_kernels_are_found(monkeypatch):
    import tokenflex_kernels as kernels

    assert doctor.kernel_error(torch.device("cpu")) < 0.02
    real = kernels.pooled_swiglu
    monkeypatch.setattr(kernels, "pooled_swiglu", lambda *arguments: real(*arguments) * 1.1)
    assert doctor.kernel_error(torch.device("cpu")) > 0.05
    monkeypatch.setattr(kernels, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "kernel_error", lambda device: 0.5)
    (finding,) = doctor._kernels(is_thorough=True)
    assert finding.status == FAIL and "projector_backend=reference" in finding.advice


def test_the_status_tells_a_machine_that_is_not_fit(monkeypatch):
    monkeypatch.setattr(doctor, "_python", lambda: iter([Finding("python", FAIL, "2.7", "install another")]))
    assert cli.main(["doctor", "--quick"]) == 1
