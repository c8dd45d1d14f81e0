//! Ids of sessions, which are also their epochs: of two sessions of a device, the one with the greater id is newer, on
//! any nodes.
//!
//! An id has 42 bits of time, 16 bits of the node's tag and 6 bits of a counter. The time is in milliseconds of the
//! Unix epoch, until the year 2109. It is a hybrid logical clock: it never goes back, and follows ids of other nodes
//! unless they are years ahead. docs/adr/0010-session-ids.md has the reasons.

use std::time::Duration;

use crate::{id::SessionId, resume::AHEAD_MAX, time::WallTime};

const NODE_BITS: u32 = 16;
const COUNTER_BITS: u32 = 6;
/// Maximum count within a millisecond. A further session takes the next millisecond.
const COUNT_MAX: u64 = (1 << COUNTER_BITS) - 1;
/// Last millisecond of the field.
const TIME_MAX: u64 = u64::MAX >> (NODE_BITS + COUNTER_BITS);
/// Last time and count. Ids stop growing there.
const LAST_MAX: u64 = TIME_MAX << COUNTER_BITS | COUNT_MAX;
/// Last millisecond that is accepted from a clock or from another node: a year before the end, so that none of them can
/// exhaust the field.
const FOLLOWED_MAX: u64 = TIME_MAX - 366 * 86_400_000;
/// Time that a mark on disk reserves after the latest id.
const RESERVED: Duration = Duration::from_secs(10);
/// The same while ids are ahead of the clock. It is short, so that a node that crashes every second does not move far
/// ahead.
const RESERVED_AHEAD: Duration = Duration::from_secs(1);

/// Tag of a node, in each of its session ids. Drawn once per data directory, or assigned by a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeTag(pub u16);

/// Source of a node's session ids.
#[derive(Debug)]
pub struct SessionIds {
    node: NodeTag,
    /// Time of the latest id, and the number of ids with that time, less one, below it.
    last: u64,
    /// Time up to which ids may have been issued, for the next start.
    marked: u64,
}

impl SessionIds {
    /// Creates ids above all that an earlier process of this node issued. `mark`: the last [`mark`](Self::mark_due)
    /// that was stored.
    #[must_use]
    pub fn new(node: NodeTag, mark: Option<WallTime>) -> Self {
        let marked = mark.map_or(0, followed);
        Self {
            node,
            last: all_of(marked),
            marked,
        }
    }

    /// Whether a stored mark is used for later ids. After a clock that was years ahead for a moment, the mark would put
    /// all later ids years ahead, on all nodes. In that case the node draws another tag instead.
    #[must_use]
    pub fn is_usable(mark: WallTime, wall: WallTime) -> bool {
        mark <= wall + AHEAD_MAX
    }

    #[must_use]
    pub const fn node(&self) -> NodeTag {
        self.node
    }

    /// Returns the next id.
    pub fn next(&mut self, wall: WallTime) -> SessionId {
        let now = followed(wall) << COUNTER_BITS;
        self.last = now.max(LAST_MAX.min(self.last + 1));
        let (time, count) = (self.last >> COUNTER_BITS, self.last & COUNT_MAX);
        SessionId(time << (NODE_BITS + COUNTER_BITS) | u64::from(self.node.0) << COUNTER_BITS | count)
    }

    /// Makes all later ids greater than `seen`, which a node of this cluster issued. An id that is years ahead is
    /// followed for [`AHEAD_MAX`] only.
    pub fn observe(&mut self, seen: SessionId, wall: WallTime) {
        let time = followed(time_of(seen).min(wall + AHEAD_MAX));
        self.last = self.last.max(all_of(time));
    }

    /// Time to store for the next start, in case the clock is set back meanwhile. `None` while the stored one is far
    /// enough ahead.
    #[must_use]
    pub fn mark_due(&self, wall: WallTime) -> Option<WallTime> {
        let (latest, marked) = (self.last_mark(), WallTime::from_unix_ms(self.marked));
        let reserved = if latest > wall { RESERVED_AHEAD } else { RESERVED };
        (latest + reserved / 2 > marked).then(|| latest + reserved)
    }

    /// `mark` is stored.
    pub fn handle_marked(&mut self, mark: WallTime) {
        self.marked = mark.as_unix_ms();
    }

    /// Time of the latest id: the mark of a process that issues no more.
    #[must_use]
    pub const fn last_mark(&self) -> WallTime {
        WallTime::from_unix_ms(self.last >> COUNTER_BITS)
    }
}

/// Time at which a session began, by the clock of its node; later if that node has followed another.
#[must_use]
pub const fn time_of(session: SessionId) -> WallTime {
    WallTime::from_unix_ms(session.0 >> (NODE_BITS + COUNTER_BITS))
}

/// The node that gave an id.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the field has 16 bits")]
pub const fn node_of(session: SessionId) -> NodeTag {
    NodeTag((session.0 >> COUNTER_BITS) as u16)
}

/// The greatest id that is believed at `wall`: later ones are of a clock that was more than [`AHEAD_MAX`] ahead, and are
/// not [followed](SessionIds::observe).
#[must_use]
pub fn newest_believed(wall: WallTime) -> SessionId {
    let time = followed(wall + AHEAD_MAX);
    SessionId(time << (NODE_BITS + COUNTER_BITS) | ((1 << (NODE_BITS + COUNTER_BITS)) - 1))
}

/// The state after all ids of this time.
const fn all_of(time: u64) -> u64 {
    time << COUNTER_BITS | COUNT_MAX
}

fn followed(wall: WallTime) -> u64 {
    wall.as_unix_ms().min(FOLLOWED_MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOON: WallTime = WallTime::from_unix_ms(1_796_000_000_000);

    fn ids(node: u16) -> SessionIds {
        SessionIds::new(NodeTag(node), None)
    }

    fn after(wall: WallTime, ms: i64) -> WallTime {
        WallTime::from_unix_ms(wall.as_unix_ms().checked_add_signed(ms).unwrap())
    }

    #[test]
    fn the_layout_of_an_id_is_fixed() {
        let mut ids = ids(0xabcd);

        assert_eq!(ids.next(NOON), SessionId(1_796_000_000_000 << 22 | 0xabcd << 6));
        assert_eq!(ids.next(NOON), SessionId(1_796_000_000_000 << 22 | 0xabcd << 6 | 1));
        let id = ids.next(after(NOON, 7));
        assert_eq!((time_of(id), node_of(id)), (after(NOON, 7), NodeTag(0xabcd)));
    }

    #[test]
    fn the_later_session_is_the_newer_one_on_whichever_node_whenever_that_booted() {
        let (mut booted_late, mut booted_early) = (ids(1), ids(2));
        let early = booted_early.next(NOON);

        let first = booted_late.next(after(NOON, 1_000));
        let second = booted_early.next(after(NOON, 1_001));
        let third = booted_late.next(after(NOON, 1_002));

        assert!(early < first && first < second && second < third);
    }

    #[test]
    fn two_nodes_never_give_one_id_in_the_same_millisecond() {
        let (mut one, mut other) = (ids(1), ids(2));

        let ones: Vec<SessionId> = (0..64).map(|_| one.next(NOON)).collect();

        assert!((0..64).all(|_| !ones.contains(&other.next(NOON))));
    }

    #[test]
    fn a_burst_within_a_millisecond_borrows_from_the_next() {
        let mut ids = ids(1);

        let burst: Vec<SessionId> = (0..65).map(|_| ids.next(NOON)).collect();

        assert!(burst.is_sorted_by(|left, right| left < right));
        assert_eq!(time_of(burst[63]), NOON);
        assert_eq!(time_of(burst[64]), after(NOON, 1));
        assert_eq!(time_of(ids.next(after(NOON, 2))), after(NOON, 2));
    }

    #[test]
    fn a_clock_that_is_set_back_between_starts_reverses_nothing() {
        let mut before = ids(1);
        before.next(NOON);
        let mark = before.mark_due(NOON).unwrap();
        before.handle_marked(mark);
        let last = before.next(after(NOON, 10_000));
        let hour_before = after(NOON, -3_600_000);

        let mut crashed = SessionIds::new(NodeTag(1), Some(mark));
        let mut stopped = SessionIds::new(NodeTag(1), Some(before.last_mark()));
        let (after_crash, after_stop) = (crashed.next(hour_before), stopped.next(hour_before));

        assert!(after_crash > last && after_stop > last);
        // Not further ahead than needed, and not for longer than needed.
        assert_eq!(time_of(after_stop), after(NOON, 10_001));
        assert_eq!(time_of(crashed.next(after(NOON, 60_000))), after(NOON, 60_000));
    }

    #[test]
    fn marks_are_due_before_ids_reach_them_and_not_for_each_id() {
        let mut ids = ids(1);
        ids.next(NOON);
        let mark = ids.mark_due(NOON).unwrap();
        ids.handle_marked(mark);

        ids.next(after(NOON, 5_000));
        assert_eq!(ids.mark_due(after(NOON, 5_000)), None);
        ids.next(after(NOON, 5_001));
        assert_eq!(ids.mark_due(after(NOON, 5_001)), Some(after(NOON, 15_001)));

        // A node that crashes repeatedly reserves little each time.
        let crashed = SessionIds::new(NodeTag(1), Some(mark));
        assert_eq!(crashed.mark_due(NOON), Some(after(mark, 1_000)));
    }

    #[test]
    fn a_node_whose_clock_is_behind_follows_what_it_sees() {
        let (mut ahead, mut behind) = (ids(2), ids(1));
        let seen = ahead.next(after(NOON, 3_600_000));

        behind.observe(seen, NOON);
        let newer = behind.next(NOON);

        assert!(newer > seen);
        assert_eq!(time_of(newer), after(NOON, 3_600_001));
        ahead.observe(newer, NOON);
        assert!(ahead.next(NOON) > newer);
    }

    #[test]
    fn ids_of_earlier_versions_are_older() {
        // Milliseconds of the start, and a counter of 20 bits.
        let earlier = SessionId(NOON.as_unix_ms() << 20 | 0xf_ffff);
        let mut ids = ids(0);

        ids.observe(earlier, NOON);

        let next = ids.next(NOON);
        assert!(next > earlier);
        assert_eq!(time_of(next), NOON);
    }

    #[test]
    fn a_clock_at_the_end_of_time_does_not_exhaust_the_ids() {
        let mut ids = ids(1);
        ids.observe(SessionId(u64::MAX), WallTime::from_unix_ms(u64::MAX));
        let first = ids.next(WallTime::from_unix_ms(u64::MAX));

        let later: Vec<SessionId> = (0..200).map(|_| ids.next(WallTime::from_unix_ms(u64::MAX))).collect();

        assert!(later.is_sorted_by(|left, right| left < right));
        assert!(later[0] > first);
    }

    #[test]
    fn each_id_that_is_believed_can_be_followed() {
        let mut ids = ids(1);
        let newest = newest_believed(NOON);

        ids.observe(newest, NOON);

        assert!(ids.next(NOON) > newest);
        assert_eq!(time_of(newest), after(NOON, 86_400_000));
        assert!(newest_believed(WallTime::from_unix_ms(u64::MAX)) < SessionId(u64::MAX));
    }

    #[test]
    fn a_clock_that_was_years_ahead_for_a_moment_is_not_followed_for_years() {
        let year_2100 = WallTime::from_unix_ms(4_102_444_800_000);
        let (mut poisoned, mut other) = (ids(2), ids(1));

        other.observe(poisoned.next(year_2100), NOON);

        assert!(time_of(other.next(NOON)) <= after(NOON, 86_400_001));
        assert!(!SessionIds::is_usable(poisoned.last_mark(), NOON));
        assert!(SessionIds::is_usable(after(NOON, 86_400_000), NOON));
    }

    proptest! {
        #[test]
        fn ids_of_a_node_grow_whatever_its_clock_and_its_neighbours_do(
            steps in prop::collection::vec((any::<bool>(), 0_u64..(1 << 42), any::<u16>()), 1..100),
        ) {
            let mut ids = ids(7);
            let mut last = SessionId(0);
            for (is_seen, ms, node) in steps {
                if is_seen {
                    let seen = SessionId(ms.min(FOLLOWED_MAX) << 22 | u64::from(node) << 6 | 63);
                    ids.observe(seen, WallTime::from_unix_ms(1 << 42));
                    last = last.max(seen);
                } else {
                    let next = ids.next(WallTime::from_unix_ms(ms));
                    prop_assert!(next > last);
                    last = next;
                }
            }
        }
    }
}
