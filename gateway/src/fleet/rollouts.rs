//! Evidence for staged changes of rules: connects and failures of the devices that a stage treats, and of a control.
//!
//! While no rollout runs, nothing is counted and no lock is taken. Memory is bounded for each of the few rollouts that
//! may run. `seawall_proto::rollout` decides; [`crate::tasks::rollouts`] writes the counts and carries out the steps.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use seawall_proto::{
    close::EndReason,
    cohorts::RETURN_WITHIN,
    id::{DeviceId, RuleId},
    rollout::{Counting, Direction, Rollout, Side, Totals},
    rules::{Rule, Subject},
    time::{Instant, WallTime},
};

use crate::fleet::history::Offline;

/// A refused device that returns within this time, or within the rule's `retry_after` if that is shorter, has failed.
const EARLY_RETURN: Duration = Duration::from_secs(120);
/// Time after the greatest hint by which a device that the rule has sent away is expected back.
const BACK_LATE: Duration = Duration::from_secs(120);
/// Maximum number of refused devices of a rollout whose returns are noticed. A return of a further one is counted as
/// its first.
const REFUSED_MAX: usize = 10_000;
/// Maximum number of models of treated devices, by which the closer control of a release is chosen.
const MODELS_MAX: usize = 16;

/// The running rollouts, with this node's counts.
#[derive(Debug, Default)]
pub struct Rollouts(ArcSwap<Vec<Arc<Watched>>>);

/// A running rollout, in one evidence window.
#[derive(Debug)]
pub struct Watched {
    pub rule: Rule,
    pub window: u64,
    /// Time between two checks of the evidence.
    pub interval: Duration,
    direction: Direction,
    evidence: Mutex<Evidence>,
}

#[derive(Debug)]
struct Evidence {
    counting: Counting,
    /// When a device was refused last.
    refused: HashMap<DeviceId, Instant>,
    models: Vec<Box<str>>,
}

impl Rollouts {
    /// Starts counting for these rollouts, each with its rule in force. Counts of rollouts that were already watched
    /// continue, unless their window has changed.
    pub fn watch(&self, running: impl IntoIterator<Item = (Rule, Rollout)>, now: Instant) {
        let before = self.0.load();
        let watched = running.into_iter().map(|(rule, rollout)| {
            let earlier = before.iter().find(|other| other.rule.id == rule.id);
            if let Some(same) = earlier.filter(|other| other.rule == rule && other.window == rollout.window()) {
                return Arc::clone(same);
            }
            let short = rollout.short_session();
            let counting = match earlier {
                Some(earlier) => earlier.evidence().counting.next(now, short),
                None => Counting::new(now, short),
            };
            Arc::new(Watched {
                window: rollout.window(),
                interval: rollout.interval(),
                direction: rollout.direction(),
                evidence: Mutex::new(Evidence {
                    counting,
                    refused: HashMap::new(),
                    models: Vec::new(),
                }),
                rule,
            })
        });
        self.0.store(Arc::new(watched.collect()));
    }

    #[must_use]
    pub fn watched(&self) -> Arc<Vec<Arc<Watched>>> {
        self.0.load_full()
    }

    /// Whether any rollout is counted.
    #[must_use]
    pub fn is_counting(&self) -> bool {
        !self.0.load().is_empty()
    }

    /// A device connects, whatever becomes of it.
    pub fn arrived(&self, device: DeviceId) {
        for watched in self.0.load().iter() {
            watched.evidence().counting.handle_arrived(device);
        }
    }

    /// A device got a session. `is_repeat`: its last one ended a short time ago, and was not closed by the gateway.
    pub fn opened(&self, subject: &Subject<'_>, is_repeat: bool, (now, wall): (Instant, WallTime)) {
        for watched in self.0.load().iter() {
            watched.opened(subject, is_repeat, (now, wall));
        }
    }

    /// The session that began at `opened_at` ended with this reason. `None`: it
    /// never was one. `is_repeat` as in [`Rollouts::opened`].
    pub fn closed(
        &self,
        subject: &Subject<'_>,
        opened_at: Instant,
        is_repeat: bool,
        reason: Option<EndReason>,
        now: Instant,
    ) {
        if is_repeat {
            // It is already counted as failed.
            return;
        }
        for watched in self.0.load().iter() {
            watched.closed(subject, opened_at, reason, now);
        }
    }

    /// A rule refused a device.
    pub fn refused(&self, rule: RuleId, device: DeviceId, now: Instant) {
        for watched in self.0.load().iter() {
            if watched.rule.id == rule && watched.direction == Direction::Rollout {
                watched.refused(device, now);
            }
        }
    }
}

/// Whether a session that begins now is a repeat: the device's last one ended a short time ago, and was not closed by
/// the gateway.
#[must_use]
pub fn is_repeat(last: Option<&Offline>, now: Instant) -> bool {
    last.is_some_and(|last| now.saturating_since(last.at) < RETURN_WITHIN && last.reason.ended_by().is_failure())
}

impl Watched {
    /// Connects whose outcome is known by now.
    pub fn totals(&self, now: Instant) -> Totals {
        self.evidence().counting.totals(now)
    }

    fn opened(&self, subject: &Subject<'_>, is_repeat: bool, (now, wall): (Instant, WallTime)) {
        if self.rule.is_expired(wall) {
            return;
        }
        let mut evidence = self.evidence();
        let Some(side) = self.side(subject, &evidence.models) else {
            return;
        };
        if let (Side::Treated, Some(model)) = (side, subject.model) {
            let is_new = !evidence.models.iter().any(|known| **known == *model);
            if is_new && evidence.models.len() < MODELS_MAX {
                evidence.models.push(model.into());
            }
        }
        if is_repeat {
            evidence.counting.handle_known(side, true);
        } else {
            evidence.counting.handle_opened(side, now);
        }
    }

    fn closed(&self, subject: &Subject<'_>, opened_at: Instant, reason: Option<EndReason>, now: Instant) {
        let mut evidence = self.evidence();
        let Some(side) = self.side(subject, &evidence.models) else {
            return;
        };
        let Some(device) = subject.device else { return };
        let has_failed = reason.is_some_and(|reason| reason.ended_by().is_failure());
        let counting = &mut evidence.counting;
        counting.handle_ended((device, side), opened_at, has_failed, now);
        let is_sent =
            self.direction == Direction::Rollout && side == Side::Treated && reason == Some(EndReason::Evicted);
        if is_sent {
            counting.handle_sent(device, self.back_by(now));
        }
    }

    /// When a device that the rule sends away now is expected back at the latest.
    fn back_by(&self, now: Instant) -> Instant {
        now + 2 * self.rule.spec.retry_after + BACK_LATE
    }

    fn refused(&self, device: DeviceId, now: Instant) {
        let early = EARLY_RETURN.min(self.rule.spec.retry_after);
        let mut evidence = self.evidence();
        let has_room = evidence.refused.len() < REFUSED_MAX;
        let last = match evidence.refused.get_mut(&device) {
            Some(last) => Some(std::mem::replace(last, now)),
            None if has_room => evidence.refused.insert(device, now),
            None => None,
        };
        let has_failed = last.is_some_and(|last| now.saturating_since(last) < early);
        evidence.counting.handle_known(Side::Treated, has_failed);
        evidence.counting.handle_sent(device, self.back_by(now));
    }

    /// The side of a device that has a session; `None` where it is not compared.
    fn side(&self, subject: &Subject<'_>, models: &[Box<str>]) -> Option<Side> {
        let is_admitted = || subject.device.is_some_and(|device| self.rule.admits(device));
        match (self.direction, self.rule.spec.is_for(subject)) {
            (Direction::Release, true) => is_admitted().then_some(Side::Treated),
            (Direction::Rollout, true) if is_admitted() => Some(Side::Near),
            (Direction::Rollout, true) => Some(Side::Treated),
            (Direction::Rollout, false) => None,
            (Direction::Release, false) => {
                let is_near = subject
                    .model
                    .is_some_and(|model| models.iter().any(|known| **known == *model));
                Some(if is_near { Side::Near } else { Side::Other })
            }
        }
    }

    fn evidence(&self) -> MutexGuard<'_, Evidence> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use seawall_proto::{
        cohorts::Past,
        presence::Evidence,
        rollout::{Counts, Plan},
        rules::{Effect, Match, RuleSpec},
    };
    use uuid::Uuid;

    use super::*;

    const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

    fn at(seconds: u64) -> Instant {
        Instant::from_micros(seconds * 1_000_000)
    }

    /// Watches a rule on version 2 that admits half of it. Sessions of ten seconds and more are proven.
    fn watching(direction: Direction, expires_at: Option<WallTime>) -> (Rollouts, Arc<Watched>) {
        let matches = Match {
            firmware: Some("=2".parse().unwrap()),
            ..Match::default()
        };
        let rule = Rule {
            id: RuleId(Uuid::from_u128(1)),
            spec: RuleSpec {
                admit_percent: 50,
                expires_at,
                ..RuleSpec::new(matches, Effect::Block)
            },
            created_at: WALL,
            revision: 1,
        };
        let plan = Plan {
            stages: vec![50],
            bake: Duration::from_secs(10),
            connects_min: 1,
        };
        let rollout = Rollout::begin(direction, plan, 0, 0, WALL).unwrap();
        let rollouts = Rollouts::default();
        rollouts.watch([(rule, rollout)], at(100));
        let watched = Arc::clone(&rollouts.watched()[0]);
        (rollouts, watched)
    }

    fn subject(device: u128, model: &'static str, firmware: &'static str) -> Subject<'static> {
        Subject {
            device: Some(DeviceId::from_uuid(Uuid::from_u128(device))),
            firmware: Some(firmware),
            model: Some(model),
            tenant: Some("default"),
        }
    }

    /// Ids of devices that the rule admits, or does not.
    fn devices(watched: &Watched, is_admitted: bool) -> impl Iterator<Item = u128> {
        let rule = watched.rule.clone();
        (0..).filter(move |n| rule.admits(DeviceId::from_uuid(Uuid::from_u128(*n))) == is_admitted)
    }

    fn counts(connects: u64, failed: u64) -> Counts {
        Counts { connects, failed }
    }

    #[test]
    fn a_connect_counts_when_its_outcome_is_known() {
        let (rollouts, watched) = watching(Direction::Release, None);
        let admitted: Vec<u128> = devices(&watched, true).take(4).collect();
        let treated = |index: usize| subject(admitted[index], "a", "2");

        for index in 0..4 {
            rollouts.opened(&treated(index), false, (at(110), WALL));
        }
        rollouts.closed(&treated(0), at(110), false, Some(EndReason::ClientGone), at(115));
        rollouts.closed(&treated(1), at(110), false, Some(EndReason::Draining), at(115));
        rollouts.closed(&treated(2), at(110), false, None, at(115));

        assert_eq!(watched.totals(at(116)).treated, counts(1, 1));
        assert_eq!(watched.totals(at(122)).treated, counts(2, 1));
        rollouts.closed(&treated(3), at(110), false, Some(EndReason::ClientGone), at(123));
        assert_eq!(watched.totals(at(140)).treated, counts(2, 1), "it lived long enough");
    }

    #[test]
    fn sessions_of_before_the_window_and_expired_rules_do_not_count() {
        let (rollouts, watched) = watching(Direction::Release, None);
        let device = subject(devices(&watched, true).next().unwrap(), "a", "2");
        rollouts.closed(&device, at(99), false, Some(EndReason::ClientGone), at(101));
        assert_eq!(watched.totals(at(200)), Totals::default());

        let (rollouts, watched) = watching(Direction::Release, Some(WALL));
        rollouts.opened(&device, false, (at(110), WALL));
        assert_eq!(watched.totals(at(200)), Totals::default());
    }

    #[test]
    fn a_repeat_fails_at_once_and_only_once() {
        let (rollouts, watched) = watching(Direction::Release, None);
        let device = subject(devices(&watched, true).next().unwrap(), "a", "2");

        rollouts.opened(&device, true, (at(110), WALL));
        rollouts.closed(&device, at(110), true, Some(EndReason::ClientGone), at(112));

        assert_eq!(watched.totals(at(200)).treated, counts(1, 1));
        let ended = |seconds, reason| Offline {
            since: WALL,
            at: at(seconds),
            reason,
            evidence: Evidence::Reset,
            past: Past::default(),
        };
        assert!(is_repeat(Some(&ended(100, EndReason::ClientGone)), at(699)));
        assert!(!is_repeat(Some(&ended(100, EndReason::ClientGone)), at(700)));
        assert!(!is_repeat(Some(&ended(100, EndReason::Evicted)), at(101)) && !is_repeat(None, at(1)));
    }

    #[test]
    fn the_control_of_a_release_is_of_the_same_model_where_there_is_one() {
        let (rollouts, watched) = watching(Direction::Release, None);
        let (admitted, refused) = (devices(&watched, true).next(), devices(&watched, false).next());
        let open = |subject| rollouts.opened(&subject, false, (at(110), WALL));

        open(subject(admitted.unwrap(), "a", "2"));
        // It had a session before it was blocked.
        open(subject(refused.unwrap(), "a", "2"));
        open(subject(7, "a", "1"));
        open(subject(8, "b", "1"));
        open(subject(9, "b", "3"));

        let totals = watched.totals(at(200));
        assert_eq!(
            (totals.treated, totals.near, totals.others),
            (counts(1, 0), counts(1, 0), counts(2, 0))
        );
    }

    #[test]
    fn the_control_of_a_rollout_is_what_it_matches_and_is_not_enforced_on() {
        let (rollouts, watched) = watching(Direction::Rollout, None);
        let (admitted, refused) = (devices(&watched, true).next(), devices(&watched, false).next().unwrap());

        rollouts.opened(&subject(admitted.unwrap(), "a", "2"), false, (at(110), WALL));
        rollouts.opened(&subject(9, "a", "1"), false, (at(110), WALL));
        let device = DeviceId::from_uuid(Uuid::from_u128(refused));
        for seconds in [110, 111, 400] {
            rollouts.refused(watched.rule.id, device, at(seconds));
        }
        rollouts.refused(RuleId(Uuid::from_u128(2)), device, at(401));

        let totals = watched.totals(at(500));
        assert_eq!(
            (totals.treated, totals.near, totals.others),
            (counts(3, 1), counts(1, 0), counts(0, 0))
        );
    }

    #[test]
    fn a_device_that_is_refused_or_evicted_is_expected_back_with_any_version() {
        let (rollouts, watched) = watching(Direction::Rollout, None);
        let refused: Vec<u128> = devices(&watched, false).take(4).collect();
        let id = |index: usize| DeviceId::from_uuid(Uuid::from_u128(refused[index]));
        let evicted = subject(refused[3], "a", "2");
        rollouts.closed(&evicted, at(90), false, Some(EndReason::Evicted), at(110));
        (0..3).for_each(|index| rollouts.refused(watched.rule.id, id(index), at(110)));

        rollouts.arrived(id(0));
        rollouts.arrived(id(3));

        // 15 minutes is the rule's hint, which is twice that at most.
        assert_eq!(watched.totals(at(110 + 1_919)).returns, counts(2, 0));
        assert_eq!(watched.totals(at(110 + 1_920)).returns, counts(4, 2));
    }

    #[test]
    fn a_window_continues_until_it_changes() {
        let (rollouts, watched) = watching(Direction::Release, None);
        let device = subject(devices(&watched, true).next().unwrap(), "a", "2");
        rollouts.opened(&device, true, (at(110), WALL));
        let plan = Plan::default();
        let mut rollout = Rollout::begin(Direction::Release, plan, 0, 0, WALL).unwrap();

        rollouts.watch([(watched.rule.clone(), rollout.clone())], at(120));
        assert_eq!(rollouts.watched()[0].totals(at(120)).treated, counts(1, 1));
        rollout.pause(WALL).unwrap();
        rollout.resume(WALL).unwrap();
        rollouts.watch([(watched.rule.clone(), rollout)], at(120));
        assert_eq!(rollouts.watched()[0].totals(at(120)), Totals::default());
        rollouts.watch([], at(130));
        assert!(!rollouts.is_counting());
    }
}
