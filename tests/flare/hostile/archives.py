"""What whoever holds the lead's kit, or the server, could send in place of a job: one table of archives.

Each entry is a name and what makes the archive of an application from that of an honest one. Nothing in here
knows what a site does with it.
"""

from __future__ import annotations

import codecs
import copy
import io
import json
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from histoflare.flare.job_files import CLIENT_FILE, CONFIGURATIONS, JOB_FILE, PROTOCOL_FILE, SERVER_FILE

Entries = list[tuple[zipfile.ZipInfo, bytes]]
FOUR = (CLIENT_FILE, SERVER_FILE, JOB_FILE, PROTOCOL_FILE)
JSON_FILES = (CLIENT_FILE, SERVER_FILE)
TOML_FILES = (JOB_FILE, PROTOCOL_FILE)


@dataclass(frozen=True)
class Around:
    """What an attacker may know or guess of the world around a job.

    Attributes:
        marker: A file that code of the attacker would write.
        file: One of a site's that a job wants to know of.
        url: An address that a job wants called.
    """

    marker: Path
    file: Path
    url: str

    def code(self) -> bytes:
        """Return Python that says it ran."""
        return f"import pathlib\npathlib.Path({str(self.marker)!r}).touch()\n".encode()


def honest(config: Path) -> dict[str, bytes]:
    """Return name → content of the application of a job folder's ``app/config``."""
    return {"config/": b"", **{f"config/{name}": (config / name).read_bytes() for name in FOUR}}


def entry(name: str, mode: int = stat.S_IFREG | 0o644, method: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x", date_time=(2026, 1, 1, 0, 0, 0))
    info.filename = info.orig_filename = name  # as it is: the constructor cuts and turns
    if name.endswith("/"):
        mode = stat.S_IFDIR | 0o755
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_STORED if name.endswith("/") else method
    return info


@dataclass(frozen=True)
class Pack:
    """Makes archives.

    Attributes:
        prefix: In front of every name. more: Name → content of what is in every archive besides.
    """

    prefix: str = ""
    more: Mapping[str, bytes] = field(default_factory=dict)

    def __call__(self, files: Mapping[str, bytes] | Entries, comment: bytes = b"") -> bytes:
        """Return an archive, of files by name or of entries as they are."""
        if isinstance(files, Mapping):
            files = [(entry(name), content) for name, content in files.items()]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings(action="ignore"):
            for name, content in self.more.items():
                archive.writestr(entry(name), content)
            for info, content in files:
                info = copy.copy(info)
                info.filename = info.orig_filename = self.prefix + info.filename
                archive.writestr(info, content, compress_type=info.compress_type)
            archive.comment = comment
        return out.getvalue()


def _lines(around: Around) -> dict[str, str]:
    """Return name → a text that some reader of FLARE would act on: HOCON, YAML, FLARE's own references."""
    file, url, marker = around.file, around.url, around.marker
    nested = "\n".join(f"a{n} = ${{a{n - 1}}} ${{a{n - 1}}}" for n in range(1, 21))
    return {
        "include file": f'include file("{file}")',
        "include a name": 'include "job.conf"',
        "include required": f'include required(file("{file}"))',
        "include classpath": f'include classpath("{file}")',
        "include package": 'include package("antigravity:x.conf")',
        "include url": f'include url("{url}/a.conf")',
        "include with blanks": f'include   url(  "{url}/b.conf"  )',
        "include a pattern": f'include file("{file.parent}/*.h5")',
        "substitution": "a = ${HOME}",
        "substitution that may fail": "a = ${?PLANTED}",
        "substitution of itself": "path = ${path} [1]",
        "three quotes": 'a = """${HOME}"""',
        "nested substitutions": f"a0 = xxxxxxxx\n{nested}",
        "added to": "a += 1",
        "HOCON object": "a { b : c, }",
        "HOCON comment": f'// x\ninclude file("{file}")',
        "omegaconf environment": "a: ${oc.env:PLANTED}",
        "omegaconf resolver": f"a: ${{oc.decode:${{file:{file}}}}}",
        "YAML object": f"!!python/object/apply:os.system ['touch {marker}']",
        "YAML anchors": "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]",
        "FLARE's environment": "a = {$PLANTED}",
        "FLARE's workspace": "a = {WORKSPACE}",
        "FLARE's workspace by character": "a = {WORKSPACE[3]}",
        "FLARE's padding": "a = {WORKSPACE:>100000000}",
        "FLARE's secret": "a = ${secret:PLANTED}",
    }


LINE_ENDS = {
    "carriage return": "\r",
    "form feed": "\f",
    "vertical tab": "\v",
    "file separator": "\x1c",
    "next line": "\x85",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "NUL": "\0",
    "escape": "\x1b[2J",
    "delete": "\x7f",
}


def _texts(good: dict[str, bytes], around: Around, pack: Pack) -> Iterator[tuple[str, bytes]]:
    """Every text in every one of the four files: behind it, in its place, as one of its values."""
    for name in FOUR:
        place = f"config/{name}"
        text = good[place].decode()
        for what, line in _lines(around).items():
            if what != "three quotes" or name in JSON_FILES:  # a field of a part's table: see LATE
                yield f"{name}: {what} behind it", pack({**good, place: f"{text}\n{line}\n".encode()})
            yield f"{name}: {what} before it", pack({**good, place: f"{line}\n{text}".encode()})
        line = f'include url("{around.url}/c.conf")'
        yield f"{name}: nothing but an include", pack({**good, place: line.encode()})
        for encoding in ("utf-16", "utf-16-le", "utf-32", "cp037"):
            yield f"{name}: in {encoding}", pack({**good, place: text.encode(encoding, "replace")})
        yield f"{name}: a mark of its order", pack({**good, place: codecs.BOM_UTF8 + text.encode()})
        yield f"{name}: no text at all", pack({**good, place: bytes(range(128, 256))})
        yield f"{name}: empty", pack({**good, place: b""})
        yield f"{name}: missing", pack({key: value for key, value in good.items() if key != place})
        yield f"{name}: large", pack({**good, place: text.encode() + b"\n" * (1 << 16)})
        yield f"{name}: brackets", pack({**good, place: b"[" * 60_000})
        yield f"{name}: brackets in lines", pack({**good, place: b"[\n" * 30_000})
    for name in JSON_FILES:
        for what, line in _lines(around).items():
            said = json.loads(good[f"config/{name}"]) | {"more": line}
            yield f"{name}: {what} as a value", pack({**good, f"config/{name}": json.dumps(said).encode()})
        for end, character in LINE_ENDS.items():
            text = good[f"config/{name}"].decode()
            said = f'{text}{character}include file("{around.file}")'
            yield f"{name}: include after a {end}", pack({**good, f"config/{name}": said.encode()})
    for end, character in LINE_ENDS.items():
        if end in ("next line", "line separator", "paragraph separator"):
            continue  # no end of a line for TOML: see INERT
        for name in TOML_FILES:
            text = good[f"config/{name}"].decode()
            said = f'{text}# x{character}include file("{around.file}")\n'
            yield f"{name}: include after a {end}", pack({**good, f"config/{name}": said.encode()})


def _classes(good: dict[str, bytes], around: Around, pack: Pack) -> Iterator[tuple[str, bytes]]:
    """FLARE's two files with other classes and settings."""

    def said(name: str, change: Callable[[dict[str, object]], object]) -> bytes:
        content = json.loads(good[f"config/{name}"])
        change(content)
        return pack({**good, f"config/{name}": json.dumps(content).encode()})

    def component(path: str, **arguments: object) -> dict[str, object]:
        return {"id": "x", "path": path, "args": arguments}

    touch = ["touch", str(around.marker)]
    for what, part in {
        "a process": component("subprocess.Popen", args=touch),
        "os.system": component("os.system", command=" ".join(touch)),
        "FLARE's script runner": component(
            "nvflare.app_common.launchers.subprocess_launcher.SubprocessLauncher", script=" ".join(touch)
        ),
        "the gate itself": component("histoflare.flare.gate.Gate", policy="policy_open.toml"),
    }.items():
        for name in JSON_FILES:
            yield f"{name}: {what}", said(name, lambda c, p=part: c["components"].append(p))
    yield (
        "a class by name",
        said(CLIENT_FILE, lambda c: c["components"].append({"id": "x", "name": "Popen", "args": {}})),
    )
    yield (
        "a filter",
        said(
            CLIENT_FILE,
            lambda c: c.update(task_result_filters=[{"tasks": ["train"], "filters": [component("x.Y")]}]),
        ),
    )
    yield "an executor for every task", said(CLIENT_FILE, lambda c: c["executors"][0].update(tasks=["*"]))
    yield (
        "a class of the server",
        said(SERVER_FILE, lambda c: c["workflows"][0]["args"].update(custom="{WORKSPACE}/local")),
    )
    yield (
        "the environment",
        said(SERVER_FILE, lambda c: c["workflows"][0]["args"].update(custom="{$PLANTED}")),
    )
    yield "2.0 for 2", said(CLIENT_FILE, lambda c: c.update(format_version=2.0))
    yield "true for 2", said(CLIENT_FILE, lambda c: c.update(format_version=True))
    twice = good[f"config/{CLIENT_FILE}"].replace(b"{", b'{"components": [], ', 1)
    yield "a key twice", pack({**good, f"config/{CLIENT_FILE}": twice})
    swapped = {f"config/{CLIENT_FILE}": good[f"config/{SERVER_FILE}"]}
    yield "the server's file for the client's", pack({**good, **swapped})


def _values(good: dict[str, bytes], _: Around, pack: Pack) -> Iterator[tuple[str, bytes]]:
    """Numbers and nesting that cost a reader time or memory."""
    for name in TOML_FILES:
        place = f"config/{name}"
        for what, line in {
            "many brackets": "a = " + "[" * 400 + "]" * 400,
            "brackets over lines": "a = [\n" + "[\n" * 20_000,
            "tables in tables": "[" + ".".join(["a"] * 400) + "]\nb = 1",
            "many dots": "\n".join(f"{'.'.join(['a'] * 490)}.b{n} = 1" for n in range(60)),
            "inline tables": "a = " + "{a=" * 200 + "1" + "}" * 200,
            "many lists": "a = [\n" + "1,\n" * 20_000 + "]",
            "lists of tables": "[[a]]\n" * 8_000,
            "a long number": "a = " + "9" * 990,
            "a long number in hex": "a = 0x" + "f" * 990,
            "infinity": "a = inf",
            "no number": "a = nan",
            "a large power": "a = 1e400",
            "a date": "a = 2026-01-01",
            "a long text": 'a = "' + "x" * 990 + '"',
            "a text over lines": 'a = """\n' + "x\n" * 20_000 + '"""',
            "an escape": 'a = "\\u001b[31m"',
            "a direction": 'a = "\\u202e"',
            "a key in quotes": '"../x" = 1',
            "a key of very many dots": ".".join(["a"] * 30_000) + " = 1",
            "an unknown table": "[launcher]\ncommand = 'x'",
        }.items():
            yield f"{name}: {what}", pack({**good, place: line.encode() + b"\n" + good[place]})
            yield f"{name}: nothing but {what}", pack({**good, place: line.encode() + b"\n"})
            if what not in ("a long text", "an unknown table", "a text over lines"):
                yield f"{name}: {what} in a table", pack({**good, place: good[place] + line.encode() + b"\n"})
    job = good[f"config/{JOB_FILE}"].decode()
    for what, (old, new) in {
        "another format": ("format = 1\n", "format = true\n"),
        "a run that is a path": ("format = 1\n", 'format = 1\nrun = "../../local"\n'),
        "a run that is a folder": ("format = 1\n", 'format = 1\nrun = ".."\n'),
        "a kind of its own": ('kind = "training"', 'kind = "exec"'),
        "many clients": ("least_sites = 2", "least_sites = 9007199254740992"),
        "no clients": ("least_sites = 2", "least_sites = -1"),
        "a long wait": ("round_seconds = ", "round_seconds = 99999"),
    }.items():
        said = job.replace(old, new) if what != "a long wait" else job.replace(old, f"{new}99999999")
        assert said != job, what
        yield f"{JOB_FILE}: {what}", pack({**good, f"config/{JOB_FILE}": said.encode()})


def _more_files(good: dict[str, bytes], around: Around, pack: Pack) -> Iterator[tuple[str, bytes]]:
    code = around.code()
    driver = json.dumps({"comm_driver_path": "."}).encode()
    module = json.dumps({"decomposer_module": "evil", "allow_log_streaming": True}).encode()
    hocon = f'include file("{around.file}")\ninclude url("{around.url}/d.conf")\n'.encode()
    for folder in ("", "config/", "custom/", "config/sub/", "sub/"):
        head = {} if folder in ("", "config/") else {folder: b""}
        for name, content in {
            "comm_config.json": driver,
            "resources.json": module,
            "resources.json.default": module,
            "log_config.json": b'{"version": 1, "handlers": {"x": {"class": "evil.X"}}}',
            "privacy.json": b"{}",
            "authorization.json": b"{}",
            "fed_client.json": b"{}",
            "meta.json": b"{}",
            "environment.json": b"{}",
            "config_fed_client.conf": hocon,
            "config_fed_client.yml": b"a: ${oc.env:HOME}\n",
            "config_fed_client.json.default": good[f"config/{CLIENT_FILE}"],
            "job.conf": hocon,
            "protocol.json": b"{}",
            "evil.pth": b"import evil\n",
            "sitecustomize.py": code,
            "__init__.py": code,
            "evil.so": b"\x7fELF",
            "start_model.safetensors": b"x",
            "earlier_rounds.json": b"[]",
            "JOB.TOML": good[f"config/{JOB_FILE}"],
            "job.toml ": good[f"config/{JOB_FILE}"],
            "job.toml.": good[f"config/{JOB_FILE}"],
        }.items():
            yield (
                f"{folder}{name} more",
                pack({**good, **head, folder + name: content, folder + "evil.py": code}),
            )
        yield f"{folder}evil.py more", pack({**good, **head, f"{folder}evil.py": code})
    for name in ("custom/", "config/sub/", "app/", "config/config/", "presets/", "..", "../"):
        yield f"the folder {name} more", pack({**good, name: b""})
    for name in (
        *("/etc/x", "../x", "../../x", "config/../x", "config/../../local/x", "./config/x", "config//x"),
        *("./config/job.toml", "config//job.toml", "config/./job.toml", "/config/job.toml"),
        *("config\\job.toml", "config\\..\\x", "C:\\x", "config/job.toml\0.py", "CONFIG/job.toml"),
        *("config/job.toml/", "config/job.toml/x", "", " ", "config/\u2024\u2024/x", "c\u043enfig/job.toml"),
    ):
        yield f"an entry called {name!r}", pack({**good, name: code if not name.endswith("/") else b""})
        if not name.endswith("/"):
            moved = {key: value for key, value in good.items() if key != "config/job.toml"}
            yield f"job.toml called {name!r}", pack({**moved, name: good["config/job.toml"]})
    yield "a folder more on top", pack({f"app/{key}": value for key, value in good.items()})
    yield (
        "no folder",
        pack({key.removeprefix("config/"): value for key, value in good.items() if key != "config/"}),
    )


def _archives(good: dict[str, bytes], around: Around, pack: Pack) -> Iterator[tuple[str, bytes]]:
    """Ways to write an archive."""
    entries = [(entry(name), content) for name, content in good.items()]
    file = str(around.file).encode()
    for what, mode, content in (
        ("a link", stat.S_IFLNK | 0o777, file),
        ("a link that leads up", stat.S_IFLNK | 0o777, b"../../../local/histoflare.toml"),
        ("a FIFO", stat.S_IFIFO | 0o644, b""),
        ("a device", stat.S_IFCHR | 0o644, b""),
        ("a disk", stat.S_IFBLK | 0o644, b""),
        ("a socket", stat.S_IFSOCK | 0o644, b""),
        ("a folder by its mode", stat.S_IFDIR | 0o755, b""),
    ):
        for name in ("config/job.toml", "config/x", "config/.__nvfl_sig.json"):
            kept = [each for each in entries if each[0].filename != name]
            yield f"{name}: {what}", pack([*kept, (entry(name, mode), content)])
    link = entry("config/", stat.S_IFLNK | 0o777)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    yield "config/ is a link", pack([(link, b""), *entries[1:]])
    for name in ("config/job.toml", "config/", "config/.__nvfl_sig.json"):
        yield f"{name} twice", pack([*entries, (entry(name), b""), (entry(name), b"")])
    other = (entry("config/job.toml"), b'include file("x")')
    yield "job.toml twice, the first another", pack([other, *entries])
    yield "job.toml twice, the last another", pack([*entries, other])
    yield "a comment", pack(good, comment=b"x")
    yield "a long comment", pack(good, comment=b"x" * 65_000)
    for what, method in {"LZMA": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}.items():
        yield what, pack([(entry(n, method=method), c) for n, c in good.items()])
    whole = pack(good)
    yield "marked as encrypted", _flag(whole, 1)
    yield "marked as strongly encrypted", _flag(whole, 0x41)
    yield "marked as patched", _flag(whole, 0x20)
    yield "an unknown method", whole.replace(b"\x08\x00\x00\x00", b"\x63\x00\x00\x00")
    bomb = pack({**good, "config/job.toml": bytes(200 << 20)})
    yield "a bomb", bomb
    yield "a bomb that says it is small", _resize(bomb, 200 << 20, 100)
    yield "a bomb of signatures", pack({**good, "config/.__nvfl_sig.json": bytes(200 << 20)})
    yield "a file that says it is huge", _resize(whole, len(good["config/job.toml"]), 0xFFFFFFF0)
    yield "many entries", pack({**good, **{f"config/{n}": b"" for n in range(2_000)}})
    yield "many entries of one name", pack([*entries, *[(entry("config/"), b"")] * 10_000])
    yield "very many entries", _many(100_000)
    yield "its end cut off", whole[:-10]
    yield "its beginning cut off", whole[200:]
    at = whole.index(CLIENT_FILE.encode()) + 60
    yield "its middle changed", whole[:at] + bytes(8) + whole[at + 8 :]
    yield "another name at the file itself", whole.replace(b"config/job.toml", b"config/jo.tomll", 1)
    yield "nothing", b""
    yield "an empty archive", pack({})
    yield "no archive", b"PK\3\4" + b"x" * 1000
    yield "a text", b"print('x')"
    yield "a pickle", b"\x80\x04\x95\x00."
    yield "an archive in an archive", pack({"app.zip": whole})


def _flag(archive: bytes, bits: int) -> bytes:
    """Return an archive with a flag set in every header."""
    out = bytearray(archive)
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = out.find(mark)
        while at >= 0:
            out[at + offset] |= bits
            at = out.find(mark, at + 4)
    return bytes(out)


def _resize(archive: bytes, size: int, says: int) -> bytes:
    """Return an archive that says another size of a file, everywhere."""
    assert struct.pack("<I", size) in archive
    return archive.replace(struct.pack("<I", size), struct.pack("<I", says))


def _many(count: int) -> bytes:
    """Return an archive of ``count`` entries of no bytes, all at one place."""
    name = b"config/x"
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    one = (
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name
    )
    directory = one * count
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, len(directory), len(local), 0
    )
    return local + directory + end


GROUPS = (_texts, _classes, _values, _more_files, _archives)


def hostile(good: dict[str, bytes], around: Around, pack: Pack) -> dict[str, bytes]:
    """Return name → an archive that nobody may take.

    Args:
        good: An honest application. pack: How archives are made of one: alone, or in a job folder.
    """
    made: dict[str, bytes] = {}
    for group in GROUPS:
        for name, archive in group(good, around, pack):
            assert name not in made, name
            made[name] = archive
    return made


def falsely_signed(good: dict[str, bytes], around: Around) -> dict[str, bytes]:
    """Return name → an application with signatures in it that FLARE itself must refuse."""
    made = {}
    certificate = b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"
    outside = json.dumps({"../../../local/histoflare.toml": "x", str(around.file): "x"}).encode()
    for what, said in {"brackets": b"[" * 60_000, "files of the site": outside, "nothing": b""}.items():
        signed = {".__nvfl_sig.json": said, ".__nvfl_submitter.crt": certificate}
        made[f"signed: {what}"] = Pack()({**good, **signed})
    return made


def other_versions(good: dict[str, bytes]) -> dict[str, bytes]:
    """Return name → the application of a job of another release."""
    job = good[f"config/{JOB_FILE}"]
    return {
        f"format {n}": Pack()(
            {**good, f"config/{JOB_FILE}": job.replace(b"format = 1\n", f"format = {n}\n".encode())}
        )
        for n in (0, 2, 99)
    }


def inert(good: dict[str, bytes], around: Around, pack: Pack) -> dict[str, bytes]:
    """Return name → an archive whose strange text means nothing to the only reader of it."""
    stored = [(entry(name, method=zipfile.ZIP_STORED), content) for name, content in good.items()]
    whole = pack(good)
    made = {"as it is": whole, "stored": pack(stored), "something in front": bytes(1000) + whole}
    size = len(good[f"config/{JOB_FILE}"])
    made["a file that says it is larger"] = _resize(whole, size, 60_000)
    for name in TOML_FILES:
        text = good[f"config/{name}"].decode()
        for what, line in _lines(around).items():
            comment = "".join(f"# {each}\n" for each in line.splitlines())
            made[f"{name}: {what} in a comment"] = pack({**good, f"config/{name}": (comment + text).encode()})
        for end in ("next line", "line separator", "paragraph separator"):
            said = f'{text}# x{LINE_ENDS[end]}include file("{around.file}")\n'
            made[f"{name}: {end} in a comment"] = pack({**good, f"config/{name}": said.encode()})
    for name in CONFIGURATIONS:
        flat = json.dumps(json.loads(good[f"config/{name}"]), indent="\t")
        made[f"{name}: another layout"] = pack({**good, f"config/{name}": flat.encode()})
    return made
