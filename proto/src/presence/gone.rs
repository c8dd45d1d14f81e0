//! What the end of a process means for the devices whose sockets it held: whether another node is gone, what is left of
//! its sessions, and when a device that did not return is offline.
//!
//! Start with [`fate`].

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Cause, Known, Presence,
    known::{Boot, return_due},
    observer::Observed,
};
use crate::{
    epoch::{NodeTag, node_of},
    id::{DeviceId, SessionId},
};

/// Time for which the row of another node stays as it is, while this node writes its own, until that node is gone.
pub const GONE_AFTER: Duration = Duration::from_secs(60);
/// Time between two reads of the rows beyond which all are watched from the beginning: the database may have been away from
/// everyone.
const READ_GAP_MAX: Duration = Duration::from_secs(30);
/// Maximum number of devices that are given up in one step.
pub const GIVEN_UP_MAX: usize = 1_000;
/// Maximum time that one step adds to the time which devices had for their return.
const STEP_MAX: Duration = Duration::from_secs(2);

/// What the database says about a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sign {
    /// Its last run that has written.
    pub boot: Boot,
    /// When it wrote last, by the database's clock. `None` if another node found it gone since.
    pub written: Option<i64>,
    /// Whether that is long ago.
    pub is_late: bool,
}

/// Why the socket behind a stored state is gone, for a node that takes over what is stored. `None`: this run holds it,
/// or a node that is not known to be gone.
///
/// `is_alone`: there are no other nodes. Then each other tag is an earlier one of this node.
#[must_use]
pub fn fate(session: SessionId, boot: Boot, signs: &[Sign], is_alone: bool) -> Option<Cause> {
    if boot.has(session) {
        return None;
    }
    if boot.is_older(session) || is_alone {
        return Some(Cause::NodeRestarted);
    }
    match holder(session, signs) {
        Some(sign) if sign.written.is_none() => Some(Cause::NodeLost),
        // It has a later run, which takes care of it.
        Some(_) => None,
        // No node ever writes a state before its own row.
        None => Some(Cause::NodeLost),
    }
}

/// Why it can't be known now whether a node still has the socket of a session. Only for an answer: nothing follows from
/// it. `None`: it has.
#[must_use]
pub fn doubt(session: SessionId, signs: &[Sign]) -> Option<Cause> {
    match holder(session, signs) {
        Some(sign) if sign.written.is_none() || sign.is_late => Some(Cause::NodeLost),
        Some(sign) if sign.boot.is_older(session) => Some(Cause::NodeRestarted),
        Some(_) => None,
        None => Some(Cause::NodeLost),
    }
}

fn holder(session: SessionId, signs: &[Sign]) -> Option<&Sign> {
    signs.iter().find(|sign| sign.boot.node == node_of(session))
}

/// Whether this node claims a device whose socket it holds, although the database has a greater epoch of it. Not while
/// another node has a socket of the device as well.
#[must_use]
pub fn claims(stored: &Known, signs: &[Sign]) -> bool {
    !stored.is_held() || doubt(stored.epoch, signs).is_some()
}

/// Whether a device of which this node has the state `known` belongs to another node since, by what is stored: it had a
/// newer session there, or its node is back.
#[must_use]
pub fn has_moved(known: &Known, stored: &Known, boot: Boot, signs: &[Sign]) -> bool {
    let is_newer = stored.epoch > known.epoch;
    let is_back =
        stored.epoch == known.epoch && node_of(stored.epoch) != boot.node && doubt(stored.epoch, signs).is_none();
    !known.is_held() && (is_newer || is_back)
}

/// What has become of a device that did not return to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Return {
    /// It is offline.
    NotBack,
    /// Another node knows more, or it was deleted: this node says nothing about it.
    Elsewhere,
}

/// Decides about a device of which this node has the state `known`. `stored`: what the database has of it. `fate`: of
/// the stored session.
#[must_use]
pub fn returned(known: &Known, stored: Option<&Known>, fate: Option<Cause>) -> Return {
    match stored {
        None => Return::Elsewhere,
        Some(stored) if stored.epoch > known.epoch => Return::Elsewhere,
        Some(stored) if stored.epoch < known.epoch => Return::NotBack,
        Some(stored) if fate.is_none() || matches!(stored.presence, Presence::Offline(_)) => Return::Elsewhere,
        Some(_) => Return::NotBack,
    }
}

/// Watches the rows of other nodes, to tell a node that is gone from one that is slow.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    rows: BTreeMap<NodeTag, Row>,
    read_at: Option<Observed>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    written: i64,
    unchanged: Duration,
}

impl Peers {
    /// Takes the rows of other nodes, right after this node wrote its own. Returns the nodes that are gone: their rows
    /// are late, and have not changed for [`GONE_AFTER`] while this node could write.
    pub fn handle_read(&mut self, signs: &[Sign], now: Observed) -> Vec<(NodeTag, i64)> {
        let passed = self.read_at.map_or(Duration::ZERO, |at| now.saturating_since(at));
        self.read_at = Some(now);
        let before = std::mem::take(&mut self.rows);
        let mut gone = Vec::new();
        for sign in signs {
            let Some(written) = sign.written else { continue };
            let unchanged = match before.get(&sign.boot.node) {
                Some(row) if row.written == written && passed <= READ_GAP_MAX => row.unchanged + passed,
                Some(_) | None => Duration::ZERO,
            };
            if sign.is_late && unchanged >= GONE_AFTER {
                gone.push((sign.boot.node, written));
            }
            self.rows.insert(sign.boot.node, Row { written, unchanged });
        }
        gone
    }
}

/// Devices that may return after the end of the process that held their sockets.
///
/// The time that they have passes only while this process runs, and while its node admits devices.
#[derive(Clone, Debug, Default)]
pub struct Awaited {
    /// By the time at which each is given up.
    due: BTreeSet<(Duration, DeviceId)>,
    /// Time that devices had.
    passed: Duration,
    stepped_at: Observed,
}

impl Awaited {
    /// Waits for a device from now on.
    pub fn insert(&mut self, device: DeviceId) {
        self.due.insert((self.passed + return_due(device), device));
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.due.is_empty()
    }

    /// Lets time pass, and returns devices whose time is over, at most [`GIVEN_UP_MAX`]. To be called every second.
    /// They are returned again until they are [removed](Self::remove).
    pub fn handle_step(&mut self, now: Observed, is_admitting: bool) -> Vec<(Duration, DeviceId)> {
        let step = now.saturating_since(self.stepped_at).min(STEP_MAX);
        self.stepped_at = now;
        if !is_admitting {
            return Vec::new();
        }
        self.passed += step;
        let over = self.due.iter().take_while(|(due, _)| *due <= self.passed);
        over.take(GIVEN_UP_MAX).copied().collect()
    }

    /// Waits no longer for devices that [`handle_step`](Self::handle_step) returned.
    pub fn remove(&mut self, devices: &[(Duration, DeviceId)]) {
        for device in devices {
            self.due.remove(device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        epoch::SessionIds,
        presence::{
            Evidence,
            known::{RETURN_GRACE, RETURN_SPREAD},
        },
        time::WallTime,
    };

    const NOON: WallTime = WallTime::from_unix_ms(1_796_000_000_000);
    const RESET: Presence = Presence::Offline(Evidence::Reset);

    fn boot(node: u16, at: WallTime) -> Boot {
        Boot {
            node: NodeTag(node),
            epoch: SessionIds::new(NodeTag(node), None).next(at),
        }
    }

    fn session(node: u16, at: WallTime) -> SessionId {
        SessionIds::new(NodeTag(node), None).next(at)
    }

    fn sign(node: u16, written: Option<i64>, is_late: bool) -> Sign {
        Sign {
            boot: boot(node, NOON),
            written,
            is_late,
        }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn at(seconds: u32) -> Observed {
        Observed::from_units(10 * seconds)
    }

    #[test]
    fn fate_of_own_earlier_runs_is_written_and_that_of_others_only_once_they_are_gone() {
        let (mine, hour_ago, later) = (
            boot(1, NOON),
            WallTime::from_unix_ms(NOON.as_unix_ms() - 3_600_000),
            NOON,
        );
        let restarted = Some(Cause::NodeRestarted);
        assert_eq!(fate(session(1, hour_ago), mine, &[], false), restarted);
        let mut ids = SessionIds::new(NodeTag(1), Some(later));
        assert_eq!(fate(ids.next(later), mine, &[], false), None, "of this run");

        for of_other in [
            session(2, hour_ago),
            session(2, WallTime::from_unix_ms(later.as_unix_ms() + 5)),
        ] {
            // Its row is late: it may be slow.
            for is_late in [false, true] {
                assert_eq!(fate(of_other, mine, &[sign(2, Some(7), is_late)], false), None);
            }
            assert_eq!(
                fate(of_other, mine, &[sign(2, None, true)], false),
                Some(Cause::NodeLost)
            );
            assert_eq!(fate(of_other, mine, &[], false), Some(Cause::NodeLost));
            assert_eq!(
                fate(of_other, mine, &[], true),
                restarted,
                "an earlier tag of the only node"
            );
        }
    }

    #[test]
    fn answer_doubts_a_node_whose_row_is_late_and_an_earlier_run() {
        let hour_ago = WallTime::from_unix_ms(NOON.as_unix_ms() - 3_600_000);
        let live = session(2, WallTime::from_unix_ms(NOON.as_unix_ms() + 5));

        assert_eq!(doubt(live, &[sign(2, Some(7), false)]), None);
        assert_eq!(doubt(live, &[sign(2, Some(7), true)]), Some(Cause::NodeLost));
        assert_eq!(doubt(live, &[sign(2, None, true)]), Some(Cause::NodeLost));
        assert_eq!(doubt(live, &[]), Some(Cause::NodeLost));
        assert_eq!(
            doubt(session(2, hour_ago), &[sign(2, Some(7), false)]),
            Some(Cause::NodeRestarted)
        );
    }

    #[test]
    fn device_whose_socket_is_here_is_claimed_unless_another_node_has_one_as_well() {
        let known = |presence| Known {
            epoch: session(2, WallTime::from_unix_ms(NOON.as_unix_ms() + 5)),
            presence,
            since: NOON,
        };
        let live = [sign(2, Some(7), false)];

        assert!(claims(&known(RESET), &live));
        assert!(claims(&known(Presence::Unknown(Cause::NodeRestarted)), &live));
        assert!(!claims(&known(Presence::Online), &live));
        assert!(!claims(&known(Presence::Unknown(Cause::Path)), &live));
        assert!(claims(&known(Presence::Online), &[sign(2, Some(7), true)]));
    }

    #[test]
    fn device_moved_if_a_newer_session_is_elsewhere_or_its_node_is_back_and_never_while_its_socket_is_here() {
        let (mine, live) = (boot(1, NOON), [sign(2, Some(7), false)]);
        let after = |ms: u64| WallTime::from_unix_ms(NOON.as_unix_ms() + ms);
        let known = |epoch, presence| Known {
            epoch,
            presence,
            since: NOON,
        };
        let (here, there) = (session(1, after(5)), session(2, after(9)));
        let lost = Presence::Unknown(Cause::NodeLost);
        let moved = |known: Known, stored: Known, signs: &[Sign]| has_moved(&known, &stored, mine, signs);

        for presence in [RESET, lost, Presence::Unknown(Cause::NodeRestarted)] {
            assert!(moved(known(here, presence), known(there, Presence::Online), &live));
            assert!(
                !moved(known(there, presence), known(here, RESET), &live),
                "it was here last"
            );
        }
        assert!(!moved(
            known(here, Presence::Online),
            known(there, Presence::Online),
            &live
        ));
        assert!(!moved(known(here, RESET), known(here, RESET), &live), "its own");

        // This node concluded that the other one is lost.
        assert!(moved(known(there, lost), known(there, Presence::Online), &live));
        assert!(!moved(
            known(there, lost),
            known(there, Presence::Online),
            &[sign(2, None, true)]
        ));
    }

    #[test]
    fn node_is_gone_once_its_row_stood_still_for_a_minute_while_this_node_wrote() {
        let mut peers = Peers::default();
        for second in (0..60).step_by(10) {
            assert!(peers.handle_read(&[sign(2, Some(7), true)], at(second)).is_empty());
        }
        assert_eq!(peers.handle_read(&[sign(2, Some(7), true)], at(60)), [(NodeTag(2), 7)]);
        // Another node has found it gone, or it is back.
        assert!(peers.handle_read(&[sign(2, None, true)], at(70)).is_empty());
        assert!(peers.handle_read(&[sign(2, Some(8), false)], at(80)).is_empty());
    }

    #[test]
    fn node_that_is_slow_or_could_not_write_either_is_not_gone() {
        let mut slow = Peers::default();
        for second in (0..600).step_by(10) {
            // It writes every 40 s.
            let sign = sign(2, Some(i64::from(second) / 40), second % 40 >= 30);
            assert!(slow.handle_read(&[sign], at(second)).is_empty());
        }

        // The database is away from both for ten minutes.
        let mut peers = Peers::default();
        for second in [0, 10, 610, 620, 660] {
            assert!(
                peers.handle_read(&[sign(2, Some(7), true)], at(second)).is_empty(),
                "{second}"
            );
        }
        // This process was stopped: observed time stands still.
        assert!(peers.handle_read(&[sign(2, Some(7), true)], at(660)).is_empty());
    }

    fn device(number: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(
            number.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835),
        ))
    }

    #[test]
    fn devices_are_given_up_one_after_another_and_never_before_their_time() {
        let mut awaited = Awaited::default();
        (0..600).for_each(|number| awaited.insert(device(number)));
        let mut counts = Vec::new();
        for second in 0..=370 {
            let over = awaited.handle_step(at(second), true);
            assert!(over.is_empty() || seconds(second.into()) >= RETURN_GRACE);
            counts.push(over.len());
            awaited.remove(&over);
        }

        assert_eq!(counts.iter().sum::<usize>(), 600);
        assert!(counts.iter().all(|count| *count < 30), "{counts:?}");
        assert!(awaited.is_empty());
    }

    #[test]
    fn time_for_a_return_stands_still_while_the_process_is_stopped_or_admits_nobody() {
        let mut awaited = Awaited::default();
        awaited.insert(device(1));
        assert!(awaited.handle_step(at(1), true).is_empty());
        // The observer's clock allows 250 ms for a stop of ten minutes; nobody is admitted for ten minutes more.
        for second in 1..600 {
            assert!(awaited.handle_step(at(second), false).is_empty());
        }
        let (before, after) = (RETURN_GRACE - seconds(3), RETURN_SPREAD + seconds(4));
        let mut second = 600;
        let mut wait = |span: Duration| {
            (0..span.as_secs()).fold(0, |_, _| {
                second += 1;
                awaited.handle_step(at(second), true).len()
            })
        };
        assert_eq!(wait(before), 0);
        assert_eq!(wait(after), 1);
    }

    #[test]
    fn devices_are_given_up_a_bounded_number_at_a_time_and_again_until_that_is_done() {
        let mut awaited = Awaited::default();
        (0..5_000).for_each(|number| awaited.insert(device(number)));
        let mut counts = Vec::new();
        for second in 0..=410 {
            let over = awaited.handle_step(at(second), true);
            counts.push(over.len());
            // The database does not answer at first.
            if second > 400 {
                awaited.remove(&over);
            }
        }
        assert_eq!(counts[370..406], [GIVEN_UP_MAX; 36]);
        assert_eq!(counts[406..], [0; 5]);
        assert!(awaited.is_empty());
    }

    #[test]
    fn device_that_another_node_knows_more_of_is_not_given_up() {
        let known = |epoch, presence| Known {
            epoch: SessionId(epoch),
            presence,
            since: NOON,
        };
        let lost = Presence::Unknown(Cause::NodeRestarted);
        let (mine, gone) = (known(5, lost), Some(Cause::NodeRestarted));

        assert_eq!(returned(&mine, Some(&known(5, lost)), gone), Return::NotBack);
        assert_eq!(
            returned(&mine, Some(&known(4, Presence::Online)), gone),
            Return::NotBack
        );
        assert_eq!(
            returned(&mine, Some(&known(6, Presence::Online)), None),
            Return::Elsewhere
        );
        assert_eq!(returned(&mine, Some(&known(6, RESET)), gone), Return::Elsewhere);
        assert_eq!(returned(&mine, None, None), Return::Elsewhere, "deleted");
        let of_other = known(5, Presence::Unknown(Cause::NodeLost));
        assert_eq!(
            returned(&of_other, Some(&known(5, Presence::Online)), None),
            Return::Elsewhere,
            "its node is back"
        );
        assert_eq!(returned(&of_other, Some(&known(5, RESET)), gone), Return::Elsewhere);
    }
}
