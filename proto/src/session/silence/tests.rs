use std::sync::Arc;

use rand::{SeedableRng, rngs::SmallRng};

use super::*;
use crate::{
    hello::SessionKind,
    id::SessionId,
    session::{Moment, SessionLimits},
    time::{Instant, WallTime},
};

const SILENT: KernelView = KernelView {
    has_unread: false,
    last_data: None,
    round_trip: Some(Duration::from_millis(200)),
};

fn at(ms: u64) -> Observed {
    Observed::ZERO + Duration::from_millis(ms)
}

/// The monotonic clock is a day ahead.
const AHEAD: Duration = Duration::from_hours(24);

fn moment(observed: Observed) -> Moment {
    let real = Instant::ZERO + AHEAD + observed.saturating_since(Observed::ZERO);
    Moment { real, observed }
}

/// When a session is called next, if it is called on time.
fn due(session: &Session, now: Observed) -> Observed {
    let real = session.poll_timeout(moment(now)).begin();
    Observed::ZERO + real.saturating_since(Instant::ZERO + AHEAD)
}

fn open(heartbeat_seconds: u64, seed: u64) -> Session {
    let limits = SessionLimits {
        heartbeat: Duration::from_secs(heartbeat_seconds),
        ..SessionLimits::default()
    };
    Session::open(
        SessionKind::Plain,
        SessionId(1),
        None,
        Arc::new(limits),
        moment(at(0)),
        WallTime::default(),
        &mut SmallRng::seed_from_u64(seed),
    )
}

/// What a session does when it is called at each of its times.
struct Rig {
    session: Session,
    now: Observed,
    health: u8,
    kernel: KernelView,
    verdict: Verdict,
    /// Everything but pings.
    said: Vec<Action>,
    pings: u32,
}

impl Rig {
    fn new(session: Session) -> Self {
        Self {
            session,
            now: at(0),
            health: 0,
            kernel: SILENT,
            verdict: Verdict::Offline,
            said: Vec::new(),
            pings: 0,
        }
    }

    /// Calls it at its next time, but not before `now`.
    fn call(&mut self) {
        self.now = due(&self.session, self.now).max(self.now);
        self.session.handle_timeout(moment(self.now), self.health);
        self.act();
    }

    fn act(&mut self) {
        while let Some(action) = self.session.poll_action() {
            match action {
                Action::Ping => self.pings += 1,
                Action::AskKernel => {
                    self.session.handle_kernel(self.kernel, self.now);
                }
                Action::AskGroups => {
                    let mut rng = SmallRng::seed_from_u64(1);
                    self.session.handle_verdict(self.verdict, self.now, &mut rng);
                }
                other @ (Action::Text(_)
                | Action::Binary(_)
                | Action::Received(_)
                | Action::Complained(_)
                | Action::Acked(_)
                | Action::RenewToken
                | Action::Silent
                | Action::Suspect
                | Action::HeardAgain
                | Action::Close(_)) => self.said.push(other),
            }
        }
    }

    fn call_until(&mut self, end: Observed) {
        while due(&self.session, self.now) <= end {
            self.call();
        }
        self.now = end;
    }

    /// Calls it until the session ends. Returns when.
    fn end(&mut self) -> Observed {
        while !self.session.is_closing() {
            self.call();
        }
        self.now
    }

    fn hear(&mut self) {
        self.session.handle_control(moment(self.now));
        self.act();
    }
}

fn is_missed(actions: &[Action]) -> bool {
    matches!(actions.last(), Some(Action::Close(Close::HeartbeatMissed { .. })))
}

#[test]
fn dead_device_is_offline_a_few_seconds_after_its_deadline() {
    for (heartbeat, deadline_ms) in [(30, 90_000), (5, 60_000), (60, 180_000), (1, 60_000)] {
        for seed in 0..50 {
            let mut rig = Rig::new(open(heartbeat, seed));
            rig.now = at(900);
            rig.hear();

            let end = rig.end();

            let least = at(900 + deadline_ms);
            let most = least + Duration::from_secs(20);
            assert!(least <= end && end <= most, "{heartbeat} s, {seed}: {end:?}");
            assert_eq!(rig.said.len(), 3, "{:?}", rig.said);
            assert_eq!(rig.said[..2], [Action::Silent, Action::Suspect]);
            assert!(is_missed(&rig.said));
            let silence = rig.session.silence(end);
            assert_eq!(u32::from(silence.pings_unanswered), rig.pings);
            assert!(silence.lasts >= Duration::from_millis(deadline_ms), "{silence:?}");
        }
    }
}

#[test]
fn answer_at_any_moment_ends_the_silence() {
    for heard_ms in (100..95_000).step_by(700) {
        let mut rig = Rig::new(open(30, heard_ms));
        rig.call_until(at(heard_ms));

        rig.hear();
        let was_silent = rig.said.contains(&Action::Silent);
        assert_eq!(rig.said.contains(&Action::HeardAgain), was_silent, "{heard_ms}");

        let end = rig.end();
        let deadline = at(heard_ms + 90_000);
        assert!(
            end >= deadline && end <= deadline + Duration::from_secs(20),
            "{heard_ms}: {end:?}"
        );
    }
}

#[test]
fn device_whose_bytes_lie_unread_in_the_kernel_is_not_silent() {
    let mut rig = Rig::new(open(30, 1));
    rig.kernel.has_unread = true;

    rig.call_until(at(3_600_000));

    assert!(!rig.session.is_closing() && !rig.said.contains(&Action::Suspect));
    rig.kernel.has_unread = false;
    let end = rig.end();
    assert!(end <= at(3_600_000 + 90_000 + 20_000), "{end:?}");
}

#[test]
fn part_of_a_message_counts_and_an_old_one_does_not() {
    let mut rig = Rig::new(open(30, 1));
    rig.kernel.last_data = Some(Duration::from_secs(5));
    rig.call_until(at(600_000));
    assert!(!rig.session.is_closing() && !rig.said.contains(&Action::Suspect));

    // The last byte is the one that was handled last, within the accuracy of both clocks.
    let mut rig = Rig::new(open(30, 1));
    rig.kernel.last_data = Some(Duration::from_millis(89_800));
    assert!(rig.end() <= at(110_000));
}

#[test]
fn slow_path_gives_a_suspect_more_time_within_bounds() {
    let waits = |round_trip: Option<u64>| {
        let mut rig = Rig::new(open(30, 1));
        rig.kernel.round_trip = round_trip.map(Duration::from_millis);
        rig.end().saturating_since(at(90_000)).as_secs()
    };

    assert_eq!(
        [waits(Some(0)), waits(Some(2_000)), waits(Some(60_000)), waits(None)],
        [5, 9, 15, 15]
    );
}

#[test]
fn deadline_is_stretched_while_the_node_is_late_and_no_longer() {
    let end_with = |recovers_at: u64| {
        let mut rig = Rig::new(open(30, 1));
        rig.health = 3;
        while !rig.session.is_closing() {
            if due(&rig.session, rig.now) >= at(recovers_at) {
                rig.health = 0;
            }
            rig.call();
        }
        rig.now.saturating_since(at(0)).as_secs()
    };

    assert!((95..=115).contains(&end_with(60_000)), "{}", end_with(60_000));
    assert!((105..=130).contains(&end_with(100_000)), "{}", end_with(100_000));
    // Four times the deadline, whatever becomes of the node.
    assert!(
        (360..=380).contains(&end_with(u64::MAX / 2)),
        "{}",
        end_with(u64::MAX / 2)
    );
}

#[test]
fn held_device_keeps_its_session_and_is_asked_again_when_it_is_called() {
    let mut rig = Rig::new(open(30, 1));
    rig.verdict = Verdict::Held;
    rig.call_until(at(600_000));
    assert!(!rig.session.is_closing());
    assert!(rig.pings >= 20, "it is pinged on: {}", rig.pings);

    // As the end of the grace does.
    rig.verdict = Verdict::Offline;
    rig.session.handle_timeout(moment(rig.now), 0);
    rig.act();

    assert!(is_missed(&rig.said));
}

#[test]
fn suspect_without_a_verdict_asks_again_each_second() {
    let mut rig = Rig::new(open(30, 1));
    rig.verdict = Verdict::Wait;
    rig.call_until(at(120_000));
    assert!(!rig.session.is_closing());

    rig.verdict = Verdict::Offline;

    assert!(rig.end() <= at(121_100));
}

#[test]
fn held_device_that_is_asked_again_gets_a_ping_and_time_to_answer() {
    let mut rig = Rig::new(open(30, 1));
    rig.verdict = Verdict::Held;
    rig.call_until(at(200_000));
    let pings = rig.pings;
    rig.said.clear();

    rig.verdict = Verdict::AskAgain;
    rig.session.handle_timeout(moment(rig.now), 0);
    rig.act();
    rig.verdict = Verdict::Offline;
    let asked = rig.now;
    let end = rig.end();

    assert_eq!(rig.said[0], Action::Suspect);
    assert!(is_missed(&rig.said) && rig.pings > pings);
    let waited = end.saturating_since(asked).as_secs();
    assert!((5..=15).contains(&waited), "{waited} s");
}

#[test]
fn device_to_which_nothing_can_be_written_is_silent_until_its_deadline() {
    let mut session = open(30, 1);
    session.handle_control(moment(at(10_000)));
    session.handle_stalled(at(30_000));
    assert_eq!(session.poll_silence(), Some(Action::Silent));

    let mut said = Vec::new();
    let mut now = at(30_000);
    while !session.is_closing() {
        now = due(&session, now).max(now);
        session.handle_timeout(moment(now), 0);
        while let Some(action) = session.poll_silence() {
            match &action {
                Action::AskKernel => {
                    session.handle_kernel(SILENT, now);
                }
                Action::AskGroups => session.handle_verdict(Verdict::Offline, now, &mut SmallRng::seed_from_u64(1)),
                Action::Silent | Action::Suspect | Action::HeardAgain | Action::Close(_) => said.push(action),
                other @ (Action::Text(_)
                | Action::Binary(_)
                | Action::Ping
                | Action::Received(_)
                | Action::Complained(_)
                | Action::Acked(_)
                | Action::RenewToken) => panic!("{other:?} can't be written"),
            }
        }
    }

    assert_eq!(said[0], Action::Suspect);
    assert!(is_missed(&said));
    assert!((100..=120).contains(&now.saturating_since(at(0)).as_secs()), "{now:?}");
    let pings = std::iter::from_fn(|| session.poll_action()).filter(|action| *action == Action::Ping);
    assert_eq!(pings.count(), 1, "those that can't go out are one");
    assert_eq!(session.silence(now).pings_unanswered, 1);
}

/// Calls a session on time for five minutes, while only a part of the time is observed.
fn pings_at(observed_per_second: f64, answers: bool) -> (Vec<u64>, bool) {
    let mut session = open(30, 1);
    let mut pings = Vec::new();
    for tenth in 0..3_000_u64 {
        let real = Instant::from_micros(tenth * 100_000) + AHEAD;
        let observed = at(0) + Duration::from_millis(tenth * 100).mul_f64(observed_per_second);
        let now = Moment { real, observed };
        if session.poll_timeout(now).begin() <= real {
            session.handle_timeout(now, 0);
        }
        while let Some(action) = session.poll_action() {
            if action == Action::Ping {
                pings.push(tenth / 10);
            } else if action == Action::AskKernel {
                session.handle_kernel(SILENT, observed);
            }
        }
        if answers && pings.last() == Some(&(tenth / 10)) {
            session.handle_control(now);
        }
    }
    (
        pings,
        session.standing == Standing::Heard || session.standing == Standing::Silent,
    )
}

#[test]
fn pings_go_out_on_time_however_little_is_observed_and_deadlines_do_not() {
    for observed in [0.0, 0.3, 1.0] {
        let (pings, is_in_time) = pings_at(observed, true);
        assert_eq!(pings.len(), 10, "{observed}: {pings:?}");
        assert!(pings.windows(2).all(|pair| pair[1] - pair[0] == 30), "{pings:?}");
        assert!(is_in_time);
    }
    // A deadline of 90 s has not passed where 89 s were observed.
    assert!(pings_at(0.29, false).1);
    assert!(!pings_at(0.35, false).1);
}

#[test]
fn pings_that_were_missed_are_left_out_and_the_phase_stays() {
    for stopped_ms in [5_000_u64, 14_000, 16_000, 29_000, 31_000, 300_000] {
        let mut session = open(30, 1);
        let first = session.poll_timeout(moment(at(0))).begin();
        let now = Moment {
            real: first + Duration::from_millis(stopped_ms),
            observed: at(0),
        };

        session.handle_timeout(now, 0);

        let has_pinged = std::iter::from_fn(|| session.poll_action()).any(|action| action == Action::Ping);
        assert_eq!(has_pinged, stopped_ms <= 15_000, "{stopped_ms}");
        let next = session.poll_timeout(now).begin();
        assert!(
            next > now.real && next <= now.real + Duration::from_secs(30),
            "{stopped_ms}"
        );
        let micros = next.saturating_since(first).as_micros();
        assert_eq!(
            micros % 30_000_000,
            0,
            "{stopped_ms}: its devices are not pinged together"
        );
    }
}

#[test]
fn session_that_stood_still_while_the_clock_ran_gives_its_device_another_chance() {
    for stall_ms in [60_000, 120_000, 3_600_000, 86_400_000] {
        for stalled_at in [1_000, 31_000, 62_000, 89_000] {
            let mut rig = Rig::new(open(30, 1));
            rig.call_until(at(stalled_at));

            rig.now = at(stalled_at + stall_ms);
            rig.call();
            assert!(!rig.session.is_closing(), "{stall_ms} {stalled_at}");
            rig.now = rig.now + Duration::from_secs(20);
            rig.hear();

            let heard = rig.now;
            let end = rig.end();
            assert!(end >= heard + Duration::from_secs(90), "the stall is forgotten");
        }
    }
}
