"""Repositories by name, against a local server that imitates the hub: its listing, files, redirects and refusals."""

import contextlib
import errno
import hashlib
import http.server
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mm_gpt.errors import CheckpointError, DownloadError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.fetching import repository
from mm_gpt.hub.fetching.repository import fetch_repository, is_repository_name

NAME = "someone/tiny-model"
COMMIT, OLDER = "c" * 40, "b" * 40
WEIGHTS = random.Random(0).randbytes(300_000)
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"eos_token": "<end>"}',
    "chat_template.jinja": b"{{ messages }}",
    "preprocessor_config.json": b'{"size": 32}',
    "added_tokens.json": b"",
    "README.md": b"# Tiny\n",
}
DECOYS = {
    "pytorch_model.bin": b"pickle",
    "training_args.pt": b"pickle",
    "scaler.pkl": b"pickle",
    "modeling_evil.py": b"raise SystemExit",
    "consolidated.safetensors": b"the same weights again",
    "adapter_model.safetensors": b"an adapter",
    "model.fp32.safetensors": b"the same weights again",
    "onnx/model.safetensors": b"other weights",
    "onnx/config.json": b"{}",
    "tokenizer.model": b"sentencepiece",
    ".gitattributes": b"",
}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Files of one repository. Large ones are redirected to another host's address, as the real hub does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {**SMALL, **DECOYS, "model.safetensors": WEIGHTS}
        self.commits = {"main": COMMIT, COMMIT: COMMIT}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.refuse: dict[str, tuple[int, str, str]] = {}
        """Part of a path -> status, X-Error-Code, X-Error-Message."""
        self.busy_times = 0
        self.drops_after: list[int] = []
        """One number per request of a large file: close the connection after this many bytes."""
        self.sends: dict[str, bytes] = {}
        """What is really sent for a file, where that is not what is listed."""
        self.pause_seconds = 0.0
        self.obeys_range = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def listing(self, commit: str) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": NAME, "sha": commit, "siblings": siblings}

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(self.pause_seconds)
        path = handler.path.partition("?")[0]
        for part, (status, code, message) in self.refuse.items():
            if part in path:
                return self.send(handler, status, {"X-Error-Code": code, "X-Error-Message": message})
        if self.busy_times:
            self.busy_times -= 1
            return self.send(handler, 503)
        if match := re.fullmatch(rf"/api/models/{NAME}/revision/([^/]+)", path):
            commit = self.commits.get(match[1])
            if commit is None:
                return self.send(handler, 404, {"X-Error-Code": "RevisionNotFound"})
            listing = json.dumps(self.listing(commit)).encode()
            return self.send(handler, 200, {"Content-Type": "application/json"}, listing)
        if match := re.fullmatch(rf"/{NAME}/resolve/({COMMIT}|{OLDER}|main)/(.+)", path):
            return self.answer_file(handler, COMMIT if match[1] == "main" else match[1], match[2])
        if match := re.fullmatch(r"/storage/(.+)", path):
            return self.answer_content(handler, match[1])
        return self.send(handler, 401, {"X-Error-Code": "RepoNotFound"})

    def answer_file(self, handler: http.server.BaseHTTPRequestHandler, commit: str, name: str) -> None:
        content = self.files[name]
        large = name.endswith(".safetensors")
        checksum = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{checksum}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{checksum}"', "X-Linked-Size": str(len(content))}
            return self.send(handler, 302, {**headers, "Location": f"{self.storage}/storage/{name}"})
        return self.send(handler, 200, headers, self.sends.get(name, content))

    def answer_content(self, handler: http.server.BaseHTTPRequestHandler, name: str) -> None:
        body, status, headers = self.sends.get(name, self.files[name]), 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and self.obeys_range:
            start = int(asked[1])
            status = 206 if start < len(body) else 416
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}" if status == 206 else "bytes */0"
            body = body[start:]
        self.send(handler, status, headers, body, self.drops_after.pop(0) if self.drops_after else None)

    def send(
        self,
        handler: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        only: int | None = None,
    ) -> None:
        handler.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "GET":
            with contextlib.suppress(ConnectionError):  # the client may have seen enough
                handler.wfile.write(body[:only])
        handler.close_connection = True

    @property
    def fetched(self) -> list[str]:
        """Names of the files asked for, without the listing and the redirects' targets."""
        return [path.split("/", 5)[5] for method, path, _ in self.requests if "/resolve/" in path and method == "GET"]

    def ranges(self, name: str) -> list[str | None]:
        return [headers.get("range") for _, path, headers in self.requests if path == f"/storage/{name}"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.http.shutdown()
    hub.http.server_close()


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's folder in an empty cache."""
    for name in ("MM_GPT_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(repository, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard(hub: Hub) -> dict[str, bytes]:
    """Turn the weights into two shards. What the repository then should give."""
    parts = {f"model-0000{i}-of-00002.safetensors": random.Random(i).randbytes(50_000) for i in (1, 2)}
    index = json.dumps({"metadata": {}, "weight_map": dict(zip("abc", [*parts, *parts], strict=False))}).encode()
    del hub.files["model.safetensors"]
    hub.files |= {**parts, "model.safetensors.index.json": index, "model-00003-of-00003.safetensors": b"left over"}
    return {**SMALL, **parts, "model.safetensors.index.json": index}


def refusal(name: str = NAME) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch_repository(name)
    message = str(caught.value)
    assert "\n" not in message
    assert "hf_secret" not in message
    return message


def test_only_what_a_model_needs(hub: Hub, cache: Path) -> None:
    folder = fetch_repository(NAME)
    assert folder == cache / "snapshots" / COMMIT
    assert contents(folder) == {**SMALL, "model.safetensors": WEIGHTS}
    assert set(hub.fetched) == {*SMALL, "model.safetensors"}
    assert not list(cache.rglob("*.partial"))
    assert len(hub.requests) == 1 + len(SMALL) + 2  # the listing, the small files, the weights and their redirect


def test_second_call_downloads_nothing(hub: Hub, cache: Path) -> None:
    folder = fetch_repository(NAME)
    hub.requests.clear()
    assert fetch_repository(NAME) == folder
    assert [path.partition("?")[0] for _, path, _ in hub.requests] == [f"/api/models/{NAME}/revision/main"]


GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq"}
UNSUPPORTED: dict[str, tuple[dict[str, object], str, str]] = {
    # config.json, another small file, the message
    "model type": ({"model_type": "bert"}, "", "unknown model type 'bert'"),
    "InternVL as it was": ({"model_type": "internvl_chat"}, "", "only the repositories ending in -hf"),
    "LLaVA as it was": ({"model_type": "llava_llama"}, "", "only the layout of llava-hf"),
    "GPTQ": ({"model_type": "llama", "quantization_config": GPTQ}, "", r"quantised weights \(quant\S+: gptq\)"),
    "AWQ": ({"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}, "", "awq"),
    "bitsandbytes": (
        {"model_type": "llama", "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        "",
        "bitsandbytes",
    ),
    "FP8 of a part": (
        {"model_type": "llava", "text_config": {"quantization_config": {"quant_method": "fp8"}}},
        "",
        "fp8",
    ),
    "compressed tensors": (
        {"model_type": "llama", "compression_config": {"format": "dense"}},
        "",
        "compression_config",
    ),
    "GPTQ of 2023": ({"model_type": "llama"}, "quantize_config.json", "quantize_config.json: quantised weights"),
    "text half": (
        {"model_type": "llava", "text_config": {"model_type": "phi"}},
        "",
        "text_config: unknown model type 'phi'",
    ),
    "no tokenizer": ({"model_type": "llama"}, "", "tokenizer.json: not a readable tokenizer"),
    "depth": ({"model_type": "llama", "num_hidden_layers": 10**9}, "", "num_hidden_layers 1000000000 is more than"),
    "ours, misspelt": ({"decoder": "smollm2-135m-instruct", "visoin": None}, "", "unknown key 'visoin'"),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_supported_is_refused_before_its_weights(hub: Hub, cache: Path, what: str, sharded: bool) -> None:
    """Gigabytes must not be fetched to say that the model is of another kind."""
    config, extra, message = UNSUPPORTED[what]
    if sharded:
        shard(hub)
    hub.files["config.json"] = json.dumps(config).encode()
    if extra:
        hub.files[extra] = b"{}"
    with pytest.raises(MMGPTError, match=message) as error:
        load_model(NAME)
    assert "\n" not in str(error.value)
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    assert not (cache / "refs").exists()  # offline calls must not take it for complete


def test_shards_of_the_index_and_no_others(hub: Hub, cache: Path) -> None:
    expected = shard(hub)
    assert contents(fetch_repository(NAME)) == expected
    assert set(hub.fetched) == set(expected)


def test_one_file_wins_over_an_index(hub: Hub, cache: Path) -> None:
    # Some repositories have the same weights in both forms.
    shard(hub)
    hub.files["model.safetensors"] = WEIGHTS
    assert contents(fetch_repository(NAME)) == {**SMALL, "model.safetensors": WEIGHTS}


def test_nothing_tells_on_the_user_and_the_token_stays_on_the_hub(hub: Hub, cache: Path) -> None:
    # The library's own downloads name installed packages, and a forwarded token would reach whoever stores the files.
    fetch_repository(NAME)
    assert {headers["user-agent"] for _, _, headers in hub.requests} == {"mm-gpt"}
    tokens = {path.startswith("/storage/"): headers.get("authorization") for _, path, headers in hub.requests}
    assert tokens == {False: "Bearer hf_secret", True: None}


def test_a_cache_of_the_library_is_reused_and_the_other_way_round(hub: Hub, cache: Path) -> None:
    import huggingface_hub

    where = {"cache_dir": cache.parent, "endpoint": hub.url, "token": False}
    for name in ("model.safetensors", "config.json"):
        huggingface_hub.hf_hub_download(NAME, name, **where)
    hub.requests.clear()
    folder = fetch_repository(NAME)
    assert set(hub.fetched) == {*SMALL} - {"config.json"}
    hub.requests.clear()
    for name in (*SMALL, "model.safetensors"):
        assert huggingface_hub.hf_hub_download(NAME, name, local_files_only=True, **where) == str(folder / name)
        assert huggingface_hub.hf_hub_download(NAME, name, revision=COMMIT, **where) == str(folder / name)
    assert not hub.requests


def test_revisions(hub: Hub, cache: Path) -> None:
    hub.commits |= {"v1.0": OLDER, OLDER: OLDER, "refs%2Fpr%2F1": OLDER}
    for revision in ("v1.0", OLDER, "refs/pr/1"):
        assert fetch_repository(f"{NAME}@{revision}") == cache / "snapshots" / OLDER
    assert len(hub.fetched) == len(SMALL) + 1
    assert "no revision 'v2' (a branch, a tag or a full commit)" in refusal(f"{NAME}@v2")


def test_a_new_commit_brings_only_what_changed(hub: Hub, cache: Path) -> None:
    old = fetch_repository(NAME)
    hub.requests.clear()
    hub.commits["main"] = OLDER
    hub.files["README.md"] = b"# Tiny, corrected\n"
    new = fetch_repository(NAME)
    assert hub.fetched == ["README.md"]
    assert contents(new)["README.md"] == b"# Tiny, corrected\n"
    assert contents(old)["README.md"] == SMALL["README.md"]


@pytest.mark.parametrize("variable", ["MM_GPT_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("sharded", [False, True])
def test_offline_uses_the_cache(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str, sharded: bool
) -> None:
    if sharded:
        shard(hub)
    folder = fetch_repository(NAME)
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert fetch_repository(NAME) == fetch_repository(f"{NAME}@{COMMIT}") == folder
    next(folder.glob("model*.safetensors")).unlink()
    message = refusal()
    assert f"{NAME} is not, or not completely, in {cache}" in message
    assert f"run: hf download {NAME} " in message
    assert "--model FOLDER" in message
    assert f"hf download {NAME} --revision v1 " in refusal(f"{NAME}@v1")
    assert not hub.requests


def test_offline_is_served_by_the_last_complete_commit(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fetch_repository(NAME)
    hub.commits["main"] = OLDER
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    hub.drops_after = [1000] * 9
    assert "cannot fetch model.safetensors" in refusal()
    monkeypatch.setenv("MM_GPT_OFFLINE", "1")
    assert fetch_repository(NAME) == old


def test_a_tokenizer_without_the_weights(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nanoVLM names the repository of its tokenizer, which need not hold a model. Stops: gigabytes for a tokenizer, and
    an offline model that is gone because a newer tokenizer was fetched."""
    fetch_repository(NAME)
    hub.commits["main"] = hub.commits[OLDER] = OLDER
    del hub.files["model.safetensors"], hub.files["config.json"]
    hub.requests.clear()
    folder = fetch_repository(NAME, weights=False)
    assert set(contents(folder)) == {*SMALL} - {"config.json"}
    monkeypatch.setenv("MM_GPT_OFFLINE", "1")
    assert contents(fetch_repository(NAME))["model.safetensors"] == WEIGHTS
    shutil.rmtree(cache / "snapshots" / COMMIT)
    (cache / "refs/main").write_text(OLDER)
    assert fetch_repository(NAME, weights=False) == folder
    with pytest.raises(DownloadError, match="offline mode is on"):
        fetch_repository(NAME)


def test_hub_out_of_reach(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch_repository(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    caplog.clear()
    assert fetch_repository(NAME) == folder
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].endswith(f"; using the copy of {NAME} in the cache")
    shutil.rmtree(cache)
    message = refusal()
    assert f"cannot fetch {NAME}: no connection to 127.0.0.1:9 (" in message
    assert f"hf download {NAME} " in message
    assert "--model FOLDER" in message


def test_silent_hub_does_not_hang(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.pause_seconds = 1.5
    start = time.monotonic()
    assert "no connection to 127.0.0.1" in refusal()
    assert time.monotonic() - start < 1.4


def test_busy_hub_is_asked_again(hub: Hub, cache: Path) -> None:
    hub.busy_times = 3
    assert contents(fetch_repository(NAME))["model.safetensors"] == WEIGHTS
    shutil.rmtree(cache)
    hub.busy_times = 99
    assert "answers HTTP 503; on a machine with access" in refusal()


@pytest.mark.parametrize(
    ("part", "answer", "expected"),
    [
        (
            "/api/",
            (401, "", ""),
            f"has no repository '{NAME}', or it is private (then set HF_TOKEN); there is no folder",
        ),
        ("/api/", (404, "RepoNotFound", "Repository not found"), f"has no repository '{NAME}'"),
        ("/api/", (401, "", "Invalid credentials in Authorization header"), "refuses the login (HF_TOKEN, or"),
        ("/resolve/", (403, "GatedRepo", "Access to model is restricted"), f"{NAME} is gated: accept its terms at"),
        ("/api/", (403, "", "Access to this resource is disabled."), "HTTP 403 (Access to this resource is disabled.)"),
        ("/resolve/", (404, "EntryNotFound", "Entry not found"), "HTTP 404 (Entry not found)"),
    ],
)
def test_refusals(hub: Hub, cache: Path, part: str, answer: tuple[int, str, str], expected: str) -> None:
    hub.refuse[part] = answer
    message = refusal()
    assert expected in message
    assert len(hub.requests) <= 2  # a refusal is final


def test_cut_connection_continues_where_it_broke(hub: Hub, cache: Path) -> None:
    hub.drops_after = [100_000, 50_000]
    assert contents(fetch_repository(NAME))["model.safetensors"] == WEIGHTS
    assert hub.ranges("model.safetensors") == [None, "bytes=100000-", "bytes=150000-"]


def test_server_without_ranges_starts_again(hub: Hub, cache: Path) -> None:
    # Appending a full answer to the part would corrupt the file.
    hub.drops_after, hub.obeys_range = [100_000], False
    assert contents(fetch_repository(NAME))["model.safetensors"] == WEIGHTS
    assert hub.ranges("model.safetensors") == [None, "bytes=100000-"]


def test_ctrl_c_leaves_what_the_next_call_continues(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(repository.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> None:
            self.seen = getattr(self, "seen", 0) + n
            if self.seen > 50_000:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(repository, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_repository(NAME)
    (part,) = cache.rglob("*.partial")
    size = part.stat().st_size
    assert 0 < size < len(WEIGHTS)
    hub.requests.clear()
    assert contents(fetch_repository(NAME)) == {**SMALL, "model.safetensors": WEIGHTS}
    assert hub.fetched == ["model.safetensors"]
    assert hub.ranges("model.safetensors") == [f"bytes={size}-"]


def test_gives_up_and_keeps_the_part(hub: Hub, cache: Path) -> None:
    hub.drops_after = [1000] * 9
    message = refusal()
    assert message.startswith(f"cannot fetch model.safetensors of {NAME}: ")
    assert "; the next call continues it, or on a machine with access run: hf download" in message
    assert next(cache.rglob("*.partial")).read_bytes() == WEIGHTS[:4000]


@pytest.mark.parametrize("size", [1234, len(WEIGHTS), 400_000], ids=["short", "full", "long"])
def test_broken_part_costs_one_fresh_start(hub: Hub, cache: Path, size: int) -> None:
    part = cache / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * size)
    assert contents(fetch_repository(NAME))["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize(
    ("name", "sent", "expected"),
    [
        ("model.safetensors", WEIGHTS[::-1], "expected sha256 "),
        ("config.json", b'{"model_type": "LLAMA"}', "expected git sha1 "),
        ("model.safetensors", WEIGHTS * 2, "sent more than the 300000 bytes"),
        ("model.safetensors", WEIGHTS[:-1], "cannot continue at byte 299999"),
    ],
    ids=["sha256", "git sha1", "longer", "shorter"],
)
def test_wrong_content_is_refused(hub: Hub, cache: Path, name: str, sent: bytes, expected: str) -> None:
    hub.sends[name] = sent
    message = refusal()
    assert expected in message
    assert name in message
    assert not (cache / "snapshots" / COMMIT / name).exists()
    hub.sends.clear()
    assert contents(fetch_repository(NAME))[name] == hub.files[name]


def test_truncated_file_in_the_cache_is_replaced(hub: Hub, cache: Path) -> None:
    weights = fetch_repository(NAME) / "model.safetensors"
    weights.resolve().write_bytes(WEIGHTS[:1000])
    fetch_repository(NAME)
    assert weights.read_bytes() == WEIGHTS


def test_pickles_are_named_and_never_fetched(hub: Hub, cache: Path) -> None:
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    with pytest.raises(CheckpointError, match=r"\(found: pytorch_model.bin, training_args.pt, .*\); pickles .* never"):
        fetch_repository(NAME)
    assert not hub.fetched
    del hub.files["config.json"]
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        fetch_repository(NAME)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (b"not json", "is not an index"),
        (b'{"weight_map": []}', "is not an index"),
        (b'{"weight_map": {}}', "names no file"),
        (b'{"weight_map": {"a": "../../../evil.safetensors"}}', "which is not a safetensors file beside it"),
        (b'{"weight_map": {"a": "onnx/model.safetensors"}}', "which is not a safetensors file beside it"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "which is not a safetensors file beside it"),
        (b'{"weight_map": {"a": "model-9.safetensors"}}', "model-9.safetensors, which the repository does not have"),
    ],
)
def test_broken_index(hub: Hub, cache: Path, index: bytes, expected: str) -> None:
    shard(hub)
    hub.files["model.safetensors.index.json"] = index
    with pytest.raises(CheckpointError, match=expected):
        fetch_repository(NAME)
    assert hub.fetched == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({"sha": "../../../evil"}, {}),
        ({"sha": None}, {}),
        ({"siblings": "none"}, {}),
        ({}, {"blobId": "../../evil"}),
        ({}, {"blobId": None}),
        ({}, {"size": None}),
        ({}, {"lfs": {"sha256": "../../evil", "size": 23}}),
        ({}, {"lfs": "yes"}),
    ],
)
def test_bad_listing_writes_nothing(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], config: dict[str, object]
) -> None:
    # Commit and checksum become names of folders and files: a hostile mirror must not choose where we write.
    listing = {**hub.listing(COMMIT), **change}
    if config:
        listing["siblings"][0] |= config  # type: ignore[index]
    monkeypatch.setattr(hub, "listing", lambda commit: listing)
    assert re.search("does not answer like a model hub|without a size and a checksum", refusal())
    assert not cache.exists()


def test_full_disk(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(repository.shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
        assert "the disk is full" in refusal()
    assert not hub.fetched

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(repository.os, "replace", no_space)
        assert refusal().endswith("free some space or set HF_HOME")


def test_cache_that_cannot_be_written(hub: Hub, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    message = refusal()
    assert message.startswith(f"cannot write to the cache: {cache}")
    assert message.endswith("set HF_HOME")


@pytest.mark.parametrize("endpoint", ["ftp://x", "nonsense", "http://[", "http://x:y"])
def test_bad_endpoint(cache: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert refusal() == "HF_ENDPOINT is not an http(s) address"


def test_two_at_once_fetch_one_copy(hub: Hub, cache: Path) -> None:
    hub.pause_seconds = 0.02
    threads = [threading.Thread(target=fetch_repository, args=(NAME,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hub.fetched) == sorted([*SMALL, "model.safetensors"])


@pytest.mark.parametrize("progress", [None, True])
def test_progress_bar(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str], progress: bool | None) -> None:
    fetch_repository(NAME, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    # None: pytest's stderr is no terminal.
    assert (f"{NAME}: 100%" in captured.err) == bool(progress)
    if progress is None:
        assert captured.err == ""


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HuggingFaceTB/SmolVLM-256M-Instruct", "a/b", "a/b@main", "o_o/x.y@refs/pr/1", f"a/b@{COMMIT}"):
        assert is_repository_name(name)
    wrong = [
        "",
        "default",
        "a/b/c",
        "/a/b",
        "./a",
        "../a",
        "a/",
        "~/a",
        "a/b@",
        "a/b@../x",
        "a/b@x//y",
        "a/b@/x",
        "a/b.git",
    ]
    wrong += ["a--b/c", "a/b..c", "https://hub/x", "a b/c", "a/b\n", "é/a", "x" * 97 + "/a", "a/b@" + "x" * 300]
    for name in wrong:
        assert not is_repository_name(name), name
        with pytest.raises(MMGPTError, match="is not the name of a hub repository"):
            fetch_repository(name)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert not is_repository_name("runs/tiny")


@given(st.text(alphabet="ab./@-_~\\\0 é", max_size=12))
@example("a/b@" + "x" * 201)
@example("a/b@x/./y")
def test_any_text_is_a_name_or_not(text: str) -> None:
    if is_repository_name(text):
        repo, revision = repository._parse(text) or ("", "")
        assert repo.count("/") == 1
        assert not {"..", ".", ""} & {*repo.split("/"), *revision.split("/")}


def test_import_stays_light() -> None:
    code = (
        "import sys, mm_gpt.hub.fetching.repository; "
        "print([m for m in ('torch', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
