"""The store's campaigns: that they find nothing, were as large as promised, and can find something."""

from __future__ import annotations

import pytest

from kvllm.store import failpoints
from tests.robustness import ptrace
from tests.robustness.campaigns import Outcome, shards
from tests.robustness.sizes import SIZE, WHOLE, enough

needs_tracing = pytest.mark.skipif(not ptrace.supported(), reason="system calls can be traced on Linux x86-64 only")


@shards("concurrency")
def test_writers_lose_nothing_and_readers_and_backups_see_committed_states_only(outcome: Outcome) -> None:
    outcome.check()
    for what in ("edits by 2 writers", "states seen by 4 readers", "did not wait and were told exit 7"):
        assert outcome.counts[what] > 0


@needs_tracing
@shards("syscalls")
def test_every_failing_system_call_leaves_the_state_before_or_after(outcome: Outcome) -> None:
    outcome.check()
    calls = outcome.counts["calls"]
    for what in ("failed with EIO", "failed with ENOSPC", "failed with EINTR"):
        assert outcome.counts[what] == calls if WHOLE else outcome.counts[what] >= 2 * outcome.counts["verbs"]
    assert outcome.counts["killed between two calls"] >= enough(calls // 3)


@needs_tracing
@shards("power")
def test_a_power_cut_after_any_call_leaves_the_state_before_or_after(outcome: Outcome) -> None:
    outcome.check()
    assert outcome.counts["different ones"] >= enough(500)


@needs_tracing
@shards("left-out syncs")
def test_the_power_cut_campaign_notices_a_sync_that_was_left_out(outcome: Outcome) -> None:
    outcome.check()
    assert outcome.counts["found without fsync_fd"] > 0
    assert outcome.counts["found without fsync_folder"] > 0


@needs_tracing
@shards("disks")
def test_a_full_disk_is_exit_10_and_the_same_succeeds_once_there_is_room(outcome: Outcome) -> None:
    if outcome.counts["no file system could be mounted"]:
        pytest.skip("no file system may be mounted here; the failing calls of the campaign above fill a disk too")
    outcome.check()


@shards("kill")
def test_no_acknowledged_edit_is_lost_or_torn_by_a_kill(outcome: Outcome) -> None:
    outcome.check()
    kills = outcome.counts["SIGKILLs"]
    assert outcome.counts["acknowledged"] >= kills // 4
    assert outcome.counts["kills within an operation"] >= kills // 4
    assert outcome.counts["recoveries killed"] >= kills // 4


@shards("failpoints")
def test_every_verb_survives_a_kill_at_every_failpoint_and_a_second_one(outcome: Outcome) -> None:
    outcome.check()
    assert {name for name in failpoints.NAMES if not outcome.counts[f"at {name}"]} == set()
    if WHOLE:
        assert outcome.counts["first kills"] == outcome.counts["verbs times failpoints"] >= 60


@shards("corruption")
def test_no_damage_is_served_or_overlooked(outcome: Outcome) -> None:
    outcome.check()
    for what in ("found by verify", "refused by a read", "repaired without consent"):
        assert outcome.counts[what] > 0
    if SIZE >= 0.5:
        for what in ("repaired with consent", "beyond repair, and said so"):
            assert outcome.counts[what] > 0


@shards("model")
def test_the_store_is_a_dictionary_and_a_list(outcome: Outcome) -> None:
    outcome.check()
    examples = outcome.counts["examples of 50 steps"]
    assert outcome.counts["steps"] >= 50 * examples
    assert outcome.counts["edits"] >= 5 * examples
    assert outcome.counts["refusals"] >= 5 * examples


@shards("growth")
def test_opening_is_constant_and_reading_linear_in_the_edits(outcome: Outcome) -> None:
    outcome.check()
    assert outcome.counts["pieces of garbage removed"] >= 8
