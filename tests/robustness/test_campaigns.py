"""The campaigns: that they find nothing, that they were as large as promised, and that they can find something."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvllm.store import failpoints
from tests.robustness import ptrace
from tests.robustness.campaigns import SIZE, Outcome, asks_for, enough
from tests.robustness.harness import VERBS

Wait = Callable[[str], Outcome]
needs_tracing = pytest.mark.skipif(not ptrace.supported(), reason="system calls can be traced on Linux x86-64 only")


@asks_for("kill")
def test_no_acknowledged_edit_is_lost_or_torn_by_a_kill(campaign: Wait) -> None:
    found = campaign("kill")
    assert found.failures == []
    assert found.counts["kills"] >= enough(2000)
    assert found.counts["acknowledged"] >= enough(500)
    assert found.counts["kills within an operation"] >= enough(500)


@asks_for("failpoints")
def test_every_verb_survives_a_kill_at_every_failpoint_and_a_second_one(campaign: Wait) -> None:
    found = campaign("failpoints")
    assert found.failures == []
    assert {name for name in failpoints.NAMES if not found.counts[f"at {name}"]} == set()
    assert found.counts["first kills"] == found.counts["failpoints reached"] >= 60
    assert found.counts["second kills"] >= 300


@needs_tracing
@asks_for("syscalls")
def test_every_failing_system_call_leaves_the_state_before_or_after(campaign: Wait) -> None:
    found = campaign("syscalls")
    assert found.failures == []
    calls = found.counts["calls"]
    assert calls >= 20 * len(VERBS)
    for what in ("failed with EIO", "failed with ENOSPC", "failed with EINTR"):
        assert found.counts[what] == calls
    assert found.counts["killed between two calls"] >= calls / 3


@needs_tracing
@asks_for("power")
def test_a_power_cut_after_any_call_leaves_the_state_before_or_after(campaign: Wait) -> None:
    found = campaign("power")
    assert found.failures == []
    assert found.counts["states after a power cut"] >= 1000


@needs_tracing
@asks_for("power")
def test_the_power_cut_campaign_notices_a_sync_that_was_left_out(campaign: Wait) -> None:
    found = campaign("power")
    assert found.counts["found without fsync_fd"] > 0
    assert found.counts["found without fsync_folder"] > 0


@needs_tracing
@asks_for("disks")
def test_a_full_disk_is_exit_10_and_the_same_succeeds_once_there_is_room(campaign: Wait) -> None:
    found = campaign("disks")
    if found.counts["no file system could be mounted"]:
        pytest.skip("no file system may be mounted here; the failing calls of the campaign above fill a disk too")
    assert found.failures == []
    assert found.counts["full disks that refused"] >= enough(100)


@asks_for("corruption")
def test_no_damage_is_served_or_overlooked(campaign: Wait) -> None:
    found = campaign("corruption")
    assert found.failures == []
    assert found.counts["bits flipped"] >= enough(2000)
    assert found.counts["structural faults"] >= 500
    assert found.counts["found by verify"] >= enough(1500)
    assert found.counts["refused by a read"] >= enough(1000)
    assert found.counts["repaired"] >= enough(50)


@asks_for("model")
def test_the_store_is_a_dictionary_and_a_list(campaign: Wait) -> None:
    found = campaign("model")
    assert found.failures == []
    assert found.counts["examples"] >= enough(300)
    assert found.counts["steps"] >= 25 * found.counts["examples"]
    assert found.counts["refusals"] > 0
    for what, least in (("edits", 1000), ("reopened", 150)):
        assert found.counts[what] >= int(least * min(SIZE, 1.0)) if SIZE >= 0.1 else True


@asks_for("concurrency")
def test_writers_lose_nothing_and_readers_see_committed_states_only(campaign: Wait) -> None:
    found = campaign("concurrency")
    assert found.failures == []
    assert found.counts["edits by eight writers"] == 400
    assert found.counts["edits by two writers"] > 0
    assert found.counts["states seen by four readers"] > 0
    assert found.counts["locks of killed holders"] == 20
