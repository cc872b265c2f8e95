"""`Store`: one knowledge base on disk, opened.

It orders what must happen together: delta to a temporary name, fsync, rename, fsync folder, re-read and hash, then one
transaction that inserts the edit and moves the head. Anything that stops it before that transaction has committed
leaves the knowledge base as it was. Knows no model; `verify` compares bytes with rows, weights are compared above.

    with Store.open("my.kb") as store, store.writer(timeout=10):
        edit = store.commit(NewEdit("insert", ("torchkeras",), store.head(), facts=(fact,)), delta_files)
"""

from __future__ import annotations

import difflib
import os
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvllm.errors import (
    ConfigError,
    Corrupt,
    EditNotFound,
    KeyExists,
    KeyNotFound,
    KvllmError,
    StaleHead,
    StoreError,
)
from kvllm.records import BackupResult, Edit, GcReport, StoredFact, VerifyReport
from kvllm.store import artefacts, files, guard, history, opening, rows, schema
from kvllm.store.artefacts import Delta
from kvllm.store.failpoints import failpoint
from kvllm.store.lock import WriterLock
from kvllm.store.opening import (
    CREATING_NAME,
    DELTAS_NAME,
    LOCK_NAME,
    SNAPSHOT_FILE,
    SNAPSHOTS_NAME,
    WRITER_SECONDS,
)
from kvllm.store.rows import Base, NewEdit
from kvllm.store.sqlite import LEDGER_NAME, UNCONFIRMED, sqlite3, translate, translated

if TYPE_CHECKING:
    from types import TracebackType

_RESERVED = ("head", "base")


class Store:
    """One opened knowledge base; make it with `Store.create` or `Store.open`.

    Attributes:
        path: The folder.
        readonly: Whether it was opened for reading only.
        base: The pinned base model.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, base: Base, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self.base = base
        self._db: sqlite3.Connection | None = connection
        self._pid = os.getpid()
        self._mutex = threading.RLock()  # one connection, one transaction at a time
        self._lock = WriterLock(path / LOCK_NAME)
        self._guard = guard.Guard(path)

    # ---------------------------------------------------------------- create, open, close

    @classmethod
    def create(cls, path: str | os.PathLike[str], base: Base, settings: Mapping[str, Any]) -> Store:
        """Make a new, empty knowledge base and open it.

        The ledger is built under a temporary name and renamed last: killed half-way, there is no knowledge base, and
        the same call does it again.

        Args:
            path: The folder; it and its parents are made. It must not exist, or be empty.
            base: The model that everything is taught to.
            settings: JSON values by name.

        Raises:
            StoreError: The folder holds something else, or already is a knowledge base.
            ConfigError: The base or the settings hold what cannot be stored.
        """
        folder = Path(path).expanduser()
        opening.check_base(base)
        written = {
            rows.checked(name, "A setting's name"): rows.dumped(rows.plain(value), f"The setting {name}")
            for name, value in settings.items()
        }
        _refuse_reserved(settings)
        with translated(folder, "Creating the knowledge base"):
            opening.refuse_foreign(folder)
            missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            failpoint("create.folder")
            lock = WriterLock(folder / LOCK_NAME)
            lock.acquire(timeout=WRITER_SECONDS)
            try:
                opening.refuse_foreign(folder)  # another process may have been faster
                opening.build(folder, base, written)
                with translated(folder, "Creating the knowledge base", UNCONFIRMED):
                    files.fsync_folder(folder)
                    for made in missing:
                        files.fsync_folder(made.parent)
            except BaseException:
                opening.undo_create(folder, remove_folder=folder in missing)
                raise
            finally:
                lock.release()
        failpoint("create.done")
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str], readonly: bool = False) -> Store:
        """Open an existing knowledge base.

        Read-only never migrates, locks or creates a file; a ledger of an older kvllm is read as it is, and upgraded by
        the first write. One exception: if a writer was killed within a transaction,
        SQLite must first roll its journal back, which is done if the folder can be written.

        Raises:
            StoreNotFound: There is none at the path.
            StoreError: The path is something else, or a newer kvllm made it.
            Corrupt: The ledger is damaged.
        """
        folder = Path(path).expanduser()
        ledger = opening.find_ledger(folder)
        with translated(folder, "Opening the knowledge base"):
            connection = opening.connect_recovered(ledger, readonly=readonly)
            try:
                opening.identify(connection, folder)
                with history.snapshot(connection):
                    guard.Guard(folder).state(connection)
                    base = opening.read_base(connection, folder)
            except BaseException:
                connection.close()
                raise
        return cls(folder, connection, base, readonly=readonly)

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Say whether there is a ledger at the path (whether it can be opened is another question)."""
        return (Path(path).expanduser() / LEDGER_NAME).is_file()

    def close(self) -> None:
        """Close the ledger; closing twice is harmless."""
        with self._mutex:
            if self._db is not None:
                self._db.close()
                self._db = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {self.path}{' (read-only)' if self.readonly else ''}>"

    # ---------------------------------------------------------------- settings and head

    @property
    def settings(self) -> dict[str, Any]:
        """The knowledge base's settings, by name."""
        with self._reading("Reading the settings") as db:
            found = db.execute("SELECT name, value FROM settings ORDER BY rowid").fetchall()
        return {
            name: rows.loaded(value, f"setting {name!r}")
            for name, value in found
            if not name.startswith(guard.RESERVED)
        }

    def set_settings(self, **settings: Any) -> None:
        """Set some settings to JSON values; the others stay."""
        written = [
            (rows.checked(name, "A setting's name"), rows.dumped(rows.plain(value), f"The setting {name}"))
            for name, value in settings.items()
        ]
        _refuse_reserved(settings)
        with self._transaction("Changing the settings") as db:
            # plain UPDATE and INSERT keep the order of names
            for name, value in written:
                if not db.execute("UPDATE settings SET value = ? WHERE name = ?", (value, name)).rowcount:
                    db.execute("INSERT INTO settings (name, value) VALUES (?, ?)", (name, value))

    def head(self) -> int:
        """Return the newest edit's id; 0 is the untouched base."""
        with self._reading("Reading the head") as db:
            return history.head(db)

    # ---------------------------------------------------------------- edits and tags

    def edit(self, edit_id: int) -> Edit:
        """Return one edit.

        Raises:
            EditNotFound: There is none with the id; 0, the base, is no edit.
        """
        with self._reading("Reading an edit") as db:
            if 1 <= edit_id <= history.head(db):
                self._guard.edits(db, [edit_id])
            found = rows.read_edits(db, edit_id, edit_id)
        if not found:
            raise EditNotFound(f"There is no edit {edit_id} in {self.path}; see `kvllm history`.")
        return found[0]

    def history(self, limit: int | None = None, light: bool = False) -> list[Edit]:
        """Return the edits, oldest first.

        Args:
            limit: Only the newest so many.
            light: Leave `report` and `config` empty, which is much faster.
        """
        with self._reading("Reading the history") as db, history.snapshot(db):
            head = history.head(db)
            first = 1 if limit is None else max(1, head - max(0, limit) + 1)
            self._guard.edits(db, range(first, head + 1))
            return rows.read_edits(db, first, head, light=light)

    def resolve(self, ref: int | str) -> int:
        """Return the edit id that a person means: an id (12, "12"), a tag, "head", or "base" (0).

        Raises:
            EditNotFound: Nothing has the name; similar tags are named.
        """
        text = unicodedata.normalize("NFC", str(ref).strip())
        head = self.head()
        if text == "head":
            return head
        if text == "base":
            return 0
        if text.isascii() and text.isdigit():
            edit_id = int(text) if len(text) < 19 else head + 1
            if edit_id <= head:
                return edit_id
            raise EditNotFound(f"There is no edit {text} in {self.path}; the newest is {head}.")
        tags = self.tags()
        if text in tags:
            return tags[text]
        raise EditNotFound(f"No edit or tag is called {text!r} in {self.path}; {_near_tags(text, tags)}")

    def tag(self, name: str, edit_id: int, *, move: bool = False) -> None:
        """Give an edit (or the base, 0) a name.

        Args:
            name: The tag.
            edit_id: What it points to.
            move: Take it from the edit that has it, if one does.

        Raises:
            ConfigError: The name is not 1-64 letters, digits, '.', '_' or '-', or is a number, "head" or "base".
            KeyExists: The tag is already taken, and not to be moved.
            EditNotFound: There is no such edit.
        """
        name = _checked_tag(name)
        with self._transaction("Tagging") as db:
            taken = db.execute("SELECT coalesce(edit_id, 0) FROM tags NOT INDEXED WHERE name = ?", (name,)).fetchone()
            if taken and not move:
                raise KeyExists(
                    f"The tag {name!r} already points to edit {taken[0]}; nothing was changed. Move it with --move (in "
                    "Python move=True), or take another name.",
                    key=name,
                )
            if not 0 <= edit_id <= history.head(db):
                raise EditNotFound(f"There is no edit {edit_id} to tag in {self.path}; nothing was changed.")
            if taken:
                db.execute(
                    "UPDATE tags SET edit_id = ?, created_at = ? WHERE name = ?", (edit_id or None, rows.now(), name)
                )
            else:
                db.execute(
                    "INSERT INTO tags (name, edit_id, created_at) VALUES (?, ?, ?)", (name, edit_id or None, rows.now())
                )
            failpoint("tag.inserted")
        failpoint("tag.committed")

    def untag(self, name: str) -> int:
        """Remove a tag and return the edit (or the base, 0) that it pointed to, which stays as it is.

        Raises:
            EditNotFound: There is no such tag; similar ones are named.
        """
        name = unicodedata.normalize("NFC", _bindable(name))
        with self._transaction("Removing a tag") as db:
            tags = dict(db.execute("SELECT name, coalesce(edit_id, 0) FROM tags NOT INDEXED").fetchall())
            if name not in tags:
                near = _near_tags(name, tags)
                raise EditNotFound(f"No tag is called {name!r} in {self.path}; nothing was changed, {near}")
            db.execute("DELETE FROM tags WHERE name = ?", (name,))
            failpoint("tag.removed")
        failpoint("tag.committed")
        return int(tags[name])

    def tags(self) -> dict[str, int]:
        """Return tag → edit id (0: the base), oldest first."""
        with self._reading("Reading the tags") as db:
            return dict(
                db.execute(
                    "SELECT name, coalesce(edit_id, 0) FROM tags NOT INDEXED ORDER BY created_at, rowid"
                ).fetchall()
            )

    # ---------------------------------------------------------------- facts

    def facts(self, at: int | None = None) -> list[StoredFact]:
        """Return the live facts, in the order in which their keys came in (an update keeps the place).

        Args:
            at: The edit whose state is meant; default: the head.
        """
        with self._reading("Listing the facts") as db, history.snapshot(db):
            if at is None or at == history.head(db):
                found = db.execute(
                    f"SELECT {rows.FACT_COLUMNS} FROM live_facts NOT INDEXED JOIN facts "
                    "ON facts.id = live_facts.fact_id ORDER BY facts.ordinal"
                ).fetchall()
                (expected,) = db.execute("SELECT count(*) FROM live_facts NOT INDEXED").fetchone()
            else:
                self._check_edit(db, at)
                self._guard.history(db, at)
                (expected,) = db.execute(f"SELECT count(*) FROM ({history.LIVE_AT})", (at,)).fetchone()
                found = db.execute(
                    f"SELECT {rows.FACT_COLUMNS} FROM facts WHERE id IN ({history.LIVE_AT}) ORDER BY ordinal",
                    (at,),
                ).fetchall()
            self._guard.facts(db, [(row[0], row[1]) for row in found], expected=expected)
        return [rows.fact_from_row(row) for row in found]

    def fact(self, key: str, at: int | None = None) -> StoredFact:
        """Return the live fact with exactly this key.

        Raises:
            KeyNotFound: There is none; similar live keys are its `suggestions`.
        """
        keys: Sequence[str]
        if at is None:
            with self._reading("Reading a fact") as db, history.snapshot(db):
                # No index: one that lost an entry would deny a fact that is there.
                live = dict(db.execute("SELECT key, fact_id FROM live_facts NOT INDEXED").fetchall())
                if key in live:
                    found = db.execute(f"SELECT {rows.FACT_COLUMNS} FROM facts WHERE id = ?", (live[key],)).fetchall()
                    self._guard.facts(db, [(row[0], row[1]) for row in found], expected=1)
                    return rows.fact_from_row(found[0])
                keys = list(live)
        else:
            state = {fact.key: fact for fact in self.facts(at)}
            if key in state:
                return state[key]
            keys = tuple(state)
        near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see `kvllm ls`."
        when = "" if at is None else f" at edit {at}"
        raise KeyNotFound(f"No fact has the key {key!r}{when}; {hint}", key=key, suggestions=near)

    def has(self, key: str) -> bool:
        """Say whether a live fact has exactly this key."""
        with self._reading("Looking for a key") as db:
            found = db.execute("SELECT 1 FROM live_facts NOT INDEXED WHERE key = ?", (_bindable(key),)).fetchone()
            return found is not None

    def count(self) -> int:
        """Return how many facts are live."""
        with self._reading("Counting the facts") as db:
            return int(db.execute("SELECT count(*) FROM live_facts NOT INDEXED").fetchone()[0])

    def fact_versions(self, key: str | None = None) -> list[StoredFact]:
        """Return every version a key (None: any key) ever had, oldest first; empty for a key never stored."""
        with self._reading("Reading the versions of facts") as db:
            self._guard.history(db)
            query = f"SELECT {rows.FACT_COLUMNS} FROM facts NOT INDEXED"
            if key is None:
                found = db.execute(f"{query} ORDER BY id").fetchall()
            else:
                found = db.execute(f"{query} WHERE key = ? ORDER BY id", (_bindable(key),)).fetchall()
            self._guard.facts(db, [(row[0], row[1]) for row in found])
        return [rows.fact_from_row(row) for row in found]

    # ---------------------------------------------------------------- commit

    def commit(
        self, new: NewEdit, delta: Mapping[str, bytes] | None, *, max_norm: float | None = artefacts.MAX_NORM
    ) -> Edit:
        """Make an edit part of the history and move the head to it, or change nothing.

        Args:
            new: What happened.
            delta: The files of its weight change; None for a rollback (or where the weights stay as they are).
            max_norm: See `check_delta`.

        Returns:
            The edit as it stands in the ledger.

        Raises:
            StaleHead: The head is no longer `new.parent`.
            Untrusted: The delta holds what it must not.
            KeyExists, KeyNotFound, ConfigError: The edit does not fit the live facts, or cannot be stored.
            Busy, OutOfResources: Nothing was changed; an OutOfResources or OSError is never retried.
        """
        rows.check_new_edit(new)
        if delta is not None:
            if new.op == "rollback":
                raise ConfigError("A rollback has no delta of its own; nothing was committed.")
            artefacts.check_delta(delta, max_norm=max_norm)
        with self.writer(timeout=WRITER_SECONDS), translated(self.path, "Committing the edit"):
            failpoint("commit.begin")
            with self._reading("Reading the head") as db:
                self._check_parent(db, new)
            sha256, brought = (None, False) if delta is None else self._store_delta(delta)
            try:
                with self._transaction("Committing the edit") as db:
                    failpoint("commit.transaction.begun")
                    edit_id = self._insert(db, new, sha256, delta)
                    (edit,) = rows.read_edits(db, edit_id, edit_id)  # so that nothing can fail after the COMMIT
                    failpoint("commit.transaction.inserted")
                failpoint("commit.transaction.committed")
            except BaseException:
                if brought and sha256 is not None:
                    self._drop_unowned(sha256)
                raise
        return edit

    def _drop_unowned(self, sha256: str) -> None:
        """Remove the new folder of a failed commit, if it is certain that no row refers to it.

        A COMMIT that was interrupted may have succeeded; asking the ledger settles it. If it cannot be asked, the
        folder stays: an orphan is harmless, a missing delta is not.
        """
        try:
            with self._reading("Looking for the delta") as db:
                owned = db.execute("SELECT 1 FROM deltas WHERE sha256 = ?", (sha256,)).fetchone() is not None
        except KvllmError:
            return
        if not owned:
            shutil.rmtree(self.delta_path(sha256), ignore_errors=True)

    def _check_parent(self, db: sqlite3.Connection, new: NewEdit) -> None:
        head = history.head(db)
        if head != new.parent:
            raise StaleHead(
                f"The edit was made on edit {new.parent}, but the head of {self.path} is now {head}; it was not "
                "committed, repeat it on the new head."
            )

    def _store_delta(self, delta: Mapping[str, bytes]) -> tuple[str, bool]:
        """Bring the files to their final folder, durable and verified; say whether the folder is new."""
        sha256 = artefacts.address(artefacts.listing(delta))
        parent, final = self.path / DELTAS_NAME, self.delta_path(sha256)
        files.sweep(parent)
        files.remove(self.path / CREATING_NAME)  # of a creation killed in its last step
        with self._reading("Looking for the delta") as db:
            owned = db.execute("SELECT 1 FROM deltas WHERE sha256 = ?", (sha256,)).fetchone() is not None
        if os.path.lexists(final):
            if _folder_address(final) == sha256:  # trained before with the same result, or an orphan of a kill
                _fsync_all(final)
                files.fsync_folder(parent)
                return sha256, False
            if owned:
                raise Corrupt(
                    f"The delta {sha256[:12]} is already in {self.path} with other content; nothing was committed, run "
                    "`kvllm verify`."
                )
            files.remove(final)
        incoming = files.write_folder(parent, delta, reached=lambda step: failpoint(f"commit.delta.{step}"))
        try:
            os.rename(incoming, final)
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        try:
            failpoint("commit.delta.renamed")
            files.fsync_folder(parent)
            failpoint("commit.delta.folder_synced")
            if _folder_address(final) != sha256:
                raise Corrupt(
                    f"The delta {sha256[:12]} reads back with other content than was written to {self.path}; nothing "
                    "was committed, check the disk."
                )
            failpoint("commit.delta.verified")
        except BaseException:
            if not owned:
                shutil.rmtree(final, ignore_errors=True)
            raise
        return sha256, not owned

    def _insert(
        self, db: sqlite3.Connection, new: NewEdit, sha256: str | None, delta: Mapping[str, bytes] | None
    ) -> int:
        """Insert everything the edit brings, within the open transaction, and move the head. Returns the edit's id."""
        self._check_parent(db, new)
        if new.target is not None:
            self._check_edit(db, new.target)
        edit_id, created_at = new.parent + 1, rows.now()
        if sha256 is not None and delta is not None:
            self._insert_delta(db, new, sha256, delta, created_at)
        rows.insert_edit(db, edit_id, new, sha256, created_at)
        live: dict[str, int] = dict(db.execute("SELECT key, fact_id FROM live_facts").fetchall())
        after = self._apply(db, new, live, edit_id, created_at)
        ended = sorted(set(live.values()) - set(after.values()))
        begun = sorted(set(after.values()) - set(live.values()))
        db.executemany(
            "INSERT INTO fact_events (fact_id, edit_id, event) VALUES (?, ?, ?)",
            [(fact_id, edit_id, "ends") for fact_id in ended] + [(fact_id, edit_id, "begins") for fact_id in begun],
        )
        db.executemany("DELETE FROM live_facts WHERE fact_id = ?", [(fact_id,) for fact_id in ended])
        keys = {fact_id: key for key, fact_id in after.items()}
        db.executemany("INSERT INTO live_facts (fact_id, key) VALUES (?, ?)", [(i, keys[i]) for i in begun])
        before = rows.base_seal(db)
        if edit_id > 1:
            (before,) = db.execute("SELECT sha256 FROM seals WHERE edit_id = ?", (edit_id - 1,)).fetchone()
        db.execute(
            "INSERT INTO seals (edit_id, sha256, version) VALUES (?, ?, ?)",
            (edit_id, rows.edit_seal(db, edit_id, before), rows.SEAL_VERSION),
        )
        moved = db.execute("UPDATE ledger SET head = ? WHERE coalesce(head, 0) = ?", (edit_id, new.parent)).rowcount
        if moved != 1:
            raise StaleHead(f"The head of {self.path} moved; the edit was not committed, repeat it.")
        return edit_id

    def _insert_delta(
        self, db: sqlite3.Connection, new: NewEdit, sha256: str, delta: Mapping[str, bytes], created_at: str
    ) -> None:
        if db.execute("SELECT 1 FROM deltas WHERE sha256 = ?", (sha256,)).fetchone():
            return  # an earlier edit brought the same bytes
        listing = artefacts.listing(delta)
        db.execute(
            "INSERT INTO deltas (sha256, bytes, norm, rank, modules, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (sha256, sum(size for size, _ in listing.values()), float(new.norm), new.rank, new.modules, created_at),
        )
        db.executemany(
            "INSERT INTO delta_files (delta, name, bytes, sha256) VALUES (?, ?, ?, ?)",
            [(sha256, name, size, digest) for name, (size, digest) in listing.items()],
        )

    def _apply(
        self, db: sqlite3.Connection, new: NewEdit, live: Mapping[str, int], edit_id: int, created_at: str
    ) -> dict[str, int]:
        """Insert the new versions and return key → fact id after the edit."""
        if new.op == "rollback":
            assert new.target is not None  # check_new_edit
            self._guard.history(db, new.target)
            return history.state(db, new.target)
        for key in new.retired:
            if key not in live:
                raise KeyNotFound(f"The key {key!r} is not live, so it cannot end; nothing was committed.", key=key)
        after = {} if new.op == "compact" else {k: i for k, i in live.items() if k not in new.retired}
        for fact in new.facts:
            if new.op == "compact" and fact.key not in live:
                raise KeyNotFound(
                    f"The key {fact.key!r} is not live, so compact cannot keep it; nothing was committed.", key=fact.key
                )
            if new.op == "insert" and fact.key in after:
                raise KeyExists(
                    f"The key {fact.key!r} is already stored; nothing was committed, use update.", key=fact.key
                )
            if new.op == "update" and fact.key not in live:
                raise KeyNotFound(
                    f"The key {fact.key!r} is not stored; nothing was committed, use insert.", key=fact.key
                )
            after[fact.key] = rows.insert_fact(
                db, fact, edit_id=edit_id, replaces=live.get(fact.key), created_at=created_at
            )
        return after

    # ---------------------------------------------------------------- deltas

    def chain(self, edit_id: int) -> list[str]:
        """Return the deltas, as sha256, whose sum over the base is the state at an edit, in replay order."""
        with self._reading("Reading the history") as db, history.snapshot(db):
            self._check_edit(db, edit_id)
            self._guard.history(db, edit_id)
            return history.chain(history.links(db), edit_id)

    def delta_path(self, sha: str) -> Path:
        """Return a delta's folder.

        Raises:
            ConfigError: It is not a sha256 in lower-case hex (and might name any folder).
        """
        if not artefacts.is_address(sha):
            raise ConfigError(f"{sha!r} is not the sha256 of a delta.")
        return self.path / DELTAS_NAME / sha

    def read_delta(self, sha: str, verify: bool = True) -> Delta:
        """Return a delta's files.

        Args:
            sha: Its content address.
            verify: Hash every byte, and check header, configuration and numbers as at the commit.

        Raises:
            Corrupt: The files are missing or not those that were committed; the edit that owns them is named.
            Untrusted: They are, but hold what a delta must not (a knowledge base from a stranger).
        """
        folder = self.delta_path(sha)
        with self._reading("Reading a delta") as db:
            recorded = {
                name: (size, digest)
                for name, size, digest in db.execute(
                    "SELECT name, bytes, sha256 FROM delta_files WHERE delta = ?", (sha,)
                )
            }
            owners = [edit_id for (edit_id,) in db.execute("SELECT id FROM edits WHERE delta = ? ORDER BY id", (sha,))]
        owner = f"of edit {', '.join(map(str, owners))}" if owners else "of no edit"
        if set(recorded) != set(artefacts.FILE_NAMES):
            raise Corrupt(f"The ledger of {self.path} has no complete delta {sha[:12]} ({owner}); run `kvllm verify`.")
        if verify and artefacts.address(recorded) != sha:
            raise Corrupt(f"The ledger's record of the delta {sha[:12]} {owner} was altered; run `kvllm verify`.")
        content: dict[str, bytes] = {}
        for name, (size, digest) in recorded.items():
            try:
                if folder.is_symlink():
                    raise OSError("a link stands in its place")
                content[name] = files.read_regular(folder / name, limit=size)
            except OSError as error:
                raise Corrupt(
                    f"The file {name} of the delta {sha[:12]} {owner} cannot be read ({error.strerror or error}); run "
                    f"`kvllm verify {self.path}`."
                ) from error
            if len(content[name]) != size or (verify and files.sha256_of(content[name]) != digest):
                raise Corrupt(
                    f"The file {name} of the delta {sha[:12]} {owner} is not the one that was committed; run "
                    f"`kvllm verify {self.path}`."
                )
        if verify:
            artefacts.check_delta(content)
        return Delta(sha, content)

    # ---------------------------------------------------------------- snapshots

    def write_snapshot(self, edit_id: int, data: bytes | str | os.PathLike[str]) -> Path:
        """Keep the materialised changed tensors of an edit's state, so that opening need not replay everything.

        Args:
            edit_id: The edit.
            data: The content of a safetensors file, or a file to copy.

        Returns:
            Where it lies. A snapshot of the edit that was there before is replaced.
        """
        parent = self.path / SNAPSHOTS_NAME
        final = parent / str(edit_id)
        with self.writer(timeout=WRITER_SECONDS), translated(self.path, "Writing a snapshot"):
            with self._reading("Reading the head") as db:
                if not 1 <= edit_id <= history.head(db):
                    raise EditNotFound(f"There is no edit {edit_id} to take a snapshot of in {self.path}.")
            parent.mkdir(exist_ok=True)
            files.sweep(parent)
            incoming = files.incoming_name(parent)
            try:
                incoming.mkdir()
                if isinstance(data, bytes):
                    files.write_durably(incoming / SNAPSHOT_FILE, data)
                    digest, size = files.sha256_of(data), len(data)
                else:
                    digest, size = files.copy_durably(Path(data), incoming / SNAPSHOT_FILE)
                if size == 0:
                    raise ConfigError("A snapshot must not be empty; nothing was written.")
                files.fsync_folder(incoming)
                failpoint("snapshot.written")
                with self._transaction("Forgetting the old snapshot") as db:
                    db.execute("DELETE FROM snapshots WHERE edit_id = ?", (edit_id,))
                files.remove(final)
                os.rename(incoming, final)
                files.fsync_folder(parent)
                failpoint("snapshot.renamed")
            except BaseException:
                shutil.rmtree(incoming, ignore_errors=True)
                raise
            with self._transaction("Recording a snapshot") as db:
                db.execute(
                    "INSERT INTO snapshots (edit_id, bytes, sha256, created_at) VALUES (?, ?, ?, ?)",
                    (edit_id, size, digest, rows.now()),
                )
            failpoint("snapshot.committed")
        return final / SNAPSHOT_FILE

    def nearest_snapshot(self, edit_id: int) -> tuple[int, Path, int] | None:
        """Return the snapshot from which replaying to an edit is shortest.

        Its chain is a beginning of the edit's chain; the longest wins. Its bytes are not read here.

        Returns:
            (edit of the snapshot, its file, how many deltas of the chain it contains), or None.
        """
        with self._reading("Looking for a snapshot") as db, history.snapshot(db):
            self._check_edit(db, edit_id)
            self._guard.history(db, edit_id)
            links = history.links(db)
            recorded = db.execute("SELECT edit_id, bytes FROM snapshots ORDER BY edit_id DESC").fetchall()
        chain = history.chain(links, edit_id)
        best: tuple[int, Path, int] | None = None
        for snapshot, size in recorded:
            covered = history.chain(links, snapshot)
            if chain[: len(covered)] != covered or (best is not None and len(covered) <= best[2]):
                continue
            file = self._snapshot_file(snapshot)
            try:
                present = file.stat().st_size == size
            except OSError:
                present = False
            if present:
                best = (snapshot, file, len(covered))
        return best

    def read_snapshot(self, edit_id: int) -> bytes | None:
        """Return a snapshot's bytes, or None if there is none, or it is damaged (replay the deltas then)."""
        with self._reading("Reading a snapshot") as db:
            row = db.execute("SELECT bytes, sha256 FROM snapshots WHERE edit_id = ?", (edit_id,)).fetchone()
        if row is None:
            return None
        try:
            content = files.read_regular(self._snapshot_file(edit_id), limit=row[0])
        except OSError:
            return None
        return content if len(content) == row[0] and files.sha256_of(content) == row[1] else None

    def drop_snapshots(self, keep: int = 2) -> int:
        """Remove all but the newest `keep` snapshots; return how many were removed."""
        with self.writer(timeout=WRITER_SECONDS), translated(self.path, "Dropping snapshots"):
            with self._transaction("Dropping snapshots") as db:
                recorded = [i for (i,) in db.execute("SELECT edit_id FROM snapshots ORDER BY edit_id DESC")]
                dropped = recorded[max(0, keep) :]
                db.executemany("DELETE FROM snapshots WHERE edit_id = ?", [(i,) for i in dropped])
            for edit_id in dropped:  # rows first: a folder without a row is harmless
                files.remove(self.path / SNAPSHOTS_NAME / str(edit_id))
        return len(dropped)

    def _snapshot_file(self, edit_id: int) -> Path:
        return self.path / SNAPSHOTS_NAME / str(edit_id) / SNAPSHOT_FILE

    # ---------------------------------------------------------------- cached key vectors

    def vectors(self, encoder: str) -> dict[int, bytes]:
        """Return fact id → cached embedding (bytes as they were put) for one encoder."""
        with self._reading("Reading the key vectors") as db:
            found = db.execute(
                "SELECT fact_id, vector FROM key_vectors NOT INDEXED WHERE encoder = ?", (_bindable(encoder),)
            ).fetchall()
        vectors = {fact_id: rows.vector_of(fact_id, encoder, stored) for fact_id, stored in found}
        return {fact_id: vector for fact_id, vector in vectors.items() if vector is not None}

    def put_vectors(self, encoder: str, vectors: Mapping[int, bytes]) -> None:
        """Cache embeddings of facts' keys, by fact id; they can be computed again at any time."""
        rows.checked(encoder, "An encoder's name")
        put = [(i, encoder, rows.checked_vector(i, encoder, bytes(vector))) for i, vector in vectors.items()]
        with self._transaction("Caching key vectors") as db:
            db.executemany(
                "INSERT OR REPLACE INTO key_vectors (fact_id, encoder, vector) VALUES (?, ?, ?)",
                put,
            )
            guard.note_vectors(db, rows.sha256_of_rows(put))

    # ---------------------------------------------------------------- lock and verify

    @contextmanager
    def writer(self, timeout: float = WRITER_SECONDS) -> Iterator[None]:
        """Hold the writer lock in the block: one process trains and commits at a time. Re-entrant.

        Raises:
            Busy: Another process still holds it after `timeout` seconds.
        """
        self._connection()
        self._refuse_readonly("Writing")
        with translated(self.path, "Taking the writer lock"):
            self._lock.acquire(timeout=timeout)
        try:
            yield
        finally:
            self._lock.release()

    def verify(
        self,
        deep: bool = False,
        *,
        repair: bool = False,
        yes: bool = False,
        tick: Callable[[int, int], None] | None = None,
    ) -> VerifyReport:
        """Compare rows, files and hashes in both directions; damage is reported, never raised.

        Args:
            deep: Read and hash every byte of every delta and snapshot, and check the deltas' numbers.
            repair: First restore what can be restored; see `kvllm.store.repair.repair`. Implies `deep`.
            yes: Let the repair give up committed data where nothing else brings the rest back.
            tick: Called with deltas checked, of how many.
        """
        from kvllm.store.repair import repair as repaired
        from kvllm.store.verify import verify

        with self._mutex:
            if not repair:
                return verify(self.path, self._connection(), deep=deep, tick=tick)
            with self.writer(timeout=WRITER_SECONDS):
                self.close()  # the ledger may be replaced
                try:
                    return repaired(self.path, yes=yes, lock=self._lock)
                finally:
                    with translated(self.path, "Opening the knowledge base"):
                        self._db = opening.connect_recovered(self.path / LEDGER_NAME, readonly=False)
                    self._guard = guard.Guard(self.path)

    # ---------------------------------------------------------------- backup and garbage

    def backup(self, target: str | os.PathLike[str], *, tick: Callable[[int, int], None] | None = None) -> BackupResult:
        """Copy the knowledge base to a new or empty folder, as it is at one moment, and verify the copy deeply.

        Neither readers nor a writer are held up; what is committed meanwhile is not in the copy.

        Args:
            target: A new or empty folder.
            tick: Called with deltas copied, of how many.

        Raises:
            StoreError: The folder holds something.
            Corrupt: This knowledge base is damaged; nothing is left at the target.
        """
        from kvllm.store import backup

        folder = Path(target).expanduser()
        made = not folder.exists()
        with self._mutex:
            backup.copy(self.path, self._connection(), folder, tick=tick)
        try:
            with translated(folder, "Making the backup"):
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            with Store.open(folder, readonly=True) as copied:
                report, head = copied.verify(deep=True), copied.head()
            if not report.ok:
                first = next(problem for problem in report.problems if problem.severity == "error")
                kind = StoreError if self.verify().ok else Corrupt
                raise kind(
                    f"The copy of {self.path} does not verify ({first.where}: {first.what}); it was removed, run "
                    "`kvllm verify --deep` on the original."
                )
        except BaseException:
            backup.discard(folder, remove_folder=made)
            raise
        return BackupResult(str(folder), head, report.edits, report.facts, report.deltas, size)

    def gc(self, *, dry_run: bool = False) -> GcReport:
        """Remove what no history needs: deltas of no edit, temporary names, all but the newest snapshots.

        Args:
            dry_run: Only say what would be removed; takes no lock.
        """
        from kvllm.store import gc

        if dry_run:
            with self._reading("Looking for garbage") as db:
                return gc.report(gc.find_garbage(self.path, db), dry_run=True)
        with self.writer(timeout=WRITER_SECONDS), translated(self.path, "Removing garbage"):
            with self._transaction("Forgetting old snapshots") as db:
                garbage = gc.find_garbage(self.path, db)
                forgotten = [(gc.snapshot_of(item),) for item in garbage]
                db.executemany("DELETE FROM snapshots WHERE edit_id = ?", forgotten)
            failpoint("gc.forgotten")  # rows first: a folder without a row is harmless
            gc.remove(self.path, garbage)
        return gc.report(garbage, dry_run=False)

    # ---------------------------------------------------------------- the connection

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreError(f"{self.path} has been closed; open it again.")
        if os.getpid() != self._pid:
            # https://www.sqlite.org/howtocorrupt.html, section 2.6
            raise StoreError(f"{self.path} was opened in another process (before a fork); open it again in this one.")
        return self._db

    def _refuse_readonly(self, doing: str) -> None:
        if self.readonly:
            raise StoreError(f"{doing} is not possible because {self.path} was opened read-only; nothing was changed.")

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        """Bring an older ledger to the present schema, before the first write and under the writer lock."""
        with translated(self.path, "Upgrading the ledger"):
            if schema.version(connection) >= schema.SCHEMA_VERSION:
                return
            self._lock.acquire(timeout=WRITER_SECONDS)
            try:
                schema.migrate(connection)
            finally:
                self._lock.release()

    def _check_edit(self, db: sqlite3.Connection, edit_id: int) -> None:
        if not 0 <= edit_id <= history.head(db):
            raise EditNotFound(f"There is no edit {edit_id} in {self.path}; the newest is {history.head(db)}.")

    @contextmanager
    def _reading(self, doing: str) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            connection = self._connection()
            with translated(self.path, doing):
                if connection.in_transaction:
                    yield connection
                    return
                with history.snapshot(connection):
                    self._guard.state(connection)
                    yield connection

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            connection = self._connection()
            self._refuse_readonly(doing)
            self._upgrade(connection)
            with translated(self.path, doing):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    self._guard.state(connection)  # damage must not be sealed as if it were meant
                    before = guard.recorded_state_seal(connection)
                    yield connection
                    after = guard.seal_state(connection)
                    try:
                        connection.execute("COMMIT")
                    except sqlite3.Error as error:
                        self._told(error, doing, before, after)
                except BaseException:
                    history.roll_back(connection)
                    raise

    def _told(self, error: sqlite3.Error, doing: str, before: str | None, after: str) -> NoReturn:
        """Raise a COMMIT's error, without saying that nothing was changed if something was.

        The transaction is over once its journal is gone. If only the last sync fails, the one of the folder, SQLite
        reports an error and the change is there.
        """
        connection = self._connection()
        history.roll_back(connection)
        try:
            happened = before != after and guard.recorded_state_seal(connection) == after
        except sqlite3.Error:
            happened = False
        if happened:
            known = translate(error, self.path, doing, UNCONFIRMED)
            if known is not None:
                raise known from error
        raise error


# -------------------------------------------------------------------- small checks


def _checked_tag(name: str) -> str:
    name = unicodedata.normalize("NFC", rows.checked(name, "A tag"))
    # letters, their marks, and numbers of any script
    plain = 1 <= len(name) <= 64 and all(unicodedata.category(c)[0] in "LMN" or c in "._-" for c in name)
    if not plain or name.isdigit() or name in _RESERVED:
        raise ConfigError(
            f"{name!r} cannot be a tag: 1 to 64 letters, digits, '.', '_' or '-', not a number, 'head' or 'base'; "
            "nothing was changed."
        )
    return name


def _near_tags(name: str, tags: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(tags), n=3)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "see `kvllm history`."


def _refuse_reserved(names: Iterable[str]) -> None:
    for name in names:
        if name.startswith(guard.RESERVED):
            raise ConfigError(f"The setting {name!r} begins with a dot, as kvllm's own do; nothing was changed.")


def _bindable(text: str) -> str:
    """Return the text as a query's parameter; what cannot be stored cannot be found, so any absent text will do."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return ""
    return text


def _folder_address(folder: Path) -> str | None:
    """Return the content address of a folder as it is on disk; None if it is no plain folder of files.

    Raises:
        OSError: It cannot be read now, which says nothing about what it holds.
    """
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        listing = {}
        for entry in os.scandir(folder):
            digest, size = files.sha256_of_file(folder / entry.name)
            listing[entry.name] = (size, digest)
    except OSError as error:
        if not files.is_no_file(error):
            raise
        return None
    return artefacts.address(listing)


def _fsync_all(folder: Path) -> None:
    """Make a folder that was found complete durable too: its writer may have been killed before its own fsync."""
    for entry in os.scandir(folder):
        with files.open_regular(folder / entry.name) as handle:
            files.fsync_fd(handle.fd)
    files.fsync_folder(folder)
