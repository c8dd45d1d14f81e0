//! The newest state that is known of a device: which of two reports about it counts, and what a restart of its node
//! means.
//!
//! Reports may be late and out of order, and wall clocks may be set. So only the epoch decides: it is the id of the
//! session that the report is about. Start with [`Known::handle`].

use std::time::Duration;

use super::{Cause, Evidence, Presence};
use crate::{
    epoch::{NodeTag, node_of},
    id::{DeviceId, SessionId},
    time::WallTime,
};

/// Time that devices have to return after a restart of their node. Then they are offline.
pub const RETURN_GRACE: Duration = Duration::from_mins(5);
/// Span after [`RETURN_GRACE`] over which devices that did not return turn offline, so that not all do at once.
pub const RETURN_SPREAD: Duration = Duration::from_mins(1);

/// Step between the numbers that a node gives to changes of its own sessions. What another node concludes about them gets
/// a number in between. So the next word of the node that holds the socket is newer.
pub const NUMBER_STEP: u64 = 4;

/// State of a device as far as it is known, and the session that it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// The session that this is about.
    pub epoch: SessionId,
    pub presence: Presence,
    /// When this state began.
    pub since: WallTime,
}

impl Known {
    /// The state of a device that no node has seen.
    pub const NEVER_SEEN: Self = Self {
        epoch: SessionId(0),
        presence: Presence::Unknown(Cause::NeverSeen),
        since: WallTime::from_unix_ms(0),
    };

    /// Takes a report if it is about a newer session, or about the same one while that has not ended. Returns whether
    /// it did.
    ///
    /// A newer session that replaces one of a device that is online leaves `since` as it was: the device stayed online.
    pub fn handle(&mut self, report: Self) -> bool {
        let has_ended = matches!(self.presence, Presence::Offline(_));
        let is_old = report.epoch < self.epoch;
        let is_late = report.epoch == self.epoch && (has_ended || report.presence == self.presence);
        if is_old || is_late {
            return false;
        }
        let stays_online = self.presence == Presence::Online && report.presence == Presence::Online;
        let since = if stays_online { self.since } else { report.since };
        *self = Self { since, ..report };
        true
    }

    /// The state after the end of the process that held the device's socket. `None` if this state does not depend on
    /// it.
    #[must_use]
    pub fn left_behind(&self, cause: Cause, at: WallTime) -> Option<Self> {
        let is_waited_for = matches!(
            self.presence,
            Presence::Unknown(Cause::NodeRestarted | Cause::NodeLost | Cause::NeverSeen)
        );
        let depends_on_it = !matches!(self.presence, Presence::Offline(_)) && !is_waited_for;
        depends_on_it.then_some(Self {
            presence: Presence::Unknown(cause),
            since: at,
            ..*self
        })
    }

    /// Whether the process that reported it holds the device's socket.
    #[must_use]
    pub const fn is_held(&self) -> bool {
        matches!(
            self.presence,
            Presence::Online | Presence::Unknown(Cause::Path | Cause::NodeLagging)
        )
    }

    /// Number of this state, if another node than the one that held the socket concludes it. `stored`: number of the
    /// state that it is concluded from.
    #[must_use]
    pub fn concluded_number(&self, stored: u64) -> u64 {
        let step = match self.presence {
            Presence::Online | Presence::Unknown(_) => 1,
            Presence::Offline(_) => 2,
        };
        stored.max(stored - stored % NUMBER_STEP + step)
    }

    /// The state of a device that did not return in time. `None` if it did, or if nobody waits for it.
    #[must_use]
    pub const fn given_up(&self, at: WallTime) -> Option<Self> {
        match self.presence {
            Presence::Unknown(Cause::NodeRestarted | Cause::NodeLost) => Some(Self {
                presence: Presence::Offline(Evidence::NotBack { since: self.since }),
                since: at,
                ..*self
            }),
            Presence::Online | Presence::Offline(_) | Presence::Unknown(_) => None,
        }
    }
}

/// One run of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    pub node: NodeTag,
    /// Less than each session of this run, and greater than those of earlier ones.
    pub epoch: SessionId,
}

impl Boot {
    /// Whether this run holds, or held, the session.
    #[must_use]
    pub fn has(&self, session: SessionId) -> bool {
        node_of(session) == self.node && session >= self.epoch
    }

    /// Whether an earlier run of this node held the session.
    #[must_use]
    pub fn is_older(&self, session: SessionId) -> bool {
        node_of(session) == self.node && session < self.epoch
    }
}

/// Time after a restart at which a device that did not return is offline. It differs from device to device.
#[must_use]
pub fn return_due(device: DeviceId) -> Duration {
    let bytes = device.as_bytes();
    let share = u32::from(u16::from_be_bytes([bytes[13] ^ bytes[1], bytes[15] ^ bytes[5]]));
    RETURN_GRACE + RETURN_SPREAD * share / u32::from(u16::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::epoch::SessionIds;

    const RESET: Presence = Presence::Offline(Evidence::Reset);

    fn known(epoch: u64, presence: Presence, at: u64) -> Known {
        Known {
            epoch: SessionId(epoch),
            presence,
            since: WallTime::from_unix_ms(at),
        }
    }

    #[test]
    fn late_close_of_an_older_session_changes_nothing() {
        let mut state = Known::NEVER_SEEN;
        assert!(state.handle(known(1, Presence::Online, 10)));
        assert!(state.handle(known(2, Presence::Online, 20)));

        assert!(!state.handle(known(1, RESET, 30)));

        assert_eq!(state, known(2, Presence::Online, 10));
    }

    #[test]
    fn what_another_node_concludes_is_newer_than_the_state_and_older_than_the_next_word_of_its_node() {
        let (lost, offline) = (known(1, Presence::Unknown(Cause::NodeLost), 1), known(1, RESET, 1));
        for number in [0, NUMBER_STEP, 40 * NUMBER_STEP] {
            let concluded = [
                number,
                lost.concluded_number(number),
                offline.concluded_number(lost.concluded_number(number)),
                number + NUMBER_STEP,
            ];
            assert!(concluded.is_sorted_by(|left, right| left < right), "{concluded:?}");
            assert_eq!(lost.concluded_number(concluded[1]), concluded[1], "concluded twice");
        }
    }

    #[test]
    fn takeover_leaves_the_device_online_since_it_was() {
        let mut state = known(1, Presence::Online, 10);

        assert!(state.handle(known(2, Presence::Online, 500)));

        assert_eq!((state.epoch, state.since), (SessionId(2), WallTime::from_unix_ms(10)));
    }

    #[test]
    fn clock_that_was_set_by_an_hour_reverses_nothing() {
        let hour = 3_600_000;
        let mut state = known(1, RESET, 2 * hour);

        assert!(state.handle(known(2, Presence::Online, hour)), "set back");
        assert!(state.handle(known(2, RESET, 3 * hour)), "set forward");
        assert!(!state.handle(known(1, Presence::Online, 9 * hour)));

        assert_eq!(state, known(2, RESET, 3 * hour));
    }

    #[test]
    fn session_that_has_ended_does_not_come_back_and_one_that_is_held_does() {
        let mut state = known(1, Presence::Online, 1);

        assert!(state.handle(known(1, Presence::Unknown(Cause::Path), 2)));
        assert!(state.handle(known(1, Presence::Online, 3)));
        assert!(!state.handle(known(1, Presence::Online, 4)));
        assert!(state.handle(known(1, RESET, 5)));
        assert!(!state.handle(known(1, Presence::Online, 6)));
        assert!(!state.handle(known(1, Presence::Unknown(Cause::Path), 7)));

        assert_eq!(state, known(1, RESET, 5));
    }

    #[test]
    fn restart_makes_sessions_unknown_until_they_return_or_the_time_is_over() {
        let mut ids = SessionIds::new(NodeTag(7), None);
        let mut of_other = SessionIds::new(NodeTag(8), None);
        let noon = WallTime::from_unix_ms(1_796_000_000_000);
        let (before, elsewhere) = (ids.next(noon), of_other.next(noon));
        let boot = Boot {
            node: NodeTag(7),
            epoch: ids.next(noon),
        };
        assert!(boot.is_older(before) && !boot.is_older(elsewhere) && !boot.is_older(ids.next(noon)));
        assert!(boot.has(ids.next(noon)) && !boot.has(before) && !boot.has(elsewhere));
        let at = WallTime::from_unix_ms(50);

        let online = known(before.0, Presence::Online, 1);
        let lost = online.left_behind(Cause::NodeRestarted, at).unwrap();
        assert_eq!(lost, known(before.0, Presence::Unknown(Cause::NodeRestarted), 50));
        assert_eq!(
            lost.left_behind(Cause::NodeRestarted, noon),
            None,
            "it is waited for already"
        );
        assert_eq!(known(1, RESET, 1).left_behind(Cause::NodeRestarted, at), None);

        let mut returned = lost;
        assert!(returned.handle(known(ids.next(noon).0, Presence::Online, 60)));
        assert_eq!(returned.given_up(noon), None);
        let offline = lost.given_up(noon).unwrap();
        assert_eq!(offline.presence, Presence::Offline(Evidence::NotBack { since: at }));
        let mut given_up = lost;
        assert!(given_up.handle(offline), "the end of the same session");
    }

    #[test]
    fn devices_that_do_not_return_turn_offline_one_after_another() {
        let due = |n: u128| {
            return_due(DeviceId::from_uuid(uuid::Uuid::from_u128(
                n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835),
            )))
        };
        let mut spans: Vec<Duration> = (0..600).map(due).collect();
        spans.sort_unstable();

        assert!(spans[0] >= RETURN_GRACE && spans[599] <= RETURN_GRACE + RETURN_SPREAD);
        let most_in_a_second = spans
            .iter()
            .map(|from| {
                spans
                    .iter()
                    .filter(|span| (*from..*from + Duration::from_secs(1)).contains(span))
                    .count()
            })
            .max();
        assert!(
            most_in_a_second < Some(30),
            "{most_in_a_second:?} of 600 within one second"
        );
    }

    fn any_presence() -> impl Strategy<Value = Presence> {
        prop_oneof![
            Just(Presence::Online),
            Just(RESET),
            Just(Presence::Unknown(Cause::Path)),
            Just(Presence::Unknown(Cause::NodeRestarted)),
        ]
    }

    proptest! {
        #[test]
        fn any_order_of_reports_ends_with_the_greatest_epoch(
            reports in prop::collection::vec((1_u64..6, any_presence(), any::<u32>()), 1..40),
        ) {
            let mut state = Known::NEVER_SEEN;
            for (epoch, presence, at) in &reports {
                state.handle(known(*epoch, *presence, u64::from(*at)));
            }

            let newest = reports.iter().map(|(epoch, ..)| *epoch).max().unwrap();
            let of_newest: Vec<Presence> =
                reports.iter().filter(|(epoch, ..)| *epoch == newest).map(|(_, presence, _)| *presence).collect();
            prop_assert_eq!(state.epoch, SessionId(newest));
            let expected = if of_newest.contains(&RESET) { RESET } else { of_newest[of_newest.len() - 1] };
            prop_assert_eq!(state.presence, expected);
        }

        #[test]
        fn reports_of_different_sessions_may_come_in_any_order(
            order in Just((1_u64..8).collect::<Vec<_>>()).prop_shuffle(),
            presences in prop::collection::vec(any_presence(), 7),
        ) {
            let mut state = Known::NEVER_SEEN;
            for epoch in &order {
                let presence = presences[usize::try_from(*epoch).unwrap() - 1];
                state.handle(known(*epoch, presence, 9));
            }

            prop_assert_eq!((state.epoch, state.presence), (SessionId(7), presences[6]));
        }
    }
}
