"""Artifacts: begun, finished, verified, compared."""

from __future__ import annotations

import json
import os

import pytest

from megatron_erpd.errors import StageError
from megatron_erpd.manifest import (
    MANIFEST,
    REQUEST,
    begin_artifact,
    differences,
    finish_artifact,
    input_digest,
    read_manifest,
    read_request,
    settings_identity,
    verify_inputs,
    verify_manifest,
    write_manifest,
)
from megatron_erpd.settings import PrecomputeSettings


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "artifact"
    begin_artifact(folder, "sample", {"seed": 1}, {"model": "abc"})
    (folder / "sub/deep").mkdir(parents=True)
    (folder / "rollouts.parquet").write_text("rows")
    (folder / "sub/deep/model.bin").write_text("weights")
    (folder / "logs").mkdir()
    (folder / "logs/x.log").write_text("log")
    finish_artifact(folder, {"rows": 3})
    return folder


def test_what_a_manifest_holds(artifact):
    manifest = verify_manifest(artifact)
    assert (manifest.stage, manifest.settings, manifest.inputs) == ("sample", {"seed": 1}, {"model": "abc"})
    assert set(manifest.files) == {"rollouts.parquet", "sub/deep/model.bin"}
    assert manifest.summary["rows"] == 3 and manifest.summary["seconds"] >= 0
    assert not (artifact / REQUEST).exists()
    assert not list(artifact.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "found_by_size"),
    [
        (lambda folder: (folder / "rollouts.parquet").unlink(), True),
        (lambda folder: (folder / "rollouts.parquet").write_text("row"), True),
        (lambda folder: (folder / "rollouts.parquet").write_text("ROWS"), False),
    ],
)
def test_damage_is_found(artifact, change, found_by_size):
    change(artifact)
    with pytest.raises(StageError, match=r"rollouts\.parquet"):
        verify_manifest(artifact)
    if found_by_size:
        with pytest.raises(StageError, match=r"rollouts\.parquet"):
            verify_manifest(artifact, checksums=False)
    else:
        verify_manifest(artifact, checksums=False)


def test_what_is_no_artifact(tmp_path):
    with pytest.raises(StageError, match="no such folder"):
        read_manifest(tmp_path / "nothing")
    with pytest.raises(StageError, match="has not finished"):
        read_manifest(tmp_path)


def rewritten(change, keep_checksum=True):
    def apply(path):
        record = json.loads(path.read_text())
        change(record)
        if not keep_checksum:
            record.pop("checksum")
        path.write_text(json.dumps(record))

    return apply


DAMAGES = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cut off or no JSON"),
    "empty": (lambda path: path.write_bytes(b""), "cut off or no JSON"),
    "zeros": (lambda path: path.write_bytes(bytes(400)), "cut off or no JSON"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe{}"), "cut off or no JSON"),
    "brackets": (lambda path: path.write_text("[" * 100_000), "cut off or no JSON"),
    "a list": (lambda path: path.write_text("[]"), "is no JSON object"),
    "null": (lambda path: path.write_text("null"), "is no JSON object"),
    "another's": (lambda path: path.write_text('{"name": "a web app"}'), "not written by this project"),
    "no schema": (rewritten(lambda r: r.pop("schema")), "says nothing of its schema"),
    "schema": (rewritten(lambda r: r.update(schema=0)), "has schema 0, not 1"),
    "setting": (rewritten(lambda r: r["settings"].update(seed=2)), "changed after it was written"),
    "stage": (rewritten(lambda r: r.update(stage="import")), "changed after it was written"),
    "input": (rewritten(lambda r: r["inputs"].update(model="xyz")), "changed after it was written"),
    "file": (rewritten(lambda r: r["files"].pop("rollouts.parquet")), "changed after it was written"),
    "size": (rewritten(lambda r: r["files"]["rollouts.parquet"].update(size=5)), "changed after it was written"),
    "checksum": (rewritten(lambda r: r.update(checksum=7)), "changed after it was written"),
    **{
        f"no {key}": (rewritten(lambda r, key=key: r.pop(key), keep_checksum=False), f"damaged: {key}: field required")
        for key in ("stage", "settings", "inputs", "files")
    },
    "unknown": (rewritten(lambda r: r.update(sttings={})), "sttings: unknown key"),
    "settings": (rewritten(lambda r: r.update(settings=[1]), keep_checksum=False), "settings: .*dictionary"),
    "digest": (rewritten(lambda r: r["inputs"].update(model=3), keep_checksum=False), "inputs.model: .*string"),
    "no size": (
        rewritten(lambda r: r["files"]["rollouts.parquet"].pop("size"), keep_checksum=False),
        r"files.rollouts.parquet.size: .*required",
    ),
    "sha": (
        rewritten(lambda r: r["files"]["rollouts.parquet"].update(sha256="abc"), keep_checksum=False),
        r"files.rollouts.parquet.sha256: ",
    ),
    "outside": (
        rewritten(lambda r: r["files"].update({"../x": r["files"]["rollouts.parquet"]}), keep_checksum=False),
        "'../x' is outside of the artifact",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_manifest_is_named_with_what_is_wrong_and_what_to_do(artifact, name):
    damage, said = DAMAGES[name]
    damage(artifact / MANIFEST)
    for read in (read_manifest, verify_manifest, input_digest, lambda folder: verify_inputs([folder])):
        with pytest.raises(StageError, match=said) as caught:
            read(artifact)
        assert str(caught.value).startswith(f"{artifact / MANIFEST}: ")
        assert "run the stage again" in str(caught.value) or "give a folder that one of its stages" in str(caught.value)


def test_a_manifest_of_the_version_before_is_accepted(artifact):
    before = read_manifest(artifact)
    rewritten(lambda record: None, keep_checksum=False)(artifact / MANIFEST)
    assert read_manifest(artifact) == before


def test_a_manifest_is_whole_whatever_its_settings_hold(tmp_path):
    settings = {"a": 1e-7, "b": None, "c": [1, {"d": "\u00e9\ud83d\ude00"}], "e": float("inf"), "f": 0.1 + 0.2}
    assert write_manifest(tmp_path, "s", settings, {}).digest == read_manifest(tmp_path).digest


def test_inputs_are_compared_with_their_manifests(artifact, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    everything = [artifact, artifact / "sub", artifact / "rollouts.parquet", plain]
    verify_inputs(everything)
    (artifact / "sub/deep/model.bin").write_text("WEIGHTS")
    for inputs in ([artifact], [artifact / "sub"], [artifact / "sub/deep/model.bin"], everything):
        with pytest.raises(StageError, match=r"sub/deep/model\.bin: differs from what manifest.json recorded"):
            verify_inputs(inputs)
    verify_inputs([artifact / "rollouts.parquet", plain])
    verify_inputs([artifact], lambda path, names: [name for name in names if name.endswith(".parquet")])
    (artifact / "rollouts.parquet").unlink()
    with pytest.raises(StageError, match=r"rollouts\.parquet: named in .* but missing(.|\n)*model\.bin: differs"):
        verify_inputs([artifact])


def test_beginning_again(tmp_path):
    folder = tmp_path / "a"
    assert not begin_artifact(folder, "sample", {"seed": 1}, {"model": "abc"})
    assert begin_artifact(folder, "sample", {"seed": 1}, {"model": "abc"})
    with pytest.raises(StageError, match="begun with other settings or inputs(.|\n)*seed: 1 -> 2"):
        begin_artifact(folder, "sample", {"seed": 2}, {"model": "abc"})
    with pytest.raises(StageError, match="input model changed"):
        begin_artifact(folder, "sample", {"seed": 1}, {"model": "xyz"})
    request = read_request(folder)
    assert request is not None and request.settings == {"seed": 1}


def test_a_finished_artifact_is_not_written_over(artifact):
    with pytest.raises(StageError, match="already holds a finished artifact, the same one"):
        begin_artifact(artifact, "sample", {"seed": 1}, {"model": "abc"})
    with pytest.raises(StageError, match="another one:\n  stage: sample -> import\n  seed: 1 -> None"):
        begin_artifact(artifact, "import", {}, {"model": "abc"})


def test_foreign_files_are_not_written_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StageError, match="holds files that no stage left there"):
        begin_artifact(tmp_path, "sample", {}, {})


def test_finishing_what_was_not_begun(tmp_path):
    with pytest.raises(StageError, match="no stage has begun it"):
        finish_artifact(tmp_path)


@pytest.mark.parametrize("text", ["[]", "", "[" * 100_000])
def test_a_request_that_can_not_be_read(tmp_path, text):
    (tmp_path / REQUEST).write_text(text)
    with pytest.raises(StageError, match="not a request"):
        read_request(tmp_path)


def test_differences_are_named(artifact):
    manifest = read_manifest(artifact)
    assert differences(manifest, "sample", {"seed": 1}, {"model": "abc"}) == []
    assert differences(manifest, "import", {"seed": 2, "top_p": 1}, {"prompts": "x"}) == [
        "stage: sample -> import",
        "seed: 1 -> 2",
        "top_p: None -> 1",
        "input model changed",
        "input prompts changed",
    ]


def test_the_digest_depends_on_content_alone(tmp_path):
    digests = []
    for name in ("a", "b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data").write_text("x" if name != "c" else "y")
        digests.append(write_manifest(folder, "s", {"k": 1}, {}, {"made by": name}).digest)
    assert digests[0] == digests[1] != digests[2]


def test_inputs(artifact, tmp_path):
    assert input_digest(artifact) == read_manifest(artifact).digest
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "model.bin").write_text("weights")
    assert input_digest(plain) == input_digest(artifact / "sub/deep")  # content counts, not where it lies
    assert input_digest(plain / "model.bin") == read_manifest(artifact).files["sub/deep/model.bin"]["sha256"]
    with pytest.raises(StageError, match="no such file or folder"):
        input_digest(tmp_path / "nothing")


def test_inputs_inside_an_artifact_are_not_read_again(artifact):
    before = input_digest(artifact / "sub"), input_digest(artifact / "rollouts.parquet")
    (artifact / "sub/deep/model.bin").write_text("changed after the fact")
    (artifact / "rollouts.parquet").write_text("too")
    assert (input_digest(artifact / "sub"), input_digest(artifact / "rollouts.parquet")) == before


def test_a_foreign_manifest_is_no_obstacle(tmp_path):
    (tmp_path / MANIFEST).write_text('{"name": "a web app"}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert len(input_digest(folder)) == 64


def test_settings_identity():
    settings = PrecomputeSettings(k=8)
    assert settings_identity(settings) == settings.model_dump(mode="json")
    identity = settings_identity(settings, ["--lr-decay-style", "cosine"], verifier=None)
    assert identity["megatron"] == ["--lr-decay-style", "cosine"] and identity["verifier"] is None
    assert settings_identity({"a": (1, 2)}) == {"a": [1, 2]} == json.loads(json.dumps({"a": [1, 2]}))


def test_the_time_of_all_starts_counts(tmp_path, monkeypatch):
    now = [1_000_000.0]
    monkeypatch.setattr("megatron_erpd.manifest.time.time", lambda: now[0])

    def start(at: float) -> None:
        now[0] = at
        begin_artifact(tmp_path / "a", "stage", {}, {})
        os.utime(tmp_path / "a" / REQUEST, (at, at))

    def leave(name: str, at: float) -> None:
        (tmp_path / "a" / name).write_text("")
        os.utime(tmp_path / "a" / name, (at, at))

    start(1_000_000)
    leave("first", 1_000_100)  # killed after 100 s, taken up a day later
    start(1_086_400)
    leave("metrics.jsonl", 1_086_430)  # 30 s
    start(1_100_000)  # killed before it wrote anything
    start(1_200_000)
    now[0] = 1_200_007
    summary = finish_artifact(tmp_path / "a").summary
    assert summary["seconds"] == 137 and summary["starts"] == 4
    # In a copy, the files' times say nothing of the start that was killed.
    start_of_copy = json.dumps({"stage": "stage", "settings": {}, "inputs": {}, "started": 1_300_000, "seconds": 5.0})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / REQUEST).write_text(start_of_copy)
    now[0] = time_of_copy = 1_400_000.0
    os.utime(tmp_path / "b" / REQUEST, (time_of_copy, time_of_copy))
    begin_artifact(tmp_path / "b", "stage", {}, {})
    now[0] += 3
    assert finish_artifact(tmp_path / "b").summary["seconds"] == 8
    # An earlier version kept no times.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / REQUEST).write_text(json.dumps({"stage": "stage", "settings": {}, "inputs": {}}))
    os.utime(tmp_path / "c" / REQUEST, (now[0] - 2, now[0] - 2))
    assert finish_artifact(tmp_path / "c").summary["seconds"] == 2
